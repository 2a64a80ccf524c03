"""Weight Compander: every weight is a bounded function of a stored value, with scales that are learned or given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of, positive
from lightning_peft.contract import SPLIT
from lightning_peft.network.targets import TargetSpec
from lightning_peft.optim.trial import decays_by_gradient
from lightning_peft.optim.wrapped import innermost
from lightning_peft.weights.maps import mapped_tensors, maps_of
from lightning_peft.weights.shards import read_whole
from lightning_peft_plugins.regularizers._weight_compander.maps import FLOOR, ArctanMap, CompanderMap, FittedCompanderMap
from lightning_peft_plugins.regularizers.functional.compander import PUBLISHED, weight_decay_gradient


class WeightCompander(Method):
    """Reparametrise every weight as ``w = a arctan(v / b)`` and train ``v``, and ``a`` and ``b`` of every layer with it.

    The bound ``a pi / 2`` keeps single weights from dominating; the map is steepest at zero, so weights pass through it
    quickly. At attachment the network computes what it did before. ``a`` and ``b`` are not decayed. Weight decay of the
    optimizer acts on ``v`` where they are learned, and on the weights where they are fixed, as in the paper.

    Args:
        targets: Layers whose ``weight`` is mapped; biases and norms are never touched by the default.
        exclude: Layers to leave alone.
        a: Scale of weights, positive: where it begins if learned. 0.5 by default.
        b: Scale of stored values, positive. 1 by default.
        learnable: Whether every layer learns its own ``a`` and ``b``; fixed, they are the same everywhere.
        preset: Fixed scales of the paper by network and data, such as ``"resnet18/cifar10"``
            (:data:`~lightning_peft_plugins.regularizers.functional.compander.PUBLISHED`).
        init: ``"published"``, or ``"fitted"``, which is ours: ``a`` and ``b`` begin where ``headroom`` and ``slope`` say for
            the weights of each layer, so for trained networks whose weights are much smaller or larger than the bound.
        headroom: With ``init="fitted"``, bound over the layer's largest magnitude, above 1.
        slope: With ``init="fitted"``, slope ``a / b`` at zero. Above 1 stores small weights smaller, so that a step moves them
            further.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: Arguments contradict one another; weights that fixed scales cannot express.

    Example:
        >>> WeightCompander(preset="resnet18/cifar10").fixed
        (1.0, 0.6)
        >>> WeightCompander(init="fitted", headroom=3.0)
        WeightCompander(targets='all-weights', exclude=('embedding',), learnable=True, init='fitted', headroom=3.0, slope=1.0)
    """

    lane = Lane.REPARAM
    commutes = True
    writes = frozenset({Resource.WEIGHT_MAP})
    weight_maps = (CompanderMap, FittedCompanderMap)
    strategies = SPLIT
    paper = "Cakaj, Mehnert, Yang: Weight Compander, IJCNN 2023, https://arxiv.org/abs/2306.16993"

    def __init__(
        self,
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec | None = ("embedding",),
        a: float | None = None,
        b: float | None = None,
        learnable: bool = True,
        preset: str | None = None,
        init: Literal["published", "fitted"] = "published",
        headroom: float = 2.0,
        slope: float = 1.0,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        one_of("init", init, ("published", "fitted"))
        if init == "fitted":
            if given := [key for key, value in {"a": a, "b": b, "preset": preset}.items() if value is not None]:
                raise MisconfigurationException(
                    f'init="fitted" chooses a and b by layer; leave out {" and ".join(given)}=, or init=.'
                )
            FittedCompanderMap(headroom, slope)
        elif (headroom, slope) != (2.0, 1.0):
            raise MisconfigurationException('headroom= and slope= are about fitted scales: add init="fitted".')
        if preset is not None:
            one_of("preset", preset, PUBLISHED)
            if a is not None or b is not None:
                raise MisconfigurationException(f"preset={preset!r} is a and b; leave out either.")
            a, b = PUBLISHED[preset]
            learnable = False
        scales = (0.5 if a is None else a, 1.0 if b is None else b)
        for key, value in zip("ab", scales, strict=True):
            positive(key, value)
        self.scales, self.learnable = scales, learnable
        self.fixed: tuple[float, float] | None = scales if init == "published" and not learnable else None
        self._fit = {"headroom": headroom, "slope": slope} if init == "fitted" else None
        self._mapped: list[str] = []
        self._by_gradient: dict[type[Optimizer], bool] = {}

    def writes_now(self) -> frozenset[Resource]:
        return self.writes | ({Resource.GRADIENT} if self.fixed else set())

    def _new_map(self) -> CompanderMap | FittedCompanderMap:
        if self._fit is not None:
            return FittedCompanderMap(**self._fit, learnable=self.learnable)
        return CompanderMap(*self.scales, self.learnable)

    def attach(self, module: LightningModule) -> None:
        self._mapped = list(self.claims(module))
        wider = {}
        for tensor in self._mapped:
            layer = tensor.rpartition(".")[0]
            weight: Tensor = module.get_submodule(layer).weight  # type: ignore[assignment]
            if not weight.is_floating_point():
                raise MisconfigurationException(
                    f"{tensor} holds {weight.dtype}, which has no compander. Leave the layer out with exclude=[{layer!r}]."
                )
            compander = self._new_map()
            try:
                self.map_weight(module, tensor, compander)
            except ValueError as error:
                raise MisconfigurationException(
                    f"{tensor} cannot be companded: {error}. {self._cure(weight, layer)}"
                ) from error
            compander.requires_grad_(weight.requires_grad)
            if isinstance(compander, CompanderMap) and compander.widened:
                wider[tensor] = compander.a.item()
        if wider:
            self._say_wider(wider)

    def _cure(self, weight: Tensor, layer: str) -> str:
        peak = float(weight.detach().abs().max())
        if self.fixed is None or not math.isfinite(peak):
            return f"Repair it, or exclude {layer!r}."
        return (
            f"Its largest weight is {peak:.3g}, and fixed scales are the same for all layers: give a= above "
            f'{2 * peak / math.pi:.3g}, let layers learn theirs (learnable=True, or init="fitted"), or exclude {layer!r}.'
        )

    def _say_wider(self, wider: Mapping[str, float]) -> None:
        some = ", ".join(f"{name} with {a:.3g}" for name, a in list(wider.items())[:3])
        warnings.warn(
            f"{self.name}: {len(wider)} of {len(self._mapped)} layers hold weights beyond the bound "
            f"{self.scales[0] * math.pi / 2:.3g} of a={self.scales[0]} and begin with a larger a: {some}"
            f'{", ..." if len(wider) > 3 else ""}. init="fitted" fits every layer, which suits trained networks; exclude= '
            "leaves layers alone.",
            UserWarning,
            stacklevel=2,
        )

    def start(self, run: Run) -> None:
        """Find out how the optimizers decay."""
        if self.fixed is None:
            return
        for optimizer in map(innermost, run.trainer.optimizers):
            if any(group.get("weight_decay") for group in optimizer.param_groups):
                self._by_gradient[type(optimizer)] = decays_by_gradient(optimizer)
        if own := [kind.__name__ for kind, by_gradient in self._by_gradient.items() if not by_gradient]:
            warnings.warn(
                f"{self.name}: the weight decay of {own[0]} is a step of its own, so it acts on stored values. With fixed "
                "scales the paper decays weights, as is done here with optimizers that decay by the gradient, like SGD.",
                UserWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def after_clipping(self, run: Run, optimizer: Optimizer) -> None:
        """Turn the decay of stored values, which the optimizer is about to add, into that of the weights."""
        if self.fixed is None or not self._by_gradient.get(type(innermost(optimizer))):
            return
        stored = {mapped.stored for mapped, _ in maps_of(run.module, CompanderMap, type(self).__name__)}
        scale = run.gradient_scale(optimizer)
        for group in optimizer.param_groups:
            strength = group["weight_decay"] * scale
            for v in group["params"]:
                if strength and v in stored and v.grad is not None:
                    v.grad.add_(weight_decay_gradient(v, *self.fixed, strength)).sub_(v, alpha=strength)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Keep learned scales above zero."""
        if self._fit is None and self.learnable:
            maps = maps_of(run.module, CompanderMap, type(self).__name__)
            if scales := [scale for _, compander in maps for scale in (compander.a, compander.b)]:
                torch._foreach_clamp_min_(scales, FLOOR)

    @torch.no_grad()
    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Mean ``a`` and ``b`` over layers."""
        if self.fixed:
            return dict(zip("ab", self.fixed, strict=True))
        names = set(self._mapped)
        maps = [m for t in mapped_tensors(run.module) if t.name in names for m in t.maps if isinstance(m, ArctanMap)]
        with read_whole(*maps):
            scales = [m.scales(torch.float32) for m in maps]
        return {key: torch.cat([pair[place] for pair in scales]).mean() for place, key in enumerate("ab")}
