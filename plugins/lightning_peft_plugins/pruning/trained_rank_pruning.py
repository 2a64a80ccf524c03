"""Trained rank pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.contract import SPLIT
from lightning_peft.network.targets import SENSITIVE, TargetSpec
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, dict_of, fields, tensors_like, whole
from lightning_peft.weights.low_rank import SCHEMES, Scheme, truncate
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.shards import spread_as


class TrainedRankPruning(Method):
    """Trains weights towards low rank: every few steps their small singular values are dropped (TRP).

    At the first step, every ``period`` steps from there, and after the last one, each target weight becomes its truncated
    singular value decomposition; the step that follows a truncation also follows a sub-gradient of the nuclear norm. After the
    fit :func:`lightning_peft.baking.split_low_rank.split_low_rank` turns each layer into two smaller ones.

    Args:
        energy: Share of the squared singular values to keep; 1 drops none.
        period: Optimizer steps between truncations.
        nuclear: Factor of the sub-gradient of the nuclear norm.
        scheme: Which matrix a convolution is: ``"channel"``, ``(outputs, inputs * kernel)``, or ``"spatial"``, ``(inputs *
            height, outputs * width)``; linear layers and pointwise convolutions are the same in both.
        targets: Layers whose rank is pruned; Linear, Conv1d/2d/3d and HF ``Conv1D`` are possible.
        exclude: Layers to leave alone; by default the first layer, the head, depthwise convolutions, and what is tied to an
            embedding. Pass ``()`` for none.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A number out of range, an unknown scheme, or a target that is under a weight map or, with
            ``"spatial"``, has not two spatial dimensions.

    Example:
        >>> TrainedRankPruning(0.95, scheme="spatial")
        TrainedRankPruning(energy=0.95, period=5, nuclear=0.0003, scheme='spatial', ...)
    """

    strategies = SPLIT
    lane = Lane.GRADIENT
    spares_frozen = True
    writes = frozenset({Resource.GRADIENT})
    commutes = True
    paper = "Xu et al., TRP: Trained Rank Pruning for Efficient Deep Neural Networks, IJCAI 2020, arXiv 2004.14566"

    def __init__(
        self,
        energy: float = 0.9,
        period: int = 5,
        nuclear: float = 3e-4,
        scheme: Scheme = "channel",
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec = SENSITIVE,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        if not 0.0 < energy <= 1.0:
            raise MisconfigurationException(f"energy={energy} must be the share of squared singular values to keep, up to 1.")
        if period < 1:
            raise MisconfigurationException(f"period={period} must be at least 1 optimizer step.")
        if nuclear < 0:
            raise MisconfigurationException(f"nuclear={nuclear} would raise the rank; use 0 or more.")
        one_of("scheme", scheme, SCHEMES)
        self.energy, self.period, self.nuclear, self.scheme = energy, period, nuclear, scheme
        self.ranks: dict[str, int] = {}
        self._pulls: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._moving: list[str] = []
        self._untrained: dict[str, Tensor] = {}
        self._last: int | None = None

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Refuse layers that the scheme does not know."""
        found = super().select(module)
        for name, layer in found.items():
            if self.scheme == "spatial" and isinstance(layer, (nn.Conv1d, nn.Conv3d)):
                raise MisconfigurationException(
                    f'scheme="spatial" needs two spatial dimensions, and {name} is a {type(layer).__name__}. Leave it out '
                    f'with exclude=[{name!r}], or use "channel".'
                )
        return found

    def start(self, run: Run) -> None:
        """Truncate for the first step."""
        self._names = list(self.claims(run.module))
        mapped = {tensor.name: tensor.maps[-1].owner for tensor in mapped_tensors(run.module)}
        for name in self._names:
            if name in mapped:
                raise MisconfigurationException(
                    f"{name} is under a weight map of {mapped[name]}, so the stored value and the weight differ in rank. "
                    f"Leave the layer out of one of them with exclude=[{name.rpartition('.')[0]!r}]."
                )
        self._last = run.end
        if self._last is None:
            rank_zero_warn(
                f"{self.name}: the end of this training is not known, so the last truncation comes up to {self.period} steps "
                "before it. With Trainer(max_steps=...) it comes after the last step."
            )
        if self.steps == 0:
            self._untrained = {name: run.module.get_parameter(name).detach().clone() for name in self._names}
            self._truncate(run, self._names)

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Go on with the layers there are now."""
        self._names, self._pulls, self._moving = list(self.claims(module)), {}, []

    @torch.no_grad()
    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Add the sub-gradient after a truncation, and note which weights move."""
        moved = trained_by(optimizer)
        self._moving = [name for name in self._names if run.module.get_parameter(name) in moved]
        for name in self._moving:
            pull, grad = self._pulls.get(name), run.module.get_parameter(name).grad
            if pull is not None and grad is not None:
                grad.add_(spread_as(grad, pull.to(grad.device)), alpha=self.nuclear)

    def after_step(self, run: Run) -> None:
        """Truncate the weights that an optimizer has moved, when their time has come."""
        for name in self._moving:  # not before the step, which a gradient scaler may skip
            self._pulls.pop(name, None)
        if self._moving and (self.steps % self.period == 0 or self.steps == self._last):
            self._truncate(run, self._moving)
        self._moving, self._untrained = [], {}

    def awaited(self, run: Run) -> Iterator[str]:
        """The truncation after the last step."""
        if self.steps % self.period and self.steps != self._last:
            yield f"the last truncation: its weights moved for {self.steps % self.period} steps since"

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Undo the first truncation when no step has followed it."""
        for name, value in self._untrained.items():
            run.module.get_parameter(name).copy_(value)
        self._untrained = {}

    @torch.no_grad()
    def _truncate(self, run: Run, names: Iterable[str]) -> None:
        for name in names:
            weight = run.module.get_parameter(name)
            made = truncate(weight, self.energy, self.scheme)
            if made is None:
                rank_zero_warn(f"{name} has no singular value decomposition at step {self.steps} and was not truncated.")
                continue
            weight.copy_(spread_as(weight, made.weight))
            self.ranks[name] = made.rank
            if self.nuclear:
                self._pulls[name] = made.pull

    def describe(self, module: nn.Module) -> str:
        """Say what is kept, and of how many layers."""
        return f"{self.energy:.0%} energy, {self.scheme}, every {self.period} steps, in {len(self.select(module))} layers"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Mean rank of the last truncations."""
        return {"rank": sum(self.ranks.values()) / max(1, len(self.ranks))}

    def state(self) -> dict[str, Any]:
        """Ranks, and sub-gradients of which the step is still to come."""
        return {"ranks": dict(self.ranks), "pulls": dict(self._pulls)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"ranks": dict_of(whole(), tensors), "pulls": tensors_like(tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self.ranks, self._pulls = dict(state["ranks"]), dict(state["pulls"])
