"""Tries methods on families of networks, and writes what came out and ``docs/compatibility/networks.md``.

    python tests/pairs/networks_page.py                       # what is not on record
    python tests/pairs/networks_page.py transformers/llama    # this family once more
    python tests/pairs/networks_page.py --method Tent         # this method once more, on all

``make compatibility`` does the first; all of it takes an hour or two of one core.
"""

from __future__ import annotations

import argparse
import logging
import zlib
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from network_families import Family, answer, family, quiet, smallest, transformers_types
from network_promises import TRIALS, train
from page_parts import counted, paragraph, table
from sweep import Record, sweep
from verdicts import BREAKS, REJECTED, SIGNS, WORKS, Verdict, general, shortened, verdict

LIBRARIES = ("transformers", "timm", "torchvision")
RECORDS = {library: Path(__file__).with_name(f"networks_{library}.json") for library in LIBRARIES}
PAGE = Path(__file__).parents[2] / "docs" / "compatibility" / "networks.md"
LIMIT = 120  # seconds of a processor
_MOST = 5000.0  # a weight that is larger after four steps has diverged


@cache
def _known(name: str) -> Family:
    """A family that can be trained and asked; so what fails later is not the network's own."""
    known = family(name)
    with quiet():
        network = known.build()
        if not answer(network(**known.batch())).pow(2).mean().isfinite():
            raise ValueError("with random weights it answers no finite number")
        answer(network(**known.batch())).pow(2).mean().backward()
        answer(network.eval()(**known.batch()))
    alone = train(known)[0]  # with two samples a network may diverge by itself
    if (largest := max(float(parameter.detach().abs().max()) for parameter in alone.parameters())) > _MOST:
        raise ValueError(f"trained without a method it diverges: a weight of {largest:.0f} after four steps")
    return known


def trial(name: str, method: str) -> Verdict:
    """Try a method on a family; one that cannot be built is no verdict, and words alone say why."""
    try:
        known = _known(name)
    except Exception as error:
        return Verdict("", f"{type(error).__name__}: {error}")
    return verdict(lambda: TRIALS[method](known))


def names(library: str) -> list[str]:
    """Families of a library in an order drawn by lot, so that any of them that were tried first are a fair sample."""
    found = [f"transformers/{kind}" for kind in transformers_types()] if library == "transformers" else smallest(library)
    return sorted(found, key=lambda name: zlib.crc32(name.encode()))


def versions(library: str) -> dict[str, str]:
    """Versions that the outcomes of a library hold for."""
    return {each: version(each).partition("+")[0] for each in ("torch", library)}


def merged() -> Record:
    """The records of all libraries as one."""
    whole = Record(Path())
    for path in RECORDS.values():
        record = Record.read(path)
        whole.versions |= record.versions
        whole.found |= record.found
        whole.unbuilt |= record.unbuilt
    return whole


def page(record: Record) -> str:
    """The page for a record."""
    whole = {name: cells for name, cells in sorted(record.found.items()) if list(cells) == list(TRIALS)}  # others are under way
    kept = Record(record.path, found=whole)
    numbers = Counter(name.partition("/")[0] for name in kept.found)
    lines = [
        "# What works on which network",
        "",
        *paragraph(
            f"{len(kept.found)} families of networks ({numbers['transformers']} of transformers, {numbers['timm']} of timm, "
            f"{numbers['torchvision']} of torchvision), asked of the registries of these libraries "
            "(`tests/pairs/network_families.py`): transformers' classes in tiny configurations, of timm and torchvision the "
            "smallest network of each module, all with random weights and small inputs. Each was trained for four steps with "
            f"every way to grow, prune, mask, skip and adapt, so far: {counted(kept.outcomes)}."
        ),
        "",
        *paragraph(
            "It works when its promise holds in numbers: an operator that keeps the function kept the outputs, or said that it "
            "does not on this network; a cut network answers as the whole one with what was cut silenced; a mask holds its "
            "share or 2:4; a deployed network answers as the one in training; a test-time method's first answer is that of its "
            "batch, and the module is given back. And when what comes out is saved and loaded: by the class itself "
            "(`save_pretrained` and `from_pretrained`, or a strict `load_state_dict`) where the class can express it, by "
            "`load_from_checkpoint` where structure changed; what generates text must generate the same tokens after loading, "
            "and with its cache as without."
        ),
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in record.versions.items())}. Repeat it with",
        "`make compatibility`, which tries what is not on record (`tests/pairs/networks_*.json`).",
        "",
        *table(
            ["network", *TRIALS],
            ([f"`{name}`", *(SIGNS[cells[method].what] for method in TRIALS)] for name, cells in kept.found.items()),
        ),
        "",
        "## What breaks",
        "",
        *table(
            ["network", "method", "message, shortened"],
            ([f"`{name}`", method, shortened(words)] for name, method, words in kept.of(BREAKS)),
        ),
        "",
        "## What is said",
        "",
        *_said(kept.of(REJECTED)),
        "",
        "Beside working, this was said:",
        "",
        *_said(kept.of(WORKS)),
        "",
        "## What was not tried",
        "",
        *table(["network", "reason"], ([f"`{name}`", shortened(words)] for name, words in sorted(record.unbuilt.items()))),
        "",
        "Written by `make compatibility`.",
        "",
    ]
    return "\n".join(lines)


def _said(outcomes: list[tuple[str, str, str]]) -> list[str]:
    messages = Counter((method, general(words)) for _, method, words in outcomes if words)
    rows = ([method, count, shortened(words, 200)] for (method, words), count in sorted(messages.items()))
    return table(["method", "networks", "message, shortened"], rows)


def main() -> None:
    """Try what is asked for or missing, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="library/name, to be tried once more")
    parser.add_argument("--method", choices=TRIALS, help="to be tried once more on all families")
    parser.add_argument("--library", choices=LIBRARIES, help="whose families are tried now; by default all")
    parser.add_argument("--begun", action="store_true", help="only families that are on record")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for library, path in RECORDS.items():
        if asked.page or library != (asked.library or library):
            continue
        record = Record.read(path)
        if record.versions != versions(library):
            record = Record(path, versions(library))
        for name in asked.families:
            record.found.pop(name, None)
            record.unbuilt.pop(name, None)
        for cells in record.found.values():
            cells.pop(asked.method, None)
        mine = [name for name in asked.families if name.startswith(f"{library}/")]
        if not asked.families:
            mine = list(record.found) if asked.begun else [name for name in names(library) if name not in record.unbuilt]
        sweep(record, {name: list(TRIALS) for name in mine}, trial, limit=LIMIT)
    PAGE.write_text(page(merged()))


if __name__ == "__main__":
    main()
