"""Training of values at some coordinates of the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.attaching.averaging import averaged_modules
from lightning_peft.contract import SHARDED
from lightning_peft.network.layers import loose_matrices
from lightning_peft.network.targets import TargetSpec
from lightning_peft.network.tunable import kinds_of, share_trained, tunable
from lightning_peft.weights.maps import MappedTensor, maps_of
from lightning_peft.weights.shards import opened
from lightning_peft.weights.sparse_values import SparseValues, carried


class SparseUpdate(Method):
    """Base of methods that train values at some coordinates of every target weight; the rest is frozen for the fit.

    Subclasses say how many coordinates a weight gets, and which ones to begin with; :meth:`move` gives it others.

    Args:
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights are trained.
        exclude: Layers whose weights are not.
        checkpoint: ``"trained"`` leaves what did not change out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.
    """

    lane = Lane.DELTA
    strategies = SHARDED
    reads = frozenset({Resource.STRUCTURE})
    writes = frozenset({Resource.DELTA})
    weight_maps = (SparseValues,)

    def __init__(
        self,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head",),
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.tune = kinds_of(tune)
        self.checkpoint = checkpoint

    def count(self, weight: Tensor) -> int:
        """How many coordinates of a weight are trained."""
        raise NotImplementedError

    def first(self, tensor: str, weight: Tensor) -> Tensor:
        """The coordinates of a weight that a training begins with, ascending.

        Args:
            tensor: Qualified name of the weight.
            weight: What the layer sees, below the values.
        """
        raise NotImplementedError

    def values(self, weight: Tensor, indices: Tensor | int) -> SparseValues:
        """Make the values of a weight, at coordinates or at so many of them."""
        return SparseValues(weight.numel(), indices)

    def attach(self, module: LightningModule) -> None:
        """Put values on the weights, all zero."""
        present = {mapped.name for mapped, _ in self.maps(module)}
        for tensor in self.claims(module):
            if tensor in present:
                continue
            weight: Tensor = getattr(module.get_submodule(tensor.rpartition(".")[0]), "weight").detach()  # noqa: B009
            # In an evaluation nothing is trained, and a checkpoint brings coordinates along.
            indices = self.first(tensor, weight) if self.fits else self.count(weight)
            values = self.values(weight, indices)
            if weight.dtype == torch.float64:
                values.to(weight.dtype)
            self.map_weight(module, tensor, values.to(weight.device))

    def maps(self, module: nn.Module) -> Iterator[tuple[MappedTensor, SparseValues]]:
        """The values on a module or on an average of it, each with its tensor."""
        found = maps_of(module, SparseValues, type(self).__name__)
        return ((mapped, values) for mapped, values in found if values.method == self.name)

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """What :attr:`tune` names; values are trained whatever they stand on."""
        return tunable(module, self.tune, {tensor.rpartition(".")[0] for tensor in self.claims(module)})

    @torch.no_grad()
    def move(self, run: Run, chosen: Mapping[str, Tensor], *, fold: bool) -> None:
        """Train other coordinates from here on; optimizers keep what they know of those that stay.

        Args:
            run: The run.
            chosen: Coordinates by name of the tensor, ascending.
            fold: Let the values into the weights first; otherwise what coordinates that are left had gained is lost.
        """
        for module in (run.module, *averaged_modules(run.trainer)):
            for mapped, values in self.maps(module):
                if mapped.name not in chosen:
                    continue
                if module is run.module:
                    _carry_state(run.trainer.optimizers, values, chosen[mapped.name])
                if fold:
                    self.fold(mapped, values)
                values.move(chosen[mapped.name])

    @staticmethod
    @torch.no_grad()
    def fold(mapped: MappedTensor, values: SparseValues) -> None:
        """Let values into their weight for good."""
        mapped.set_entering(values, mapped.leaving(values))
        values.values.zero_()

    def describe(self, module: nn.Module) -> str:
        """Count the coordinates, and name matrices that no layer of the usual kinds holds."""
        weights = [module.get_submodule(tensor.rpartition(".")[0]).weight for tensor in self.claims(module)]
        count = sum(self.count(weight) for weight in weights)  # type: ignore[arg-type]
        whole = sum(weight.numel() for weight in weights)  # type: ignore[operator]
        parts = [f"{count:,} of {whole:,} weights in {len(weights)} layers", *(f"{part} as they are" for part in self.tune)]
        if unreached := loose_matrices(module):
            parts.append(f"not {', '.join(unreached[:3])}{', ...' * (len(unreached) > 3)}")
        return ", ".join(parts)

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}


def _carry_state(optimizers: Iterable[Optimizer], values: SparseValues, indices: Tensor) -> None:
    """Move what optimizers keep for every coordinate; counters of steps go on."""
    new = indices.to(values.indices.device)
    for optimizer in optimizers:
        for tensor in optimizer.state.get(values.values, {}).values():
            if isinstance(tensor, Tensor) and tensor.shape == values.values.shape:
                with opened(tensor) as full:
                    full.copy_(carried(full, values.indices, new))
