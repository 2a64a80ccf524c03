"""What FTWT's skipping is worth on the clock: a dense network, FTWT from there, deployment. `runtimes.py` goes on from here.

    python benchmarks/skipping.py --network resnet50 --seeds 0 1 2 --work skipping
    python benchmarks/skipping.py --network vgg16 --seeds 0 1 2 --dense-seed 0 --work skipping
    python benchmarks/skipping.py --clock --network resnet50 vgg16 --output docs/evidence/skipping

ResNet-50 with its packaged ImageNet weights learns the grocery photos; VGG-16 learns a part of CIFAR-10 from nothing. The dense
network is trained to the end, then trained on for the same epochs: as it is, so that what is lost is not made up for by longer
training, with FTWT, and with StructuredPruning (`--stages cut`). Each stage is kept in `--work`: an interrupted run goes
on where it stopped. `--clock` times what is trained, batch 1 on the CPU, with one and with two threads: run it when the machine
does nothing else. The dense network has its norms folded and the faster memory layout, and takes turns with the skipping one.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from pruning_networks import keep_memory, spread, trainer
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import FTWT, Method, StructuredPruning, compare_deployments
from lightning_peft_recipes.cifar10 import CIFAR10DataModule
from lightning_peft_recipes.cifar10_vgg import CIFAR10VGG
from lightning_peft_recipes.groceries import GroceriesDataModule
from lightning_peft_recipes.image_classifier import TimmClassifier


@dataclass(frozen=True)
class Setting:
    """How a network is trained.

    Attributes:
        epochs: Of the dense training.
        lr: Of the dense training.
        more_epochs: Of a second dense training, with the head at the others' learning rate; none where the first is enough.
        after_epochs: Of the training after it, with FTWT or without.
        after_lr: Of that training.
        taught: Whether it also learns from what the dense network says.
        mass: FTWT's share of activity.
        lr_scale: Learning rate of FTWT's predictors, as a multiple.
        exclude: Layers without a predictor: with few channels and large maps there is little to skip and much to look at.
        masses: Other shares of activity, by layers.
        cut: Share of the operations that StructuredPruning removes; none where it was not tried.
    """

    epochs: int
    lr: float
    more_epochs: int
    after_epochs: int
    after_lr: float
    taught: bool
    mass: float
    lr_scale: float
    exclude: tuple[str, ...] = ()
    masses: dict[str, float] = field(default_factory=dict)
    cut: float = 0.0


SETTINGS = {
    "resnet50": Setting(3, 2e-4, 8, 16, 5e-5, True, 0.78, 80, ("first", r"re:layer1\."), {r"re:layer2\.": 0.93}, cut=0.4),
    "vgg16": Setting(10, 0.05, 0, 10, 3e-4, False, 0.86, 20),
    "tf_efficientnet_lite0": Setting(7, 5e-4, 0, 12, 2e-4, True, 0.86, 20, cut=0.35),
}


class Taught(TimmClassifier):  # type: ignore[misc]
    """A timm classifier that also learns from what another network says of its images (Hinton et al., arXiv:1503.02531).

    Attributes:
        teacher: The other, in a list so that its weights are not among the module's.
    """

    teacher: list[nn.Module]
    share, temperature = 0.9, 2.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, and divergence from the teacher."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            taught = self.teacher[0](images)
        student, teacher = (F.log_softmax(each.float() / self.temperature, 1) for each in (logits, taught))
        apart = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
        return (1.0 - self.share) * loss + self.share * apart


STAGES = ("FTWT", "longer", "cut")  # of the same length, from the trained network


def build(name: str, stage: str) -> Any:
    """The LightningModule of a stage; a new head learns faster."""
    setting = SETTINGS[name]
    last = stage in STAGES
    lr = setting.after_lr if last else setting.lr
    if name == "vgg16":
        # From a trained network on AdamW, as the other: with SGD at 0.01 the masks came so suddenly that it never recovered.
        return CIFAR10VGG(optimizer="adamw", lr=lr, weight_decay=0.01) if last else CIFAR10VGG(lr=lr)
    settings: dict[str, Any] = {"model": name, "lr": lr, "label_smoothing": 0.1}
    if last and setting.taught:
        return Taught(**settings)
    return TimmClassifier(head_lr_scale=10 if stage == "dense" else 1, **settings)


def data_of(name: str, *, test: bool = False) -> Any:
    """The data module. Photos are larger in the test, since random crops show things larger (Touvron et al., NeurIPS 2019)."""
    data: Any
    if name == "vgg16":
        data = CIFAR10DataModule(batch_size=128, eval_batch_size=250, train_size=15_000, val_size=1000)
    else:
        data = GroceriesDataModule(image_size=224 if test else 160, batch_size=16, eval_batch_size=33)
    data.prepare_data()
    return data


def ftwt(network: str) -> FTWT:
    """The method of a network."""
    setting = SETTINGS[network]
    layers: dict[str, Any] = {"exclude": setting.exclude or None, "masses": setting.masses}
    return FTWT(setting.mass, strength=0.01, cooldown="60%", normalise="standard", lr_scale=setting.lr_scale, **layers)


def cutting(network: str) -> StructuredPruning:
    """The method that cuts, early enough to recover."""
    amount = SETTINGS[network].cut
    return StructuredPruning(amount, "taylor", of="flops", start="5%", end="40%", every="5%", round_to=16)


def train(network: str, seed: int, stage: str, start: Path | None, path: Path) -> Path:
    """Run one stage (``"dense"``, ``"more"``, or one of :data:`STAGES`), unless that is done."""
    if path.exists():
        return path
    setting, data, callbacks = SETTINGS[network], data_of(network), []
    lightning.seed_everything(seed)
    module = build(network, stage)
    notes: dict[str, Any] = {}
    if start is not None:
        module.load_state_dict(torch.load(start, weights_only=True)["state_dict"])
        if isinstance(module, Taught):
            module.teacher = [copy.deepcopy(module.model).eval().requires_grad_(False)]
    if stage in METHODS:
        callbacks = [METHODS[stage](network)]
    began = time.perf_counter()
    # bfloat16: many CPUs have units for it.
    epochs = {"dense": setting.epochs, "more": setting.more_epochs}.get(stage, setting.after_epochs)
    runner = trainer(epochs, callbacks, "bf16-mixed")
    runner.fit(module, data)
    runner.save_checkpoint(path)
    notes["seconds"] = time.perf_counter() - began
    if stage == "FTWT":
        notes["predicted"] = callbacks[0].predicted
        # Proved to compute what the trained network computes with its predictors' masks.
        module.model = callbacks[0].deploy(module, samples_of(network), calibrate=False).network
    # In half precision a predictor may decide otherwise.
    tester = trainer(1, [], "32-true" if stage == "FTWT" else "bf16-mixed")
    found = tester.test(module, data_of(network, test=True), verbose=False)[0]
    notes |= {"accuracy": found["test/accuracy"], "calibration_error": found["test/ece"]}
    path.with_suffix(".json").write_text(json.dumps(notes, indent=1))
    print(path.name, notes, flush=True)
    return path


METHODS: dict[str, Callable[[str], Method]] = {"FTWT": ftwt, "cut": cutting}


def samples_of(network: str) -> Tensor:
    """Sixteen images that were not trained on."""
    data = data_of(network, test=True)
    data.setup("fit")
    return torch.cat([images for images, _ in data.val_dataloader()])[:16]


def paths(network: str, seed: int, args: argparse.Namespace) -> dict[str, Path]:
    """Checkpoint of each stage."""
    first = seed if args.dense_seed is None else args.dense_seed
    seeds = {"dense": first, "more": first, **dict.fromkeys(STAGES, seed)}
    if not SETTINGS[network].more_epochs:
        del seeds["more"]
    return {stage: args.work / f"{network}-{number}-{stage}.ckpt" for stage, number in seeds.items()}


def one(network: str, seed: int, args: argparse.Namespace) -> None:
    """All stages with one seed."""
    path = paths(network, seed, args)
    start = train(network, seed, "dense", None, path["dense"])
    if "more" in path:
        start = train(network, seed, "more", start, path["more"])
    for stage in args.stages:
        train(network, seed, stage, start, path[stage])


@torch.inference_mode()
def clock(network: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time what was trained with a seed."""
    path = paths(network, seed, args)
    notes = {stage: json.loads(file.with_suffix(".json").read_text()) for stage, file in path.items() if file.exists()}
    module = lightning_peft.load_from_checkpoint(type(build(network, "FTWT")), path["FTWT"])
    samples = samples_of(network)
    found: dict[str, Any] = {"network": network, "seed": seed, **notes, "threads": {}}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        deployed = ftwt(network).deploy(module, samples, checkpoint=path["FTWT"])
        times = deployed.times
        found["threads"][threads] = {
            "speedup": [times.low, times.ratio, times.high],
            "ms": [1e3 * times.first, 1e3 * times.second],
            "flops": deployed.flops,
            "masked": len(deployed.masked),
        }
        print(f"{network}, seed {seed}, {threads} threads: {deployed}", flush=True)
    if args.report:
        before = lightning_peft.load_from_checkpoint(type(module), path.get("more", path["dense"]))
        data = data_of(network, test=True)
        data.setup("test")
        report = compare_deployments(
            before.model,
            deployed.network,
            list(samples.split(1)),
            data.test_dataloader(),
            runs=16,
            names=("dense", "FTWT"),
            made_by="python benchmarks/skipping.py",
        )
        report.write(args.work / f"report-{network}-{seed}")
    return found


def row(network: str, found: list[dict[str, Any]]) -> str:
    """One line of the table: means over seeds, lowest and highest in brackets."""
    dense = [100 * run.get("more", run["dense"])["accuracy"] for run in found]  # what FTWT began from
    ours = [100 * run["FTWT"]["accuracy"] for run in found]
    longer = [(100 * run["longer"]["accuracy"], mine) for run, mine in zip(found, ours, strict=True) if "longer" in run]
    cells = [network, str(len(found)), spread(dense, 1), spread(ours, 1)]
    cells.append(spread([before - mine for before, mine in zip(dense, ours, strict=True)], 1))
    cells.append(spread([other - mine for other, mine in longer], 1) if longer else "-")
    cells.append(spread([100 * run["FTWT"]["predicted"] for run in found], 0))
    cells.append(spread([100 * run["threads"][1]["flops"] for run in found], 1))
    cells.append(spread([1 / run["threads"][1]["flops"] for run in found], 2))
    cells += [spread([run["threads"][threads]["speedup"][1] for run in found], 2) for threads in (1, 2)]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "network",
    "seeds",
    "dense, %",
    "FTWT, %",
    "points lost",
    "against dense trained on",
    "operations predicted, %",
)
CLOCK = ("operations executed, %", "if time followed", "1 thread", "2 threads")


def main() -> None:
    """Run all seeds, or time them and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dense-seed", type=int, help="one dense network for all seeds, to save time")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["FTWT", "longer"])
    parser.add_argument("--work", type=Path, default=Path("skipping"))
    parser.add_argument("--clock", action="store_true", help="time what is trained")
    parser.add_argument("--report", action="store_true", help="with --clock: write a report of each seed into --work")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    keep_memory()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.clock:
        for network in args.network:
            for seed in args.seeds:
                one(network, seed, args)
        return
    found = {network: [clock(network, seed, args) for seed in args.seeds] for network in args.network}
    head = [*HEAD, *CLOCK]
    table = "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(row(*item) for item in found.items())])
    print(table)
    if args.output:
        runs = [run for each in found.values() for run in each]
        args.output.with_suffix(".json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
