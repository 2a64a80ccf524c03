"""Chooses a learning rate for each variant of a study by the validation data of one training each, on a seed of its own.

    python benchmarks/rates.py --study deltas_stories --epochs 1 --train-size 16384 --threads 1 --output runs/rates

The walk begins at ``--lr``, or at the best rate of those that OUTPUT.json has, and goes on in steps of the root of ten, in the
direction that is better, until a step is worse.
What was tried is kept in OUTPUT.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import methods
from rich.console import Console
from rich.progress import track

SEED = 100
METRICS = {"val/accuracy": -1, "val/loss": 1}
"""The first of these that there is says what is best, by its smallest value times the sign."""


def walk(tried: dict[float, float], evaluate: Callable[[float], float], first: float) -> float:
    """Find the rate of the smallest value by steps of half a decade from the first, and keep what was tried.

    Args:
        tried: Values by rate, known ones and those that are added.
        evaluate: Value of a rate.
        first: Where the walk begins.

    Example:
        >>> walk({}, lambda rate: abs(math.log10(rate) + 2), 1e-3)
        0.01
    """

    def value(halves: int) -> float:
        rate = rate_at(halves)
        if rate not in tried:
            tried[rate] = evaluate(rate)
        return tried[rate] if math.isfinite(tried[rate]) else math.inf

    at = round(2 * math.log10(first))
    for direction in (1, -1):
        moved = False
        while value(at + direction) < value(at):
            at, moved = at + direction, True
        if moved:
            break
    return rate_at(at)


def rate_at(halves: int) -> float:
    """A power of the root of ten, to one digit.

    Example:
        >>> rate_at(-5), rate_at(-6)
        (0.003, 0.001)
    """
    return float(f"{10 ** (halves / 2):.0e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods.add_arguments(parser)
    args = parser.parse_args()
    study, path = methods.begin(args), args.output.with_suffix(".json")
    found = read(path)

    def evaluate(variant: str, rate: float) -> float:
        trainer, model, data, _, _ = methods.trained(study, variant, SEED, rate, args)
        trainer.limit_val_batches = 1.0
        metrics = trainer.validate(model, datamodule=data, verbose=False)[0]
        name = next(name for name in METRICS if name in metrics)
        return METRICS[name] * metrics[name]

    for variant in track(args.variants or list(study.variants), description="rates", console=Console(stderr=True)):
        tried = found.setdefault(variant, {})
        first = min(tried, key=tried.__getitem__) if tried else args.lr
        best = walk(tried, lambda rate, variant=variant: evaluate(variant, rate), first)
        path.write_text(json.dumps(found, indent=1))
        print(f"{variant}: {best:g} of {', '.join(f'{rate:g} {value:.4g}' for rate, value in sorted(tried.items()))}")


def read(path: Path) -> dict[str, dict[float, float]]:
    """What was tried before, but rates that were chosen by hand and have no value on record."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return {
        variant: {float(rate): value for rate, value in tried.items() if value is not None} for variant, tried in found.items()
    }


if __name__ == "__main__":
    main()
