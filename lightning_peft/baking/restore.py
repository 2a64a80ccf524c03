"""Giving an ordinary module the weights of a baked checkpoint, after the structural changes it went through, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.attaching.lasting import leave_hooks
from lightning_peft.namespaces import both
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal
from lightning_peft.structure.edit_types import Edit
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts


def restore(module: nn.Module, state: Mapping[str, Any], edits: Sequence[Edit] = (), *, strict: bool = True) -> None:
    """Load plain weights into a module; when that is refused, the module is as before.

    Args:
        module: What the user's class builds.
        state: Tensors by plain name.
        edits: Structural changes the tensors are those after; done first where the module has not been through them.
        strict: Whether names must agree, and types of tensors too.

    Raises:
        CheckpointError: Names, shapes, types or structural changes do not fit.
        MisconfigurationException: Weight maps or layer parts stand on the module.
    """
    if next(mapped_tensors(module), None) is not None or next(placed_parts(module), None) is not None:
        raise MisconfigurationException(
            "The module is under weight maps or layer parts, and the weights to load are baked. Load into a new instance, or "
            "bake it first: lightning_peft.bake(module)."
        )
    before = journal.journal_of(module)
    restructured = journal.replay(module, list(edits), state)
    try:
        _check(module, state, strict)
    except files.CheckpointError:
        if restructured and list(edits)[: len(before)] == before:
            for _ in edits[len(before) :]:
                journal.take_back(module)
        raise
    module.load_state_dict(dict(state), strict=strict)
    if isinstance(module, both(LightningModule)):
        leave_hooks(module)


def _check(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    files.check_tensors(state, module)
    if not strict:
        return
    own = module.state_dict()
    missing, unknown = [name for name in own if name not in state], [name for name in state if name not in own]
    if missing or unknown:
        parts = [f"lack {_some(missing)}"] if missing else []
        parts += [f"have {_some(unknown)}, which {type(module).__name__} does not have"] if unknown else []
        raise files.CheckpointError(
            f"The weights {' and '.join(parts)}. Build the module with the arguments it was saved with, or pass strict=False."
        )
    for name, value in own.items():
        if isinstance(value, Tensor) and isinstance(state[name], Tensor) and state[name].dtype != value.dtype:
            raise files.CheckpointError(
                f"The weights hold {name} as {state[name].dtype}; this module has {value.dtype}. Convert the module first "
                f"(module.to({state[name].dtype})), or pass strict=False to let PyTorch round."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
