"""How adapters of one type stand in a folder of Hugging Face PEFT: what every type says of itself."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.layout import Layout, layout_of
from lightning_peft.weights.mapped_layer import MappedLayer


@dataclass(frozen=True)
class Target:
    """A layer that a folder holds an adapter of.

    Attributes:
        name: Its name within the network.
        layer: The layer.
        layout: How its weight is read as a matrix.
    """

    name: str
    layer: nn.Module
    layout: Layout

    @property
    def device(self) -> torch.device:
        """Where its weight is."""
        return self._stored.device

    @property
    def _stored(self) -> Tensor:
        stack = self.layer.part_stack if isinstance(self.layer, MappedLayer) else None
        beneath = stack.beneath.get("weight") if stack is not None else None  # where parts are merged
        weight = self.layer._parameters["weight"] if beneath is None else beneath
        assert weight is not None
        return weight.detach()

    @property
    def frozen(self) -> Tensor:
        """The weight that deltas stand on, as a matrix, in single precision or better."""
        value = self._stored
        chain = self.layer.weight_maps.get("weight") if isinstance(self.layer, MappedLayer) else None
        for each in chain.active if chain is not None else ():
            if each.lane < Lane.DELTA:
                value = each(value).detach()
        return self.layout.matrix(value).to(torch.promote_types(value.dtype, torch.float32))


@dataclass(frozen=True)
class Adapted:
    """A layer with a delta that is to be written: its name within the network, the layer, the form."""

    name: str
    layer: nn.Module
    form: Any


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Attributes:
        path: The folder.
        config: ``adapter_config.json``.
        layers: The tensors of each layer's adapter, by the layer's name and their own.
        shared: Tensors that stand beside the network.
        others: Parameters that were trained as they are, by name.
    """

    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]
    others: Mapping[str, Tensor]


class PeftFormat:
    """One type of adapter; subclasses are entry points of the group ``lightning_peft.peft_formats``.

    Their names are those of PEFT's ``peft_type``. A variant of a type has a name of its own behind a dot: the setting that
    switches it on (``LORA.kasa_config``), or the value of one that begins with ``init_`` (``MISS.bat``).

    Attributes:
        peft_type: PEFT's name of the type.
        owner: Class of the method that trains such adapters.
        beginning: What the names of its tensors begin with.
        tensors: Those names, in sets of which a layer has one.
        shared: Names of tensors that stand beside the network.
        settings: What it reads of ``adapter_config.json``.
        past: What says how an adapter was made or found, and changes nothing of the one that is in the file.
        dropout: Setting that holds the dropout.
    """

    peft_type: ClassVar[str]
    owner: ClassVar[str]
    beginning: ClassVar[str]
    tensors: ClassVar[tuple[frozenset[str], ...]]
    shared: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[frozenset[str]]
    past: ClassVar[frozenset[str]] = frozenset()
    dropout: ClassVar[str]

    def complete(self, config: Mapping[str, Any]) -> Collection[frozenset[str]]:
        """The sets of tensors of which every layer has one, for a configuration."""
        return self.tensors

    def check(self, saved: Saved) -> None:
        """Refuse a folder by its configuration.

        Raises:
            MisconfigurationException: It describes what is not in its tensors.
        """

    def forms(self, targets: Sequence[Target], saved: Saved) -> list[Form | None]:
        """Make the forms of a folder.

        Args:
            targets: The layers, in the order of ``saved.layers``.
            saved: The folder.

        Returns:
            A form for each layer; ``None`` for one whose adapter adds nothing.

        Raises:
            MisconfigurationException: A tensor or a setting does not fit.
        """
        return [self.form(target, saved.layers[target.name], saved.config) for target in targets]

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Form | None:
        """Make the form of one layer, see :meth:`forms`."""
        raise NotImplementedError

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Write deltas.

        Args:
            adapted: The layers.

        Returns:
            Tensors by their names, and settings.

        Raises:
            MisconfigurationException: PEFT has no place for one of them.
        """
        raise NotImplementedError


def target_of(net: nn.Module, name: str) -> Target:
    """Find a layer that a folder holds an adapter of.

    Raises:
        MisconfigurationException: There is none of that name, or without a matrix of numbers.
    """
    try:
        layer: Any = net.get_submodule(name)
        layout = layout_of(layer, layer.weight)
        fits = len(layout.shape) > 1 and layer.weight.is_floating_point() and "weight" in layer._parameters
    except AttributeError:
        fits = False
    if not fits:
        raise MisconfigurationException(
            f"The adapter is of a layer {name!r}, which {type(net).__name__} does not have, or not with a weight. Name the "
            "network that PEFT wrapped with network=, or build the model that it was trained with."
        )
    return Target(name, layer, layout)


def check_rank(target: Target, rank: int, largest: int | None = None) -> None:
    """Refuse a rank that the matrix of a layer does not have.

    Raises:
        MisconfigurationException: It is zero, or above ``largest``, that of the matrix by default.
    """
    if not 0 < rank <= (target.layout.largest_rank if largest is None else largest):
        raise MisconfigurationException(
            f"The adapter's rank for {target.name!r} is {rank}; its matrix has {tuple(target.layout.matrix_shape)}."
        )


def check_shapes(target: Target, tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors of other shapes than those of a layer's form.

    Raises:
        MisconfigurationException: One has another shape.
    """
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise MisconfigurationException(
                f"The adapter's {key} of {target.name!r} has shape {tuple(tensors[key].shape)}; the layer's would be "
                f"{tuple(shape)}. It was trained beside another network."
            )


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Read a positive number.

    Raises:
        MisconfigurationException: There is none.
    """
    value = config.get(key, default)
    if not is_number(value) or value <= 0:
        raise MisconfigurationException(f"The adapter's {key} is {str(value)[:30]!r}, not a positive number. Save it again.")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that can be counted with.

    Example:
        >>> is_number(2), is_number(True), is_number(float("nan")), is_number(10**400)
        (True, False, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def check_linear(adapted: Sequence[Adapted], owner: str, *others: type[nn.Module], transposed: bool = False) -> None:
    """Refuse layers beside which PEFT has no adapter of a type.

    Args:
        adapted: The layers.
        owner: Name of the adapters.
        *others: Layers beside linear ones that have it.
        transposed: Whether those of transformers' ``Conv1D`` do.

    Raises:
        MisconfigurationException: One is of another kind.
    """
    for each in adapted:
        if not (isinstance(each.layer, (nn.Linear, *others)) or (transposed and each.form.layout.transposed)):
            raise MisconfigurationException(
                f"PEFT has no {owner} for {each.name}, which is no linear layer. Write it as a LoRA, own=False, where it is a "
                f"product of thin matrices, or leave it out when training: exclude=[{each.name!r}]."
            )


def one_rank(adapted: Sequence[Adapted]) -> int:
    """Return the rank of all forms, where PEFT has but one for them.

    Raises:
        MisconfigurationException: They have several.
    """
    ranks = {each.form.rank for each in adapted}
    if len(ranks) > 1:
        raise MisconfigurationException(
            f"PEFT has one rank for such adapters, and these have {sorted(ranks)}. Write them as a LoRA: own=False."
        )
    return int(ranks.pop())
