"""Accuracy against measured latency: FTWT, structured pruning, N:M and magnitude pruning at several budgets.

    python benchmarks/pruning_curves.py --networks resnet mobilenet lite0 --seeds 0 1 2 --work pruning
    python benchmarks/pruning_curves.py --clock --work pruning --output docs/evidence/pruning_curves

The first command trains and tests; every run is kept in the work folder, so an interrupted one goes on and several processes
may share the folder with other seeds or networks. The second loads what was trained and times it beside the dense network, in
turns, batch 1, one thread, norms folded: run it when the machine does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from pruning_networks import SETTINGS, Setting, build, data_of, dense, from_dense, keep_memory, kept, spread, tested, trainer
from rich.progress import track
from torch import nn

import lightning_peft
from lightning_peft import FTWT, MagnitudePruning, NMSparsity, StructuredPruning
from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.network.channel_units import channel_units
from lightning_peft_plugins.pruning._ftwt.skipping.clock import paired_times
from lightning_peft_plugins.pruning._ftwt.skipping.deploy import in_fastest_layout
from lightning_peft_plugins.pruning._ftwt.skipping.fold import fold_norms

# What a method is given as its budget, lightest first. FTWT's mass leaves about 75, 55 and 45 % of the operations.
BUDGETS: dict[str, list[Any]] = {
    "FTWT": [0.97, 0.92, 0.85],
    "structured": [0.3, 0.5, 0.7],
    "N:M": ["2:4", "1:4", "1:8"],
    "magnitude": [0.5, 0.75, 0.9],
}
ALL_BUDGETS = ("resnet",)  # other networks get the lightest and the heaviest, to save time
TITLES = {
    "resnet": "narrow ResNet-18, CIFAR-10, 32 px",
    "mobilenet": "narrow MobileNetV2, CIFAR-10, 32 px",
    "lite0": "EfficientNet-Lite0, photos, 128 px",
}
COLOURS = {"dense": "black", "FTWT": "C0", "structured": "C1", "N:M": "C2", "magnitude": "C3"}


def budgets(network: str, name: str) -> list[Any]:
    """What a method is given on a network."""
    return BUDGETS.get(name, ["none"])[:: 1 if network in ALL_BUDGETS else 2]


def method(name: str, budget: Any, setting: Setting) -> Any:
    """The callback of a method at a budget; ``None`` trains on densely."""
    masked = {"targets": "pointwise" if setting.pointwise else "all-weights", "exclude": ["first", "head"]}
    makers: dict[str, Callable[[], Any]] = {
        "dense": lambda: None,
        "FTWT": lambda: FTWT(budget, normalise="standard", strength=0.01, lr_scale=20, cooldown="60%"),
        "structured": lambda: StructuredPruning(budget, "taylor", of="flops", start="5%", end="35%", every="10%", round_to=4),
        "N:M": lambda: NMSparsity(budget, recipe="sr-ste", fine_tune="30%", **masked),
        "magnitude": lambda: MagnitudePruning(budget, end="50%", every="5%", **masked),
    }
    return makers[name]()


def one(network: str, seed: int, name: str, budget: Any, work: Path) -> dict[str, Any]:
    """Prune, train, test and keep one network, unless that is done."""
    path = work / f"{network}-{seed}-{name}-{budget}.json".replace(":", "-")
    if path.exists():
        return json.loads(path.read_text())
    setting = SETTINGS[network]
    start = dense(network, seed, work)
    seed_everything(seed, verbose=False)
    rate: tuple[Any, ...] = (setting.ftwt_lr, "adamw") if name == "FTWT" else (setting.pruned_lr,)
    module, callback = from_dense(network, start, *rate), method(name, budget, setting)
    runner = trainer(setting.pruned_epochs, [] if callback is None else [callback], setting.precision)
    began = time.perf_counter()
    runner.fit(module, datamodule=data_of(network))
    seconds = time.perf_counter() - began
    runner.save_checkpoint(path.with_suffix(".ckpt"))
    if isinstance(callback, FTWT):
        # Proved to compute what the trained network computes with its predictors' masks.
        module.model = callback.deploy(module, samples_of(network), calibrate=False).network
    weights = [layer.weight for layer in module.model.modules() if isinstance(layer, nn.Conv2d)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
    found = {"network": network, "seed": seed, "method": name, "budget": budget, "seconds": seconds, "zeros": zeros}
    return kept(path, found | tested(module, network))


def samples_of(network: str) -> Any:
    """Sixteen images that were not trained on."""
    data: Any = data_of(network)
    data.setup("fit")
    return torch.cat([images for images, _ in data.val_dataloader()])[:16]


def deployable(network: nn.Module, sample: Any) -> nn.Module:
    """Norms folded, in the memory layout that is faster here."""
    plain = copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format)
    fold_norms(plain, channel_units(plain))
    return in_fastest_layout(plain, sample)


@torch.inference_mode()
def clock(found: dict[str, Any], work: Path) -> dict[str, Any]:
    """Add the time of a trained network beside the dense one's, and the operations it executes."""
    network, seed, name = found["network"], found["seed"], found["method"]
    path = work / f"{network}-{seed}-{name}-{found['budget']}.ckpt".replace(":", "-")
    samples = list(samples_of(network).split(1))
    module = build(network, SETTINGS[network].pruned_lr)
    if name == "FTWT":
        module = lightning_peft.load_from_checkpoint(type(module), path)
        deployed = FTWT(found["budget"]).deploy(module, torch.cat(samples), checkpoint=path)
        times, flops = deployed.times, deployed.flops
    else:
        before = lightning_peft.load_from_checkpoint(type(module), work / f"{network}-{seed}-dense.ckpt")
        after = lightning_peft.load_from_checkpoint(type(module), path)
        first, second = deployable(before.model, samples[0]), deployable(after.model, samples[0])
        times = paired_times(first, second, samples, runs=32)
        counts = []
        for each in (first, second):
            with FlopCount() as count:
                each(samples[0])
            counts.append(count.total)
        flops = counts[1] / counts[0]
    return found | {
        "flops": flops,
        "speedup": [times.low, times.ratio, times.high],
        "ms": [1e3 * times.first, 1e3 * times.second],
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel a network: a dot a seed, a line through the means of a method."""
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(run["network"] for run in runs))
    figure, axes = plt.subplots(1, len(networks), figsize=(5 * len(networks), 4.2), layout="constrained", squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        for name, colour in COLOURS.items():
            groups: dict[str, list[tuple[float, float]]] = {}
            for run in runs:
                if (run["network"], run["method"]) == (network, name):
                    groups.setdefault(str(run["budget"]), []).append((1 / run["speedup"][1], 100 * run["accuracy"]))
            if not groups:
                continue
            for points in groups.values():
                axis.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.35, markeredgewidth=0)
            means = [[statistics.mean(values) for values in zip(*points, strict=True)] for points in groups.values()]
            axis.plot(*zip(*means, strict=True), "-s", color=colour, markersize=5, label=name)
            if name == "dense":
                axis.axhline(means[0][1], color="black", linewidth=0.8, linestyle=":")
        axis.set_title(TITLES[network], fontsize=11)
        axis.set_xlabel("time of one image, share of dense (measured)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, lowest and highest in brackets."""
    head = ["network", "method", "budget", "seeds", "accuracy, %", "ECE, %", "zeros, %", "operations, %", "speed-up"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["network"], run["method"], str(run["budget"])), []).append(run)

    lines = [f"| {' | '.join(head)} |", "|-" * len(head) + "|"]
    for key, group in groups.items():
        columns = [
            spread([100 * run["accuracy"] for run in group], 1),
            spread([100 * run["calibration_error"] for run in group], 1),
            f"{100 * statistics.mean(run['zeros'] for run in group):.0f}",
            f"{100 * statistics.mean(run['flops'] for run in group):.0f}",
            spread([run["speedup"][1] for run in group], 2),
        ]
        lines.append(f"| {' | '.join([*key, str(len(group)), *columns])} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", choices=["dense", *BUDGETS], default=["dense", *BUDGETS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("pruning"))
    parser.add_argument("--clock", action="store_true", help="time what is trained")
    parser.add_argument("--output", type=Path, default=Path("docs/evidence/pruning_curves"))
    args = parser.parse_args()
    keep_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    todo = [
        (network, seed, name, budget)
        for network in args.networks
        for seed in args.seeds
        for name in args.methods
        for budget in budgets(network, name)
    ]
    if not args.clock:
        for each in track(todo, description="training"):
            print(json.dumps(one(*each, args.work)), flush=True)
        return
    paths = [args.work / f"{'-'.join(map(str, each))}.json".replace(":", "-") for each in todo]
    runs = [clock(json.loads(path.read_text()), args.work) for path in track(paths, description="timing") if path.exists()]
    args.output.with_suffix(".json").write_text(json.dumps(runs, indent=1))
    plot(runs, args.output.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
