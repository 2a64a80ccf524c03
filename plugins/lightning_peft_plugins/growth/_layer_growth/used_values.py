"""Values as a network uses them, for operators that need not know how its class stores them.

Gemma stores the factors of its norms less 1, and multiplies embeddings by the root of the width. An operator sees whole
factors, and what it returns is stored so that the wider class uses what the operator meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeAlias

import torch
from torch import Tensor

from lightning_peft.structure.edits import Edit

Values: TypeAlias = Mapping[str, Tensor]
Rest = ParamSpec("Rest")
Widening: TypeAlias = Callable[Concatenate[Values, Edit, Rest], dict[str, Tensor]]


def on_used_values(widen: Widening[Rest]) -> Widening[Rest]:
    """Let an operator widen values as they are used.

    Args:
        widen: Old values and a width edit to the new values of the edit's tensors.

    Example:
        >>> entry = {"offset": 1.0, "factor": 0.5}
        >>> halved = on_used_values(lambda values, edit: {"w": values["w"]})
        >>> halved({"w": torch.tensor([0.0, 2.0])}, {"tensors": {"w": entry}})["w"]
        tensor([-0.5000,  0.5000])
    """

    @functools.wraps(widen)
    def on_used(values: Values, edit: Edit, *args: Rest.args, **options: Rest.kwargs) -> dict[str, Tensor]:
        entries = edit["tensors"]
        used = {name: _wide(values[name]) + entry["offset"] for name, entry in entries.items() if "offset" in entry}
        new = widen({**values, **used}, edit, *args, **options)
        return {name: _stored(value, values[name].dtype, entries[name]) for name, value in new.items()}

    return on_used


def _stored(value: Tensor, dtype: torch.dtype, entry: Mapping[str, Any]) -> Tensor:
    value = value * entry["factor"] if "factor" in entry else value
    return (value - entry["offset"] if "offset" in entry else value).to(dtype)


def _wide(value: Tensor) -> Tensor:
    """So wide that what was added can be taken away again without a trace; Apple's GPUs have no double precision."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
