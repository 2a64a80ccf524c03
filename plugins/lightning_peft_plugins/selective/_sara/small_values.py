"""Values at the small entries of a weight, of which another weight has another number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft_plugins.selective._shared.roomy_values import RoomyValues


class SmallValues(RoomyValues):
    """Values whose number depends on the weight, and so is that of the file when one is loaded, before optimizers are made."""

    kind = "small_values"
    sized_by_file = frozenset({"values"})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}values")
        if isinstance(saved, Tensor) and saved.ndim == 1 and len(saved) <= self.size and saved.shape != self.values.shape:
            self.indices = self.indices[:0]
            self.values.data = torch.zeros(len(saved), dtype=self.values.dtype, device=self.values.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
