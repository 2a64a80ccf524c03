"""What a method costs: the ratio of a training step with it to a plain Lightning step, measured in turn in one run.

    python benchmarks/overhead.py --output docs/evidence/overhead

Every round trains each variant for a few steps from the same weights; the ratio is taken round by round against the plain step
of the same round, and its median is reported, so a drifting machine does not move it.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PSKD, Lane, Method, NMSparsity, WeightCompander

BARS = {"hub": 1.01, "PSKD": 1.05, "WeightCompander": 1.10, "NMSparsity": 1.10, "all three": 1.20}
MODELS = {"vit_tiny": ("vit_tiny_patch16_224", "all-linear"), "efficientnet_lite0": ("tf_efficientnet_lite0", "pointwise")}


class Nothing(Method):
    """A method that does nothing: what is left is the hub."""

    lane = Lane.REPORT


class Classifier(LightningModule):
    """A plain classifier."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=100)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class StepClock(Callback):
    """Times from one batch start to the next, so that every hook and the data loading between them count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.marks: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(self.clock())

    def step_seconds(self, skip: int) -> float:
        """Median step time without the first ``skip`` steps."""
        times = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return statistics.median(times[skip:])


def variants(targets: str) -> dict[str, Callable[[], list[Callback]]]:
    """Callbacks of every variant, built anew for every run."""
    # Binary masks from the first step: the dearest phase, a mask chosen in every forward pass.
    sparsity = lambda: NMSparsity("2:4", recipe="sr-ste", targets=targets)  # noqa: E731
    compander = lambda: WeightCompander(targets=targets, exclude=["first", "head"])  # noqa: E731
    return {
        "plain": list,
        "hub": lambda: [Nothing()],
        "PSKD": lambda: [PSKD()],
        "WeightCompander": lambda: [compander()],
        "NMSparsity": lambda: [sparsity()],
        "all three": lambda: [sparsity(), compander(), PSKD()],
    }


def run_once(model: str, callbacks: list[Callback], args: argparse.Namespace, device: str) -> float:
    """Train a few steps and return the median step time in seconds."""
    torch.manual_seed(0)
    size = args.batch_size * (args.steps + args.warmup + 1)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size).repeat(args.steps + args.warmup + 1, 1, 1, 1)
    data = TensorDataset(images, torch.arange(size) % 100)
    clock = StepClock(time.process_time if args.cpu_time else time.perf_counter)
    # Epochs, not steps: PSKD's memory is in use from the second epoch on.
    trainer = Trainer(
        max_epochs=2,
        accelerator=device,
        devices=1,
        callbacks=[clock, *callbacks],
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model), DataLoader(data, batch_size=args.batch_size, shuffle=True))
    return clock.step_seconds(skip=args.steps + args.warmup + 1 + args.warmup)


def measure(name: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure all variants of one model in turn."""
    model, targets = MODELS[name]
    chosen = variants(targets)
    seconds: dict[str, list[float]] = {variant: [] for variant in chosen}
    for _ in track(range(args.rounds), description=name, console=Console(stderr=True)):
        for variant, callbacks in chosen.items():
            seconds[variant].append(run_once(model, callbacks(), args, device))
    rows = {}
    for variant, times in seconds.items():
        ratios = [time / plain for time, plain in zip(times, seconds["plain"], strict=True)]
        rows[variant] = {
            "ms": 1000 * statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "bar": BARS.get(variant),
        }
    return rows


def markdown(results: dict[str, Any], about: dict[str, Any]) -> str:
    """Render the results."""
    lines = ["# Overhead of a method per training step", "", f"`python benchmarks/overhead.py`: {about}", ""]
    for model, rows in results.items():
        lines += [f"## {model}", "", "| variant | step, ms | ratio to plain | min to max | bar |", "|-|-|-|-|-|"]
        for variant, row in rows.items():
            bar = "" if row["bar"] is None else f"<= {row['bar']:.2f}"
            spread = f"{row['ratio_min']:.3f} to {row['ratio_max']:.3f}"
            lines.append(f"| {variant} | {row['ms']:.1f} | {row['ratio']:.3f} | {spread} | {bar} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, steadier than wall time on a shared machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads",
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
        "batch": args.batch_size,
        "image": args.image_size,
        "precision": args.precision,
        "clock": "processor time" if args.cpu_time else "wall time",
        "rounds": args.rounds,
        "steps per round": args.steps,
    }
    results = {name: measure(name, args, device) for name in args.models}
    for model, rows in results.items():
        table = Table("variant", "step, ms", "ratio", "min", "max", "bar", title=model)
        for variant, row in rows.items():
            cells = [
                f"{row['ms']:.1f}",
                *(f"{row[key]:.3f}" for key in ("ratio", "ratio_min", "ratio_max")),
                str(row["bar"] or ""),
            ]
            table.add_row(variant, *cells)
        Console().print(table)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))
        args.output.with_suffix(".md").write_text(markdown(results, about) + "\n")


if __name__ == "__main__":
    main()
