"""The plan: which method acts where, resolved once per run, printed, and refused when two methods would fight."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.attaching.hook_checks import ConflictError, check_hooks, check_order
from lightning_peft.compose.lanes import ONE_WRITER, ONE_WRITER_PER_TENSOR, Lane, Resource
from lightning_peft.contract import Contract, methods_of, ordered
from lightning_peft.network.layers import loose_matrices
from lightning_peft.network.plain_tensors import plain_tensors
from lightning_peft.network.resolve import resolve_network
from lightning_peft.network.targets import explicitly_named, tied_names

_LITTLE = 0.02  # share of the parameters below which a method that acts on what it finds is likely to miss what was meant


@dataclass(frozen=True)
class PlanRow:
    """One method in a plan."""

    lane: Lane
    name: str
    what: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Methods in the order they act; ``str(plan)`` is the printed table."""

    network: str
    parameters: int
    rows: tuple[PlanRow, ...]

    def __str__(self) -> str:
        head = f"lightning_peft plan (network: {self.network or 'the module itself'}, {self.parameters / 1e6:.2f} M parameters)"
        cells = [
            (
                row.lane.name,
                row.name,
                row.what,
                "; ".join(
                    f"{verb} {', '.join(things)}" for verb, things in (("reads", row.reads), ("writes", row.writes)) if things
                ),
            )
            for row in self.rows
        ]
        widths = [max((len(row[column]) for row in cells), default=0) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n  ".join([head, *lines])


def network_of(methods: Iterable[Contract], module: nn.Module) -> tuple[str, nn.Module]:
    """Agree on the network: the name methods were given, else the one found when any method reads it, else the module."""
    methods = list(methods)
    given = {method.network for method in methods if method.network is not None}
    if len(given) > 1:
        raise MisconfigurationException(f"The methods name different networks: {sorted(given)}. Give all of them the same one.")
    needs = any(method.reads_now() & {Resource.LOGITS, Resource.INPUTS} for method in methods)
    try:
        return resolve_network(module, next(iter(given), None))
    except MisconfigurationException:
        if given or needs:
            raise
        return "", module


def resolve(methods: Sequence[Contract], module: nn.Module, network: str) -> Plan:
    """Order methods and refuse those that conflict.

    Args:
        methods: The methods of one Trainer.
        module: The user's module, complete.
        network: Qualified name of the network.

    Returns:
        The plan.

    Raises:
        ConflictError: Two methods write one thing, or one changes the structure that another relies on.
        MisconfigurationException: A target matches nothing, a claimed tensor is shared with a layer left out, or a method
            overrides a hook that its lane never gets.
    """
    methods = ordered(methods)
    for method in methods:
        check_hooks(method)
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ConflictError(f'Two methods are called {name!r}: give one of them another name with name="...".')
    claims = {method.name: list(dict.fromkeys(method.claims(module))) for method in methods}
    for resource in Resource:
        writers = [method for method in methods if resource in method.writes_now()]
        if resource in ONE_WRITER and len(writers) > 1:
            raise ConflictError(
                f"{' and '.join(method.name for method in writers)} both write the {resource.value}, so their effects would "
                "depend on each other. Remove one of them."
            )
        if resource in ONE_WRITER_PER_TENSOR:
            _check_overlap(writers, claims, resource)
    check_order(methods, claims)
    _check_structure(methods)
    _check_ties(methods, claims, module)
    on_weights = [method for method in methods if method.lane in (Lane.REPARAM, Lane.MASK) and claims[method.name]]
    shares = {method.name: share_of(module, claims[method.name]) for method in on_weights}
    for method in on_weights:
        if shares[method.name] < _LITTLE:
            _warn_of_little(method, shares[method.name], len(claims[method.name]), module)
    rows = tuple(
        PlanRow(
            method.lane,
            method.name,
            _what(method, module, shares.get(method.name)),
            tuple(sorted(resource.value for resource in method.reads_now())),
            tuple(sorted(resource.value for resource in method.writes_now())),
        )
        for method in methods
    )
    return Plan(network, sum(parameter.numel() for parameter in module.parameters()), rows)


def _what(method: Contract, module: nn.Module, share: float | None) -> str:
    described = method.describe(module)
    if share is not None:
        described += f", {_share(method, module, share)}"
    parts = [described]
    if spared := method.left_alone(module):
        parts.append(f"leaves {len(spared)} frozen alone ({_some(spared)})")
    return "; ".join(filter(None, parts))


def _share(method: Contract, module: nn.Module, share: float) -> str:
    """Say how much of the network a method acts on, and which weights it passes by because no layer holds them."""
    said = f"{share:.0%} of the parameters" if share >= 0.005 else f"{share:.1%} of the parameters"
    unreached = loose_matrices(module) if method.lane == Lane.MASK else []
    return said + (f", not {_some(unreached)}" if unreached else "")


def _warn_of_little(method: Contract, share: float, tensors: int, module: nn.Module) -> None:
    """Warn when a method that was not told layer by layer where to act reaches next to nothing of the network."""
    if "exclude" in method.given_arguments or explicitly_named(module, method.targets):
        return
    others = loose_matrices(module)
    warnings.warn(
        f"{method.name} acts on {share:.1%} of the parameters: targets={method.targets!r} without "
        f"exclude={method.exclude!r} selects {tensors} tensor{'s' if tensors > 1 else ''}"
        + (f", and out of reach are {_some(others)}. " if others else ". ")
        + 'Choose other targets=, such as "all-weights", or name the layers that are meant.',
        UserWarning,
        stacklevel=2,
    )


def share_of(module: nn.Module, claims: Iterable[str]) -> float:
    """Share of a module's parameters that some tensors hold, each counted once.

    Example:
        >>> share_of(nn.Linear(3, 1), ["weight"])
        0.75
    """
    tensors = {name: tensor for name, tensor in plain_tensors(module).items() if isinstance(tensor, nn.Parameter)}
    claimed = {id(tensors[name]): tensors[name].numel() for name in claims if name in tensors}
    return sum(claimed.values()) / max(1, sum({id(tensor): tensor.numel() for tensor in tensors.values()}.values()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_structure(methods: Sequence[Contract]) -> None:
    changing = [method.name for method in methods if Resource.STRUCTURE in method.writes_now()]
    relying = [method.name for method in methods if Resource.STRUCTURE in method.reads_now()]
    if changing and relying:
        raise ConflictError(
            f"{relying[0]} relies on the structure of the network, which {changing[0]} changes during the training. Train "
            "with one of them first, then with the other."
        )
    if len(changing) > 1:
        raise ConflictError(
            f"{changing[0]} and {changing[1]} both change the structure of the network, and what one names and measures, the "
            "other moves or removes. Train with one of them first, then with the other."
        )


def _check_overlap(writers: Sequence[Contract], claims: dict[str, list[str]], resource: Resource) -> None:
    owners: dict[str, str] = {}
    for method in writers:
        for tensor in claims[method.name]:
            other = owners.setdefault(tensor, method.name)
            if other != method.name:
                layer = tensor.rpartition(".")[0]
                raise ConflictError(
                    f"{other} and {method.name} both put a {resource.value} on {tensor}. Give them different targets, for "
                    f"instance exclude=[{layer!r}] in one of them."
                )


def _check_ties(methods: Iterable[Contract], claims: dict[str, list[str]], module: nn.Module) -> None:
    aliases = {name: names for names in tied_names(module).values() for name in names}
    for method in methods:
        claimed = set(claims[method.name])
        for tensor in claims[method.name]:
            others = [name for name in aliases.get(tensor, ()) if _layer(module, name) is not _layer(module, tensor)]
            if others and not (method.ties and claimed.issuperset(others)):
                path, all_paths = tensor.rpartition(".")[0], [name.rpartition(".")[0] for name in (tensor, *others)]
                advice = f"Name all of its layers, targets={all_paths!r} and exclude=None, leave" if method.ties else "Leave"
                raise MisconfigurationException(
                    f"{method.name} targets {tensor}, which is the same parameter as {', '.join(others)}"
                    f"{'' if claimed.isdisjoint(others) else ' (also targeted)'}: mapping one view would change the other. "
                    f"{advice} it out with exclude=[{path!r}], or untie the layers."
                )


def _layer(module: nn.Module, tensor: str) -> nn.Module:
    """The layer that owns a tensor; one that stands in several places is one layer, which sees one value everywhere."""
    return module.get_submodule(tensor.rpartition(".")[0])


def plan(module: nn.Module, callbacks: Iterable[object]) -> Plan:
    """Resolve the plan of a module and a callbacks list without training.

    Args:
        module: A LightningModule or any module.
        callbacks: What will be given to ``Trainer(callbacks=...)``; objects that are no methods are ignored.

    Returns:
        The plan; print it.

    Raises:
        MisconfigurationException: As in training: conflicts, targets that match nothing, an ambiguous network.
    """
    methods = list(methods_of(callbacks))
    name, _ = network_of(methods, module)
    return resolve(methods, module, name)
