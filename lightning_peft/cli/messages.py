"""What a command's user reads: errors in one message, and warnings that are of use."""

from __future__ import annotations

import warnings


class RankError(Exception):
    """A process of a training failed; the message is the one it would have ended a command with."""


def message_of(error: Exception) -> str:
    """Say what went wrong; errors that were not written for users also say what they are."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_peft.assets.archives import AssetError
    from lightning_peft.cli.recipes import UsageError

    cause = error.__context__
    if isinstance(error, RuntimeError) and isinstance(cause, OSError):  # torch.save on a full disk
        error = cause
    if isinstance(error, (UsageError, MisconfigurationException, AssetError, OSError, RankError)):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def silence() -> None:
    """Leave out remarks of Lightning that a recipe's user can do nothing about."""
    for message in (
        ".*does not have many workers",
        ".*The number of training batches",
        ".*Checkpoint directory .* exists and is not empty",
        ".*isinstance.treespec, LeafSpec.",
        ".*No complete tensor found in the group",
        ".*GPU available but not used",
        ".*Using `DistributedSampler` with the dataloaders",
        # LightningCLI's own use of jsonargparse
        r"\s*By default only one JsonargparseDeprecationWarning",
        r"[\s\S]*was deprecated in v4\.",
    ):
        warnings.filterwarnings("ignore", message=message)
