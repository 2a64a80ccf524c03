"""The visible state of a module, so that a test can say that nothing was left on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.attaching.lasting import LastingShim

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def trace(module: nn.Module) -> dict[str, Any]:
    """Describe a module: classes, attributes, hooks, modes, parameter names in order, state-dict keys.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = trace(layer)
        >>> hook = layer.register_forward_hook(print)
        >>> difference(before, trace(layer))
        "['hooks']['']['_forward_hooks']: 0 against 1"
        >>> hook.remove()
        >>> difference(before, trace(layer))
    """
    parts = dict(module.named_modules())
    return {
        "classes": {name: type(part).__qualname__ for name, part in parts.items()},
        "attributes": {name: dict.fromkeys(_attributes(part)) for name, part in parts.items()},
        "hooks": {name: {hooks: len(getattr(part, hooks)) for hooks in _HOOKS} for name, part in parts.items()},
        "training": {name: part.training for name, part in parts.items()},
        "parameters": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "parameter order": [name for name, _ in module.named_parameters()],
        "state": list(module.state_dict()),
    }


def _attributes(part: nn.Module) -> list[str]:
    """Names of a module's attributes, but for what an edited one keeps so that its checkpoints tell of the edits."""
    return sorted(name for name, value in vars(part).items() if not isinstance(value, LastingShim))


def without(clean: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Leave the parts out of a trace that another does not have, for a module that lost them on purpose.

    Example:
        >>> whole, left = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> difference(without(trace(whole), trace(left)), trace(left))
    """
    parts = found["classes"]
    kept: dict[str, Any] = {}
    for what, names in clean.items():
        tensors = what in ("parameters", "parameter order", "state")
        stays = [name for name in names if (name.rpartition(".")[0] if tensors else name) in parts]
        kept[what] = stays if isinstance(names, list) else {name: names[name] for name in stays}
    return kept


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Say where two nests of plain data first differ, exactly; ``None`` when they are equal, bit for bit.

    Example:
        >>> difference({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 1.5])})
        "['w']: tensors differ by up to 0.5"
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensor_difference(a, b, path)
    if type(a) is not type(b):
        return f"{path}: {type(a).__name__} against {type(b).__name__}"
    if isinstance(a, dict):
        if list(a) != list(b):
            only = [repr(key) for key in {**a, **b} if (key in a) != (key in b)]
            return f"{path}: {'only one side has ' + ', '.join(only) if only else 'the order of the keys differs'}"
        return next(filter(None, (difference(a[key], b[key], f"{path}[{key!r}]") for key in a)), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path}: {a!r} against {b!r}"
        return next(filter(None, (difference(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))), None)
    return None if a == b or (a != a and b != b) else f"{path}: {a!r} against {b!r}"


def _tensor_difference(a: Tensor, b: Tensor, path: str) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{path}: {a.dtype} of shape {tuple(a.shape)} against {b.dtype} of shape {tuple(b.shape)}"
    if torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
        return None
    return f"{path}: tensors differ by up to {(a.double() - b.double()).abs().max().item():.3g}"
