"""Our pruning beside Lightning's `ModelPruning` and Torch-Pruning: accuracy at equal sparsity, and what resuming gives.

    python benchmarks/pruning_rivals.py --seeds 0 1 2 --work pruning --output docs/evidence/pruning_rivals

The narrow ResNet of `pruning_networks.py` on CIFAR-10. All start from one dense network a seed, prune once before the first
step (75 % of the weights of all layers ranked together, or half of the operations) and train on for the same epochs. What a
step costs beside `ModelPruning` is measured by `benchmarks/overhead.py --set pruning`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from pruning_networks import SETTINGS, SmallTimm, data_of, dense, from_dense, kept, spread, tested, trainer
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import MagnitudePruning, StructuredPruning
from lightning_peft.measure.flop_count import FlopCount

EXAMPLE = torch.zeros(1, 3, 32, 32)


class TorchPruning(Callback):
    """Torch-Pruning as its readme has it: cut before the optimizer exists; the ratio rises until half of the work is gone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        network: Any = pl_module.model
        before = _flops(network)
        for step in range(1, 100):
            trial = copy.deepcopy(network)
            _cut(trial, step / 100)
            if _flops(trial) <= 0.5 * before:
                break
        _cut(network, step / 100)


def _cut(network: Any, ratio: float) -> None:
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    # Every layer alike, its default: with global_pruning=True this network lost half of its accuracy for good.
    pruner = torch_pruning.pruner.BasePruner(
        network, EXAMPLE, importance, pruning_ratio=ratio, ignored_layers=[network.get_classifier()]
    )
    pruner.step()


def _flops(network: nn.Module) -> int:
    training = network.training
    with FlopCount() as count, torch.no_grad():
        network.eval()(EXAMPLE)
    network.train(training)
    return int(count.total)


class BeforeTheFirstStep(ModelPruning):
    """`ModelPruning` prunes at the end of an epoch; to compare equal trainings it is asked at the start of the first."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.apply_pruning(0.75)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


def lightning_pruning() -> ModelPruning:
    """See :class:`BeforeTheFirstStep`; weights of convolutions and linear layers, as ours."""
    settings: dict[str, Any] = {"use_global_unstructured": True, "parameter_names": ["weight"], "verbose": 0}
    return BeforeTheFirstStep("l1_unstructured", amount=0.75, make_pruning_permanent=True, **settings)


VARIANTS: dict[str, Callable[[], Callback]] = {
    "MagnitudePruning, 75 %": lambda: MagnitudePruning(0.75, start=0, end=None, exclude=()),
    "Lightning ModelPruning, 75 %": lightning_pruning,
    "StructuredPruning, half the operations": lambda: StructuredPruning(0.5, of="flops", start=1),
    "Torch-Pruning, half the operations": TorchPruning,
}


def accuracy(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Prune, train and test, unless that is done."""
    path = work / f"rivals-{seed}-{list(VARIANTS).index(name)}.json"
    if path.exists():
        return json.loads(path.read_text())
    setting, start = SETTINGS["resnet"], dense("resnet", seed, work)
    seed_everything(seed, verbose=False)
    module = _contiguous(from_dense("resnet", start, setting.pruned_lr))
    before = _flops(module.model)
    runner = trainer(setting.pruned_epochs, [VARIANTS[name]()], setting.precision)
    runner.fit(module, datamodule=data_of("resnet"))
    weights = [layer.weight for layer in module.model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    found = {"variant": name, "seed": seed, "zeros": zeros, "flops": _flops(module.model) / before}
    return kept(path, found | tested(module, "resnet"))


def resumed(name: str, work: Path) -> str:
    """Train four epochs, and again from the checkpoint of the second in a module with other initial weights: compare."""
    seed_everything(0, verbose=False)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)

    def module(seed: int) -> SmallTimm:
        seed_everything(seed, verbose=False)
        return _contiguous(SmallTimm("resnet", 0.01))

    path = work / "resume.ckpt"
    whole, first, second = module(1), module(1), module(2)
    trainer(4, [VARIANTS[name]()]).fit(whole, loader)
    # Stopped as a job is killed: within a schedule of four epochs, by a checkpoint written at the end of the second.
    stopped = trainer(4, [VARIANTS[name](), _SaveAfter(1, path)])
    stopped.fit(first, loader)
    try:
        trainer(4, [VARIANTS[name]()]).fit(second, loader, ckpt_path=path)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    one, other = whole.state_dict(), second.state_dict()
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        return "another network: names or shapes differ"
    worst = max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
    zeros = [sum(int((value == 0).sum()) for value in each.values() if value.ndim > 1) for each in (one, other)]
    return "bit-exact" if worst == 0 else f"weights differ by up to {worst:.2g}, {zeros[0]:,} zeros became {zeros[1]:,}"


def _contiguous(module: SmallTimm) -> SmallTimm:
    """PyTorch's global pruning fails on weights in channels-last layout."""
    module.model.to(memory_format=torch.contiguous_format)
    return module


class _SaveAfter(Callback):
    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def table(runs: list[dict[str, Any]], resuming: dict[str, str]) -> str:
    """Means over seeds, lowest and highest in brackets."""
    lines = ["| variant | seeds | accuracy, % | ECE, % | zeros, % | operations, % | resumed |", "|-|-|-|-|-|-|-|"]
    for name in VARIANTS:
        group = [run for run in runs if run["variant"] == name]
        cells = []
        for key in ("accuracy", "calibration_error", "zeros", "flops"):
            values = [100 * run[key] for run in group]
            cells.append(spread(values, 1))
        lines.append(f"| {' | '.join([name, str(len(group)), *cells, resuming[name]])} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("pruning"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    resuming = {name: resumed(name, args.work) for name in VARIANTS}
    print(json.dumps(resuming, indent=1), flush=True)
    todo = [(name, seed) for seed in args.seeds for name in VARIANTS]
    runs = [accuracy(name, seed, args.work) for name, seed in track(todo, description="training")]
    print(table(runs, resuming))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps({"runs": runs, "resumed": resuming}, indent=1))


if __name__ == "__main__":
    main()
