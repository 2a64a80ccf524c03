"""What growth costs: the edit itself in training steps, and a step after it against one of a network built that size.

    python benchmarks/growth.py --output docs/evidence/growth_cost

The edit is the time between two batches in which `LayerGrowth` acts, copies, optimizer and averages included, divided by the
median step after it. Steps are compared as in `overhead.py`: two trainings in processes of their own take turns, step by step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from overhead import Baton, median_interval, now, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LayerGrowth
from lightning_peft_recipes.language_model import LanguageModel

BAR_STEP, BAR_EDIT = 1.02, 50.0
EDIT_STEP = 3


class ViT(LightningModule):
    """A plain classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=10)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch["images"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def task(name: str) -> tuple[LightningModule, DataLoader[Any]]:
    """A network as it ends, and random data for it."""
    torch.manual_seed(0)
    if name == "llama":
        tokens = torch.randint(0, 2048, (160, 128))
        rows: list[Any] = [{"input_ids": row, "labels": row} for row in tokens]
        return LanguageModel(vocab_size=2048, hidden_size=128, heads=4, ffn=344), DataLoader(rows, batch_size=16)
    images = TensorDataset(torch.randn(160, 3, 64, 64))
    rows = [{"images": image, "labels": index % 10} for index, (image,) in enumerate(images)]
    return ViT(), DataLoader(rows, batch_size=16)


class EditClock(Callback):
    """Seconds of what happens before a batch, from the first callback to the last, and of whole steps."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.steps: list[float] = []
        self._since = now()

    def first(self) -> Callback:
        """The callback to list before the method."""
        clock = self

        class First(Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                this = now()
                clock.steps.append(this - clock._since)
                clock._since = this

        return First()

    def on_train_batch_start(self, *args: Any) -> None:
        self.before.append(now() - self._since)
        self._since = now()  # the edit is no part of the step


def growth(name: str) -> LayerGrowth:
    """Growth to the depth the network was built with."""
    return LayerGrowth(at=f"step:{EDIT_STEP}", start=2 if name == "llama" else 3, optimizer_state="copy")


def trainer(callbacks: list[Callback], steps: int, device: str) -> Trainer:
    """A Trainer that does nothing but train."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_steps=steps, max_epochs=-1, accelerator=device, devices=1, callbacks=callbacks, **off)


def edit_cost(name: str, *, average: bool, repeats: int, device: str) -> dict[str, float]:
    """Median cost of an edit, in seconds and in steps."""
    costs, steps = [], []
    for _ in range(repeats):
        clock = EditClock()
        module, data = task(name)
        averages = [EMAWeightAveraging()] if average else []
        trainer([*averages, clock.first(), growth(name), clock], EDIT_STEP + 6, device).fit(module, data)
        costs.append(clock.before[EDIT_STEP])
        steps.append(statistics.median(clock.steps[EDIT_STEP + 2 :]))
    seconds, step = statistics.median(costs), statistics.median(steps)
    return {"seconds": seconds, "step": step, "steps": seconds / step}


def fit(name: str, grown: bool, pipe: Connection, rounds: int, threads: int, device: str) -> None:
    """Train in this process, a step at a time."""
    quiet()
    torch.set_num_threads(threads)
    module, data = task(name)
    trainer([Baton(pipe, time.perf_counter), *([growth(name)] if grown else [])], rounds + 2, device).fit(module, data)


def step_ratio(name: str, rounds: int, threads: int, device: str) -> dict[str, Any]:
    """Ratio of a step after growth to a step of the network built that size."""
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}  # see overhead.py
    context = multiprocessing.get_context("spawn")
    pipes, runs = [], []
    seconds: list[list[float]] = [[], []]
    try:
        for grown in (False, True):
            pipe, end = context.Pipe()
            runs.append(context.Process(target=fit, args=(name, grown, end, rounds, threads, device)))
            runs[-1].start()
            end.close()
            pipe.recv()
            pipes.append(pipe)
        for step in range(rounds):
            for place in range(2):
                which = (place + step) % 2
                pipes[which].send(None)
                seconds[which].append(pipes[which].recv())
    finally:
        for run in runs:
            run.kill()
    warm = EDIT_STEP + 3
    ratios = [after / built for built, after in zip(seconds[0][warm:], seconds[1][warm:], strict=True)]
    return {"ratio": statistics.median(ratios), "interval": median_interval(ratios), "ms": 1000 * statistics.median(seconds[0])}


def markdown(results: dict[str, Any], about: dict[str, Any]) -> str:
    """Render the results."""
    lines = [
        "# Cost of growth",
        "",
        f"`python benchmarks/growth.py`: {about}. Depth by stacking, AdamW with copied states; bars: an edit costs less than "
        f"{BAR_EDIT:.0f} steps, a step after it at most {BAR_STEP} times one of a network built that size.",
        "",
        "| network | blocks | edit, ms | in steps | with EMA, in steps | step after / step built | 95 % interval |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, row in results.items():
        low, high = row["step"]["interval"]
        lines.append(
            f"| {row['what']} | {row['blocks']} | {1000 * row['edit']['seconds']:.0f} | {row['edit']['steps']:.2f} | "
            f"{row['edit with EMA']['steps']:.2f} | {row['step']['ratio']:.3f} | {low:.3f} to {high:.3f} |"
        )
        print(name, row)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="steps of each training that are compared")
    parser.add_argument("--repeats", type=int, default=5, help="edits that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    shown = {"llama": ("Llama, width 128, vocabulary 2,048", "2 to 8"), "vit": ("ViT-tiny, 64 px", "3 to 12")}
    results = {
        name: {
            "what": what,
            "blocks": blocks,
            "edit": edit_cost(name, average=False, repeats=args.repeats, device=args.device),
            "edit with EMA": edit_cost(name, average=True, repeats=args.repeats, device=args.device),
            "step": step_ratio(name, args.rounds, args.threads, args.device),
        }
        for name, (what, blocks) in shown.items()
    }
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    about = {"device": where, "torch": torch.__version__.partition("+")[0], "batch": 16}
    text = markdown(results, about)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
