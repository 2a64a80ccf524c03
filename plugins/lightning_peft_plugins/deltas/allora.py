"""ALLoRA: a product whose rows learn the faster the shorter they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_peft.arguments import positive
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas.functional.allora import row_rates


class RatedForm(LowRankForm):
    """``B A``, whose gradient is multiplied row by row on its way to both factors.

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``.
        scale: Factor of the product.
        table: Whether rows of the weight are looked up, as in an embedding.
        eta: Factor of a row of zeros.
    """

    kind = "rated"
    beside = "linear"
    reason = "the gradients of its rows are scaled"

    def __init__(self, layout: Layout, rank: int, scale: float = 1.0, table: bool = False, eta: float = 2.0) -> None:
        super().__init__(layout, rank, scale, table)
        self.eta = eta

    def rates(self) -> Tensor:
        """Factors of the rows, shape ``(outputs,)``, without a graph."""
        return row_rates(self.rows().detach(), self.up.detach(), self.eta)

    def delta(self) -> Tensor:
        whole = super().delta()
        if not torch.is_grad_enabled():
            return whole
        return whole + only_gradient(whole * (self.rates() - 1).unsqueeze(-1))

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "table": self.table, "eta": self.eta}


class RatedPart(DeltaPart):
    """Such a product beside a linear layer: what reaches the inputs is the gradient as it is."""

    kind = "rated_delta"
    form: Any

    def around(self, call: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = super().around(call, layer, args, kwargs)
        form = self.form
        if not output.requires_grad:
            return output
        inputs = (args[0] if args else next(iter(kwargs.values()))).detach()
        down, up = (factor.to(inputs.dtype) for factor in form.factors())
        product = linear(linear(inputs, down), up) * (form.scale * form.share * (form.rates() - 1))
        return output + only_gradient(product.to(output.dtype))


def only_gradient(value: Tensor) -> Tensor:
    """Zeros with the gradient of a tensor.

    Args:
        value: Finite numbers.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> zero = only_gradient(x * x)
        >>> zero.backward()
        >>> zero.item(), x.grad.item()
        (0.0, 6.0)
    """
    return value - value.detach()


class ALLoRA(ProductDelta):
    """ALLoRA (Huang and Balestriero, 2024): the gradient of row ``i`` of ``B A`` is divided by a root of that row's length.

    There is no scale and no dropout; ``eta`` is what remains to be chosen. The network computes what it does with LoRA.

    Args:
        rank: Rows of ``A`` and columns of ``B``.
        eta: Factor of the gradient of a row of zeros, which all are at first.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.product_delta.ProductDelta`.

    Example:
        >>> ALLoRA(rank=4).eta
        2.0
    """

    slots = Slots(rule=("allora",))
    fixed_arguments = frozenset({"alpha", "scaling", "init", "dropout"})
    kind = RatedForm
    part = RatedPart
    parts = (RatedPart,)
    paper = "Huang and Balestriero, ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws, 2024, arXiv 2410.09692"

    def __init__(self, rank: int = 8, eta: float = 2.0, **kwargs: Any) -> None:
        super().__init__(rank, None, "rank", "lora", **kwargs)
        positive("eta", eta, "It is the factor of the gradient of a row of zeros.")
        self.eta = eta

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"eta": self.eta}
