"""A model that is merged: its tensors by name, and what else its file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """One input.

    Attributes:
        label: What messages call it.
        tensors: By name. Those of a file are mapped into memory, and read when they are used. Where a value is computed, this
            one is as large and of the same kind only.
        computed: By name, what computes a value when it is asked for.
        others: What a state dict holds that is no tensor, by name.
        rest: What a checkpoint holds beside its tensors, without what only a resume needs.
        folder: The folder of a model that is one, whose other files a merged folder gets too.
    """

    label: str
    tensors: Mapping[str, Tensor]
    computed: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    _latest: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def value(self, name: str) -> Tensor:
        """Return a tensor; of those that are computed, the latest is kept, since it is asked for piece by piece."""
        if name not in self.computed:
            return self.tensors[name].detach()
        if name not in self._latest:
            self._latest.clear()
            with torch.no_grad():
                self._latest[name] = self.computed[name]()
        return self._latest[name]

    def tied(self) -> dict[str, str]:
        """Names of tensors that are another name's tensor too, and that name, which comes first."""
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        for name, tensor in self.tensors.items():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if name not in self.computed and tensor.numel() and (earlier := first.setdefault(place, name)) != name:
                found[name] = earlier
        return found
