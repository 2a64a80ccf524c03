"""Tries every method beside every feature of a Trainer, and writes ``docs/compatibility/features.md`` (``make compatibility``).

    python tests/pairs/features_page.py               # what is not on record
    python tests/pairs/features_page.py Tent          # this method once more

First each method beside each feature alone; then combinations, one feature of each factor, in which every two features meet
that Lightning lets meet, with the methods in turn. All of it takes ten minutes of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
from collections import Counter
from pathlib import Path

import torch
from covering import Pair, covering, pairs_of
from feature_outcomes import combined, outcome, plain, smallest
from page_parts import counted, paragraph, table
from pairs import CONFIGURATIONS
from sweep import Record, sweep
from trainer_features import BY_NAME, factors
from verdicts import BREAKS, REJECTED, SIGNS, WORKS, Verdict, general, shortened

HERE = Path(__file__).parent
ALONE, TOGETHER = HERE / "features.json", HERE / "feature_pairs.json"
PAGE = HERE.parents[1] / "docs" / "compatibility" / "features.md"
LIMIT = 120  # seconds of a processor
_JOINED = " + "


def quietly(function: object, *args: object) -> Verdict:
    """Run a trial without what progress bars and summaries print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)  # type: ignore[operator, no-any-return]


def alone(feature: str, method: str) -> Verdict:
    """Try a method beside one feature."""
    return quietly(outcome, (feature,), method)


def together(row: str, method: str) -> Verdict:
    """Try a method beside a combination; where it does not work, beside as few features of it as make it so."""
    names = row.split(_JOINED)
    found = quietly(outcome, names, method)
    if not found.what:
        return Verdict("", _refused_by_lightning(names))
    if found.what == WORKS:
        return found
    fewest, found = quietly(smallest, names, method)  # type: ignore[misc]
    return Verdict(found.what, f"[{_JOINED.join(fewest)}] {found.words}")


def _refused_by_lightning(names: list[str]) -> str:
    """The two features that Lightning does not take together, without any method."""
    defaults = set(combined(()).values())
    for pair in itertools.combinations([name for name in names if name not in defaults], 2):
        if isinstance(plain(pair), Exception):
            return _JOINED.join(pair)
    return ""


def _impossible(record: Record) -> set[Pair]:
    return {frozenset(pair.split(_JOINED)) for pair in record.unbuilt.values() if pair}


def rows(record: Record) -> dict[str, list[str]]:
    """Combinations that are to be tried, with the methods for each."""
    methods = list(CONFIGURATIONS)
    found = {}
    table = factors()
    table["profiler"] = [name for name in table["profiler"] if name != "PyTorch profiler"]  # twice in a process it may crash
    for number, row in enumerate(covering(table, _impossible(record))):
        defaults = set(combined(()).values())
        name = _JOINED.join(value for value in row.values() if value not in defaults)
        if name and name not in record.unbuilt:
            found[name] = [methods[number % len(methods)]]
    return found


def cover(record: Record) -> None:
    """Try combinations until every pair that Lightning takes has met."""
    while True:
        before = len(record.unbuilt)
        wanted = rows(record)
        record.found = {name: cells for name, cells in record.found.items() if name in wanted}
        sweep(record, wanted, together, limit=LIMIT)
        if len(record.unbuilt) == before:
            return


def page(single: Record, pairs: Record) -> str:
    """The page for both records."""
    methods = list(CONFIGURATIONS)
    said = Counter((name, general(words)) for name, _, words in single.of(REJECTED))
    return "\n".join(
        [
            "# What works beside which feature of a Trainer",
            "",
            *_introduction(single, pairs),
            "",
            *table(
                ["feature", "kind", *methods],
                (
                    [name, BY_NAME[name].factor, *(SIGNS[single.found[name][method].what] for method in methods)]
                    for name in BY_NAME
                    if name in single.found
                ),
            ),
            "",
            "## What breaks",
            "",
            *table(
                ["features", "method", "message, shortened"],
                ([name, method, shortened(words)] for name, method, words in single.of(BREAKS) + pairs.of(BREAKS)),
            ),
            "",
            "## What is said",
            "",
            *table(
                ["feature", "methods", "message, shortened"],
                ([name, count, shortened(words, 200)] for (name, words), count in sorted(said.items())),
            ),
            "",
            "Written by `make compatibility`, which tries what is not on record (`tests/pairs/features.json`,",
            "`tests/pairs/feature_pairs.json`).",
            "",
        ]
    )


def _introduction(single: Record, pairs: Record) -> list[str]:
    waiting = [name for values in factors().values() for name in values if name not in single.found]
    met: set[Pair] = set().union(*(pairs_of(combined(name.split(_JOINED))) for name in pairs.found))
    paragraphs = [
        f"Each of {len(CONFIGURATIONS)} methods was trained beside each of {len(single.found)} features of Lightning's "
        "Trainer, one at a time, on the small convolutional network of the pairs: lengths, precisions (16-mixed with a "
        "gradient scaler, on the CPU), ways of optimising, validation, logging, profilers, switches, Lightning's callbacks, "
        "what follows the fit, and `pytorch_lightning`. What adapts is tested afterwards under the same features. "
        f"{counted(single.outcomes)}.",
        f"Not tried yet: {', '.join(waiting)}." if waiting else "",
        f"Then in {len(pairs.found)} combinations, with one feature of each kind, in which {len(met)} pairs of features "
        f"meet, with the methods in turn: {counted(pairs.outcomes)}. Lightning alone refuses {len(_impossible(pairs))} pairs."
        if pairs.found
        else "Combinations of features, in which every two of them meet, are tried by `make compatibility` too.",
        "It works when the training makes as many steps as without the method, logs what was logged, ends with finite weights, "
        "leaves nothing on the module, and either trains other weights than without the method or says why not.",
    ]
    return "\n\n".join("\n".join(paragraph(each)) for each in paragraphs if each).split("\n")


def main() -> None:
    """Try what is asked for or missing, and write the records and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="tried once more beside every feature")
    parser.add_argument("--part", choices=("alone", "together"), help="what is tried now; by default both")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    asked = parser.parse_args()
    if unknown := [name for name in asked.methods if name not in CONFIGURATIONS]:
        parser.error(f"there is no {', '.join(unknown)} in tests/pairs/pairs.py")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    single, pairs = Record.read(ALONE), Record.read(TOGETHER)
    if not asked.page:
        for record in (single, pairs):
            for cells in record.found.values():
                for method in asked.methods:
                    cells.pop(method, None)
        names = [name for values in factors().values() for name in values]
        if asked.part != "together":
            sweep(single, {name: list(CONFIGURATIONS) for name in names}, alone, limit=LIMIT)
        if asked.part != "alone":
            cover(pairs)
    PAGE.write_text(page(single, pairs))


if __name__ == "__main__":
    main()
