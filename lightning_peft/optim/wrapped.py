"""An optimizer that stands before another one, and is it in every respect that is not overridden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class WrappedOptimizer(Optimizer):
    """Base of optimizers that a method puts before the user's: the same groups, the same state, saved in the same form.

    Override :meth:`step`. What is kept for each parameter goes into ``self.state[parameter]`` once the inner optimizer has
    made its own there, in its first step; it is then saved, moved and copied along when the network grows.

    Args:
        inner: The optimizer to stand before; schedulers go on holding it.
    """

    def __init__(self, inner: Optimizer) -> None:
        # Not Optimizer.__init__, which makes groups and state of its own; this is what torch calls after unpickling.
        self.__setstate__({"inner": inner, "defaults": inner.defaults})

    inner: Optimizer

    # Looked up at every use, since load_state_dict gives an optimizer new ones.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.inner.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, by ``self.inner.step(closure)``, and return what that returned; ``closure`` may be ``None``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the inner optimizer."""
        self.inner.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer behind all that stands before it."""
    while isinstance(optimizer, WrappedOptimizer):
        optimizer = optimizer.inner
    return optimizer


def same_groups(optimizer: Any, other: Optimizer) -> bool:
    """Whether two optimizers have one list of groups, and so are one to a scheduler."""
    return optimizer is other or getattr(optimizer, "param_groups", None) is other.param_groups


def take_place(new: Optimizer, old: Optimizer) -> bool:
    """Let one optimizer share the groups of another, so that whoever holds the old one sets what the new one uses.

    Returns:
        Whether it could: the new one must have been built from the groups of the old one.
    """
    if new.param_groups is not old.param_groups:
        if [*map(id, new.param_groups)] != [*map(id, old.param_groups)]:
            return False
        new.param_groups = old.param_groups

    # torch gives an optimizer new groups when its state is loaded, and a scheduler warns when the one it holds took no step.
    def share(loaded: Optimizer) -> None:
        old.param_groups = loaded.param_groups

    def note_step(*_: Any) -> None:
        old._opt_called = True  # type: ignore[attr-defined]

    new.register_load_state_dict_post_hook(share)
    new.register_step_post_hook(note_step)
    return True
