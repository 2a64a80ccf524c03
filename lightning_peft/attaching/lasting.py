"""Hooks that stay on a module which is no longer what its class builds: it was edited, or maps and parts stay on it.

They write and read the library's section of its checkpoints in runs without a method, where there is no hub.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_peft.attaching.saving import CheckpointHooks, described, structure_record, write
from lightning_peft.attaching.trained import TrainedParameters
from lightning_peft.capture.shim import Shim
from lightning_peft.compose.run import Run
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure import journal
from lightning_peft.structure.carry import group_names
from lightning_peft.weights.detach import attachments


class LastingShim(Shim):
    """A hook that copies of the module have too; pickles are clean.

    Args:
        module: The module.
    """

    hook: str

    def __init__(self, module: LightningModule) -> None:
        self._module = weakref.ref(module)
        super().__init__(module, self.hook, self._act)

    def _act(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> LastingShim:
        twin: LightningModule = copy.deepcopy(self._module(), memo)  # type: ignore[assignment]
        journal.hand_on(self._module(), twin)  # type: ignore[arg-type]
        return type(self)(twin)


class LastingSave(LastingShim):
    """Goes on writing what a module went through, and what stays on it, into its checkpoints."""

    hook = "on_save_checkpoint"

    def _act(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        module = self._module()
        if module is None or files.KEY in checkpoint or not (journal.journal_of(module) or attachments(module)):
            inner(checkpoint)
            return
        section, beside = described(module.trainer, module, checkpoint, [])
        if journal.journal_of(module):
            optimizers = module.trainer.optimizers if checkpoint.get("optimizer_states") else []
            section |= structure_record(module, group_names(module, optimizers))
        write(inner, checkpoint, section, beside)


class LastingLoad(LastingShim):
    """Gives what stays on a module the tensors of a checkpoint, in runs without a method."""

    hook = "on_load_checkpoint"

    def _act(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        module = self._module()
        first = module is not None and vars(module).get(self.hook) is self  # else the hub's own hook came before
        if module is None or not first or not attachments(module):
            inner(checkpoint)
            return
        run = Run(module.trainer, module, "", module)
        hooks = CheckpointHooks(run, [], TrainedParameters(run, []), fitting=module.trainer.state.fn == TrainerFn.FITTING)
        try:
            hooks.load(inner, checkpoint)
        except Exception:
            if hooks.before is not None:
                hooks.before.restore()
            raise


def leave_hooks(module: LightningModule) -> None:
    """Put the hooks in place that a module needs from now on, if it is not what its class builds."""
    stays = bool(attachments(module))
    needed = {LastingSave: stays or bool(journal.journal_of(module)), LastingLoad: stays}
    for hook, wanted in needed.items():
        if wanted and not isinstance(vars(module).get(hook.hook), hook):
            hook(module).install()
