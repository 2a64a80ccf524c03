"""What a method needs in memory beside a plain training step, as shares of the weights that it acts on.

    python benchmarks/memory.py --output docs/evidence/memory

Four linear layers of equal sides and few rows, so that weights are nearly all there is; one step after five others. Counted
are bytes of tensors, each storage once: *held*, those there are between two steps; *kept*, those that the step made and its
backward pass begins with; *peak*, the most that it had at once. The plain step's are taken off.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deltas import Kept, lean, quiet
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    PSKD,
    SORSA,
    DoRA,
    LoRA,
    MagnitudePruning,
    MiSS,
    NMSparsity,
    Wanda,
    WeightCompander,
)

SIDE, LAYERS, ROWS, SAMPLES, BEFORE = 1024, 4, 8, 64, 5
WEIGHTS = 4 * LAYERS * SIDE**2  # bytes
EVERYWHERE = {"targets": "all-linear", "exclude": ("head",)}

METHODS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "NMSparsity, MDGF": lambda: [NMSparsity("2:4", **EVERYWHERE)],
    "NMSparsity, SR-STE": lambda: [NMSparsity("2:4", recipe="sr-ste", **EVERYWHERE)],
    "NMSparsity, one-shot": lambda: [NMSparsity("2:4", recipe="one-shot", **EVERYWHERE)],
    "MagnitudePruning": lambda: [MagnitudePruning(0.5, end=None, **EVERYWHERE)],
    "Wanda": lambda: [Wanda(0.5, start=2, every=1, **EVERYWHERE)],
    "WeightCompander": lambda: [WeightCompander(**EVERYWHERE)],
    "PSKD": lambda: [PSKD()],
    "all three": lambda: [NMSparsity("2:4", **EVERYWHERE), WeightCompander(**EVERYWHERE), PSKD()],
    "LoRA": lambda: [LoRA(rank=8, **EVERYWHERE)],
    "DoRA": lambda: [DoRA(rank=8, **EVERYWHERE)],
    "SORSA": lambda: [SORSA(rank=8, **EVERYWHERE)],
    "MiSS": lambda: [MiSS(rank=8, **EVERYWHERE)],
    "LoRA + 2:4": lambda: [LoRA(rank=8, **EVERYWHERE), NMSparsity("2:4", **EVERYWHERE)],
}


class Wide(LightningModule):
    """A classifier of which nearly all are square matrices."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(SIDE, SIDE, bias=False), nn.Tanh())]
        self.model = nn.Sequential(*layers, nn.Linear(SIDE, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Looks(Callback):
    """Counts in one step."""

    def __init__(self) -> None:
        self.counter, self.held = Kept(), 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == BEFORE:
            self.held = there()
            self.counter.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == BEFORE:
            self.counter.on_before_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == BEFORE:
            self.counter.on_train_batch_end()


def there() -> int:
    """Bytes of all tensors of this process, and of their gradients."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout is torch.strided:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def measure(make: Callable[[], list[Callback]]) -> dict[str, int]:
    """Train a few steps; bytes held, kept and at the peak."""
    torch.manual_seed(0)
    before, looks = there(), Looks()
    data = TensorDataset(torch.randn(SAMPLES, SIDE), torch.randint(10, (SAMPLES,)))
    lean(callbacks=[*make(), looks], max_steps=BEFORE + 2).fit(Wide(), DataLoader(data, ROWS))
    return {"held": looks.held - before, "kept": looks.counter.bytes, "peak": looks.counter.peak}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet()
    plain = measure(METHODS["plain"])
    found = {name: measure(METHODS[name]) for name in args.methods if name != "plain"}
    shares = {name: {key: (value - plain[key]) / WEIGHTS for key, value in counts.items()} for name, counts in found.items()}
    table = Table("method", "held", "kept", "peak", title="beside a plain step, in multiples of the weights' bytes")
    for name, counts in shares.items():
        table.add_row(name, *(f"{value:+.3f}" for value in counts.values()))
    Console().print(table)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps({"plain": plain, "shares": shares}, indent=1))


if __name__ == "__main__":
    main()
