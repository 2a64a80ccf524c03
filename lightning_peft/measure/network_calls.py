"""Listening to a network's calls during ``test``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.capture.tap import Tap
from lightning_peft.network.resolve import resolve_network


class NetworkCalls(Callback):
    """Base of callbacks that read the calls a test batch makes of the network, in ``on_test_batch_end``.

    Subclasses close the tap when they have read a batch.
    """

    def __init__(self) -> None:
        self._tap: Tap | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the network and listen.

        Raises:
            MisconfigurationException: The module has no single network.
        """
        name, network = resolve_network(pl_module)
        self._tap = Tap(network, name)
        self._tap.install()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen to this batch."""
        if self._tap is not None:
            self._tap.open()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._release()

    def _release(self) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap = None
