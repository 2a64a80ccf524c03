"""NaN and infinity: one policy for all methods (docs/concepts.md)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision

from lightning_peft import (
    FTWT,
    GBLM,
    PERP,
    PSKD,
    SAP,
    BlockPruning,
    FisherEstimator,
    GroupEnvelope,
    Lane,
    LayerGrowth,
    MagnitudePruning,
    MaskedPruning,
    Method,
    MixtureGrowth,
    NMSparsity,
    StageSharing,
    StructuredPruning,
    TrainedRankPruning,
    Wanda,
    WeightCompander,
)
from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.compose.run import Run
from lightning_peft.testing.modules import Conv, Plain, deepened
from lightning_peft.testing.runs import assert_clean, fit
from lightning_peft_plugins.growth._shared.triggers import Plateau
from lightning_peft_plugins.pruning._block_pruning.block_activations import BlockActivations
from lightning_peft_plugins.pruning._shared.layer_statistics import LayerStatistics

Deep = deepened(Plain)
FAMILIES: list[tuple[type[Plain], Callable[[], Method]]] = [
    (Plain, NMSparsity),
    (Plain, WeightCompander),
    (Plain, PSKD),
    (Plain, lambda: MagnitudePruning(0.5)),
    (Plain, lambda: SAP(start=1, every=1, end=3)),
    (Plain, lambda: PERP(rank=2)),
    (Plain, TrainedRankPruning),
    (Conv, lambda: GroupEnvelope(0.5, end=3)),
    (Conv, FTWT),
    (Conv, lambda: MixtureGrowth(at="step:3")),
    (Conv, lambda: StructuredPruning(0.2, start=3)),
    (Deep, lambda: LayerGrowth(at="step:3", start=2)),
    (Deep, lambda: StageSharing(2, at="step:3")),
    (Deep, lambda: BlockPruning(1, start=3, every=2)),
]


def spoilt(style: type[Plain], step: int) -> type[Plain]:
    """The same module, whose loss is NaN at one step."""

    def base_loss(self: Plain, batch: object) -> torch.Tensor:
        loss: torch.Tensor = style.base_loss(self, batch)
        return loss * math.nan if self.trainer.training and self.trainer.global_step == step else loss

    return type(style.__name__, (style,), {"base_loss": base_loss})


@pytest.mark.parametrize(("style", "make"), FAMILIES, ids=[repr(make())[:24] for _, make in FAMILIES])
def test_a_loss_that_is_nan_stops_every_method_in_time(style: type[Plain], make: Callable[[], Method]) -> None:
    torch.manual_seed(0)
    module = spoilt(style, 2)()
    with pytest.raises(NonFiniteLossError, match="your training_step returned is nan"):
        fit([make()], module=module)
    assert all(value.isfinite().all() for value in module.parameters())


def test_a_gradient_scaler_skips_such_a_step_as_ever() -> None:
    torch.manual_seed(0)
    module = spoilt(Plain, 2)()
    fit([NMSparsity("2:4")], module=module, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert all(value.isfinite().all() for value in module.parameters())


class Spoils(Method):
    """Makes a layer, or all of them, NaN after a step."""

    lane = Lane.REPORT

    def __init__(self, step: int, layer: str = "") -> None:
        super().__init__(name="a")
        self.step, self.layer = step, layer

    def after_step(self, run: Run) -> None:
        if run.step == self.step:
            with torch.no_grad():
                for parameter in run.module.get_submodule(self.layer).parameters():
                    parameter.mul_(math.nan)


def test_a_layer_that_is_nan_does_not_spread_to_those_it_is_compared_with() -> None:
    torch.manual_seed(0)
    module = Conv()

    noted = {}

    class First(Spoils):
        lane = Lane.MASK

        def after_step(self, run: Run) -> None:
            super().after_step(run)
            noted.update({name: value.detach().clone() for name, value in run.module.named_parameters()})

    with pytest.raises(NonFiniteLossError):
        fit([First(2, "model.3"), GroupEnvelope(0.5, end=3)], module=module)
    assert not module.model[3].weight.isfinite().any()
    others = [name for name in noted if not name.startswith("model.3.")]
    assert all(torch.equal(module.get_parameter(name), noted[name]) for name in others), "by a NaN nothing is shrunk"


def test_scores_of_the_last_step_that_are_nan_are_none() -> None:
    torch.manual_seed(0)
    method = FisherEstimator("train", samples=8, targets="all-linear")
    with pytest.warns(UserWarning, match="fisher_estimator scored nothing after step 4"):
        fit([Spoils(4), method])
    assert method.scores == {}


def test_a_gradient_that_is_not_finite_is_not_seen() -> None:
    seen = LayerStatistics({"|g|", "x^2"})
    layer = torch.nn.Linear(2, 1)
    for values in ([1.0, 2.0], [math.inf, 4.0], [math.nan, -6.0]):
        seen.see_gradient(layer.weight, torch.tensor([values]))
        seen.see_inputs(layer, torch.tensor([values]))
    assert seen.sums["|g|"].tolist() == [[1.0, 12.0]]
    assert seen.sums["x^2"].tolist() == [1.0, 56.0]
    block = BlockActivations()
    for value in (0.5, math.nan, 0.5):
        block.add(torch.tensor(value))
    assert block.mean() == 0.5


def test_a_metric_that_is_nan_is_no_plateau() -> None:
    plateau = Plateau(patience=2, min_delta=0.01)
    for value in (1.0, math.nan, math.nan, math.inf):
        plateau.look(value)
    assert not plateau.reached
    assert plateau.best == 1.0


@pytest.mark.parametrize(
    ("style", "make"),
    [
        (Plain, lambda: MaskedPruning(pattern="2:4", start=2)),
        (Plain, lambda: GBLM(0.5, start=2, every=2)),
        (Plain, lambda: Wanda(pattern="2:4", start=2, every=2)),
        (Plain, lambda: SAP(start=2, every=1, end=3)),
        (Conv, lambda: StructuredPruning(0.2, start=2)),
        (Deep, lambda: BlockPruning(1, "magnitude", start=2, every=2)),
    ],
    ids=lambda value: repr(value())[:30] if not isinstance(value, type) else value.__name__,
)
def test_nothing_is_chosen_by_scores_that_are_nan(style: type[Plain], make: Callable[[], Method]) -> None:
    class Broken(Method):
        """Spoils all weights after the second step, before the methods of later names and lanes look at them."""

        lane = type(make()).lane
        strategies = frozenset({"single"})

        def after_step(self, run):
            if run.step == 2:
                with torch.no_grad():
                    for parameter in run.module.parameters():
                        parameter.mul_(math.nan)

    torch.manual_seed(0)
    module = style()
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"Scores of .* are NaN, so nothing can be ranked"):
        fit([Broken(name="a"), make()], module=module)
    assert_clean(module, "scores that are NaN")
    assert shapes == {name: value.shape for name, value in module.state_dict().items()}
