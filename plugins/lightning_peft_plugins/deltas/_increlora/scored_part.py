"""A product beside a linear layer whose gradient is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_peft_plugins.deltas._shared.blocks_part import BlocksPart


class ScoredPart(BlocksPart):
    """Shows its form the gradient for the product, which nothing else here computes: that of the outputs times the inputs."""

    def around(self, call: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = super().around(call, layer, args, kwargs)
        form = self.form
        if form.watched and output.requires_grad:
            inputs = (args[0] if args else next(iter(kwargs.values()))).detach()

            def see(gradient: Tensor) -> None:
                flat = gradient.flatten(0, -2)
                form.see(flat.T @ inputs.flatten(0, -2).to(flat.dtype))

            output.register_hook(see)
        return output
