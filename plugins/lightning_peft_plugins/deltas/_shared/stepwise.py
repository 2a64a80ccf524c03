"""Low-rank products that are others within a training step."""

from __future__ import annotations

from typing import Any

from lightning_peft import Run
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta


class Stepwise(ProductDelta):
    """A low-rank product that training steps see as subclasses say in :meth:`show`, and all else as it is."""

    def show(self, step: int | None) -> None:
        """Let the forms compute as in a step.

        Args:
            step: Optimizer steps before it; ``None`` for as they are outside of one.
        """
        raise NotImplementedError

    def batch_start(self, run: Run, batch: Any) -> None:
        """Show what the step sees; batches that are accumulated have one step."""
        self.show(run.step)

    def after_step(self, run: Run) -> None:
        """Show the network as it is again; one that steps by hand may go on in the same batch."""
        self.show(run.step if run.in_step else None)

    def validation_start(self, run: Run) -> None:
        """Show the network that is validated."""
        self.show(None)

    def epoch_end(self, run: Run) -> None:
        """Show the network that callbacks see at the end of an epoch."""
        self.show(None)

    def finish(self, run: Run) -> None:
        """Leave the network as it is."""
        self.show(None)
