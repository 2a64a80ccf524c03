"""The members of the deltas' family that ``methods.py`` does not set beside LoRA on all data, at LoRA's budget on one network.

    python benchmarks/delta_members.py --rates runs/member_rates.json
    python benchmarks/methods.py --study deltas_members --epochs 3 --image-size 64 --threads 1 --output runs/deltas_members

The first command finds learning rates: one training each with a quarter of the training photos held out.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.progress import track

import lightning_peft as peft
from lightning_peft_recipes.groceries import GroceriesDataModule
from lightning_peft_recipes.image_classifier import TimmClassifier

HEAD = {"tune": ("head",)}
# Of EfficientNet-Lite0, whose stem has 32 x 27 weights: what divides neither is left out there.
STEM = HEAD | {"exclude": ["head", "depthwise", "first"]}
# Ranks are the largest with which no more is trained than by LoRA of rank 8, 200,678 numbers with the head.
MEMBERS: Mapping[str, Callable[[], Callback]] = {
    "LoRA+ r=8": lambda: peft.LoRA(8, lr_ratio=16, **HEAD),
    "OLoRA r=8": lambda: peft.OLoRA(8, **HEAD),
    "SORSA r=7": lambda: peft.SORSA(7, **HEAD),
    "KaSA r=7": lambda: peft.KaSA(7, 7, **HEAD),
    "CorDA r=8": lambda: peft.CorDA(8, looks=2, **HEAD),
    "LoRA-SB r=16": lambda: peft.LoRASB(16, looks=2, **HEAD),
    "SVFit r=16": lambda: peft.SVFit(16, **HEAD),
    "LoLDU r=16": lambda: peft.LoLDU(16, **HEAD),
    "Bone b=8": lambda: peft.Bone(8, **STEM),
    "FLoRA r=7": lambda: peft.FLoRA(7, **HEAD),
    "SALT r=16": lambda: peft.SALT(16, **HEAD),
    "PHM r=7": lambda: peft.PHM(7, **STEM),
    "NOLA r=8": lambda: peft.NOLA(8, bases=1024, **HEAD),
    "RandLoRA r=4": lambda: peft.RandLoRA(4, **HEAD),
    "SoKA r=10": lambda: peft.SoKA(10, **HEAD),
    "TLoRA r=11": lambda: peft.TLoRA(11, **HEAD),
    "DSEE r=7": lambda: peft.DSEE(7, **HEAD),
    "BALoRA r=8": lambda: peft.BALoRA(8, **HEAD),
    "DyLoRA r=8": lambda: peft.DyLoRA(8, **HEAD),
    "IncreLoRA r=3 of 6": lambda: peft.IncreLoRA(1, target=3, most=6, warmup="10%", every=5, **HEAD),
    "TriAdaptLoRA r=4 of 8": lambda: peft.TriAdaptLoRA(1, target=4, most=8, **HEAD),
    "PEGO 2 of r=4": lambda: peft.PEGO(4, members=2, **HEAD),
    "LoRA-GGPO r=8": lambda: peft.LoRAGGPO(8, **HEAD),
    "ALLoRA r=8": lambda: peft.ALLoRA(8, **HEAD),
}
TRIED = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RATES: Mapping[str, float] = {  # of TRIED, by accuracy on the photos held out
    "LoRA+ r=8": 0.0001,
    "OLoRA r=8": 0.0001,
    "SORSA r=7": 0.0001,
    "KaSA r=7": 0.0001,
    "CorDA r=8": 0.0001,
    "LoRA-SB r=16": 0.0001,
    "SVFit r=16": 0.0001,
    "LoLDU r=16": 0.0001,
    "Bone b=8": 0.0001,
    "FLoRA r=7": 0.0001,
    "SALT r=16": 0.0001,
    "PHM r=7": 0.003,
    "NOLA r=8": 0.0001,
    "RandLoRA r=4": 0.0001,
    "SoKA r=10": 0.0003,
    "TLoRA r=11": 0.0001,
    "DSEE r=7": 0.0001,
    "BALoRA r=8": 0.0001,
    "DyLoRA r=8": 0.0001,
    "IncreLoRA r=3 of 6": 0.0001,
    "TriAdaptLoRA r=4 of 8": 0.0001,
    "PEGO 2 of r=4": 0.0001,
    "LoRA-GGPO r=8": 0.0001,
    "ALLoRA r=8": 0.0001,
}


def accuracy(member: str, lr: float) -> float:
    """Train once and return the accuracy on the photos held out."""
    seed_everything(100, verbose=False)
    data = GroceriesDataModule(image_size=64, batch_size=16, val=0.25)
    model = TimmClassifier(lr=lr, head_lr_scale=5e-3 / lr)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=3,
        gradient_clip_val=1.0,
        accelerator="cpu",
        callbacks=[MEMBERS[member]()],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(model, datamodule=data)
    (found,) = Trainer(accelerator="cpu", **quiet).validate(model, datamodule=data, verbose=False)  # type: ignore[arg-type]
    return float(found["val/accuracy"])


def main() -> None:
    """Try the learning rates of every member, and write what they came to; what is there is not tried again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, required=True)
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = json.loads(args.rates.read_text()) if args.rates.exists() else {}
    todo = [(member, lr) for member in args.members for lr in TRIED if f"{lr:g}" not in found.get(member, {})]
    for member, lr in track(todo, console=Console(stderr=True)):
        found.setdefault(member, {})[f"{lr:g}"] = accuracy(member, lr)
        args.rates.write_text(json.dumps(found, indent=1))
    for member, tried in found.items():
        best = max(tried, key=lambda lr: tried[lr])
        print(f'    "{member}": {best},  # {", ".join(f"{lr}: {value:.3f}" for lr, value in tried.items())}')


if __name__ == "__main__":
    main()
