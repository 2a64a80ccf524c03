"""What FTWT's skipping is worth on the clock: dense fine-tuning, FTWT from there, deployment, all on the grocery photos.

    python benchmarks/skipping.py --network resnet50 --size 160 --cost 0.45 --seeds 0 1 2 --output docs/evidence/skipping

`--cost` is the share of operations aimed at: the mass that gives it on one batch of the dense network is looked up before the
training. Each stage is kept in `--work`, so that an interrupted run goes on where it stopped. Batch 1 on the CPU, with one and
with two threads; the dense network has its norms folded and the faster memory layout, and takes turns with the skipping one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

import lightning_peft
from lightning_peft import FTWT, compare_deployments
from lightning_peft.attach.channel_units import ChannelUnit, channel_units
from lightning_peft.functional import active_channels
from lightning_peft.skipping.costs import LayerCosts, share_of_cost
from lightning_peft_recipes.groceries import GroceriesDataModule
from lightning_peft_recipes.image_classifier import TimmClassifier

# Large results are given back to the system and taken again at every call otherwise, and the pages cost more than the work:
# on a virtual machine a dense network ran at half its speed. Read when a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_TOP_PAD_": "67108864"}
MASSES = [round(0.4 + 0.01 * i, 2) for i in range(60)]
SETTINGS = {
    "resnet50": {"dense_epochs": 3, "dense_lr": 2e-4, "epochs": 5, "lr": 2e-4},
    "tf_efficientnet_lite0": {"dense_epochs": 6, "dense_lr": 5e-4, "epochs": 8, "lr": 5e-4},
}


def trainer(epochs: int, callbacks: list[Any]) -> Trainer:
    """A quiet Trainer on the CPU."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, log_every_n_steps=5, **quiet)


@torch.no_grad()
def costs_by_mass(network: nn.Module, inputs: Tensor) -> dict[float, float]:
    """Share of operations a dense network would need if every unit computed exactly the channels of each mass."""
    units = [unit for unit in channel_units(network) if unit.activated]
    strength: dict[str, Tensor] = {}

    def look(unit: ChannelUnit) -> Any:
        def see(layer: nn.Module, args: Any, output: Tensor) -> None:
            for activation in unit.activations:
                output = activation(output)
            strength[unit.producer] = output.flatten(2).abs().amax(2)

        return see

    handles = [network.get_submodule(unit.gate).register_forward_hook(look(unit)) for unit in units]
    costs = LayerCosts()
    costs.open(network)
    network.eval()(inputs)
    costs.close()
    for handle in handles:
        handle.remove()
    shares = {mass: {name: active_channels(value, mass).float().mean(1) for name, value in strength.items()} for mass in MASSES}
    return {mass: float(share_of_cost(costs.of, units, share).mean()) for mass, share in shares.items()}


def dense(args: argparse.Namespace, seed: int, data: GroceriesDataModule) -> Path:
    """Fine-tune the dense network, unless that is done."""
    path = args.work / f"{args.network}-{args.size}-{seed}-dense.ckpt"
    if not path.exists():
        settings = SETTINGS[args.network]
        lightning.seed_everything(seed)
        module = TimmClassifier(model=args.network, lr=settings["dense_lr"], head_lr_scale=10)
        runner = trainer(settings["dense_epochs"], [])
        runner.fit(module, data)
        runner.save_checkpoint(path)
    return path


def train(args: argparse.Namespace, seed: int, data: GroceriesDataModule, start: Path) -> tuple[Path, dict[str, float]]:
    """Train with FTWT from the dense network, unless that is done; say what was predicted."""
    path = args.work / f"{args.network}-{args.size}-{seed}-{args.cost}.ckpt"
    notes = path.with_suffix(".json")
    if not path.exists():
        settings = SETTINGS[args.network]
        lightning.seed_everything(seed)
        module = TimmClassifier(model=args.network, lr=settings["lr"], head_lr_scale=1)
        module.load_state_dict(torch.load(start, weights_only=True)["state_dict"])
        data.setup("fit")
        table = costs_by_mass(module.model, next(iter(data.train_dataloader()))[0])
        mass = min(table, key=lambda known: abs(table[known] - args.cost))
        notes.write_text(json.dumps({"mass": mass, "predicted": table[mass]}))
        runner = trainer(settings["epochs"], [FTWT(mass, normalise="standard", strength=0.01, lr_scale=20, cooldown="60%")])
        runner.fit(module, data)
        runner.save_checkpoint(path)
    return path, json.loads(notes.read_text())


def one(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All stages with one seed."""
    data = GroceriesDataModule(image_size=args.size, batch_size=16)
    data.prepare_data()
    start = dense(args, seed, data)
    path, notes = train(args, seed, data, start)
    before = lightning_peft.load_from_checkpoint(TimmClassifier, start)
    module = lightning_peft.load_from_checkpoint(TimmClassifier, path)
    data.setup("test")
    samples = torch.cat([images for images, _ in data.val_dataloader()])[:16]
    found: dict[str, Any] = {"seed": seed, **notes, "threads": {}}
    with torch.inference_mode():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            deployed = FTWT(notes["mass"]).deploy(module, samples, checkpoint=path)
            times = deployed.times
            found["threads"][threads] = {
                "speedup": [times.low, times.ratio, times.high],
                "ms": [1e3 * times.first, 1e3 * times.second],
                "flops": deployed.flops,
                "masked": len(deployed.masked),
            }
            print(f"{args.network}, seed {seed}, {threads} threads: {deployed}", flush=True)
    report = compare_deployments(
        before.model,
        deployed.network,
        list(samples.split(1)),
        data.test_dataloader(),
        runs=16,
        names=("dense", "FTWT"),
        made_by="python benchmarks/skipping.py",
    )
    assert report.quality is not None
    found["accuracy"] = [quality.accuracy for quality in report.quality]
    found["calibration_error"] = [quality.ece for quality in report.quality]
    if args.report:
        report.write(args.work / f"report-{args.network}-{seed}")
    print(json.dumps(found), flush=True)
    return found


def row(network: str, size: int, found: list[dict[str, Any]]) -> str:
    """One line of the table: means over seeds, lowest and highest in brackets."""

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    accuracy = [spread([100 * run["accuracy"][i] for run in found], 1) for i in (0, 1)]
    flops = spread([100 * run["threads"][1]["flops"] for run in found], 1)
    speed = [spread([run["threads"][threads]["speedup"][1] for run in found], 2) for threads in (1, 2)]
    possible = spread([1 / run["threads"][1]["flops"] for run in found], 2)
    cells = [f"{network}, {size} px", str(len(found)), *accuracy, flops, possible, *speed]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all seeds and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(SETTINGS), default="resnet50")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--cost", type=float, default=0.45)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("skipping"))
    parser.add_argument("--report", action="store_true", help="write a report of each seed into --work")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not all(key in os.environ for key in ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    args.work.mkdir(parents=True, exist_ok=True)
    found = [one(args, seed) for seed in args.seeds]
    head = ["network", "seeds", "accuracy, dense", "FTWT", "operations left, %", "if time followed", "1 thread", "2 threads"]
    table = "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", row(args.network, args.size, found)])
    print(table)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps({**vars(args), "runs": found}, indent=1, default=str))
        args.output.with_suffix(".md").write_text(f"{table}\n")


if __name__ == "__main__":
    main()
