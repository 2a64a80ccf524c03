"""Put edits: another module in a layer's place, wrapped round it or instead of it.

The module is built from the name of a constructor and plain arguments, so a checkpoint can say what stands there. Which
constructors there are is for the installed methods to say (:class:`~lightning_peft.structure.replacement.Replacement`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft import registry
from lightning_peft.network.block_lists import signature
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.structure.edit_types import PutEdit, Recorded
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.forms import anything, dict_of, fields, list_of, maybe, text
from lightning_peft.structure.low_rank_pair import LowRankPair
from lightning_peft.structure.plain import not_plain
from lightning_peft.structure.replacement import Replacement
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.maps import plain_tensors

_OF_THE_ENGINE: tuple[type[Replacement], ...] = (LowRankPair,)
_FORMS = {
    "path": text,
    "also": list_of(text),
    "replaced": text,
    "method": maybe(text),
    "kind": text,
    "config": dict_of(anything),
}
_FORM = fields(_FORMS)


class PutResult(NamedTuple):
    """What a put did, in the terms of :class:`~lightning_peft.structure.edits.Change`."""

    renamed: dict[str, str]
    copied: dict[str, str]
    removed: dict[str, nn.Module]


def put_edit(module: nn.Module, path: str, replacement: Replacement, *, method: str | None = None) -> PutEdit:
    """Describe a module in a layer's place.

    Args:
        module: The module.
        path: Qualified name of the layer; where it stands in several places, all of them change.
        replacement: What takes its place.
        method: Class name of the method that declares it; ``None`` for one of the engine's own.

    Raises:
        CheckpointError: There is no such layer, or the arguments do not fit it.
    """
    layer = layer_at(module, path)
    others = [name for name, part in module.named_modules(remove_duplicate=False) if part is layer and name != path]
    edit: PutEdit = {
        "op": "put",
        "path": path,
        "also": others,
        "replaced": signature(layer),
        "method": method,
        "kind": replacement.kind,
        "config": replacement.config(),
    }
    check_put(module, edit)
    return edit


def layer_at(module: nn.Module, path: str) -> nn.Module:
    """Return the layer called ``path``.

    Raises:
        CheckpointError: There is none, or nothing else can stand there.
    """
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{type(module).__name__} has no submodule {path!r}, which should be replaced.") from None
    parent, _, name = path.rpartition(".")
    if not path:
        raise CheckpointError("A module cannot be put in its own place; name a layer within it.")
    if isinstance(module.get_submodule(parent), nn.MultiheadAttention) and name == "out_proj":
        raise CheckpointError(
            f"{path} is never called: nn.MultiheadAttention reads its weight. Replace the attention {parent!r} instead."
        )
    return layer


def rebuild(edit: Recorded) -> Replacement:
    """Make the replacement an edit names, of an installed method only.

    Raises:
        MisconfigurationException: There is no such method.
        CheckpointError: It has no such replacement, or the arguments do not fit.
    """
    own, owner = _OF_THE_ENGINE, "This version of lightning-peft"
    if edit["method"] is not None:
        own, owner = registry.find(edit["method"]).replacements, f"The method {edit['method']}"
    for candidate in own:
        if candidate.kind == edit["kind"]:
            try:
                return candidate(**edit["config"])
            except Exception as error:  # an author cannot foresee what stands in a damaged file
                raise CheckpointError(f"The recorded arguments of {edit['kind']!r} do not fit: {error}") from error
    raise CheckpointError(f"{owner} knows no replacement {edit['kind']!r}; upgrade the package that ships it.")


def check_put(module: nn.Module, edit: Recorded) -> None:
    """Refuse an edit that does not fit, before anything is touched.

    Raises:
        CheckpointError: It is malformed, was made on another layer, or its arguments do not fit.
    """
    found = _FORM({key: edit.get(key) for key in _FORMS}, "")
    found = found or (None if (odd := not_plain(edit["config"], "['config']")) is None else f"{odd}, no plain data")
    if found is not None:
        raise CheckpointError(f"A recorded replacement of a layer is malformed: {found}.")
    replacement, path = rebuild(edit), edit["path"]
    layer = layer_at(module, path)
    places = sorted(name for name, part in module.named_modules(remove_duplicate=False) if part is layer)
    if signature(layer) != edit["replaced"] or places != sorted([path, *edit["also"]]):
        raise CheckpointError(
            f"{edit['kind']} was put in the place of {path}, then {edit['replaced']} in {1 + len(edit['also'])} places; this "
            f"{type(module).__name__} has {signature(layer)} in {len(places)}. Build the model with the arguments it was "
            "trained with."
        )
    try:
        replacement.check(layer)
    except Exception as error:  # what an author's check meets in a damaged file cannot be foreseen
        raise CheckpointError(f"{edit['kind']} cannot replace {path}: {error}.") from error


def put(module: nn.Module, edit: PutEdit) -> PutResult:
    """Build what takes the place of a layer, and put it there.

    Raises:
        CheckpointError: It cannot be built; nothing is changed then.
    """
    layer, replacement = module.get_submodule(edit["path"]), rebuild(edit)
    before = plain_tensors(layer)
    new = _built(module, layer, edit)
    if replacement.inside is None:
        detach_maps(layer, "live")  # maps of a layer that is no longer called
    _stand(module, edit, new)
    known = {id(tensor): name for name, tensor in before.items()}
    sources = replacement.sources()
    renamed, copied = {}, {}
    for place in (edit["path"], *edit["also"]):
        if replacement.inside is not None:
            renamed[place] = f"{place}.{replacement.inside}"
        for name, tensor in plain_tensors(new).items():
            if id(tensor) in known and replacement.inside is None:
                renamed[f"{place}.{known[id(tensor)]}"] = f"{place}.{name}"
            elif id(tensor) not in known and name in sources:
                copied[f"{place}.{name}"] = f"{place}.{sources[name]}"
    return PutResult(renamed, copied, {} if replacement.inside is not None else {edit["path"]: layer})


def _built(module: nn.Module, layer: nn.Module, edit: PutEdit) -> nn.Module:
    replacement = rebuild(edit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(edit.get("seed", 0)))
        try:
            new = replacement.build(layer)
            stands = replacement.inside is None or new.get_submodule(replacement.inside) is layer
        except Exception as error:
            raise CheckpointError(f"{edit['kind']} could not be built in the place of {edit['path']}: {error}") from error
    if not isinstance(new, nn.Module) or not stands:
        raise CheckpointError(
            f"{type(replacement).__name__}.build must return a module"
            + (f" that holds the layer as {replacement.inside!r}." if replacement.inside else ".")
        )
    modes = {part: part.training for part in layer.modules()}
    new.train(layer.training)
    for part, training in modes.items():  # a norm that is frozen inside the layer stays so
        part.training = training
    tensors = [*layer.parameters(), *layer.buffers(), *module.parameters()]
    return new.to(tensors[0].device) if tensors else new


def _stand(module: nn.Module, edit: PutEdit, new: nn.Module) -> None:
    for place in (edit["path"], *edit["also"]):
        parent, _, name = place.rpartition(".")
        module.get_submodule(parent)._modules[name] = new


def take_out(module: nn.Module, edit: PutEdit, removed: Mapping[str, nn.Module]) -> None:
    """Put the replaced layer back.

    Raises:
        CheckpointError: It left in another process.
    """
    new, inside = module.get_submodule(edit["path"]), rebuild(edit).inside
    layer = removed.get(edit["path"]) if inside is None else new.get_submodule(inside)
    if layer is None:
        raise CheckpointError(
            f"{edit['path']} was replaced before this module was built, so the layer that stood there is not available. Load "
            "into a new instance of the class."
        )
    device = next((tensor.device for tensor in new.parameters()), torch.device("cpu"))
    _stand(module, edit, _awake(layer, device).train(new.training))


def shells(removed: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copy replaced layers without their values, which a checkpoint brings when one of them comes back."""
    return {path: _shell(layer) for path, layer in removed.items()}


def _shell(layer: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*layer.parameters(), *layer.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return deep_copy(layer, memo)


@torch.no_grad()
def _awake(layer: nn.Module, device: torch.device) -> nn.Module:
    """Move a layer to a device; a shell gets zeros."""
    if not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        return layer.to(device)
    layer.to_empty(device=device)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.zero_()
    return layer


@torch.no_grad()
def values_after(
    module: nn.Module, edit: PutEdit, removed: Mapping[str, nn.Module], plain: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what an edit makes of other values of the layer: those of new tensors, by qualified name.

    Args:
        module: The module, edited.
        edit: The edit.
        removed: What it removed.
        plain: Plain values before the edit, by qualified name, an average for instance.
    """
    inside = rebuild(edit).inside
    layer = removed[edit["path"]] if inside is None else module.get_submodule(f"{edit['path']}.{inside}")
    twin = deep_copy(layer)
    detach_maps(twin, "unmasked")
    own = plain_tensors(twin)
    for name, tensor in own.items():
        tensor.copy_(plain[f"{edit['path']}.{name}"])
    kept = set(map(id, own.values()))
    new = plain_tensors(_built(module, twin, edit))
    return {
        f"{place}.{name}": tensor
        for place in (edit["path"], *edit["also"])
        for name, tensor in new.items()
        if id(tensor) not in kept
    }


def new_parameters(
    module: nn.Module, edit: PutEdit, copied: Mapping[str, str], old: Mapping[str, Tensor], trained: Sequence[nn.Parameter]
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield every new parameter with its name and the one it is trained like.

    Args:
        module: The module, edited.
        edit: The edit.
        copied: Declared source of new tensors.
        old: Stored tensors before the edit, by plain name.
        trained: What optimizers train.
    """
    trained_ids, old_ids = set(map(id, trained)), set(map(id, old.values()))
    before = [tensor for name, tensor in old.items() if name.startswith(f"{edit['path']}.")]
    nearest = [*before, *_nearest(module, edit["path"])]
    likely = next((tensor for tensor in nearest if id(tensor) in trained_ids), None)
    for name, tensor in module.get_submodule(edit["path"]).named_parameters(prefix=edit["path"]):
        if id(tensor) in old_ids or not tensor.requires_grad:
            continue
        source = old.get(copied.get(name, ""))
        like = source if source is not None and id(source) in trained_ids else likely
        if isinstance(like, nn.Parameter):
            yield name, tensor, like


def _nearest(module: nn.Module, path: str) -> list[Tensor]:
    """Parameters of the module, those before a layer from the nearest back, then those behind it."""
    named = list(module.named_parameters())
    inner = {id(tensor) for tensor in module.get_submodule(path).parameters()}
    start = next((place for place, (_, tensor) in enumerate(named) if id(tensor) in inner), len(named))
    others = [[tensor for _, tensor in part if id(tensor) not in inner] for part in (named[:start], named[start:])]
    return [*reversed(others[0]), *others[1]]
