"""Other orders of channels in training: weights, optimizer states, averages and held masks follow, or nothing changes."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_peft.attaching import averaging
from lightning_peft.structure.reorder import Orders, reorder, reordered_state
from lightning_peft.weights.maps import plain_tensors


def reorder_training(trainer: Trainer, module: LightningModule, orders: Orders) -> None:
    """Put coordinates into another order between two optimizer steps.

    Args:
        trainer: The Trainer; its gradients must not be needed any more.
        module: The module.
        orders: The orders.

    Raises:
        MisconfigurationException: An optimizer keeps something that cannot follow; nothing is changed then.
    """
    orders = trainer.strategy.broadcast(orders)  # rank 0 decides for all
    tensors = plain_tensors(module)
    changed = [
        (state, reordered_state(state, list(tensors[name].shape), dims, name))
        for name, dims in orders.items()
        for optimizer in trainer.optimizers
        if (state := optimizer.state.get(tensors[name])) is not None
    ]
    for network in (module, *averaging.averaged_modules(trainer)):
        reorder(network, orders)
    for state, values in changed:
        for key, value in values.items():
            state[key].copy_(value)
    for name in orders:
        tensors[name].grad = None
