"""Digests of what every method trains and answers, to hold a change of the code's shape against: nothing may move by a bit.

    python tests/pairs/digests.py before.json     # before the change
    python tests/pairs/digests.py before.json     # after it: prints what differs, and fails

Each method trains together with the regularisers that go with it, on the network of the pairs. Digests hold on the machine
and the torch they were taken with, so they are not in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pairs import CONFIGURATIONS, outcome, run
from torch import Tensor

PARTNERS = ("WeightCompander", "PSKD")


def company(name: str) -> list[str]:
    """The method and every partner that all before it accept."""
    names = [name]
    for partner in PARTNERS:
        if partner not in names and not outcome(*sorted([*names, partner])):
            names.append(partner)
    return names


def digest(names: list[str]) -> str:
    """SHA-256 over the weights, the optimizers' state and the answers of one run."""
    runner, module = run(*(CONFIGURATIONS[name]() for name in names))
    found = hashlib.sha256()
    states = [optimizer.state_dict() for optimizer in runner.optimizers]
    for key, value in leaves({"weights": dict(module.state_dict()), "optimizers": states, "answers": module.answers}):
        found.update(f"{key} {value if not isinstance(value, Tensor) else (tuple(value.shape), value.dtype)}".encode())
        if isinstance(value, Tensor):
            found.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts and lists that is neither, with its path."""
    if isinstance(value, (dict, list, tuple)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, f"{path}/{key}")
    else:
        yield path, value


def main() -> None:
    """Write the table, or compare with the one that is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path, help="written if it is not there, else compared with")
    path = parser.parse_args().table
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = {}
    for name in CONFIGURATIONS:
        names = company(name)
        table[name] = f"{'+'.join(names)} {digest(names)}"
    if not path.exists():
        path.write_text(json.dumps(table, indent=1))
        print(f"{len(table)} digests written")
        return
    before = json.loads(path.read_text())
    moved = [name for name in {**before, **table} if before.get(name) != table.get(name)]
    for name in moved:
        print(f"{name}: {before.get(name)} -> {table.get(name)}")
    print(f"{len(table) - len(moved)} of {len(table)} as before")
    sys.exit(bool(moved))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
