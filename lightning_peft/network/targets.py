"""Which modules a method works on: one grammar for every method.

A target is one of

=====================  ================================================================================================
``"all-linear"``       every ``nn.Linear`` and every Hugging Face ``Conv1D``
``"all-conv"``         every ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``
``"all-weights"``      both of the above
``"auto"``             ``"all-conv"`` where those hold more weights than linear layers (but the head), else ``"all-linear"``
``"pointwise"``        every convolution with a 1x1 kernel and one group
``"norm"``             every normalisation layer with an affine weight (BatchNorm, LayerNorm, GroupNorm, RMSNorm, ...)
``"mlp.fc1"``          the end of a qualified name, whole components only (``fc1`` matches ``a.fc1``, not ``a.xfc1``)
``"re:REGEX"``         ``re.search`` on the qualified name (anchor with ``^`` and ``$``)
``"type:ClassName"``   modules with a class of that name among their bases
``"group:2-5"``        timm layer groups 2 to 5, both included, as the model's ``group_matcher`` numbers them
``nn.Linear``          a module class, subclasses included
=====================  ================================================================================================

or a list of these, which unite. Excludes take the same grammar and the keywords ``"first"`` (the layer that reads the
input), ``"head"`` (the layer that writes the logits), ``"depthwise"`` (convolutions with more than one group) and
``"embedding"`` (``nn.Embedding`` and every layer whose weight is tied to one).

Modules inside ``parametrizations`` and inside torchmetrics metrics are never targets; parts of PEFT adapters are by name only.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeAlias, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Size, Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics import Metric, MetricCollection

from lightning_peft.network.adapters import adapter_parts
from lightning_peft.network.layers import (
    has_class,
    heads,
    is_conv,
    is_depthwise,
    is_linear,
    is_norm,
    is_pointwise,
    is_weight,
    own_parameters,
    public_class,
)

TargetSpec: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def select(model: nn.Module, targets: TargetSpec, exclude: TargetSpec | None = None) -> dict[str, nn.Module]:
    """Find the modules that ``targets`` name and ``exclude`` does not.

    Args:
        model: Module to search, itself included (its own name is ``""``).
        targets: What to find, see the module docstring. Entries of a list unite.
        exclude: What to leave out with everything in it, same grammar and the keywords ``first``, ``head``, ``depthwise``,
            ``embedding``.

    Returns:
        Fully qualified name to module, in module order. A module registered under several names appears once, under
        the first.

    Raises:
        MisconfigurationException: If an entry of ``targets`` (or a name, regex, type or group in ``exclude``) matches
            nothing, or if ``exclude`` leaves nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select(net, "all-linear"))
        ['0', '2']
        >>> list(select(net, nn.Linear, exclude="head"))
        ['0']
    """
    names = _names(model)
    if not _entries(targets):
        raise MisconfigurationException('`targets` is empty. Name at least one, for example "all-linear".')
    chosen = {module for entry in _entries(targets) for module in _match(model, names, entry, must=True)}
    dropped = excluded(model, exclude)
    found = {aliases[0]: module for module, aliases in names.items() if module in chosen and module not in dropped}
    if not found:
        raise MisconfigurationException(
            f"exclude={exclude!r} removes every module that targets={targets!r} selects "
            f"({', '.join(names[m][0] or '(the model)' for m in list(chosen)[:5])}). Narrow the one or widen the other."
        )
    return found


def excluded(model: nn.Module, exclude: TargetSpec | None) -> set[nn.Module]:
    """Find the modules that ``exclude`` leaves out: those it matches and everything in them.

    Raises:
        MisconfigurationException: A name, regex, type or group in ``exclude`` matches nothing.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
        >>> len(excluded(net, "0")), len(excluded(net, None))
        (3, 0)
    """
    names = _names(model)
    matched = {module for entry in _entries(exclude) for module in _match_excluded(model, names, entry)}
    return {part for module in matched for part in module.modules()}


def explicitly_named(model: nn.Module, targets: TargetSpec | None) -> set[nn.Module]:
    """Find the modules that ``targets`` names one by one: by name, regular expression or timm group, not by kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> explicitly_named(net, ["all-linear", nn.Linear, "type:Linear"]), len(explicitly_named(net, ["all-linear", "2"]))
        (set(), 1)
    """
    names = _names(model)
    entries = [entry for entry in _entries(targets) if isinstance(entry, str) and entry not in (*PRESETS, AUTO)]
    return {module for entry in entries if not entry.startswith("type:") for module in _match(model, names, entry, must=True)}


ValueT = TypeVar("ValueT")


def by_layer(
    model: nn.Module, layers: Iterable[str], value: ValueT, others: Mapping[str, ValueT], argument: str
) -> dict[str, ValueT]:
    """Give every layer a value, and some of them another.

    Args:
        model: Module the names are relative to.
        layers: Qualified names of the layers.
        value: What a layer has that no target of ``others`` matches.
        others: Values by target; the last match counts.
        argument: What the user calls ``others``.

    Raises:
        MisconfigurationException: A target matches none of the layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> by_layer(net, ["0", "2"], 0.9, {"re:^2": 0.5}, "masses")
        {'0': 0.9, '2': 0.5}
    """
    values = dict.fromkeys(layers, value)
    for target, other in others.items():
        matched = [name for name in select(model, target) if name in values]
        if not matched:
            raise MisconfigurationException(f"{argument}={{{target!r}: ...}} matches no layer among the targets.")
        values.update(dict.fromkeys(matched, other))
    return values


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Parameters that are registered more than once.

    Returns:
        First qualified name to all qualified names (the first included), for shared parameters only.

    Example:
        >>> net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> net["b"].weight = net["a"].weight
        >>> tied_names(net)
        {'a.weight': ['a.weight', 'b.weight']}
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {all_names[0]: all_names for all_names in names.values() if len(all_names) > 1}


def _entries(spec: TargetSpec | None) -> list[str | type[nn.Module]]:
    if spec is None:
        return []
    return list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every candidate module in module order with all names it is registered under."""
    names: dict[nn.Module, list[str]] = {}

    def walk(module: nn.Module, name: str, ancestors: tuple[nn.Module, ...]) -> None:
        if isinstance(module, (Metric, MetricCollection)) or module in ancestors:
            return
        names.setdefault(module, []).append(name)
        for key, child in module._modules.items():
            if child is None or (key == "parametrizations" and parametrize.is_parametrized(module)):
                continue
            walk(child, f"{name}.{key}" if name else key, (*ancestors, module))

    walk(model, "", ())
    return names


SENSITIVE = ("first", "head", "depthwise", "embedding")
"""Layers that sparsity leaves dense by default: few weights, much harm."""

AUTO = "auto"

PRESETS: dict[str, Callable[[nn.Module], bool]] = {
    "all-linear": is_linear,
    "all-conv": is_conv,
    "all-weights": is_weight,
    "pointwise": is_pointwise,
    "norm": is_norm,
}


def _match(model: nn.Module, names: dict[nn.Module, list[str]], entry: str | type[nn.Module], must: bool) -> list[nn.Module]:
    """Modules that one entry matches; with ``must``, presets have to match something too."""
    if not (isinstance(entry, str) or (isinstance(entry, type) and issubclass(entry, nn.Module))):
        raise MisconfigurationException(f"A target is a string or an nn.Module class, got {entry!r}.")
    if isinstance(entry, str) and entry.startswith("group:"):
        wanted = set(_timm_group(names, entry))
        return [module for module, aliases in names.items() if wanted.intersection(aliases)]
    if entry == AUTO:
        entry = _main_kind(names.keys())
    matches = _matcher(entry)
    found = [module for module, aliases in names.items() if any(matches(module, name) for name in aliases)]
    if isinstance(entry, type) or entry in PRESETS or entry.startswith("type:"):
        parts = adapter_parts(names.keys())
        found = [module for module in found if module not in parts]
    if not found and (must or entry not in PRESETS):
        _no_match(model, names, entry)
    return found


def _main_kind(modules: Collection[nn.Module]) -> str:
    """The preset of what most of a network's weights are in; its head says nothing about that."""
    rest = set(modules) - set(heads(modules)) - adapter_parts(modules)
    linear, conv = (sum(_numel(m) for m in rest if is_kind(m)) for is_kind in (is_linear, is_conv))
    return "all-conv" if conv > linear else "all-linear"


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in own_parameters(module).values())


def holding_weights(model: nn.Module, targets: TargetSpec, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out of what :func:`select` found whatever has no ``weight``: a regular expression matches containers too.

    Raises:
        MisconfigurationException: An entry of ``targets`` matches nothing else; the layers to name are named.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 8)), nn.Linear(8, 2))
        >>> list(holding_weights(net, "re:0", select(net, "re:0")))
        ['0.0']
    """
    if all(map(_has_weight, found.values())):
        return dict(found)
    names = _names(model)
    for entry in _entries(targets):
        matched = _match(model, names, entry, must=True)
        if not any(map(_has_weight, matched)):
            _no_weight(names[matched[0]][0], matched[0], entry)
    return {name: module for name, module in found.items() if _has_weight(module)}


def _has_weight(module: nn.Module) -> bool:
    """Whether there is a weight, be it one that a hook computes."""
    return "weight" in own_parameters(module) or isinstance(vars(module).get("weight"), Tensor)


def _no_weight(name: str, module: nn.Module, entry: str | type[nn.Module]) -> NoReturn:
    label, shown, own = entry if isinstance(entry, str) else entry.__name__, name or "the module", own_parameters(module)
    inner = [f"{name}.{key}".removeprefix(".") for key, layer in module.named_modules() if key and is_weight(layer)]
    if own:
        raise MisconfigurationException(
            f"Target {label!r}: {shown}, {public_class(module)}, has no weight but {', '.join(own)}, which are out of reach of "
            f"weight maps and masks. Leave it out{f', or name its layers: {inner[:3]}' if inner else ''}."
        )
    raise MisconfigurationException(
        f"Target {label!r}: {shown}, {public_class(module)}, has no weight of its own. "
        + (f"Name its layers, targets={inner[:3]!r}{' and so on' if len(inner) > 3 else ''}." if inner else "Name a layer.")
    )


def _matcher(entry: str | type[nn.Module]) -> Callable[[nn.Module, str], bool]:
    if isinstance(entry, type):
        return lambda module, _: isinstance(module, entry)
    if entry in PRESETS:
        return lambda module, _: PRESETS[entry](module)
    if entry.startswith("type:"):
        return lambda module, _: has_class(module, entry.removeprefix("type:"))
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise MisconfigurationException(f"Target {entry!r} is not a valid regular expression: {error}.") from error
        return lambda _, name: pattern.search(name) is not None
    return lambda _, name: f".{name}".endswith(f".{entry}") and bool(entry)


def _match_excluded(model: nn.Module, names: dict[nn.Module, list[str]], entry: str | type[nn.Module]) -> list[nn.Module]:
    if entry == "first":
        # a network that starts with an embedding table has no dense first layer: its table is the first layer
        return [module for module in names if is_weight(module) or isinstance(module, nn.Embedding)][:1]
    if entry == "head":
        found = heads(names.keys())
        return [*found, *(twin for module in found for twin in _twins(model, names[module][0]))]
    if entry == "depthwise":
        return [module for module in names if is_depthwise(module)]
    if entry == "embedding":
        tables = {id(p) for m in names if isinstance(m, nn.Embedding) for p in own_parameters(m).values()}
        return [module for module in names if tables.intersection(map(id, own_parameters(module).values()))]
    return _match(model, names, entry, must=False)


def _twins(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The same layer in copies of the network beside it: a target network, a teacher."""
    first, _, rest = name.partition(".")
    own = model._modules.get(first)
    for key, child in model._modules.items():
        if rest and own is not None and child is not None and key != first and _shapes(child) == _shapes(own):
            yield child.get_submodule(rest)


def _shapes(module: nn.Module) -> list[tuple[str, Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def _timm_group(names: dict[nn.Module, list[str]], entry: str) -> list[str]:
    """Qualified names of the modules in the timm layer groups ``"group:K"`` or ``"group:K-L"``."""
    bounds = re.fullmatch(r"group:(\d+)(?:-(\d+))?", entry)
    if bounds is None:
        raise MisconfigurationException(f'Target {entry!r} is not of the form "group:3" or "group:3-5".')
    owner = next((m for m in names if callable(getattr(m, "group_matcher", None))), None)
    if owner is None:
        raise MisconfigurationException(
            f"Target {entry!r} needs a timm model (a submodule with `group_matcher`), and there is none. "
            'Select by name instead, for example "re:blocks\\.[0-3]\\.".'
        )
    try:
        from timm.models import group_modules
    except ImportError as error:
        raise MisconfigurationException(f'Target {entry!r} needs timm: pip install "lightning-peft[vision]".') from error
    groups = group_modules(owner, owner.group_matcher(coarse=False))  # type: ignore[operator]
    low, high = int(bounds[1]), int(bounds[2] or bounds[1])
    if low > high or high > max(groups):
        raise MisconfigurationException(f"Target {entry!r}: this model has layer groups 0 to {max(groups)}.")
    prefix = f"{names[owner][0]}." if names[owner][0] else ""
    return [f"{prefix}{name}" for group in range(low, high + 1) for name in groups[group]]


def _no_match(model: nn.Module, names: dict[nn.Module, list[str]], entry: str | type[nn.Module]) -> NoReturn:
    layers = Counter(public_class(module) for module in names if own_parameters(module))
    present = ", ".join(f"{name} x{count}" for name, count in layers.most_common()) or "no layer with parameters"
    if isinstance(entry, type) or entry in PRESETS:
        label = entry if isinstance(entry, str) else entry.__name__
        raise MisconfigurationException(f"Target {label!r} matches nothing in {type(model).__name__}. It has {present}.")
    if entry.startswith("type:"):
        wanted = entry.removeprefix("type:")
        classes = sorted({base.__name__ for module in names for base in type(module).__mro__})
        near = [f"type:{name}" for name in difflib.get_close_matches(wanted, classes, n=5)]
    else:
        near = _nearest_names(names, entry.removeprefix("re:"))
    hint = f"Did you mean {', '.join(near)}?" if near else f"It has {present}."
    raise MisconfigurationException(f"Target {entry!r} matches no module of {type(model).__name__}. {hint}")


def _nearest_names(names: dict[nn.Module, list[str]], wanted: str) -> list[str]:
    """Close endings of the same depth, presets included; qualified names of modules that end so."""
    depth = wanted.count(".") + 1
    endings: dict[str, str] = {}
    for aliases in names.values():
        for name in aliases:
            endings.setdefault(".".join(name.split(".")[-depth:]), name)
    near = difflib.get_close_matches(wanted, [*PRESETS, *filter(None, endings)], n=5)
    return [endings.get(ending, ending) for ending in near]
