"""What a copy of a network would cost after a cut."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.structure import edits
from lightning_peft.structure.coupled.network_copy import NetworkCopy
from lightning_peft.structure.edits import Edit


class CountedCopy(NetworkCopy):
    """A copy that counts what is left of it."""

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
