"""A recipe's own callbacks and loggers, kept beside those of the command line; settings that are overruled are reported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_peft.atomic_files import whole
from lightning_peft.cli.recipes import UsageError


class LastEpoch(Checkpoint):
    """Keeps the state at the end of the last whole epoch, the point from which a resumed run repeats nothing.

    No ModelCheckpoint, because that writes over the file of the epoch before. Where temporary files lie on another disk, a
    process that is killed meanwhile loses both.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, after all other callbacks."""
        save_last(trainer, self.path)


def save_last(trainer: Trainer, path: Path) -> None:
    """Let a checkpoint appear when it is finished; where processes share a training, all of them ask and the first writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) if trainer.is_global_zero else nullcontext(path) as part:
        trainer.save_checkpoint(part)


def stand_beside(
    arguments: dict[str, Any], own: Sequence[Callback], folder: Path, curves: str, *, terminal: bool, rehearsal: bool = False
) -> tuple[str, ...]:
    """Add callbacks and a logger to a Trainer's arguments, in place.

    Args:
        arguments: Arguments of the Trainer, callbacks and loggers instantiated.
        own: Callbacks to add after the recipe's.
        folder: Folder for the logged numbers, and for whatever has none of its own.
        curves: Name of the folder of the logged numbers in it.
        terminal: Whether a progress bar can be seen.
        rehearsal: Whether nothing is to be kept: the recipe's loggers and checkpoint callbacks write where they were told to.

    Returns:
        A sentence for each setting of the recipe that was overruled.

    Raises:
        UsageError: The Trainer would keep nothing to report on.
    """
    if arguments.get("fast_dev_run"):
        raise UsageError("fast_dev_run keeps no checkpoint to bake and report on. To try a recipe in a few steps, use --check.")
    if rehearsal:
        arguments["logger"], arguments["enable_checkpointing"] = None, None
        arguments["callbacks"] = [callback for callback in arguments["callbacks"] if not isinstance(callback, Checkpoint)]
    overruled = []
    if arguments.get("logger") is False:
        overruled.append("logger: false is ignored, because the report is made from the logs.")
    if arguments.get("enable_checkpointing") is False:
        overruled.append("enable_checkpointing: false is ignored, because the last epoch is kept to resume from and to bake.")
    if arguments.get("barebones"):
        arguments["barebones"] = False
        overruled.append("barebones: true is ignored, because nothing could be logged or kept.")
    theirs = _loggers(arguments.get("logger"))
    arguments["logger"] = [*theirs, CSVLogger(folder, name=curves, flush_logs_every_n_steps=20)]
    arguments["enable_checkpointing"] = True
    arguments["default_root_dir"] = arguments.get("default_root_dir") or folder
    if arguments.get("enable_model_summary") is None:
        arguments["enable_model_summary"] = False
    arguments["callbacks"] += own
    _show_progress(arguments, terminal)
    return tuple(overruled)


def _loggers(given: Any) -> list[Logger]:
    if isinstance(given, Logger):
        return [given]
    return [] if given is None or isinstance(given, bool) else list(given)


def _show_progress(arguments: dict[str, Any], terminal: bool) -> None:
    """Show the recipe's bar if it has one, ours on a terminal if it says nothing."""
    wanted = arguments.get("enable_progress_bar")
    if any(isinstance(callback, ProgressBar) for callback in arguments["callbacks"]):
        arguments["enable_progress_bar"] = True
        return
    if wanted is None:
        arguments["enable_progress_bar"] = terminal
    if terminal and arguments["enable_progress_bar"]:
        arguments["callbacks"].append(RichProgressBar(leave=False))


def quiet(arguments: dict[str, Any]) -> None:
    """Let a Trainer write and show nothing; arguments are changed in place, as an :data:`Adjust` does."""
    arguments |= {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    loud = (Checkpoint, ProgressBar)  # Lightning refuses them beside those switches
    arguments["callbacks"] = [callback for callback in arguments["callbacks"] if not isinstance(callback, loud)]
