"""Which part of a LightningModule is *the network*, and how its outputs are read as logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_peft.namespaces import both, own

_DOMINANT = 0.99  # share of the parameters that makes a child *the* network


def check_materialised(module: nn.Module) -> None:
    """Refuse lazy layers that have seen no batch.

    Raises:
        MisconfigurationException: One of the module's parameters has no shape yet.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            path = name.rpartition(".")[0]
            kind = type(module.get_submodule(path)).__name__
            raise MisconfigurationException(
                f"{path or 'The module'} is a {kind}, whose {name.rpartition('.')[2]} has no shape before its first batch, and "
                "methods are attached before that. Run one batch through the network when you build it: "
                "with torch.no_grad(): network(example_batch)."
            )


def resolve_network(module: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Find the network a LightningModule trains.

    Args:
        module: The user's module.
        name: Qualified name given by the user; ``""`` means the module itself, ``None`` means find it.

    Returns:
        Qualified name and module. Without a name it is the only direct child that owns at least 99 % of the parameters
        (metrics do not count), else the module itself when it defines ``forward``.

    Raises:
        MisconfigurationException: The named submodule does not exist, or several children share the parameters.
    """
    if name is not None:
        try:
            return name, module.get_submodule(name)
        except AttributeError:
            children = ", ".join(repr(child) for child, _ in module.named_children())
            raise MisconfigurationException(
                f"network={name!r} is not a submodule of {type(module).__name__}; its children are {children or 'none'}."
            ) from None
    sizes = {
        child: size
        for child, sub in module.named_children()
        if not isinstance(sub, Metric) and (size := sum(p.numel() for p in sub.parameters())) > 0
    }
    # What weight maps hold for themselves belongs to no child, and must not change which of them is the network.
    total = sum(
        p.numel() for p in {*module.parameters(recurse=False), *(p for sub in module.children() for p in sub.parameters())}
    )
    for child, size in sizes.items():
        if size >= _DOMINANT * total:
            return child, module.get_submodule(child)
    if not isinstance(module, both(LightningModule)) or type(module).forward is not own(LightningModule, module).forward:
        return "", module
    shares = ", ".join(f"{child!r} ({100 * size / max(total, 1):.0f} % of the parameters)" for child, size in sizes.items())
    raise MisconfigurationException(
        f"{type(module).__name__} has no single network: {shares or 'no child has parameters'}. "
        'Pass network="<name>" to the method, or define forward() on the module.'
    )


def as_logits(output: Any) -> Tensor:
    """Read logits out of what a network returned.

    Args:
        output: A tensor, a mapping or object with ``logits`` (HF ``ModelOutput``), or a tuple whose first tensor counts.

    Returns:
        The logits, whatever their shape.

    Raises:
        MisconfigurationException: Nothing in the output can be read as logits.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor):
                return item
    keys = f" with keys {list(output)}" if isinstance(output, Mapping) else ""
    raise MisconfigurationException(
        f"The network returned {type(output).__name__}{keys}, in which no logits were found. Return a tensor, a tuple whose "
        'first tensor is the logits, or something with "logits".'
    )


def with_logits(output: Any, logits: Tensor) -> Any:
    """Put other logits in the place of those that :func:`as_logits` finds.

    Example:
        >>> import torch
        >>> with_logits({"logits": torch.zeros(1), "loss": None}, torch.ones(1))
        {'logits': tensor([1.]), 'loss': None}
    """
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, Mapping):  # a ModelOutput too
        return type(output)(**{key: logits if key == "logits" else value for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        old = as_logits(output)
        items = [logits if item is old else item for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)
    changed.logits = logits
    return changed
