"""Where a delta stands: beside the layer or on its weight, with one result, and refusals that name the cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import NMSparsity, WeightCompander
from lightning_peft.deltas import sides
from lightning_peft.functional import is_nm
from lightning_peft.testing import runs
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts
from lightning_peft_plugins.deltas.dora import DoRA
from lightning_peft_plugins.deltas.lora import LoRA

BATCH = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(0)).fill_diagonal_(0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Two experts in one tensor, as transformers stacks them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,eoi->bso", x, self.up)


class Whole(nn.Module):
    """Numbers that stand for weights, as quantised layers hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(8, 8, dtype=torch.long), requires_grad=False)


def padded() -> nn.Module:
    """A table whose row of padding says something, so that it would learn if it could."""
    return nn.Embedding.from_pretrained(torch.randn(9, 8), freeze=False, padding_idx=0)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Any]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), BATCH, "all-linear"),
    "convolution": (lambda: nn.Conv1d(6, 4, 3, padding=1, stride=2), BATCH, "all-conv"),
    "dilated": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding="same"), BATCH[None], "all-conv"),
    "groups": (lambda: nn.Conv1d(6, 4, 3, groups=2), BATCH, "all-conv"),
    "reflected": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="reflect"), BATCH, "all-conv"),
    "table": (padded, IDS, nn.Embedding),
    "clipped table": (lambda: nn.Embedding(9, 8, scale_grad_by_freq=True), IDS, nn.Embedding),
    "transposed": (lambda: nn.Sequential(transformers.pytorch_utils.Conv1D(5, 8)), BATCH, "all-linear"),
    "attention": (Attending, BATCH, ["attention", "all-linear"]),
    "experts": (lambda: nn.Sequential(Experts()), BATCH, "type:Experts"),
}
ON_WEIGHTS = {"groups", "reflected", "clipped table", "attention", "experts"}


class Trained(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network.double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def fitted(name: str, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], LoRA]:
    """State before and after a training, and the method."""
    make, data, targets = NETWORKS[name]
    torch.manual_seed(0)
    module = Trained(make())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    method = LoRA(**{"rank": 2, "alpha": 3, "targets": targets, "exclude": None, **settings})
    trainer(callbacks=[method], max_epochs=3).fit(module, DataLoader(data, batch_size=len(data)))  # type: ignore[arg-type]
    return before, module.state_dict(), method


@pytest.mark.parametrize("name", NETWORKS)
def test_both_sides_train_to_one_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, beside, _ = fitted(name)
    monkeypatch.setattr(sides, "why_on_weight", lambda *_: "told to")
    _, on_weight, _ = fitted(name)
    changed = [key for key in before if not torch.equal(before[key], beside[key])]
    assert changed, "nothing was learnt"
    for key in before:
        torch.testing.assert_close(beside[key], on_weight[key], atol=1e-12, rtol=1e-12)
    for key in changed:
        gained = beside[key] - before[key]
        matrices = gained if name == "experts" else gained.flatten(1)
        assert torch.linalg.matrix_rank(matrices, atol=1e-12).max() <= 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_says_which_side(name: str) -> None:
    make, _, targets = NETWORKS[name]
    module = Trained(make())
    method = LoRA(rank=2, targets=targets, exclude=None)
    assert any(place.side == "weight" for place in method.places(module)) == (name in ON_WEIGHTS)
    assert ("on the weight" in str(lightning_peft.plan(module, [method]))) == (name in ON_WEIGHTS)


def test_the_plan_says_that_the_head_stays_frozen() -> None:
    def said(**settings: Any) -> str:
        return str(
            lightning_peft.plan(Trained(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))), [LoRA(2, **settings)])
        )

    assert "the head (net.2) stays frozen, tune=('head',) trains it" in said()
    assert "stays frozen" not in said(tune=("head",)) + said(exclude=None)


@pytest.mark.parametrize("name", ["linear", "convolution", "experts", "table"])
def test_the_plan_counts_parameters_by_the_formula(name: str) -> None:
    make, _, targets = NETWORKS[name]
    expected = {
        "linear": 2 * (8 + 5) + 2 * (5 + 3),
        "convolution": 2 * (4 + 6 * 3),
        "experts": 2 * 2 * (8 + 8),
        "table": 2 * (9 + 8),
    }
    plan = str(lightning_peft.plan(Trained(make()), [LoRA(rank=2, targets=targets, exclude=None)]))
    assert f"{expected[name]} parameters" in plan


def test_under_a_mask_the_delta_acts_on_the_weight_and_zeros_stay() -> None:
    module = Trained(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    methods = [LoRA(rank=2, exclude=None), NMSparsity("2:4", exclude=())]
    assert "2 of them on the weight (other methods map it)" in str(trained_plan(module, methods))
    trainer(callbacks=methods, max_epochs=3).fit(module, DataLoader(BATCH, batch_size=4))  # type: ignore[arg-type]
    assert all(is_nm(layer.weight, 2, 4) for layer in module.net if isinstance(layer, nn.Linear))


def trained_plan(module: LightningModule, methods: list[Any]) -> str:
    """What a method says of itself in a fit, where it knows of the others."""
    said: list[str] = []

    class Listens(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            said.append(methods[0].describe(pl_module))

    trainer(callbacks=[*methods, Listens()]).fit(module, DataLoader(BATCH, batch_size=4))  # type: ignore[arg-type]
    return said[0]


def test_a_compander_and_a_delta_on_one_weight() -> None:
    module = Trained(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    methods = [LoRA(rank=2, exclude=None), WeightCompander(exclude=())]
    trainer(callbacks=methods, max_epochs=2).fit(module, DataLoader(BATCH, batch_size=4))  # type: ignore[arg-type]
    assert all(value.isfinite().all() for value in module.state_dict().values())


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "rank": (lambda: nn.Sequential(nn.Linear(8, 3)), {"rank": 4}, r"rank=4 is above the rank of net\.0\.weight, \(3, 8\)"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))),
        {},
        r"net\.0\.weight is computed by a parametrization",
    ),
    "integers": (lambda: Whole(), {"targets": "type:Whole"}, r"net\.table is of type torch\.int64"),
    "no matrix": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)),
        {"targets": ["re:net$"]},
        r"Name its layers: targets=\['net\.1'\]",
    ),
    "dropout": (lambda: nn.Conv1d(6, 4, 3, groups=2), {"targets": "all-conv", "dropout": 0.1}, "Set dropout=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_delta_can_stand_on_is_refused_and_the_advice_works(name: str) -> None:
    make, settings, words = REFUSED[name]
    module = Trained(make())
    with pytest.raises(MisconfigurationException, match=words) as refusal:
        fit(module, LoRA(**{"rank": 2, "exclude": None, **settings}))
    if name == "rank":
        (rank,) = re.findall(r"at most rank=(\d+)", str(refusal.value))
        fit(module, LoRA(rank=int(rank), exclude=None))
    elif name == "dropout":
        fit(module, LoRA(**{"rank": 2, "exclude": None, **settings, "dropout": 0.0}))
    elif name == "no matrix":
        fit(module, LoRA(rank=2, exclude=None, targets=["net.1"]))


def fit(module: LightningModule, method: LoRA) -> None:
    trainer(callbacks=[method]).fit(module, DataLoader(BATCH, batch_size=4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"), [({"rank": 0}, "rank=0 must be positive"), ({"alpha": 0.0}, "alpha=0.0 must be positive")]
)
def test_arguments_that_make_no_sense(settings: Any, words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        LoRA(**settings)


def test_lengths_on_top_of_another_adapter_scale_its_rows_too() -> None:
    """Beside a layer they would see the frozen weight alone, and would scale nothing at all outside of another part."""
    module = Plain()
    runs.fit([LoRA(4, keep=True)], module=module)
    runs.fit([DoRA(4, keep=True, name="lengths")], module=module.train())
    inputs = next(iter(loader(8)))[0]
    live = module.eval().logits(inputs)
    weight, bias = (module.model[0].state_dict()[key] for key in ("parametrizations.weight.original", "bias"))
    maps = {each.name: each.maps for each in mapped_tensors(module)}
    part = next(each.part for each in placed_parts(module))
    form: Any = maps["model.0.weight"][0].form  # type: ignore[attr-defined]
    whole = weight + form.scale * form.up @ form.down
    rows = whole * (form.magnitude / whole.norm(dim=1)).unsqueeze(1)
    lora: Any = part.form
    expected = inputs @ (rows + lora.scale * lora.up @ lora.down).T + bias
    torch.testing.assert_close(module.model[0](inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lightning_peft.bake(module).logits(inputs), live, atol=1e-5, rtol=1e-5)
