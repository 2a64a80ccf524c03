"""Loss terms: what a method adds to the user's loss inside ``training_step``, and how the terms combine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.capture.tap import Captured, Tap
from lightning_peft.network.logits import as_logits

if TYPE_CHECKING:
    from lightning_peft.compose.run import Run


@dataclass(frozen=True, slots=True)
class Loss:
    """The result of a loss method: the optimised loss becomes ``scale * base + value``, values of other methods unscaled.

    Attributes:
        value: Scalar to add, with its graph.
        scale: Factor of the user's loss; a method that sets it declares ``Resource.LOSS_SCALE``.
    """

    value: Tensor | float = 0.0
    scale: Tensor | float = 1.0


@dataclass(slots=True)
class Step:
    """One call of the user's ``training_step``, as a method sees it.

    Attributes:
        base_loss: The user's own loss, a scalar.
        batch: The batch the user's step was given.
        batch_idx: Its position in the epoch.
        run: The training this step belongs to.
        tap: The tap of the network.
        repeated: Whether this batch was seen in this optimizer step already (:meth:`StepClosure.again`): return the term, and
            remember nothing.
    """

    base_loss: Tensor
    batch: Any
    batch_idx: int
    run: Run
    tap: Tap | None = None
    repeated: bool = False

    @property
    def call(self) -> Captured:
        """The latest call of the network in this step."""
        if self.tap is None:
            raise RuntimeError("The method must declare Resource.LOGITS or Resource.INPUTS in `reads` to see the network.")
        return self.tap.last()

    @property
    def logits(self) -> Tensor:
        """Logits of the latest call of the network, with their graph."""
        return as_logits(self.call.output)

    @property
    def sample_index(self) -> Tensor:
        """Positions in the dataset of this batch's samples, shape ``(batch,)``, as the training loader drew them."""
        if self.run.samples is None:
            raise RuntimeError("The method must declare Resource.SAMPLE_INDEX in `reads` to see sample indices.")
        return self.run.samples.indices()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Positional arguments of the latest call of the network."""
        return self.call.args


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; raised before the backward pass, so no weight has been touched."""


def combine(loss: Tensor, terms: Mapping[str, Loss]) -> Tensor:
    """Combine a loss with loss terms: scales act on the user's loss alone, values add up in the order given.

    Args:
        loss: The user's loss, a scalar.
        terms: Term of each method by its name.

    Returns:
        The scalar to optimise.

    Example:
        >>> combine(torch.tensor(2.0), {"a": Loss(value=0.25), "b": Loss(scale=0.5)})
        tensor(1.2500)
    """
    for term in terms.values():
        if not (isinstance(term.scale, float) and term.scale == 1.0):
            loss = term.scale * loss
    for term in terms.values():
        if not (isinstance(term.value, float) and term.value == 0.0):
            loss = loss + term.value
    return loss


def split_output(output: Any) -> Tensor:
    """Return the loss out of what a ``training_step`` returned: a tensor, or a mapping with ``loss``."""
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
    return loss


def join_output(output: Any, loss: Tensor) -> Any:
    """Put a loss in the place it was taken from, leaving the user's own object unchanged."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def check_finite(base: Tensor, terms: Mapping[str, Loss]) -> None:
    """Raise when a loss is not finite, naming who made it so.

    Raises:
        NonFiniteLossError: The user's loss or a method's term is NaN or infinite.
    """
    if not _is_finite(base):
        raise NonFiniteLossError(
            f"The loss your training_step returned is {base.item()}. No weight was changed in this step: resume from the last "
            "checkpoint with a lower learning rate or gradient_clip_val, or find the source with "
            "Trainer(detect_anomaly=True)."
        )
    for name, term in terms.items():
        if not (_is_finite(term.value) and _is_finite(term.scale)):
            raise NonFiniteLossError(
                f"The loss term of {name} is not finite while your own loss is {base.item():.4g}. No weight was changed in "
                f"this step: lower the weight of {name} or the learning rate, and resume from the last checkpoint."
            )


def _is_finite(value: Tensor | float) -> bool:
    if isinstance(value, Tensor) and value.numel() != 1:
        return bool(torch.isfinite(value).all())
    return math.isfinite(value.item() if isinstance(value, Tensor) else value)  # in a tenth of the time
