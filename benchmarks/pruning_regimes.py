"""The same masker on networks that were trained too little, enough and too long (Zhou et al., ICML 2023).

    python benchmarks/pruning_regimes.py --seeds 0 1 2 --work pruning --output docs/evidence/pruning_regimes

The narrow ResNet of `pruning_networks.py` on 1,500 images of CIFAR-10, few enough to be learned by heart in the longest of
the trainings. Each network is pruned once by magnitude, all layers together, and tested as it is and after a short training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import pruning_networks
import torch
from lightning.pytorch import seed_everything
from pruning_networks import dense, from_dense, kept, spread, tested, trainer
from rich.progress import track

from lightning_peft import MagnitudePruning

REGIMES = {"too little": 3, "enough": 20, "too long": 80}
AMOUNTS = (0.0, 0.75, 0.9)
EPOCHS, LR = 4, 0.02


def one(regime: str, seed: int, amount: float, work: Path) -> dict[str, Any]:
    """Prune and test the network of a regime, unless that is done."""
    path = work / f"regime-{seed}-{REGIMES[regime]}-{amount}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = dense("resnet", seed, work, REGIMES[regime])
    found: dict[str, Any] = {"regime": regime, "seed": seed, "amount": amount}
    for name, epochs, lr in (("pruned", 1, 0.0), ("trained", EPOCHS, LR)):
        seed_everything(seed, verbose=False)
        module = from_dense("resnet", start, lr)
        masker = [MagnitudePruning(amount, start=0, end=None)] if amount else []
        if name == "pruned":
            # One step at a learning rate of zero: the mask is in place, and nothing was trained.
            trainer(1, masker, limit_train_batches=1).fit(module, datamodule=pruning_networks.data_of("resnet"))
            module.load_state_dict(_statistics(start), strict=False)
        else:
            trainer(epochs, masker, "bf16-mixed").fit(module, datamodule=pruning_networks.data_of("resnet"))
        found |= {f"{name}_{key}": value for key, value in tested(module, "resnet").items()}
    return kept(path, found)


def _statistics(start: Path) -> dict[str, torch.Tensor]:
    """What the step changed after all: the running statistics of norms."""
    values: dict[str, torch.Tensor] = torch.load(start, weights_only=True)["state_dict"]
    return {name: value for name, value in values.items() if "running_" in name or "num_batches" in name}


def table(runs: list[dict[str, Any]]) -> str:
    """Accuracy by amount, means over seeds, lowest and highest in brackets."""
    lines = ["| dense training | pruned | accuracy at once, % | after 4 epochs, % | ECE then, % |", "|-|-|-|-|-|"]
    for regime, epochs in REGIMES.items():
        for amount in AMOUNTS:
            group = [run for run in runs if (run["regime"], run["amount"]) == (regime, amount)]
            cells = []
            for key in ("pruned_accuracy", "trained_accuracy", "trained_calibration_error"):
                values = [100 * run[key] for run in group]
                cells.append(spread(values, 1))
            lines.append(f"| {regime}: {epochs} epochs | {amount:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the amount, at once and after training."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    panels = (("pruned_accuracy", "pruned, not trained after it"), ("trained_accuracy", f"{EPOCHS} epochs after it"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for number, (regime, epochs) in enumerate(REGIMES.items()):
            groups = [
                [100 * run[key] for run in runs if (run["regime"], run["amount"]) == (regime, amount)] for amount in AMOUNTS
            ]
            for amount, values in zip(AMOUNTS, groups, strict=True):
                axis.plot([100 * amount] * len(values), values, "o", color=f"C{number}", alpha=0.35, markeredgewidth=0)
            means = [statistics.mean(values) for values in groups]
            axis.plot([100 * amount for amount in AMOUNTS], means, color=f"C{number}", label=f"{regime}: {epochs} epochs")
        axis.set_title(title)
        axis.set_xlabel("weights pruned, %")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("pruning"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work / "regimes"
    work.mkdir(parents=True, exist_ok=True)
    pruning_networks.TRAIN_IMAGES, pruning_networks.TEST_IMAGES = 1_500, 2_000
    todo = [(regime, seed, amount) for seed in args.seeds for regime in REGIMES for amount in AMOUNTS]
    runs = [one(*each, work) for each in track(todo, description="regimes")]
    print(table(runs))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(runs, indent=1))
        plot(runs, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
