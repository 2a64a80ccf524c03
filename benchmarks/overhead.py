"""What a method costs: the ratio of a training step with it to a plain Lightning step, measured side by side in one run.

    python benchmarks/overhead.py --output docs/evidence/overhead
    python benchmarks/overhead.py --set pruning --output docs/evidence/pruning_overhead

Every variant is a `Trainer.fit` in a process of its own, and all of them are in flight at once: a baton goes round, and each
variant takes one step when it holds it. The ratio is taken to the plain step of the same round, a second or so away, so that a
machine whose speed drifts moves both; the order changes from round to round. Reported is the median of the ratios, with a
bootstrap interval. (Threads instead of processes would share one OpenMP runtime, which then slows every small operation.)
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import GBLM, PSKD, BlockPruning, Lane, MaskedPruning, Method, NMSparsity, WeightCompander

BARS = {"hub": 1.01, "PSKD": 1.05, "WeightCompander": 1.10, "NMSparsity": 1.10, "all three": 1.20}
RIVALS = {"MaskedPruning": "Lightning ModelPruning"}  # also compared with each other, round by round
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


def quiet() -> None:
    """Silence what Lightning says at every start."""
    warnings.filterwarnings("ignore")
    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}").setLevel(logging.ERROR)


def now(clock: Callable[[], float] = time.perf_counter) -> float:
    """What a clock says when a GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


class Baton(Callback):
    """Holds its `Trainer` back at every batch start until the other end of the pipe gives leave for its next turn.

    What it sends is the seconds of a step of the turn before, from one batch start to the next, so that every hook and the data
    loading between them count.

    Args:
        pipe: The other end gives leave, and takes the seconds.
        clock: Tells seconds.
        steps: Steps of a turn. The first of several is not timed: it finds the caches as the other variants left them.
    """

    def __init__(self, pipe: Connection, clock: Callable[[], float], steps: int = 1) -> None:
        self.pipe, self.clock, self.steps = pipe, clock, steps
        self.started: float | None = None
        self.left = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.left -= 1
        if self.left > 0:
            if self.left == self.steps - 1:
                self.started = self._now()
            return
        timed = max(self.steps - 1, 1)
        self.pipe.send(None if self.started is None else (self._now() - self.started) / timed)
        self.pipe.recv()
        self.left, self.started = self.steps, self._now()

    def _now(self) -> float:
        return now(self.clock)


def variants(targets: str) -> dict[str, Callable[[], list[Callback]]]:
    """Callbacks of every variant, built anew for every run."""
    # Binary masks from the first step: the dearest phase, a mask chosen in every forward pass.
    sparsity = partial(NMSparsity, "2:4", recipe="sr-ste", targets=targets)
    compander = partial(WeightCompander, targets=targets, exclude=["first", "head"])
    return {
        "plain": list,
        "hub": lambda: [Nothing()],
        "PSKD": lambda: [PSKD()],
        "WeightCompander": lambda: [compander()],
        "NMSparsity": lambda: [sparsity()],
        "all three": lambda: [sparsity(), compander(), PSKD()],
    }


def pruning(targets: str) -> dict[str, Callable[[], list[Callback]]]:
    """Masks of half of all weights, beside Lightning's own, and a score that watches every input and gradient."""
    whole = {"targets": targets, "exclude": ()}
    theirs = {"use_global_unstructured": True, "make_pruning_permanent": False, "parameter_names": ["weight"]}
    return {
        "plain": list,
        # Both prune when the warm-up is over. Pruned before the first step, Adam's second moments would be exact zeros, whose
        # square roots take MKL thirty times as long: a cost of zeros, not of a mask.
        "MaskedPruning": lambda: [MaskedPruning(0.5, start="1ep", **whole)],
        "GBLM, watching": lambda: [GBLM(0.5, start=100_000, every=100_000, **whole)],
        "BlockPruning, watching": lambda: [BlockPruning(1, start=100_000, every=100_000)],
        "Lightning ModelPruning": lambda: [
            ModelPruning("l1_unstructured", amount=0.5, apply_pruning=lambda epoch: epoch == 0, **theirs)
        ],
    }


SETS = {"methods": variants, "pruning": pruning}


def fit(name: str, variant: str, pipe: Connection, args: argparse.Namespace, device: str) -> None:
    """Train in this process, a step at a time."""
    quiet()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, targets = MODELS[name]
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size).repeat(args.warmup, 1, 1, 1)
    data = TensorDataset(images, torch.arange(len(images)) % 100)
    baton = Baton(pipe, time.process_time if args.cpu_time else time.perf_counter)
    trainer = Trainer(
        # The first epoch is the warm-up: PSKD's memory is in use from the second on.
        max_epochs=2 + args.rounds // args.warmup,
        accelerator=device,
        devices=1,
        callbacks=[baton, *SETS[args.set](targets)[variant]()],
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model), DataLoader(data, batch_size=args.batch_size, shuffle=True))


def interleave(
    name: str, chosen: Sequence[str], args: argparse.Namespace, train: Callable[..., None], *more: Any
) -> dict[str, list[float]]:
    """Train all variants at once, one step of one variant at a time; return the seconds of every counted step.

    Args:
        name: What is trained.
        chosen: The variants.
        args: With ``warmup`` and ``rounds``.
        train: Called in a process of its own for each variant, with its name, the variant, a pipe for its :class:`Baton`, and
            ``args``.
        *more: Handed on to ``train``.
    """
    # glibc hands large activations back to the kernel or keeps them, as it happens to have learnt in this process: 15 % of an
    # EfficientNet step between processes that do the same. Here all of them keep their memory.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
    context = multiprocessing.get_context("spawn")
    pipes, runs = {}, []
    seconds: dict[str, list[float]] = {variant: [] for variant in chosen}
    try:
        for variant in chosen:
            pipes[variant], end = context.Pipe()
            runs.append(context.Process(target=train, args=(name, variant, end, args, *more)))
            runs[-1].start()
            end.close()  # a run that dies is then seen as the end of its pipe
            pipes[variant].recv()
        for step in track(range(args.warmup + args.rounds), description=name, console=Console(stderr=True)):
            for place in range(len(chosen)):
                variant = chosen[(place + step) % len(chosen)]
                pipes[variant].send(None)
                seconds[variant].append(pipes[variant].recv())
    finally:
        for run in runs:
            run.kill()
    return {variant: times[args.warmup :] for variant, times in seconds.items()}


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a median."""
    samples = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(values), (4000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = samples[draws].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def measure(name: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure all variants of one model side by side."""
    seconds = interleave(name, list(SETS[args.set](MODELS[name][1])), args, fit, device)
    rows = {}
    for variant, times in seconds.items():
        ratio, interval = compared(times, seconds["plain"])
        bar = BARS.get(variant)
        rows[variant] = {"ms": 1000 * statistics.median(times), "ratio": ratio, "interval": interval, "bar": bar}
        if variant in RIVALS:
            rows[variant]["rival"] = (RIVALS[variant], *compared(times, seconds[RIVALS[variant]]))
    return rows


def compared(times: list[float], others: list[float]) -> tuple[float, tuple[float, float]]:
    """Median ratio of times of the same rounds, and its interval."""
    ratios = [time / other for time, other in zip(times, others, strict=True)]
    return statistics.median(ratios), median_interval(ratios)


def markdown(results: dict[str, Any], about: dict[str, Any]) -> str:
    """Render the results."""
    lines = ["# Overhead of a method per training step", "", f"`python benchmarks/overhead.py`: {about}", ""]
    for model, rows in results.items():
        lines += [f"## {model}", "", "| variant | step, ms | ratio to plain | 95 % interval | bar |", "|-|-|-|-|-|"]
        for variant, row in rows.items():
            bar = "" if row["bar"] is None else f"<= {row['bar']:.2f}"
            spread = "{:.3f} to {:.3f}".format(*row["interval"])
            lines.append(f"| {variant} | {row['ms']:.1f} | {row['ratio']:.3f} | {spread} | {bar} |")
        lines.append("")
        for variant, (rival, ratio, interval) in ((name, row["rival"]) for name, row in rows.items() if "rival" in row):
            lines += ["{} to {}: {:.3f} ({:.3f} to {:.3f}).".format(variant, rival, ratio, *interval), ""]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--set", choices=SETS, default="methods", help="what is compared with the plain step")
    parser.add_argument("--rounds", type=int, default=40, help="counted steps of every variant")
    parser.add_argument("--warmup", type=int, default=5, help="steps of every variant before, and the length of an epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, steadier than wall time on a shared machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    quiet()
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
    }
    results = {name: measure(name, args, device) for name in args.models}
    for model, rows in results.items():
        table = Table("variant", "step, ms", "ratio", "95 % interval", "bar", title=model)
        for variant, row in rows.items():
            interval = "{:.3f} to {:.3f}".format(*row["interval"])
            table.add_row(variant, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", interval, str(row["bar"] or ""))
        Console().print(table)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))
        args.output.with_suffix(".md").write_text(markdown(results, about) + "\n")


if __name__ == "__main__":
    main()
