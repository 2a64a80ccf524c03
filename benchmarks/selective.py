"""What a training step with a selective method costs, in time and in bytes, against full fine-tuning, side by side in one run.

    python benchmarks/selective.py --networks vit --output docs/evidence/selective

Networks, data and measures are those of ``deltas.py``. Optimizer bytes are Adam's state after the last step.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from deltas import NETWORKS, Kept, Tuned, arguments, batches, lean, timed, train
from lightning.pytorch import Callback
from overhead import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_peft import HFT, LIFT, SSF, BitFit, Method, NormTuning, SpIEL

METHODS: dict[str, Callable[[], Method]] = {
    "BitFit": BitFit,
    "NormTuning": NormTuning,
    "SSF": SSF,
    "HFT": HFT,
    "LIFT": lambda: LIFT(rank=8, every=None),
    "SpIEL": SpIEL,
}


def built(name: str, variant: str) -> tuple[Tuned, list[Callback]]:
    """The module and the callbacks of a variant."""
    torch.manual_seed(0)
    module = Tuned(NETWORKS[name][0]())
    return module.train(), [METHODS[variant]()] if variant in METHODS else []


def fit(name: str, variant: str, pipe: Connection, args: argparse.Namespace) -> None:
    """Train in this process, a step at a time."""
    train(name, *built(name, variant), pipe, args)


class State(Callback):
    """Counts the bytes of the optimizer's state."""

    bytes = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        states = trainer.optimizers[0].state.values()
        tensors = [each for state in states for each in state.values() if isinstance(each, Tensor)]
        self.bytes = sum(each.numel() * each.element_size() for each in tensors)


def weighed(name: str, variant: str, device: str) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward pass of a step, and of the optimizer's state."""
    kept, state = Kept(), State()
    module, callbacks = built(name, variant)
    lean(callbacks=[*callbacks, kept, state], max_steps=1, accelerator=device).fit(module, batches(name, 1))
    return kept.bytes, state.bytes


def main() -> None:
    """Command line."""
    args = arguments(__doc__)
    quiet()
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": args.threads}
    results = {name: timed(name, ("full", *METHODS), "full", args, fit) for name in args.networks}
    for name, rows in results.items():
        for variant, row in rows.items():
            row["kept"], row["state"] = weighed(name, variant, args.device)
    for name, rows in results.items():
        table = Table("variant", "step, ms", "of full", "least to most", "kept, MB", "Adam's state, MB", title=name)
        for variant, row in rows.items():
            spread = "{:.3f} to {:.3f}".format(*row["range"])
            sizes = (f"{row[key] / 1e6:.2f}" for key in ("kept", "state"))
            table.add_row(variant, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", spread, *sizes)
        Console().print(table)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
