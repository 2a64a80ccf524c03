"""Which part of a LightningModule is *the network*, and how its outputs are read as logits."""

from __future__ import annotations

import difflib

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
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


def named_submodule(module: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the submodule of a name that a user gave.

    Args:
        module: The user's module.
        name: Qualified name in it.
        argument: Argument that the name was given as.

    Raises:
        MisconfigurationException: There is none of that name; names the nearest, and the children.
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        children = ", ".join(repr(child) for child, _ in module.named_children())
        near = difflib.get_close_matches(name, [path for path, _ in module.named_modules() if path], n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise MisconfigurationException(
            f"{argument}={name!r} is not a submodule of {type(module).__name__}; its children are {children or 'none'}.{meant}"
        ) from None


def resolve_network(module: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Find the network a LightningModule trains.

    Args:
        module: The user's module.
        name: Qualified name given by the user; ``""`` means the module itself, ``None`` means find it.

    Returns:
        Qualified name and module. Without a name it is the only direct child that owns at least 99 % of the parameters
        (metrics do not count) and can be called, else the module itself when it defines ``forward``.

    Raises:
        MisconfigurationException: The named submodule does not exist, or several children share the parameters.
    """
    if name is not None:
        return name, named_submodule(module, name, "network")
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
        found = module.get_submodule(child)
        answers = type(found).forward is not nn.Module.forward or "forward" in vars(found)  # the latter by torch.compile
        if size >= _DOMINANT * total and answers:  # a list of blocks answers nothing
            return child, found
    if not isinstance(module, both(LightningModule)) or type(module).forward is not own(LightningModule, module).forward:
        return "", module
    shares = ", ".join(f"{child!r} ({100 * size / max(total, 1):.0f} % of the parameters)" for child, size in sizes.items())
    raise MisconfigurationException(
        f"{type(module).__name__} has no single network: {shares or 'no child has parameters'}. "
        'Pass network="<name>" to the method, or define forward() on the module.'
    )
