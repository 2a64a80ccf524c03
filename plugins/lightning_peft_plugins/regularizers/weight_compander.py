"""Weight Compander: every weight is a bounded function of a stored value, with learnable scales per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run, WeightMap
from lightning_peft.network.targets import TargetSpec
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.regularizers.functional.compander import compand, compand_inverse, compander_scales


class CompanderMap(WeightMap):
    """The map ``w = a arctan(v / b)`` on the weights of one layer, with ``log a`` and ``log b`` of its own.

    A plain weight that comes in (when the map is attached, when the layer is reset, when the weights of an ordinary module
    are loaded) sets both scales anew by
    :func:`~lightning_peft_plugins.regularizers.functional.compander.compander_scales`, so that its values, whatever they are,
    lie within the bound and the layer computes what it did.

    Args:
        headroom: Bound over the layer's largest magnitude, above 1.
        slope: Slope of the map at zero, positive.
        learnable: Whether ``log_a`` and ``log_b`` are parameters; they are buffers otherwise.
    """

    kind = "compander"
    lane = Lane.REPARAM
    optimizer_overrides = {"weight_decay": 0.0}
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
            value = torch.zeros((), dtype=torch.float32)
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def config(self) -> dict[str, Any]:
        return {"headroom": self.headroom, "slope": self.slope, "learnable": self.learnable}

    def scales(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``b``, positive, as 0-dim tensors of at least single precision."""
        dtype = torch.promote_types(dtype, torch.float32)
        return self.log_a.to(dtype).exp(), self.log_b.to(dtype).exp()

    def forward(self, weight: Tensor) -> Tensor:
        return compand(weight, *self.scales(weight.dtype))

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Fit the scales to a plain weight and return its stored value.

        Raises:
            ValueError: The weight holds values no finite stored value maps to.
        """
        for scale, value in zip((self.log_a, self.log_b), compander_scales(weight, self.headroom, self.slope), strict=True):
            scale.data = torch.full((), value, dtype=scale.dtype, device=weight.device)
        return compand_inverse(weight, *self.scales(weight.dtype))

    def extra_repr(self) -> str:
        return f"headroom={self.headroom}, slope={self.slope}, learnable={self.learnable}"


class WeightCompander(Method):
    """Reparametrise every weight as ``w = a arctan(v / b)`` and train ``v`` and, per layer, ``a`` and ``b``.

    The bound ``a pi / 2`` keeps single weights from dominating; the map is steepest at zero, so weights pass through it
    quickly. At attachment the network computes what it did before. ``v`` is decayed by the optimizer as the weight was; ``a``
    and ``b`` are not. RECONSTRUCTION: the published formula could not be confirmed, see its card.

    Args:
        targets: Layers whose ``weight`` is mapped; biases and norms are never touched by the default.
        exclude: Layers to leave alone.
        headroom: Initial bound over the layer's largest magnitude, above 1. Smaller compresses large weights more.
        slope: Initial slope ``a / b`` at zero. Above 1 stores small weights smaller, so that a step moves them further.
        learnable: Whether ``a`` and ``b`` are trained.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Example:
        >>> WeightCompander(headroom=3.0)
        WeightCompander(targets='all-weights', exclude=('embedding',), headroom=3.0, slope=1.0, learnable=True)
    """

    lane = Lane.REPARAM
    writes = frozenset({Resource.WEIGHT_MAP})
    weight_maps = (CompanderMap,)
    paper = "Cakaj, Mehnert, Yang: Weight Compander, IJCNN 2023, https://arxiv.org/abs/2306.16993"

    def __init__(
        self,
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec | None = ("embedding",),
        headroom: float = 2.0,
        slope: float = 1.0,
        learnable: bool = True,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        self._new_map = CompanderMap(headroom, slope, learnable).config()
        self._mapped: list[str] = []

    def attach(self, module: LightningModule) -> None:
        self._mapped = list(self.claims(module))
        for tensor in self._mapped:
            layer = tensor.rpartition(".")[0]
            weight: Tensor = module.get_submodule(layer).weight  # type: ignore[assignment]
            if not weight.is_floating_point():
                raise MisconfigurationException(
                    f"{tensor} holds {weight.dtype}, which has no compander. Leave the layer out with exclude=[{layer!r}]."
                )
            compander = CompanderMap(**self._new_map)
            try:
                self.map_weight(module, tensor, compander)
            except ValueError as error:
                raise MisconfigurationException(
                    f"{tensor} cannot be companded: {error}. Repair it, or exclude {layer!r}."
                ) from error
            compander.requires_grad_(weight.requires_grad)

    @torch.no_grad()
    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Mean ``a`` and ``b`` over layers."""
        names = set(self._mapped)
        maps = [m for t in mapped_tensors(run.module) if t.name in names for m in t.maps if isinstance(m, CompanderMap)]
        return {
            "a": torch.stack([m.log_a for m in maps]).float().exp().mean(),
            "b": torch.stack([m.log_b for m in maps]).float().exp().mean(),
        }
