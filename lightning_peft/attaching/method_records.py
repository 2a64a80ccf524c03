"""A method's part of a checkpoint: written, checked against its form, restored."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.attaching import rank_states
from lightning_peft.contract import Contract
from lightning_peft.structure import method_state
from lightning_peft.structure.method_state import MethodState
from lightning_peft.structure.plain import not_plain
from lightning_peft.weights.maps import plain_tensors


def describe(method: Contract) -> dict[str, Any]:
    """Describe a method for a checkpoint, as plain data."""
    return {"method": type(method).__name__, "name": method.name, "config": method.config(), "steps": method.steps}


def state_of(method: Contract) -> dict[str, Any]:
    """Return the versioned state of a method; every rank has to ask.

    Raises:
        MisconfigurationException: Its ``state()`` returned something that could not be loaded again.
    """
    state = method.state()
    if (found := not_plain(state)) is not None:
        raise MisconfigurationException(
            f"state() of {method.name} holds something that is not plain data, so the checkpoint could not be resumed: "
            f"{found}. Return tensors, numbers, strings, lists and dicts only."
        )
    return method_state.write(method.steps, method._epochs_ended, state, rank_states.of_all(method, state))


def check(method: Contract, saved: Any, module: nn.Module | None = None) -> MethodState:
    """Refuse what :func:`state_of` cannot have returned, without touching the method.

    Args:
        method: The method.
        saved: What a checkpoint holds.
        module: The module, with the structure the checkpoint was saved with; ``None`` when it is not at hand.

    Raises:
        MisconfigurationException: Another version, or another form.
    """
    form = method.state_form(None if module is None else plain_tensors(module))
    return method_state.read(method.name, saved, form)


def restore(method: Contract, saved: Any, module: nn.Module | None) -> None:
    """Give a method the state back that :func:`state_of` returned.

    Raises:
        MisconfigurationException: The state has another version or form; nothing of it is taken over then.
    """
    found = check(method, saved, module)
    method.steps, method._epochs_ended = found.steps, found.epochs
    method.restored = True
    try:
        method.load_state(rank_states.for_this_rank(method, found.state, found.ranks))
    except MisconfigurationException:
        raise
    except Exception as error:  # what load_state meets in a damaged file, its author cannot foresee
        raise method_state.not_restored(method.name, f"{type(error).__name__}: {error}") from error
