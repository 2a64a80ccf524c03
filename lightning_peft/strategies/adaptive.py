"""A DDP strategy that follows changes of the module's structure."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

NAME = "adaptive_ddp"


class AdaptiveDDPStrategy(DDPStrategy):
    """DDP for networks that grow in training: ``Trainer(strategy="adaptive_ddp")``.

    Stock ``"ddp"`` works just as well, and with ``pytorch_lightning`` it is the one to name; this one also lets code of yours
    that edits the module say so, by :meth:`rewrap`.

    Args:
        **kwargs: Those of :class:`~lightning.pytorch.strategies.DDPStrategy`.
    """

    strategy_name = NAME

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def rewrap(self) -> None:
        """Synchronise the gradients of the parameters the module has now, from rank 0's values on."""
        rewrap_ddp(self)


def rewrap_ddp(strategy: DDPStrategy) -> None:
    """Wrap the module of a DDP strategy again.

    The wrapper synchronises the gradients of the parameters it was built with; new ones would diverge between ranks without a
    word. Building it again sends rank 0's parameters and buffers to the others.
    """
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def register() -> None:
    """Make the strategy known to Lightning by name."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(NAME, AdaptiveDDPStrategy, description="DDP that follows changes of the module's structure")
