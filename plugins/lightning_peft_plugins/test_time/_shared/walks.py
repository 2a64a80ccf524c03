"""From predictions back to gradients: which samples of a call are run with a graph, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import detached
from lightning_peft_plugins.test_time.functional.predictions import softmax_entropy


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk back through a graph.

    Attributes:
        loss: Sum of the weighted entropies.
        gradients: Its gradient for each parameter.
        chosen: Probabilities of the chosen predictions, shape ``(chosen, classes)``.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    chosen: Tensor


@dataclass(frozen=True, slots=True)
class Walker:
    """Runs calls of the network and walks back from the predictions that count; keeps nothing, so threads may share it.

    Attributes:
        predict: Reads logits of shape (samples, positions, classes) out of an output.
        weigh: Weighs the predictions of a call, given their logits: shape (samples, positions), 0 for those that do not count.
        parameters: What gradients are wanted for.
        independent: Whether the samples of a call can be run apart from each other.
        predicting: What a pass whose output is the prediction runs in.
    """

    predict: Callable[[Any], Tensor]
    weigh: Callable[[Call, Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    independent: Callable[[Call], bool]
    predicting: Callable[[], AbstractContextManager[None]] = nullcontext

    def there_and_back(self, call: Call) -> tuple[Any, Walk | None]:
        """Run a call with a graph and walk back if a prediction counts; returns the output without the graph."""
        with torch.enable_grad():
            with self.predicting():
                output = call()
            logits = self.predict(output)
        weights = self.weigh(call, logits.detach())
        if not bool(logits.isfinite().all()) and self.independent(call):
            return detached(output), self.again(call, weights)  # backwards, 0 times NaN is NaN
        return detached(output), self._back(logits, weights)

    def again(self, call: Call, weights: Tensor) -> Walk | None:
        """Run the samples with a prediction that counts once more, with a graph, and walk back."""
        rows = rows_that_count(weights)
        if not len(rows):
            return None
        with torch.enable_grad():
            logits = self.predict(call.take(rows)())
        return self._back(logits, weights[rows])

    def _back(self, logits: Tensor, weights: Tensor) -> Walk | None:
        counts = weights > 0
        if not bool(counts.any()):
            return None
        with torch.enable_grad():
            picked = logits[counts]
            loss = (weights[counts] * softmax_entropy(picked)).sum()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        dtype = torch.promote_types(picked.dtype, torch.float32)
        return Walk(loss.detach(), gradients, picked.detach().softmax(-1, dtype=dtype))


def rows_that_count(weights: Tensor) -> Tensor:
    """Indices of the samples with a weight above 0 anywhere.

    Example:
        >>> rows_that_count(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
        tensor([1])
    """
    return (weights > 0).any(-1).nonzero().squeeze(-1)
