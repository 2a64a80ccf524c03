"""Layer parts that do nothing, or will be missed: said, because nothing else would show it."""

from __future__ import annotations

from collections.abc import Collection

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.part_states import unmergeable
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.parts import PlacedPart, placed_parts


def check_called(module: nn.Module) -> None:
    """Refuse to train a part beside a layer whose weight is used and which is not called; ask when gradients are there.

    Raises:
        MisconfigurationException: There is such a layer.
    """
    for placed in _uncalled(module):
        weight = placed.layer._parameters.get("weight")
        if weight is not None and weight.grad is not None:
            raise MisconfigurationException(
                f"{placed.path}.weight has a gradient, but {placed.path} was not called: code reads the weight and calls a "
                f"function with it, which bypasses the part {placed.part.kind!r} of {placed.part.owner}. Leave the layer out "
                f"with exclude=[{placed.path!r}], or call it: {placed.path}(x) instead of linear(x, {placed.path}.weight)."
            )


def warn_uncalled(module: nn.Module) -> None:
    """Say at the end of a training which parts no call came by."""
    if idle := [f"{placed.part.kind!r} of {placed.part.owner} on {placed.path}" for placed in _uncalled(module)]:
        rank_zero_warn(
            f"No call of its layer reached the part {idle[0]}{_more(idle)}, so it did nothing in this training. If the layer "
            "is used, code reads its weight instead of calling it; leave such layers out with exclude=."
        )


def warn_untrained(trainer: Trainer, module: nn.Module) -> None:
    """Say which parts no optimizer trains."""
    trained = trained_by(*trainer.optimizers)
    idle = [
        f"{placed.part.kind!r} of {placed.part.owner} on {placed.path}"
        for placed in placed_parts(module)
        if any(parameter.requires_grad and parameter not in trained for parameter in placed.part.parameters())
    ]
    if idle:
        rank_zero_warn(
            f"No optimizer trains the part {idle[0]}{_more(idle)}, because none trains its layer. Let configure_optimizers "
            "give one of them self.parameters(), or the parameters of self that require a gradient: both contain the parts'."
        )


def warn_lost(module: nn.Module, stay: Collection[Attachment] = frozenset()) -> None:
    """Say which parts a module is about to lose for good, because they cannot go into its weights and do not stay."""
    if lost := unmergeable(module, stay):
        rank_zero_warn(
            f"The fit is over and the module is an ordinary one again, without the part {lost[0]}{_more(lost)}, which cannot "
            "be merged into a weight. It is in the checkpoints, and comes back when the module is trained, tested or used "
            "in predict with its method among the callbacks."
        )


def _uncalled(module: nn.Module) -> list[PlacedPart]:
    return [placed for placed in placed_parts(module) if placed.part.enabled and not placed.part.called]


def _more(names: list[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""
