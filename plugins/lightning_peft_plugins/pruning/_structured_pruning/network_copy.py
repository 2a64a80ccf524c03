"""A copy of a network to try things on: its dependencies, and what a cut would make of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.structure import edits
from lightning_peft.structure.depth import copied
from lightning_peft.structure.edits import Edit
from lightning_peft.weights.maps import parameters_with_maps
from lightning_peft_plugins.pruning._structured_pruning.example import call


class NetworkCopy:
    """A network without weight maps and data, on the ``meta`` device where its forward runs there, else on the CPU.

    Args:
        network: The network; it is not touched.
        name: Its name, for messages.
        example: What it is called with (:func:`~lightning_peft_plugins.pruning._structured_pruning.example.record`).

    Raises:
        MisconfigurationException: It cannot be called with the example on its own.
    """

    def __init__(self, network: nn.Module, name: str, example: Mapping[str, Any]) -> None:
        self.example, self.name = example, name or type(network).__name__
        plain = copied(network, masked=True).eval().requires_grad_(True)
        self.device, self.module = torch.device("meta"), _on_meta(plain)
        try:
            self.call()
        except Exception:  # an operator without a shape rule, or a forward that looks at values
            self.device, self.module = torch.device("cpu"), plain.to("cpu")
            self._call_on_cpu()

    def _call_on_cpu(self) -> None:
        try:
            self.call()
        except Exception as error:
            raise MisconfigurationException(
                f"{self.name} cannot be traced: called with ones of the shapes of a batch it fails with "
                f"{type(error).__name__}: {error}. StructuredPruning needs a forward that depends on shapes only; name the "
                'part of the module that has one with network="<name>".'
            ) from error

    def call(self) -> Any:
        """Run the network as recorded."""
        return call(self.module, self.example, self.device)

    def params(self, edit: Edit) -> int:
        """Count the parameters there are after an edit."""
        sizes = {name: parameter.numel() for name, parameter in self.module.named_parameters()}
        return sum(math.prod(edit["tensors"][name]["to"]) if name in edit["tensors"] else n for name, n in sizes.items())

    def flops(self, edit: Edit) -> int:
        """Count the operations of a forward pass with one sample after an edit, which is undone.

        Raises:
            Exception: Whatever the network raises when the edit has broken it.
        """
        change = edits.apply(self.module, edit)
        try:
            with torch.no_grad(), _SizeCount() as count:
                self.call()
            return count.total
        finally:
            edits.undo(self.module, change)


class _SizeCount(FlopCount):
    """Passes over operators that cost nothing and keep the size, which PyTorch works out slowly on the ``meta`` device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if torch.Tag.pointwise in func.tags and func._schema.name.endswith("_"):
                return args[0]
            if func is torch.ops.aten.native_batch_norm.default:
                channels = args[0].new_empty(args[0].shape[1])
                return torch.empty_like(args[0]), channels, channels
        return super().__torch_dispatch__(func, types, args, kwargs)


def _on_meta(network: nn.Module) -> nn.Module:
    """Copy a network without its data; ``Module.to`` would untie its tensors."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in network.buffers()}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters_with_maps(network)}
    twin: nn.Module = copy.deepcopy(network, memo)
    return twin
