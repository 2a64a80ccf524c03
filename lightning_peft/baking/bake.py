"""Baking: from a module or checkpoint under weight maps to an ordinary one that loads without this library."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.atomic_files import whole
from lightning_peft.attaching.lasting import leave_hooks
from lightning_peft.baking.reading import harmless_objects
from lightning_peft.baking.reading import read_checkpoint as read_checkpoint
from lightning_peft.baking.reopen import reopen
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal, part_states, partial, plain_state
from lightning_peft.structure.earlier_parts import upgraded
from lightning_peft.structure.edits import Edit
from lightning_peft.weights.detach import attachments, detach_maps

ModuleT = TypeVar("ModuleT", bound=nn.Module)
LightningT = TypeVar("LightningT", bound=LightningModule)

_KEPT = ("epoch", "global_step", "pytorch-lightning_version")


def bake(module: ModuleT) -> ModuleT:
    """Turn a module into an ordinary one, in place: maps applied, masks last, parts merged, names and classes as they were.

    A module whose ``fit`` has ended is baked already; a copy taken during training is not.

    Args:
        module: Any module, usually ``copy.deepcopy`` of one in training.

    Returns:
        The same module.

    Raises:
        MisconfigurationException: A layer part computes something that no weight does, or holds a number that is not finite:
            a weight would be lost with it. Nothing was changed then.

    Example:
        >>> import torch
        >>> bake(torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    if lost := part_states.unmergeable(module):
        raise MisconfigurationException(
            f"The layer part {lost[0]} computes something that no weight can, so the module cannot be baked. Keep it as it "
            "is, or switch them off first (part.enabled = False) to bake it without them."
        )
    for each in attachments(module):
        if each.enabled:
            each.check_finite()
    detach_maps(module, "baked")
    return module


def baked(checkpoint: Mapping[str, Any], base: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return the ordinary form of a checkpoint: plain weights and hyperparameters, nothing to resume.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        base: Tensors by name, for a checkpoint that holds only what was trained on them.

    Raises:
        CheckpointError: The recorded weight maps do not fit the tensors, or the base is missing or another one.
    """
    checkpoint = upgraded(checkpoint)
    section = files.read(checkpoint)
    rest = kept(checkpoint)
    state = dict(checkpoint["state_dict"])
    versioned = functools.partial(plain_state.with_versions, state=checkpoint["state_dict"])
    if section is None:
        return {**rest, "state_dict": versioned(state)}
    if section["version"] < plain_state.PLAIN:  # an average of theirs has masks as they stood when averaging began
        state |= plain_state.masks_of(checkpoint.get("current_model_state", {}), section["weights"])
    state = dict(partial.filled(state, section, base))
    plain_state.refuse_edited(plain_state.edited(state, section))
    state = plain_state.joined(state, section)
    return {**rest, "state_dict": versioned(files.bake_state_dict(state, section)), files.KEY: record_of(section)}


def record_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a baked checkpoint still says of its training: methods and structural changes.

    Args:
        section: The library's part of the checkpoint that was baked.
    """
    done = [{key: value for key, value in record.items() if key != "maps"} for record in section["methods"]]
    history = {"version": section["version"], "methods": done, "weights": {}}
    if edits := journal.read(section):
        history["journal"] = journal.write(edits)
    return history


def kept(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an ordinary checkpoint keeps beside its tensors: hyperparameters, and nothing to resume."""
    return {key: checkpoint[key] for key in checkpoint if _is_kept(key)}


def _as_saved(checkpoint: Mapping[str, Any], base: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return what :func:`baked` does with the weights that the file has for an ordinary module, parts still beside them."""
    section = files.read(checkpoint)
    if section is None or section["version"] < plain_state.PLAIN:
        raise files.CheckpointError(
            "The checkpoint has no weight maps or layer parts that could be attached: it was saved without a method, or by a "
            "version of lightning-peft that did not write them so. Load it without attached=True."
        )
    state = dict(partial.filled(checkpoint["state_dict"], section, base))
    plain_state.refuse_edited(plain_state.edited(state, section))
    return {**kept(checkpoint), "state_dict": plain_state.with_versions(state, checkpoint["state_dict"])}


def _is_kept(key: str) -> bool:
    return key in _KEPT or key.startswith(("hyper_parameters", "hparams"))


def bake_checkpoint(
    source: str | Path, target: str | Path, *, trusted: bool = False, base: nn.Module | Mapping[str, Tensor] | None = None
) -> Path:
    """Bake a checkpoint file; the model's class is not needed.

    Args:
        source: Checkpoint written during or after training.
        target: File to write; ``ModelClass.load_from_checkpoint(target)`` works without this library, if its arguments build
            the network the training ended with. Objects among the hyperparameters are kept, and Lightning too reads them with
            ``weights_only=False`` only.
        trusted: Whether Python objects in the file may be rebuilt; see :func:`read_checkpoint`.
        base: A module, or tensors by name, as they were before the training, for a file that holds only what was trained.

    Returns:
        ``target``.

    Raises:
        CheckpointError: See :func:`read_checkpoint` and :func:`baked`.
    """
    target = Path(target)
    tensors = base.state_dict() if isinstance(base, nn.Module) else base
    checkpoint = baked(read_checkpoint(source, trusted=trusted), tensors)
    with whole(target) as part, part.open("wb") as file:  # of a path torch.save would not say that a disk is full
        torch.save(checkpoint, file)
    return target


def load_from_checkpoint(
    cls: type[LightningT], path: str | Path, *, trusted: bool = False, attached: bool = False, **kwargs: Any
) -> LightningT:
    """Load a LightningModule from any checkpoint of a run with methods, baked, and grown if it was.

    Args:
        cls: The user's class.
        path: Checkpoint written during or after training.
        trusted: Whether Python objects in the file may be rebuilt, as a network among the hyperparameters; see
            :func:`read_checkpoint`.
        attached: Attach weight maps and layer parts as they were in the file instead of baking them, to switch them
            (:func:`lightning_peft.switch`) or to train on. What draws new masks or schedules is the method: without it they
            stand still.
        **kwargs: Passed to ``cls.load_from_checkpoint``: constructor arguments, ``map_location``, ``strict``.

    Returns:
        A module that computes what the trained one does, an ordinary one unless ``attached``.

    Raises:
        CheckpointError: See :func:`read_checkpoint` and :func:`baked`; or LightningCLI trained another class.
        MisconfigurationException: ``weights_only`` was passed.
    """
    if "weights_only" in kwargs:
        raise MisconfigurationException(
            "load_from_checkpoint has no weights_only: files are read as plain data. Where a file you trust holds Python "
            "objects, pass trusted=True instead of weights_only=False."
        )
    found = upgraded(read_checkpoint(path, trusted=trusted))
    section = files.read(found)
    left_out = partial.leaves_out(section)
    form = _as_saved if attached else baked
    checkpoint = _without_tensors(found) if left_out else form(found)
    filled = plain_state.with_versions(checkpoint["state_dict"], checkpoint["state_dict"])
    edits = journal.read(section)
    if edits or left_out:
        cls = _claim_class(cls, checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)

    def fill(own: Mapping[str, Tensor]) -> dict[str, Any]:
        filled.update(form(found, own)["state_dict"])
        return plain_state.with_versions(filled, found["state_dict"])

    built = _replaying(cls, edits, fill if left_out else None) if edits or left_out else cls
    with harmless_objects():
        module: LightningT = built.load_from_checkpoint(buffer, weights_only=not trusted, **kwargs)
    if built is not cls:
        module.__class__ = cls
    if attached and section is not None:
        reopen(module, filled, section)
    leave_hooks(module)
    return module


def _without_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return kept(checkpoint) | {"state_dict": {}}


def _replaying(
    cls: type[LightningT], edits: list[Edit], fill: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None
) -> type[LightningT]:
    """Return a subclass that goes through edits between being built and being filled, and leaves the user's class alone.

    Args:
        cls: The user's class.
        edits: The edits.
        fill: Returns the tensors of a checkpoint from the weights the class builds, of which it holds none.
    """

    def on_load_checkpoint(self: LightningT, checkpoint: dict[str, Any]) -> None:
        if fill is not None:
            checkpoint["state_dict"] = fill(self.state_dict())
        journal.replay(self, edits, checkpoint["state_dict"])
        cls.on_load_checkpoint(self, checkpoint)

    # The one moment between the two is the module's own hook.
    return type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})


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
            f"The checkpoint was trained as {name}, which is neither {cls.__name__} nor an imported class that inherits from "
            f"it. Import {attribute or name} and pass it instead of {cls.__name__}."
        )
    plain = {key: value for key, value in hyper.items() if key != "_class_path"}
    checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = plain
    return found
