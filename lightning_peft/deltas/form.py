"""What a weight gains: few parameters, and a function of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from lightning_peft.deltas.layout import Layout

Beside = Literal["any", "linear", "none"]
LARGEST = 16  # times the weight, what a file may ask for; factors of full rank with what they began as are below that
_FORMS: dict[str, type[Form]] = {}


class Form(nn.Module):
    """The parameters of one delta; subclasses define :meth:`delta`, or :meth:`of` where the update is no sum.

    One that is a product of thin matrices is a :class:`~lightning_peft.deltas.factored_form.FactoredForm`.

    A subclass is known by its ``kind`` from then on, so that checkpoints can be read: it takes the layout, the rank and further
    plain arguments, which :meth:`config` returns.

    Attributes:
        kind: Name in checkpoints.
        beside: Layers beside which it can stand; it acts on the weight of all others.
        reason: Why it acts on those.
        tables: Whether rows that are looked up, as in an embedding, can have it.
        rank: Its rank.
        share: Factor of the delta among several, see :func:`lightning_peft.blend`.
    """

    share: float = 1.0
    kind: ClassVar[str]
    beside: ClassVar[Beside] = "none"
    reason: ClassVar[str] = "it is no product of thin matrices"
    tables: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            _FORMS[cls.kind] = cls

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__()
        self._layout, self.rank = layout, rank

    @property
    def peft(self) -> str | None:
        """Name of the type of adapter that PEFT has for it, see :mod:`~lightning_peft.deltas.peft_format`."""
        return None

    @property
    def layout(self) -> Layout:
        """How the weight is read as a matrix; follows the cuts that reach the form's parameters."""
        return self._layout

    def reset(self, weight: Tensor, generator: Generator) -> None:
        """Set the parameters so that the layer computes what it did.

        Args:
            weight: The frozen weight, as a matrix.
            generator: What random values are drawn from.
        """
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return what the weight gains, as a matrix."""
        raise NotImplementedError

    def of(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer sees, as a matrix, for the frozen one."""
        return weight + self.share * self.delta().to(weight.dtype)

    def on_weight(self, weight: Tensor) -> Tensor:
        """The same in the shape that the layer keeps its weight in."""
        return self.layout.weight(self.of(self.layout.matrix(weight)))

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor but the layout, as plain data."""
        return {"rank": self.rank}

    @classmethod
    def trainable(cls, layout: Layout, rank: int, **arguments: Any) -> int:
        """Count the parameters of one delta by the closed formula.

        Args:
            layout: How the weight is read as a matrix.
            rank: Its rank.
            **arguments: What else the constructor takes.
        """
        raise NotImplementedError


def build_form(
    kind: str, shape: list[int], transposed: bool, stacked: bool, arguments: Mapping[str, Any], share: float = 1.0
) -> Form:
    """Make the form that a checkpoint describes.

    Raises:
        ValueError: No form is called so, or it would be larger than any product of its kind.
    """
    layout, rank = Layout(torch.Size(shape), transposed, stacked), arguments.get("rank", 0)
    if kind not in _FORMS or not 0 < rank <= layout.largest_rank:
        raise ValueError(f"there is no delta {kind!r} of rank {rank} for a weight of shape {shape}")
    with torch.device("meta"):  # nothing is allocated before its size is known
        size = sum(tensor.numel() for tensor in _FORMS[kind](layout, **arguments).state_dict().values())
    if size > LARGEST * layout.shape.numel():
        raise ValueError(f"a delta {kind!r} with {arguments} would be {size:,} numbers for a weight of shape {shape}")
    form = _FORMS[kind](layout, **arguments)
    form.share = share
    return form


def described(form: Form) -> dict[str, Any]:
    """Return what :func:`build_form` takes, as plain data."""
    layout = form.layout
    placed = {"shape": list(layout.shape), "transposed": layout.transposed, "stacked": layout.stacked}
    return {"kind": form.kind, **placed, "arguments": form.config(), "share": form.share}
