"""What methods cost where a step is short: three layers of 16, one thread, microseconds beside a plain Lightning step.

    python benchmarks/overhead_tiny.py

On a GPU, kernels of a real network take about as long as Python needs to start them; here the arithmetic takes no time at all,
so that what is left is the same Python. As in ``overhead.py`` every variant is a fit in a process of its own; a turn is many
steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from deltas import lean
from lightning.pytorch import Callback, LightningModule
from overhead import Baton, Nothing, interleave, quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PSKD, LoRA, MagnitudePruning, NMSparsity, WeightCompander

LAYERS, TURN = 3, 50
WHOLE: dict[str, Any] = {"targets": "all-linear", "exclude": ()}
VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "a callback": lambda: [Callback()],  # what Lightning takes for calling one more, which does nothing
    "hub": lambda: [Nothing()],
    "MagnitudePruning": lambda: [MagnitudePruning(0.5, **WHOLE)],
    "WeightCompander": lambda: [WeightCompander(**WHOLE)],
    "NMSparsity, sr-ste": lambda: [NMSparsity("2:4", recipe="sr-ste", **WHOLE)],
    "LoRA": lambda: [LoRA(4, **WHOLE)],
    "PSKD": lambda: [PSKD()],
}
GOALS = {"hub": 20, "MagnitudePruning": 90, "WeightCompander": 90, "NMSparsity, sr-ste": 90, "PSKD": 150}  # us a step


class Tiny(LightningModule):
    """Classifies rows of 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, labels = batch
        return nn.functional.cross_entropy(self.model(rows), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(name: str, variant: str, pipe: Connection, args: argparse.Namespace) -> None:
    """Train in this process, some steps at a time."""
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16 * TURN, 16), torch.randint(16, (16 * TURN,)))  # PSKD's memory is in use from turn two
    baton = Baton(pipe, time.process_time if args.cpu_time else time.perf_counter, TURN)
    epochs = args.warmup + args.rounds + 1
    lean(callbacks=[baton, *VARIANTS[variant]()], max_epochs=epochs).fit(Tiny(), DataLoader(data, batch_size=16))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help=f"counted turns, of {TURN} steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true", help="time the CPU spends on it, on a machine that others use too")
    args = parser.parse_args()
    quiet()
    seconds = interleave("tiny", list(VARIANTS), args, fit)
    table = Table("variant", "step, us", "beside plain", "a layer", "goal, a step", title="three layers of 16")
    for variant, times in seconds.items():
        beside = statistics.median(1e6 * (own - plain) for own, plain in zip(times, seconds["plain"], strict=True))
        goal = str(GOALS.get(variant, ""))
        table.add_row(variant, f"{1e6 * statistics.median(times):.0f}", f"{beside:.0f}", f"{beside / LAYERS:.0f}", goal)
    Console().print(table)


if __name__ == "__main__":
    main()
