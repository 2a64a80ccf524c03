"""Baking: from a module or checkpoint under weight maps to an ordinary one that loads without this library."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.attach.saving import JournalShim
from lightning_peft.files import whole
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal
from lightning_peft.weights.maps import detach_maps

ModuleT = TypeVar("ModuleT", bound=nn.Module)
LightningT = TypeVar("LightningT", bound=LightningModule)

_KEPT = ("epoch", "global_step", "pytorch-lightning_version")


def bake(module: ModuleT) -> ModuleT:
    """Turn a module into an ordinary one, in place: weight maps applied, masks last, names and classes as they were.

    A module whose ``fit`` has ended is baked already; a copy taken during training is not.

    Args:
        module: Any module, usually ``copy.deepcopy`` of one in training.

    Returns:
        The same module.

    Example:
        >>> import torch
        >>> bake(torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    detach_maps(module, "baked")
    return module


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running anything in it.

    Raises:
        CheckpointError: The file is no checkpoint, is damaged, or contains objects that would run code.
        FileNotFoundError: There is no such file.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise files.CheckpointError(
            f"{path} holds Python objects besides plain data and was not opened, because loading them could run code. If you "
            "trust its source, load it with torch.load(weights_only=False) and save it again as plain data. "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:  # torch seeks in a truncated archive
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise files.CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), Mapping):
        raise files.CheckpointError(f'{path} is not a Lightning checkpoint: it has no "state_dict".')
    return loaded


def baked(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ordinary form of a checkpoint: plain weights and hyperparameters, nothing to resume.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.

    Raises:
        CheckpointError: The recorded weight maps do not fit the tensors.
    """
    section = files.read(checkpoint)
    kept = {key: checkpoint[key] for key in checkpoint if key in _KEPT or key.startswith(("hyper_parameters", "hparams"))}
    state = dict(checkpoint["state_dict"])
    if section is None:
        return {**kept, "state_dict": state}
    history = {"version": section["version"], "methods": section["methods"], "weights": {}}
    if edits := journal.read(section):
        history["journal"] = journal.write(edits)
    return {**kept, "state_dict": files.bake_state_dict(state, section), files.KEY: history}


def bake_checkpoint(source: str | Path, target: str | Path) -> Path:
    """Bake a checkpoint file; the model's class is not needed.

    Args:
        source: Checkpoint written during or after training.
        target: File to write; ``ModelClass.load_from_checkpoint(target)`` works without this library, if its arguments build
            the network the training ended with.

    Returns:
        ``target``.

    Raises:
        CheckpointError: See :func:`read_checkpoint` and :func:`baked`.
    """
    target = Path(target)
    with whole(target) as part:
        torch.save(baked(read_checkpoint(source)), part)
    return target


def load_from_checkpoint(cls: type[LightningT], path: str | Path, **kwargs: Any) -> LightningT:
    """Load a LightningModule from any checkpoint of a run with methods, baked, and grown if it was.

    Args:
        cls: The user's class.
        path: Checkpoint written during or after training.
        **kwargs: Passed to ``cls.load_from_checkpoint``: constructor arguments, ``map_location``, ``strict``.

    Returns:
        An ordinary module that computes what the trained one does.

    Raises:
        CheckpointError: See :func:`read_checkpoint` and :func:`baked`; or LightningCLI trained another class.
    """
    checkpoint = baked(read_checkpoint(path))
    edits = journal.read(checkpoint.get(files.KEY))
    if edits:
        cls = _claim_class(cls, checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    if not edits:
        return cls.load_from_checkpoint(buffer, weights_only=True, **kwargs)

    def on_load_checkpoint(self: LightningT, checkpoint: dict[str, Any]) -> None:
        journal.replay(self, edits, checkpoint["state_dict"])
        cls.on_load_checkpoint(self, checkpoint)

    # The one moment between building and loading is the module's own hook; a subclass leaves the user's class alone.
    hooks = {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__}
    grown: type[LightningT] = type(cls.__name__, (cls,), hooks)
    module: LightningT = grown.load_from_checkpoint(buffer, weights_only=True, **kwargs)
    module.__class__ = cls
    JournalShim.keep(module)
    return module


def _claim_class(cls: type[LightningT], checkpoint: dict[str, Any]) -> type[LightningT]:
    """Return the class LightningCLI recorded, and strike its name out of the checkpoint.

    Lightning would look for the name among subclasses of the class it loads with, and that one is made for the occasion. As
    there, only classes that are imported already count.
    """
    hyper = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY)
    if not isinstance(hyper, Mapping) or "_class_path" not in hyper:
        return cls
    name = str(hyper["_class_path"])
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, cls)):
        raise files.CheckpointError(
            f"The checkpoint was trained as {name}, which is neither {cls.__name__} nor an imported subclass of it. "
            f"Import {attribute or name} and pass it instead of {cls.__name__}."
        )
    plain = {key: value for key, value in hyper.items() if key != "_class_path"}
    checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = plain
    return found
