"""The border where a method's saved state comes in: read, held against its form, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.forms import Form, whole

FORMAT = 1


class MethodState(NamedTuple):
    """A method's part of a checkpoint: its clock, its own state, and what of that each of several ranks has of its own."""

    steps: int
    epochs: int
    state: dict[str, Any]
    ranks: list[dict[str, Any]]


def write(steps: int, epochs: int, state: dict[str, Any], ranks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the state of a method for a checkpoint."""
    written = {"version": FORMAT, "steps": steps, "epochs": epochs, "state": state}
    return written | ({"ranks": list(ranks)} if ranks else {})


def read(name: str, saved: Any, form: Form | None) -> MethodState:
    """Return the state of a method that a checkpoint holds, after checking all of it.

    Args:
        name: The method's, for the message.
        saved: What :func:`write` returned, if the file is whole.
        form: What the method's own state looks like; ``None`` when its author does not say.

    Raises:
        MisconfigurationException: It has another version or form.
    """
    if not isinstance(saved, dict) or type(saved.get("version")) is not int or saved["version"] != FORMAT:
        found = saved.get("version") if isinstance(saved, dict) else type(saved).__name__
        raise MisconfigurationException(
            f"The checkpoint holds state of {name} in format {found!r}; this version reads format {FORMAT}. "
            "Use the version of lightning-peft that wrote it, or start from its baked weights."
        )
    steps, epochs, state = (saved.get(key) for key in ("steps", "epochs", "state"))
    ranks = saved.get("ranks", [])
    listed = isinstance(ranks, list) and all(isinstance(own, dict) for own in ranks)
    if whole()(steps, "") or whole()(epochs, "") or not isinstance(state, dict) or not listed:
        raise MisconfigurationException(
            f"The checkpoint's state of {name} is malformed: it needs whole numbers from 0 under 'steps' and 'epochs', "
            "a dict under 'state', and a list of dicts under 'ranks' if that is there. The file is damaged or was edited; "
            "resume from another one."
        )
    for each in (state, *({**state, **own} for own in ranks)):
        if form is not None and (found := form(each, "")) is not None:
            raise not_restored(name, found)
    return MethodState(steps, epochs, state, ranks)  # type: ignore[arg-type]


def not_restored(name: str, reason: object) -> CheckpointError:
    """The error of a state that does not fit."""
    return CheckpointError(
        f"{name} was not restored: its state in the checkpoint does not fit ({reason}). The file is damaged, was edited, or "
        "comes from another version; resume from another one, or start from its weights: "
        "lightning_peft.load_from_checkpoint(ModelClass, path)."
    )
