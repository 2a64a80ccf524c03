"""What every two methods did in one short training, on record, and the page that tells of it.

    python tests/pairs/composition.py            # trains the pairs that are not on record, and writes the page
    python tests/pairs/composition.py Tent PSKD  # trains these two with every other method once more

One method with all others takes about ten seconds. ``make generate`` does the first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from pairs import CONFIGURATIONS, PAIRS, STEPS, outcome

RECORD = Path(__file__).parent / "rejected.json"
PAGE = Path(__file__).parents[2] / "docs" / "composition.md"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Record:
    """Which methods were trained in pairs, and the reason why a pair was rejected; pairs without one train together."""

    methods: frozenset[str]
    rejected: dict[Pair, str]

    @classmethod
    def read(cls) -> Record:
        """Read the record."""
        stored = json.loads(RECORD.read_text())
        return cls(
            frozenset(stored["methods"]), {(a, b): reason for reason, pairs in stored["rejected"].items() for a, b in pairs}
        )

    def write(self) -> None:
        """Write it, pairs of one reason together."""
        reasons: dict[str, list[Pair]] = defaultdict(list)
        for pair, reason in sorted(self.rejected.items()):
            reasons[reason].append(pair)
        lines = [f"  {json.dumps(reason)}: {json.dumps(pairs)}" for reason, pairs in sorted(reasons.items())]
        methods = json.dumps(sorted(self.methods))
        RECORD.write_text(f'{{"methods": {methods},\n "rejected": {{\n' + ",\n".join(lines) + "\n}}\n")

    def renewed(self, methods: Collection[str] = ()) -> Record:
        """Return the record with the pairs of some methods, and of those that it lacks, trained anew."""
        missing = {*methods, *CONFIGURATIONS} - (self.methods - {*methods})
        rejected = {}
        for pair in PAIRS:
            reason = reason_of(pair) if missing & {*pair} else self.rejected.get(pair, "")
            if reason:
                rejected[pair] = reason
        return Record(frozenset(CONFIGURATIONS), rejected)


def reason_of(pair: Pair) -> str:
    """Train a pair and return why it is rejected, with the two methods called A and B so that equal reasons are equal."""
    words = outcome(*pair)
    written = {name: rf"\b({CONFIGURATIONS[name]().name}|{name})\b" for name in pair}
    places = {name: found.start() if (found := re.search(written[name], words)) else len(words) for name in pair}
    for letter, name in zip("AB", sorted(pair, key=places.__getitem__), strict=True):
        words = re.sub(written[name], letter, words)
    return words


def page(record: Record) -> str:
    """The contents of ``docs/composition.md``."""
    rejected: dict[str, list[Pair]] = defaultdict(list)
    for pair, reason in sorted(record.rejected.items()):
        rejected[reason].append(pair)
    count, pairs = len(record.rejected), len(PAIRS)
    lines = [
        "# What goes together",
        "",
        f"Each pair of the {len(record.methods)} methods was trained for {STEPS} steps on a small convolutional network with a",
        "validation loader and Lightning's sanity check, and tested afterwards if one of them adapts; a test repeats it and",
        "compares. Both methods act on all they can.",
        "",
        f"**{pairs - count} of {pairs} pairs train together** and leave a clean module. The other {count} are rejected",
        "when `fit` or `test` begins, with a message that says why:",
        "",
        "| rejected together | the message (A, B: the two methods) |",
        "| --- | --- |",
    ]
    for reason, found in sorted(rejected.items(), key=lambda item: (-len(item[1]), item[0])):
        cell = reason.replace("|", r"\|")
        lines.append(f"| {_grouped(found)} | {cell} |")
    return "\n".join([*lines, "", "Written by `make generate`."]) + "\n"


def _grouped(pairs: Iterable[tuple[str, str]]) -> str:
    """Say which pairs, in as few words as they take."""
    partners: dict[str, set[str]] = defaultdict(set)
    for first, second in pairs:
        partners[first].add(second)
        partners[second].add(first)
    if all(partners[name] == set(partners) - {name} for name in partners) and len(partners) > 2:
        return f"any two of {', '.join(partners)}"
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    left = {name: set(others) for name, others in partners.items()}
    while any(left.values()):
        name = max(left, key=lambda name: len(left[name]))
        others = tuple(sorted(left.pop(name)))
        groups[others].append(name)
        for other in others:
            left[other].discard(name)
    return "; ".join(f"{', '.join(names)} with {', '.join(others)}" for others, names in groups.items())


def main() -> None:
    """Train what is asked for or missing, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="train its pairs once more")
    names = parser.parse_args().methods
    if unknown := [name for name in names if name not in CONFIGURATIONS]:
        parser.error(f"there is no {', '.join(unknown)} in tests/pairs/pairs.py")
    torch.set_num_threads(1)
    record = Record.read().renewed(names)
    record.write()
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
