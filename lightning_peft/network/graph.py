"""The graph of a network, traced in the largest parts that can be traced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from lightning_peft.network.layers import is_norm, is_weight


class _LayerTracer(fx.Tracer):
    """Looks into everything but layers: what has no children, weights under maps, norms with an activation of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        bare = all(isinstance(child, parametrize.ParametrizationList | nn.ModuleDict) for child in m.children())
        return bare or is_weight(m) or is_norm(m)


def traced_parts(network: nn.Module) -> Iterator[tuple[str, fx.Graph]]:
    """Trace a network, or, where its ``forward`` depends on data, its children on their own, and so on downwards.

    Args:
        network: Any module. Arguments with defaults are taken at their defaults.

    Yields:
        Prefix of a part's names (``""`` for the network, else ending with a dot) and its graph, whose ``call_module``
        targets are relative to the part.

    Example:
        >>> [prefix for prefix, _ in traced_parts(nn.Sequential(nn.Linear(2, 2)))]
        ['']
    """
    yield from _parts(network, "", set())


def _parts(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, fx.Graph]]:
    if module in seen or not any(is_weight(layer) for layer in module.modules()):
        return
    seen.add(module)
    graph = None if is_weight(module) else _trace(module)
    if graph is not None:
        yield prefix, graph
        return
    for name, child in module.named_children():
        yield from _parts(child, f"{prefix}{name}.", seen)


def _trace(module: nn.Module) -> fx.Graph | None:
    if type(module).forward is nn.Module.forward:  # a list of blocks
        return None
    try:
        return _LayerTracer().trace(module, concrete_args=_defaults(module))
    except Exception:  # whatever a stranger's forward does with a symbol in place of a tensor
        return None


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
