"""The position of the training loader, when a run is resumed in the middle of an epoch."""

from __future__ import annotations

from lightning.pytorch import Trainer


def restore_loader(trainer: Trainer) -> bool:
    """Give the training loader the position a checkpoint has for it, if it does not have it yet.

    Lightning hands the position over while it sets the loader up, and not again. A module that asks for
    ``estimated_stepping_batches`` in ``configure_optimizers`` has it set up before the checkpoint is read, and would see the
    epoch's first batches a second time.

    Returns:
        Whether the loader was given it now.
    """
    loop = trainer.fit_loop
    if not (loop.restarting and loop._combined_loader_states_to_load and loop._data_fetcher is not None):
        return False
    loop._load_combined_loader_states()
    iter(loop._data_fetcher)
    return True
