"""Deltas of frozen weights as a method: which tensors get one, what is trained, what the plan says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Generator, Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of, positive
from lightning_peft.contract import SPLIT
from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.on_module import Delta, deltas_on
from lightning_peft.deltas.sides import Place, places
from lightning_peft.deltas.slots import Slots
from lightning_peft.network.layers import heads
from lightning_peft.network.seeds import named_seed
from lightning_peft.network.targets import TargetSpec
from lightning_peft.network.tunable import kinds_of, share_trained, tunable


class DeltaMethod(Method):
    """Trains what frozen weights gain, and whatever else is named; the rest is frozen for the fit.

    Where nothing else acts on a weight, a delta of thin factors is computed beside the layer, from its inputs: no weight is
    kept and none gets a gradient. Under masks and other maps it is added to the weight. The plan says where which. After the
    fit the module is ordinary, with the deltas in its weights, unless ``keep`` leaves them beside.

    Args:
        rank: Rank of the deltas.
        dropout: Share of a layer's inputs that the delta does not see in training.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights get a delta; an ``nn.MultiheadAttention`` for its input projections, a stack of experts
            for its matrices.
        exclude: Layers that get none.
        keep: Leave the deltas on the module after the fit, for :func:`lightning_peft.switch` and further training.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints, which tells two adapters of one module apart.

    Raises:
        MisconfigurationException: A rank above that of a matrix, a target without a weight of its own or one that is
            quantised or parametrised, dropout where the delta acts on the weight.

    Attributes:
        kind: Form of the deltas.
        part: What stands beside a layer.
        slots: What :func:`~lightning_peft.deltas.slots.LowRank` finds the member by.
    """

    strategies = SPLIT
    lane = Lane.DELTA
    ties = True
    writes = frozenset({Resource.DELTA})
    weight_maps = (DeltaMap,)
    parts = (DeltaPart,)
    slots: ClassVar[Slots | None] = None
    kind: type[Form]
    part: ClassVar[type[DeltaPart]] = DeltaPart

    def __init__(
        self,
        rank: int = 8,
        *,
        dropout: float = 0.0,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head", "depthwise"),
        keep: bool = False,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        positive("rank", rank)
        if not 0 <= dropout < 1:
            raise MisconfigurationException(f"dropout={dropout} must be at least 0 and below 1.")
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.tune = kinds_of(tune)
        self.rank, self.dropout = rank, dropout
        self.stays, self.checkpoint = keep, checkpoint

    def arguments(self, place: Place) -> dict[str, Any]:
        """What the form of one tensor is made with, beside its layout."""
        return {"rank": self.rank}

    def begin(self, form: Any, weight: Tensor, generator: Generator) -> None:
        """Give a form its first values.

        Args:
            form: The form.
            weight: The frozen weight, as a matrix.
            generator: What random values are drawn from.
        """
        form.reset(weight, generator)

    def deltas(self, module: nn.Module) -> Iterator[tuple[str, Delta]]:
        """Yield the method's deltas on a module, each with the name of its tensor, those beside layers first.

        The one of layers that share a tensor comes once, under the first of its names.
        """
        forms = set()
        for name, delta in self._all_deltas(module):
            if delta.form not in forms:
                forms.add(delta.form)
                yield name, delta

    def _all_deltas(self, module: nn.Module) -> Iterator[tuple[str, Delta]]:
        return ((name, delta) for name, delta in deltas_on(module) if delta.method == self.name)

    def forms(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """Yield their forms in the same way."""
        return ((name, delta.form) for name, delta in self.deltas(module))

    def places(self, module: nn.Module) -> list[Place]:
        """The tensors that get a delta, each with the side of its layer on which that acts."""
        found = places(self, module, self.kind)
        self._check(found)
        self._check_kept(module)
        return found

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The tensors that get a delta."""
        return [place.tensor for place in self.places(module)]

    def attach(self, module: LightningModule) -> None:
        """Put the deltas on, where there is none yet."""
        there = dict(self._all_deltas(module))
        forms: dict[nn.Parameter, Form] = {}  # layers that share a tensor share its form
        for place in self.places(module):
            delta = there.get(place.tensor)
            form = forms.get(place.stored) or (self._new_form(place) if delta is None else delta.form)
            forms[place.stored] = form
            if delta is not None:
                delta.form = form  # a file has one for each layer
            elif place.side == "weight":
                self.map_weight(module, place.tensor, DeltaMap(form))
            else:
                self.put_part(module, place.path, self.part(form, self.dropout))
        for _, delta in self._all_deltas(module):
            delta.tuned = tuple(dict.fromkeys((*delta.tuned, *self.tune)))

    def _new_form(self, place: Place) -> Form:
        """A form with its first values."""
        form, weight = self.kind(place.layout, **self.arguments(place)), place.seen
        if weight.dtype == torch.float64:  # else in single precision whatever the weight has: few numbers, small steps
            form.to(weight.dtype)
        matrix = place.layout.matrix(weight.detach()).to(next(form.parameters()).dtype)
        try:
            self.begin(form, matrix, torch.Generator().manual_seed(named_seed(f"{self.name}/{place.tensor}")))
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{place.tensor}: {error}") from None
        return form.to(weight.device)

    def _check(self, found: Sequence[Place]) -> None:
        """See that the tensors can have deltas of this form and rank, and dropout where it is asked for."""
        if not self.kind.tables and (table := next((each for each in found if isinstance(each.layer, nn.Embedding)), None)):
            raise MisconfigurationException(
                f"{self.name} scales outputs, and the rows of {table.path} are none. Leave it out: exclude=[{table.path!r}]; "
                "LoRA takes embeddings."
            )
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

    def _check_kept(self, module: nn.Module) -> None:
        """See that an adapter of this name that is on the module is one of this method's."""
        for tensor, delta in self.deltas(module):
            if delta.form.kind != self.kind.kind:
                raise MisconfigurationException(
                    f"The adapter {self.name!r} on {tensor} is one of {delta.owner}, which {type(self).__name__} cannot train "
                    f"on. Train it with {delta.owner}(name={self.name!r}), give {type(self).__name__} another name, or make "
                    "ordinary weights of it first: lightning_peft.bake(module)."
                )

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The deltas, and what :attr:`tune` names."""
        tuned = tunable(module, self.tune, {place.path for place in self.places(module)})
        return [*tuned, *(parameter for _, form in self.forms(module) for parameter in form.parameters())]

    def describe(self, module: nn.Module) -> str:
        """Say what stands where, and what is trained."""
        found = self.places(module)
        on_weight = [place for place in found if place.side == "weight"]
        apart = {place.stored: place for place in found}.values()
        count = sum(self.kind.trainable(place.layout, **self.arguments(place)) for place in apart)
        parts = [f"rank {self.rank} on {len(found)} tensors, {count:,} parameters"]
        if on_weight:
            reasons = {place.reason for place in on_weight}
            parts.append(f"{len(on_weight)} of them on the weight ({'; '.join(sorted(reasons))})")
        there = dict(self.forms(module))
        kept = [(there[place.tensor].rank, self.arguments(place).get("rank")) for place in found if place.tensor in there]
        if others := sorted({rank for rank, asked in kept if rank != asked is not None}):
            parts.append(f"those that are on the module go on with rank {' and '.join(map(str, others))}")
        parts.extend(f"{part} as they are" for part in self.tune)
        writers = set(heads(list(module.modules()))) - {place.layer for place in found}
        if frozen := [name for name, layer in module.named_modules() if layer in writers and "head" not in self.tune]:
            parts.append(f"the head ({', '.join(frozen)}) stays frozen, tune=('head',) trains it")
        return ", ".join(parts)

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}
