"""The keys of every edit. At run time edits are plain dicts, and checkpoints hold them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, TypedDict


class EditNotes(TypedDict, total=False):
    """What any edit may say beside what it changes.

    Attributes:
        follow: Whether the other methods act on new layers too.
        seed: Seed of the random numbers that fill new tensors, the same on every rank; 0 where it is missing.
        by: Name of the method that asked for it.
        step: Optimizer step at which it was asked for.
        event: Number of the event of that method's plan.
    """

    follow: bool
    seed: int
    by: str
    step: int
    event: int


_From = TypedDict("_From", {"from": int})  # a keyword, which no class body can name
_FromShape = TypedDict("_FromShape", {"from": list[int]})


class _BlocksOptions(EditNotes, total=False):
    shared: bool
    tied: list[int]
    zeroed: list[str]
    check: str
    numbering: list[Any]


class BlocksEdit(_BlocksOptions, _From):
    """Which blocks a list holds (:mod:`lightning_peft.structure.depth`).

    Attributes:
        op: ``"blocks"``.
        path: Qualified name of the list.
        from: Blocks before.
        sources: Old position of every new block.
        block: Signatures of the old blocks, each once, sorted.
        rates: Stochastic-depth rates of the new blocks, by the name of the layer in the block.
        old_rates: Those of the old blocks.
        shared: Whether new blocks of one source are one block.
        tied: First position of every old block, where some stand in several.
        zeroed: Tensors of a block that an operator fills with zeros.
        check: ``"off"``: the network's class need not be able to build the new list.
        numbering: Prefix and first number of the names of entries, where these are not their positions.
    """

    op: Literal["blocks"]
    path: str
    sources: list[int]
    block: list[str]
    rates: dict[str, list[float]]
    old_rates: dict[str, list[float]]


class _ResizeEntryOptions(TypedDict, total=False):
    of: list[str]
    tied: list[str]
    tied_head: bool
    offset: float
    factor: float


class ResizeEntry(_ResizeEntryOptions, _FromShape):
    """A tensor that grows.

    Attributes:
        from: Its shape before.
        to: Its shape after.
        role: ``"weight"``, ``"bias"``, ``"embedding"``, ``"scale"``, ``"norm_weight"`` and so on.
        dims: Product of axes of every dimension (:mod:`lightning_peft.structure.axes`).
        input: Position of the input dimension.
        of: Tensors whose outputs a scale multiplies.
        tied: Other names of the tensor.
        tied_head: Whether what follows the norm shares its weight with an embedding.
        offset: What the layer adds to it before it is used.
        factor: What its new value is multiplied by for the network to use it as the operator means it.
    """

    to: list[int]
    role: str
    dims: list[str]
    input: int | None


class ResizeEdit(EditNotes):
    """Which sizes axes of a network grow to (:mod:`lightning_peft.structure.width`).

    Attributes:
        op: ``"resize"``.
        path: Qualified name of the network.
        axes: Old and new number of units by axis.
        tensors: What becomes of each tensor, by qualified name.
        attributes: Old and new value of the numbers layers note, by layer and attribute.
        config: Old and new value of the numbers a configuration notes, by key.
        norms: Normalisations, by layer.
        inputs: Product of axes each layer reads, by layer.
        eps_config: Key of the configuration that notes the epsilon of all norms; empty where none does.
    """

    op: Literal["resize"]
    path: str
    axes: dict[str, list[int]]
    tensors: dict[str, ResizeEntry]
    attributes: dict[str, dict[str, list[Any]]]
    config: dict[str, list[Any]]
    norms: dict[str, dict[str, Any]]
    inputs: dict[str, str]
    eps_config: str


class _SliceEntryOptions(TypedDict, total=False):
    tied: list[str]


class SliceEntry(_SliceEntryOptions, _FromShape):
    """A tensor that loses coordinates.

    Attributes:
        from: Its shape before.
        to: Its shape after.
        kept: Ranges of the coordinates that stay, by dimension; ``None`` for a dimension that stays whole.
        tied: Other names of the tensor.
    """

    to: list[int]
    kept: list[list[list[int]] | None]


class SliceEdit(EditNotes):
    """Which coordinates of tensors stay (:mod:`lightning_peft.structure.slices`).

    Attributes:
        op: ``"slice"``.
        path: Qualified name of the network.
        tensors: What becomes of each tensor, by qualified name.
        attributes: Old and new value of the numbers layers note, by layer and attribute.
    """

    op: Literal["slice"]
    path: str
    tensors: dict[str, SliceEntry]
    attributes: dict[str, dict[str, list[Any]]]


class PutEdit(EditNotes):
    """Another module in a layer's place (:mod:`lightning_peft.structure.put`).

    Attributes:
        op: ``"put"``.
        path: Qualified name of the layer.
        also: Its other names, where it stands in several places.
        replaced: Signature of the layer.
        method: Class name of the method that declares the replacement; ``None`` for one of the engine's own.
        kind: Name of the replacement.
        config: Arguments the replacement is built with: numbers, strings, lists and dicts.
    """

    op: Literal["put"]
    path: str
    also: list[str]
    replaced: str
    method: str | None
    kind: str
    config: dict[str, Any]


Edit: TypeAlias = BlocksEdit | ResizeEdit | SliceEdit | PutEdit
"""A change of structure: strings, numbers, lists and dicts only, told apart by ``"op"``."""

Recorded: TypeAlias = Mapping[str, Any]
"""An edit as a file holds it, before it is checked."""
