"""Low-rank deltas: the engine's forms as one method."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import Place, places
from lightning_peft.network.layers import heads
from lightning_peft.network.targets import TargetSpec
from lightning_peft.network.tunable import TUNABLE, share_trained, tunable
from lightning_peft.weights.parts import placed_parts

SCALINGS = ("rank", "root")


class LowRank(Method):
    """Trains a low-rank delta of frozen weights, ``W + scale B A``, and whatever else is named; the rest is frozen for the fit.

    Where nothing else acts on a weight, the product is computed beside the layer, from its inputs: no weight is made and none
    gets a gradient. Under masks and other maps it is added to the weight. The plan says where which. After the fit
    the module is ordinary, with the products in its weights, unless ``keep`` leaves them beside.

    Args:
        rank: Rows of ``A`` and columns of ``B``.
        alpha: Numerator of the scale; the rank by default, so that the scale is 1.
        scaling: What it is divided by: ``"rank"``, or ``"root"`` of the rank (Kalajdzievski 2023).
        dropout: Share of a layer's inputs that the product does not see in training.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights get a delta; an ``nn.MultiheadAttention`` for its input projections, a stack of experts
            for its matrices.
        exclude: Layers that get none.
        keep: Leave the deltas on the module after the fit, for :func:`lightning_peft.switch` and further training.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints, which tells two adapters of one module apart.

    Raises:
        MisconfigurationException: A rank above that of a matrix, a scale of zero, a target without a weight of its own or one
            that is quantised or parametrised, dropout where the delta acts on the weight.

    Example:
        >>> LowRank(rank=4, tune=("head",))
        LowRank(rank=4, scaling='rank', dropout=0.0, tune=('head',), targets='auto', ...)
    """

    lane = Lane.DELTA
    writes = frozenset({Resource.DELTA})
    weight_maps = (DeltaMap,)
    parts = (DeltaPart,)
    kind: ClassVar[type[LowRankForm]] = LowRankForm
    paper = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        scaling: Literal["rank", "root"] = "rank",
        dropout: float = 0.0,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head", "depthwise"),
        *,
        keep: bool = False,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        if rank < 1:
            raise MisconfigurationException(f"rank={rank} must be at least 1.")
        if alpha == 0:
            raise MisconfigurationException("alpha=0 multiplies every delta by zero, so nothing would be learnt. Leave it out.")
        if not 0 <= dropout < 1:
            raise MisconfigurationException(f"dropout={dropout} must be at least 0 and below 1.")
        one_of("scaling", scaling, SCALINGS)
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.tune = (tune,) if isinstance(tune, str) else tuple(tune)
        for part in self.tune:
            one_of("tune", part, TUNABLE)
        self.rank, self.alpha, self.scaling, self.dropout = rank, rank if alpha is None else alpha, scaling, dropout
        self.stays, self.checkpoint = keep, checkpoint

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (self.rank if self.scaling == "rank" else self.rank**0.5)

    def form(self, place: Place) -> Form:
        """Make the delta of one tensor."""
        return self.kind(place.layout, self.rank, self.scale, table=isinstance(place.layer, nn.Embedding))

    def places(self, module: nn.Module) -> list[Place]:
        """The tensors that get a delta, each with the side of its layer on which that acts."""
        found = places(self, module, self.kind)
        self._check(found)
        return found

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The tensors that get a delta."""
        return [place.tensor for place in self.places(module)]

    def attach(self, module: LightningModule) -> None:
        """Put the deltas on."""
        for place in self.places(module):
            form, weight = self.form(place), place.seen
            if weight.dtype == torch.float64:  # else in single precision whatever the weight has: few numbers, small steps
                form.to(weight.dtype)
            seed = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(f"{self.name}/{place.tensor}".encode()))
            form.reset(place.layout.matrix(weight.detach()), seed)
            form.to(weight.device)
            if place.side == "weight":
                self.map_weight(module, place.tensor, DeltaMap(form))
            else:
                self.put_part(module, place.path, DeltaPart(form, self.dropout))

    def _check(self, found: Sequence[Place]) -> None:
        """See that the tensors can have deltas of this rank, and dropout where it is asked for."""
        if small := [place for place in found if self.rank > place.layout.largest_rank]:
            least = min(place.layout.largest_rank for place in small)
            raise MisconfigurationException(
                f"rank={self.rank} is above the rank of {small[0].tensor}, {tuple(small[0].layout.matrix_shape)}. Give at most "
                f"rank={least}, or leave out what is smaller: exclude={[place.path for place in small]!r} beside what is "
                "excluded now."
            )
        on_weight = next((place for place in found if place.side == "weight"), None)
        if self.dropout and on_weight is not None:
            raise MisconfigurationException(
                f"The delta of {on_weight.tensor} acts on the weight, since {on_weight.reason}, and no inputs pass by it that "
                f"dropout={self.dropout} could leave out. Set dropout=0, or leave the layer out: exclude=[{on_weight.path!r}]."
            )

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The deltas, and what :attr:`tune` names."""
        parts = (placed.part for placed in placed_parts(module) if placed.part.method == self.name)
        tuned = tunable(module, self.tune, {place.path for place in self.places(module)})
        return [*tuned, *(parameter for part in parts for parameter in part.parameters())]

    def describe(self, module: nn.Module) -> str:
        """Say what stands where, and what is trained."""
        found = self.places(module)
        on_weight = [place for place in found if place.side == "weight"]
        count = sum(self.kind.trainable(place.layout, self.rank) for place in found)
        parts = [f"rank {self.rank} on {len(found)} tensors, {count:,} parameters"]
        if on_weight:
            reasons = {place.reason for place in on_weight}
            parts.append(f"{len(on_weight)} of them on the weight ({'; '.join(sorted(reasons))})")
        parts.extend(f"{part} as they are" for part in self.tune)
        writers = set(heads(list(module.modules()))) - {place.layer for place in found}
        if frozen := [name for name, layer in module.named_modules() if layer in writers and "head" not in self.tune]:
            parts.append(f"the head ({', '.join(frozen)}) stays frozen, tune=('head',) trains it")
        return ", ".join(parts)

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}


class LoRA(LowRank):
    """LoRA (Hu et al. 2022): ``W + (alpha / rank) B A``; see :class:`LowRank` for its arguments."""


class DoRA(LowRank):
    """DoRA (Liu et al. 2024): LoRA turns the rows of a weight, and their lengths are learned apart; arguments as for LoRA.

    Beside linear layers the norm of the sum is found without making the sum. Elsewhere the delta acts on the weight.
    """

    kind = DecomposedForm
    paper = "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv 2402.09353"

    def _check(self, found: Sequence[Place]) -> None:
        if table := next((place for place in found if isinstance(place.layer, nn.Embedding)), None):
            raise MisconfigurationException(
                f"{self.name} scales outputs, and the rows of {table.path} are none. Leave it out: exclude=[{table.path!r}]; "
                "LoRA takes embeddings."
            )
        super()._check(found)
