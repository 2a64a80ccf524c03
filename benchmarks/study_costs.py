"""Measures what a step of every variant of a study costs, in short fits one after the other, and writes it to finished runs.

    python benchmarks/study_costs.py --study deltas_reviews --train-size 640 --threads 1 --output runs/deltas_reviews

The runs of a study are hours apart, beside whatever else the machine does; their times are those of one sitting after this.
"""

from __future__ import annotations

import argparse
import json

import methods
from rich.console import Console
from rich.progress import track

MEASURED = ("step_ms", "memory_mb")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    study, path = methods.begin(args), args.output.with_suffix(".json")
    results = methods.load(path)
    args.epochs = 1
    for variant in track(args.variants or list(results), description="costs", console=Console(stderr=True)):
        rate = study.rates.get(variant, args.lr)
        *_, run = methods.trained(study, variant, 0, rate, args, limit_train_batches=args.steps)
        for each in results[variant].values():
            each |= {name: run[name] for name in MEASURED}
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
