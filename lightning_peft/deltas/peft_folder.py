"""Adapters to and from folders of Hugging Face PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.contract import snake_case
from lightning_peft.deltas import peft_files, peft_modules
from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.on_module import Delta, deltas_on
from lightning_peft.deltas.peft_format import Adapted, PeftFormat, Saved, Target, target_of
from lightning_peft.deltas.peft_formats import format_named
from lightning_peft.deltas.sides import why_on_weight
from lightning_peft.network.resolve import resolve_network
from lightning_peft.weights.detach import attachments, detach_maps
from lightning_peft.weights.maps import attach_map
from lightning_peft.weights.merge import check_unmerged
from lightning_peft.weights.parts import put_part

# What says how an adapter was made or found, and changes nothing of the one that is in the file.
_OF_THE_PAST = {"peft_type", "target_modules", "exclude_modules", "modules_to_save", "bias", "fan_in_fan_out", "inference_mode"}
_OF_THE_PAST |= {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "layers_to_transform"}
_OF_THE_PAST |= {"layers_pattern", "runtime_config"}


def save_peft(
    module: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    also: Collection[str] = (),
    own: bool = False,
    network: str | None = None,
) -> Path:
    """Write an adapter as a folder that ``peft.PeftModel.from_pretrained`` reads.

    Any delta that is a product of thin matrices is written as the LoRA that it is, for instance one of PiSSA as a LoRA of twice
    its rank beside the unchanged base, and one of AdaLoRA with the ranks that it was left. One that is none is written as the
    type that PEFT has for it. What ``tune=`` of its method named goes along: whole modules as ``modules_to_save``, and biases.

    Args:
        module: The module, with a delta on it: in training, or after a fit of a method with ``keep=True``.
        folder: Folder to write; it must not exist or be empty, and appears only when it is complete.
        name: Name of the method whose adapter is meant, where there are several.
        also: Names of further layers within the network that were trained as they are, such as a new head that the method's
            ``tune=`` did not name: ``("classifier",)``; they become ``modules_to_save``.
        own: Write PEFT's own type for the delta where it has one (``MISS``, ``RANDLORA``, ``ADALORA``, KaSA) instead of a LoRA:
            no larger than what was trained, and trained on by PEFT as what it is, but read by fewer programs.
        network: Qualified name of the network that PEFT will wrap; found where it is the only one.

    Returns:
        ``folder``.

    Raises:
        MisconfigurationException: No adapter, several, one that PEFT has no place for, or a folder in use.
    """
    folder, (prefix, net) = Path(folder), resolve_network(module, network)
    deltas = list(_adapter(module, name))
    adapted = [Adapted(_within(prefix, path), layer, delta.form) for path, layer, delta in deltas]
    kind = _format_for(adapted, own)
    tensors, config = kind.written(adapted)
    tune = [each for _, _, delta in deltas for each in delta.tuned]
    names = peft_modules.tuned_names(module, tune, {path for path, *_ in deltas})
    tuned = peft_modules.tuned(net, _those_within(prefix, names), list(also), adapted, kind)
    shared = {key: value for key, value in tensors.items() if key in kind.shared}
    tensors = {key: value for key, value in tensors.items() if key not in shared}
    common = {
        "peft_type": kind.peft_type,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": _targets(net, [each.name for each in adapted]),
        kind.dropout: max(delta.dropout if isinstance(delta, DeltaPart) else 0.0 for _, _, delta in deltas),
    }
    peft_files.write(folder, common | tuned.config | config, tensors | tuned.tensors, shared)
    return folder


def load_peft(module: nn.Module, folder: str | Path, *, name: str | None = None, network: str | None = None) -> list[str]:
    """Put an adapter of a PEFT folder on a module, where it stays: switched, trained on by its method, baked.

    Args:
        module: The module, whose network has the weights that the adapter was trained beside.
        folder: The folder: of LoRA or DoRA, or of a type that an installed plugin reads (``MISS``, ``RANDLORA``, ``ADALORA``).
        name: Name to know the adapter by. That of the method which trains it on by default: ``"lora"`` of LoRA and DoRA,
            ``"mi_ss"`` of MiSS.
        network: Qualified name of the network that PEFT wrapped; found where it is the only one.

    Returns:
        The layers that have it.

    Raises:
        MisconfigurationException: The folder is damaged, pickled or of another kind, or does not fit the network, or an adapter
            of that name is on the module. Nothing was changed then.
    """
    check_unmerged(module, "another adapter")
    (kind, saved), (prefix, net) = peft_files.read(Path(folder)), resolve_network(module, network)
    warn_of_unknown(kind, saved)
    name = name or snake_case(kind.owner)
    if any(each.method == name for each in attachments(module)):
        raise MisconfigurationException(f"{name!r} is on the module already. Give the adapter another name: name=.")
    targets = [target_of(net, layer) for layer in saved.layers]
    forms = kind.forms(targets, saved)
    made = {
        f"{prefix}.{target.name}" if prefix else target.name: _delta(net, target, form, kind, saved, name)
        for target, form in zip(targets, forms, strict=True)
        if form is not None
    }
    tuned = peft_modules.loaded(net, saved)
    trained = {key for key, _ in net.named_parameters()} & tuned.keys()
    for delta in made.values():
        delta.owner = "DoRA" if isinstance(delta.form, DecomposedForm) else kind.owner
        delta.method, delta.stays = name, True
        delta.tuned = tuple(f"{prefix}.{key}" if prefix else key for key in sorted(trained))
    _attach(module, made)
    own = net.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in tuned.items():
            own[key].copy_(value)
    return list(made)


def _attach(module: nn.Module, made: Mapping[str, Delta]) -> None:
    """Put all deltas on, or none."""
    before = frozenset(attachments(module))
    try:
        for path, delta in made.items():
            if isinstance(delta, DeltaMap):
                attach_map(module, f"{path}.weight", delta)
            else:
                put_part(module, path, delta)
    except BaseException:
        detach_maps(module, "pristine", stay=before)
        raise


def _delta(net: nn.Module, target: Target, form: Form, kind: PeftFormat, saved: Saved, name: str) -> Delta:
    """What stands on a layer with a form, on the side on which it can act."""
    form.to(target.device)
    if why_on_weight(net, target.name, target.layer, type(form), name):
        return DeltaMap(form)
    dropout = saved.config.get(kind.dropout) or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise MisconfigurationException(
            f"{kind.dropout} of {saved.path} is {dropout!r}; it is from 0 to below 1. Save it again."
        )
    return DeltaPart(form, float(dropout))


def warn_of_unknown(kind: PeftFormat, saved: Saved) -> None:
    """Warn of settings of a folder that nothing here reads."""
    known = kind.settings | kind.past | _OF_THE_PAST | {kind.dropout}
    unset: tuple[object, ...] = (None, False, {}, [], "none", 1)
    unknown = sorted(key for key, value in saved.config.items() if key not in known and value not in unset)
    if unknown:
        warnings.warn(
            f"{saved.path} has settings that say nothing to this library: {', '.join(unknown)}.", UserWarning, stacklevel=3
        )


def _adapter(module: nn.Module, name: str | None) -> Iterator[tuple[str, nn.Module, Delta]]:
    """Layer by layer: name, layer and delta of one method's adapter."""
    found = list(deltas_on(module))
    names = dict.fromkeys(delta.method for _, delta in found)
    if name is None and len(names) > 1:
        raise MisconfigurationException(f"Several adapters are on the module: {', '.join(names)}. Say which with name=.")
    if not names or (name is not None and name not in names):
        there = f"; there is {', '.join(names)}" if names else ""
        raise MisconfigurationException(
            f"No adapter {'' if name is None else repr(name) + ' '}is on the module{there}. It is there during a fit, and "
            "afterwards where the method has keep=True."
        )
    wanted = name or next(iter(names))
    for tensor, delta in found:
        if delta.method != wanted:
            continue
        path, _, key = tensor.rpartition(".")
        inside = isinstance(module.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)
        if key != "weight" or inside:
            raise MisconfigurationException(
                f"PEFT has no place for a delta of {tensor}. Leave it out when training: exclude=[{path!r}]."
            )
        yield path, module.get_submodule(path), delta


def _format_for(adapted: Sequence[Adapted], own: bool) -> PeftFormat:
    """The format that deltas are written in."""
    names = {each.form.peft for each in adapted}
    factored = all(isinstance(each.form, FactoredForm) for each in adapted)
    if factored and (not own or names == {None}):
        return format_named("LORA")
    if None in names or len(names) > 1:
        odd = next(each for each in adapted if each.form.peft is None or not factored)
        raise MisconfigurationException(
            f"The delta of {odd.name}, {odd.form.kind!r}, is no product of thin matrices, and PEFT has no type of adapter for "
            "it. Bake it and save the whole weights."
        )
    return format_named(names.pop())


def _targets(net: nn.Module, names: Sequence[str]) -> list[str] | str:
    """PEFT's ``target_modules``, which it takes for the ends of names: an expression where those fit other layers too."""
    others = [path for path, _ in net.named_modules() if path not in names]
    if any(path.endswith(tuple(f".{name}" for name in names)) for path in others):
        return "|".join(re.escape(name) for name in names)
    return list(names)


def _those_within(prefix: str, names: Sequence[str]) -> list[str]:
    """Names within the network; what was trained outside of it is said."""
    outside = [name for name in names if prefix and not name.startswith(f"{prefix}.")]
    if outside:
        warnings.warn(
            f"{', '.join(outside)} were trained too, and are not within the network {prefix!r} that PEFT will wrap, so "
            "that they are not in the folder. Save them apart, or name an outer network: network=''.",
            UserWarning,
            stacklevel=3,
        )
    return [_within(prefix, name) for name in names if name not in outside]


def _within(prefix: str, path: str) -> str:
    inner = path.removeprefix(f"{prefix}.") if prefix else path
    if prefix and inner == path:
        raise MisconfigurationException(f"{path} is not within the network {prefix!r}. Name the network with network=.")
    return inner
