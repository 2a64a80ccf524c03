"""The weight maps of the compander: scales as published, and scales fitted to each layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Lane, WeightMap
from lightning_peft.arguments import positive
from lightning_peft.weights.functions import as_type
from lightning_peft.weights.shards import by_parts
from lightning_peft_plugins.regularizers.functional.compander import compand, compand_inverse, compander_scales

FLOOR = 1e-3  # of learned scales: one that reaches zero has no function
_NEAR = 0.999  # share of the bound up to which a weight has a stored value worth having


class ArctanMap(WeightMap):
    """The map ``w = a arctan(v / b)``; subclasses say where ``a`` and ``b`` come from.

    Learned scales have shape ``(1,)``: FSDP2 shards no tensor without dimensions.
    """

    lane = Lane.REPARAM
    optimizer_overrides = {"weight_decay": 0.0}

    def scales(self, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """Return ``a`` and ``b``, positive: tensors of shape ``(1,)`` of at least single precision, or numbers."""
        raise NotImplementedError

    def splits(self, weight: Tensor) -> bool:
        return True

    def forward(self, weight: Tensor) -> Tensor:
        return by_parts(compand, weight, *self.scales(weight.dtype))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


class CompanderMap(ArctanMap):
    """The map ``w = a arctan(v / b)`` on the weights of one layer, with the scales of the paper.

    A plain weight that comes in (when the map is attached, when the layer is reset, when the weights of an ordinary module are
    loaded) sets learned scales to where they began. Where it lies beyond their bound, which the paper does not speak of, the
    layer begins with twice the bound it needs and the same slope at zero; fixed scales are shared by all layers and have no
    other value to take.

    Args:
        a: Scale of weights, positive.
        b: Scale of stored values, positive.
        learnable: Whether they are parameters of this layer, trained as they are.
    """

    kind = "weight_compander"
    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, a: float = 0.5, b: float = 1.0, learnable: bool = True) -> None:
        super().__init__()
        positive("a", a)
        positive("b", b)
        self.first, self.learnable = (float(a), float(b)), learnable
        if learnable:
            self.a, self.b = (nn.Parameter(torch.tensor([value], dtype=torch.float32)) for value in self.first)

    def config(self) -> dict[str, Any]:
        return {"a": self.first[0], "b": self.first[1], "learnable": self.learnable}

    def scales(self, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """Return ``a`` and ``b``: tensors of shape ``(1,)`` where they are learned, else numbers."""
        if not self.learnable:
            return self.first
        dtype = torch.promote_types(dtype, torch.float32)
        return as_type(self.a, dtype), as_type(self.b, dtype)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Let the scales begin anew and return the stored value of a plain weight.

        Raises:
            ValueError: The weight holds values no finite stored value maps to.
        """
        a, b = self.first
        if self.learnable and weight.numel():
            peak = float(weight.abs().max())
            if not math.isfinite(peak):
                raise ValueError("it holds weights that are NaN or infinite")
            if peak > _NEAR * a * math.pi / 2:
                wider = 2 * peak * 2 / math.pi  # the weight's angle is then pi / 4, and its stored value is b
                a, b = wider, b * wider / a
                if max(a, b) > min(torch.finfo(dtype).max for dtype in (weight.dtype, self.a.dtype)):
                    raise ValueError(f"its largest weight, {peak:.3g}, has no stored value within {weight.dtype}")
            for scale, value in ((self.a, a), (self.b, b)):
                scale.data = _scale_of(weight, value)
            a, b = (scale.item() for scale in (self.a, self.b))
        return compand_inverse(weight, a, b)

    @property
    def widened(self) -> bool:
        """Whether the scale of weights is not where it began."""
        return self.learnable and not math.isclose(self.a.item(), self.first[0], rel_tol=1e-2)


class FittedCompanderMap(ArctanMap):
    """The map ``w = a arctan(v / b)`` on the weights of one layer, with ``log a`` and ``log b`` fitted to them; ours.

    A plain weight that comes in sets both scales anew by
    :func:`~lightning_peft_plugins.regularizers.functional.compander.compander_scales`, so that its values, whatever they are,
    lie within the bound and the layer computes what it did.

    Args:
        headroom: Bound over the layer's largest magnitude, above 1.
        slope: Slope of the map at zero, positive.
        learnable: Whether ``log_a`` and ``log_b`` are parameters; they are buffers otherwise.
    """

    kind = "compander"
    log_a: Tensor
    log_b: Tensor

    def __init__(self, headroom: float = 2.0, slope: float = 1.0, learnable: bool = True) -> None:
        super().__init__()
        if not (isinstance(headroom, (int, float)) and headroom > 1.0):
            raise MisconfigurationException(
                f"headroom must be above 1, got {headroom!r}: at 1 the largest weight has no inverse."
            )
        if not (isinstance(slope, (int, float)) and slope > 0.0):
            raise MisconfigurationException(f"slope must be positive, got {slope!r}; 1 keeps small weights as they are.")
        self.headroom, self.slope, self.learnable = float(headroom), float(slope), learnable
        for name in ("log_a", "log_b"):
            value = torch.zeros(1, dtype=torch.float32)
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def config(self) -> dict[str, Any]:
        return {"headroom": self.headroom, "slope": self.slope, "learnable": self.learnable}

    def scales(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``b``, positive, as tensors of shape ``(1,)`` of at least single precision."""
        dtype = torch.promote_types(dtype, torch.float32)
        return as_type(self.log_a, dtype).exp(), as_type(self.log_b, dtype).exp()

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Fit the scales to a plain weight and return its stored value.

        Raises:
            ValueError: The weight holds values no finite stored value maps to.
        """
        for scale, value in zip((self.log_a, self.log_b), compander_scales(weight, self.headroom, self.slope), strict=True):
            scale.data = _scale_of(weight, value)
        return compand_inverse(weight, *self.scales(weight.dtype))


def _scale_of(weight: Tensor, value: float) -> Tensor:
    return torch.full((1,), value, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
