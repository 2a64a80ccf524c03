"""LoRA beside other methods, on real data: trained, killed, resumed bit for bit, baked.

    python benchmarks/delta_company.py

As in ``kills.py`` every training runs once left alone, and once ended by SIGKILL in two of its steps and taken up again. At the
end of each the network is compared with what its last checkpoint is baked to, and looked at for what the other method
promises. Networks have their pretrained weights and no dropout, whose random numbers a user's checkpoint does not hold.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kills import Killed, attempt, same_batches, train
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import EATA, PSKD, AdaLoRA, FisherEstimator, LayerGrowth, LoRA, Method, NMSparsity, Tent, bake_checkpoint
from lightning_peft.functional import is_nm
from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.runs import Fit, seed_all
from lightning_peft.testing.trace import difference
from lightning_peft_recipes.groceries import GroceriesDataModule
from lightning_peft_recipes.image_classifier import TimmClassifier
from lightning_peft_recipes.reviews import ReviewsDataModule
from lightning_peft_recipes.text_classifier import TextClassifier

KILLS = 2
SCORED = 16  # samples
POINTWISE = {"targets": "pointwise", "exclude": ["first", "head", r"re:blocks\.[0123]\."]}


def photos() -> LightningDataModule:
    """A few grocery photos, the same crops every time."""
    return GroceriesDataModule(image_size=64, augment=False, subset=28, eval_batch_size=14)


def reviews() -> LightningDataModule:
    """A few sentences of Rotten Tomatoes; the shift is IMDb."""
    return ReviewsDataModule("rotten_tomatoes", max_length=24, eval_batch_size=16, train_size=32, val_size=32, test_size=64)


def without_dropout(module: LightningModule) -> LightningModule:
    """Let no dropout draw."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def lite0() -> LightningModule:
    """EfficientNet-Lite0."""
    return without_dropout(TimmClassifier(lr=3e-4, drop_rate=0.0))


def minilm() -> LightningModule:
    """MiniLM."""
    return without_dropout(TextClassifier(lr=1e-3))


def stays_sparse(run: Fit, data: LightningDataModule) -> str:
    """The products are in the weights, and these are 2:4."""
    (nm,) = (method for method in run.methods if isinstance(method, NMSparsity))
    layers, base = nm.select(run.module), nm.select(lite0())
    assert all(is_nm(layer.weight, 2, 4, dim=1) for layer in layers.values())
    survivors = [(layer.weight[layer.weight != 0], base[name].weight[layer.weight != 0]) for name, layer in layers.items()]
    assert all(not torch.equal(now, before) for now, before in survivors)
    return f"the merged weights of {len(layers)} layers are 2:4, and what is left has moved"


def learns_from_itself(run: Fit, data: LightningDataModule) -> str:
    """PS-KD remembers what the network said of every sample."""
    (pskd,) = (method for method in run.methods if isinstance(method, PSKD))
    seen = int(pskd.state()["seen"].sum())
    assert seen == 8, f"PS-KD remembers {seen} samples"
    return f"PS-KD remembers its soft labels of the {seen} samples"


def adapts(run: Fit, data: LightningDataModule) -> str:
    """Test-time methods move LayerNorm of the merged network for the shift, and give it back."""
    template = data.test_dataloader()
    shifted = DataLoader(data.shifted("imdb"), batch_size=16, collate_fn=template.collate_fn)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    before = {key: value.clone() for key, value in run.module.state_dict().items()}
    (source,) = Trainer(accelerator="cpu", **quiet).test(run.module, shifted, verbose=False)
    moved = []
    for method in (Tent(lr=1e-2), EATA(lr=1e-2, d_margin=1.0, e_margin=1.0, fisher=template, fisher_samples=32)):
        (adapted,) = Trainer(accelerator="cpu", callbacks=[method], **quiet).test(run.module, shifted, verbose=False)
        assert adapted["test/loss"] != source["test/loss"], f"{method.name} did not move"
        moved.append(type(method).__name__)
        assert all(torch.equal(value, before[key]) for key, value in run.module.state_dict().items())
    return f"{' and '.join(moved)} move its LayerNorm for IMDb, and give it back"


def scores_the_sum(run: Fit, data: LightningDataModule) -> str:
    """Scores taken with the products beside frozen layers are those of the merged network."""
    (found,) = (method for method in run.methods if isinstance(method, FisherEstimator))
    again = FisherEstimator(samples=SCORED)
    trainer(callbacks=[again]).validate(run.module, same_batches(data.train_dataloader()), verbose=False)
    assert found.scores.keys() == again.scores.keys()
    worst = max(
        float((found.scores[name] - score).norm() / score.norm().clamp_min(1e-12)) for name, score in again.scores.items()
    )
    assert worst < 1e-3, f"scores differ by {worst}"
    return f"the scores of {len(found.scores)} tensors are those of the merged network to {worst:.0e}"


def grows(run: Fit, data: LightningDataModule) -> str:
    """The network has all its layers, and what all of them gained on what they were copied from has the ranks of the budget."""
    (ada,) = (method for method in run.methods if isinstance(method, AdaLoRA))
    small, layers, ranks = base_of(CASES["AdaLoRA + LayerGrowth"]), set(), 0
    for name, layer in ada.select(run.module).items():
        if found := re.search(r"\.layer\.(\d+)\.", name):  # every layer of the small network stands twice in a row
            layers.add(found[1])
            name = name.replace(found[0], f".layer.{int(found[1]) // 2}.")
        base = small.get_submodule(name).weight.detach()  # type: ignore[operator, union-attr]
        rounding = torch.finfo(base.dtype).eps * float(base.norm())  # of the weight that the product went into
        ranks += int((torch.linalg.svdvals((layer.weight.detach() - base).double()) > rounding).sum())
    budget = ada.target * len(ada.select(run.module))
    assert len(layers) == 6
    assert 0 < ranks <= budget, f"ranks {ranks} of a budget of {budget}"
    return f"3 layers have become {len(layers)}, and their weights gained {ranks} ranks, of a budget of {budget}"


@dataclass(frozen=True)
class Case:
    """What is trained, and what must hold of it."""

    methods: Callable[[], list[Method]]
    module: Callable[[], LightningModule]
    data: Callable[[], LightningDataModule]
    holds: Callable[[Fit, LightningDataModule], str]


def low_rank(**settings: Any) -> LoRA:
    """LoRA of rank 4 with the head."""
    return LoRA(rank=4, tune=("head",), **settings)


CASES = {
    "LoRA + NMSparsity 2:4": Case(lambda: [low_rank(**POINTWISE), NMSparsity("2:4", **POINTWISE)], lite0, photos, stays_sparse),
    "LoRA + PSKD": Case(lambda: [low_rank(), PSKD()], lite0, photos, learns_from_itself),
    "LoRA, then Tent and EATA": Case(lambda: [low_rank()], minilm, reviews, adapts),
    "LoRA + FisherEstimator": Case(
        lambda: [low_rank(), FisherEstimator("train", samples=SCORED)], minilm, reviews, scores_the_sum
    ),
    "AdaLoRA + LayerGrowth": Case(
        lambda: [
            AdaLoRA(rank=6, target=4, tinit=2, tfinal=2, every=1, tune=("head",)),
            LayerGrowth("interpolate", at="step:6", start=3),
        ],
        minilm,
        reviews,
        grows,
    ),
}


def train_case(case: Case, killers: list[Callback], folder: Path, number: int) -> None:
    """Train, bake the last checkpoint and compare, and write down what holds."""
    data = case.data()
    data.prepare_data()
    data.setup()
    run = train(
        case.methods(),
        folder,
        number,
        module=base_of(case),
        data=same_batches(data.train_dataloader()),
        after=killers,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    plain = torch.load(bake_checkpoint(folder / "last.ckpt", folder / "baked.ckpt", base=base_of(case)), weights_only=True)
    ordinary = base_of(case)
    ordinary.load_state_dict(plain["state_dict"])
    found = difference(dict(ordinary.state_dict()), dict(run.module.state_dict()))
    assert found is None, f"baked and trained differ: {found}"
    (folder / "holds.txt").write_text(case.holds(run, data))


def base_of(case: Case) -> LightningModule:
    """The module as every attempt began with it."""
    seed_all(0)
    return case.module()


def whole_and_killed(case: Case, draw: random.Random, folder: Path) -> str | None:
    """Train left alone and killed, in folders of these names, and return the first difference.

    Raises:
        CheckpointError: A training failed.
    """
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    attempt(partial(train_case, case, []), whole, 0)
    for number in range(KILLS):
        killer = Killed(draw.randint(2, 5), draw.random() < 0.5)
        ended, _ = attempt(partial(train_case, case, [killer]), killed, number + 5)
        assert not ended, "it ended before it was killed"
    attempt(partial(train_case, case, []), killed, KILLS + 5)
    states = [torch.load(path / "final.pt", weights_only=True) for path in (whole, killed)]
    return difference(*states)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in arguments.cases:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                found = whole_and_killed(CASES[name], random.Random(name), folder)
            except CheckpointError as error:
                found = str(error)
            holds = (folder / "killed" / "holds.txt").read_text() if found is None else found
        failed += found is not None
        same = "the same, bit for bit, and baked to what was trained" if found is None else "NOT the same"
        print(f"{name}: {KILLS} kills, {same}; {holds} ({time.monotonic() - start:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
