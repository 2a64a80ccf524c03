"""The linear layer that makes the logits, found by asking, and the features it is given."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.logits import as_logits
from lightning_peft.network.resolve import named_submodule


def with_input(layer: nn.Module, call: Call) -> tuple[Any, Tensor | None]:
    """Run a call; return its output, and what a layer was given when it last ran, ``None`` if it did not.

    Args:
        layer: The layer, whose first argument is recorded, with its graph if there is one.
        call: The call.
    """
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        output = call()
    finally:
        hook.remove()
    return output, seen[-1] if seen else None


class Classifier:
    """The last linear layer of a network: what it returns is the logits.

    No name is asked: in its first call every linear layer shows what it returns, and the one whose output the network returned
    is the classifier.

    Args:
        method: Name of the method, for messages.
        run: The run, with its network.
        layer: Qualified name of the layer in the user's module, for a network that makes something else of its output.

    Raises:
        MisconfigurationException: The named layer does not exist or is no ``nn.Linear``.
    """

    def __init__(self, method: str, run: Run, layer: str | None = None) -> None:
        self._method, self._network = method, run.network
        self._named = layer is not None
        self._layer: nn.Linear | None = None
        if layer is not None:
            found = named_submodule(run.module, layer, "classifier")
            if not isinstance(found, nn.Linear):
                raise MisconfigurationException(
                    f"{method}: classifier={layer!r} is {type(found).__name__}, but the features of a linear classifier are "
                    "needed. Name an nn.Linear."
                )
            self._layer = found

    @property
    def layer(self) -> nn.Linear:
        """The layer; known after the first call."""
        assert self._layer is not None
        return self._layer

    def run(self, call: Call) -> tuple[Any, Tensor]:
        """Run a call; return its output, and the features the classifier was given, shape ``(samples, width)``.

        Raises:
            MisconfigurationException: No linear layer makes the logits, or it is not given one feature vector a sample.
        """
        if self._layer is None:
            self._layer = self._find(call)
        output, features = with_input(self._layer, call)
        if features is None or features.ndim != 2 or len(features) != call.size:
            given = "of no call" if features is None else str(tuple(features.shape))
            raise MisconfigurationException(
                f"{self._method} needs one feature vector a sample for the classifier; of {call.size} samples it was given "
                f"{given}. Name the layer that is given them: classifier=<name of an nn.Linear>."
            )
        return output, features

    def _find(self, call: Call) -> nn.Linear:
        """Ask which linear layer returns what the network returns."""
        made: list[tuple[nn.Linear, Tensor]] = []
        layers = [module for module in self._network.modules() if isinstance(module, nn.Linear)]
        hooks = [layer.register_forward_hook(lambda layer, _, output: made.append((layer, output))) for layer in layers]
        try:
            with torch.no_grad():
                logits = as_logits(call())
        finally:
            for hook in hooks:
                hook.remove()
        found = [layer for layer, output in made if output.shape == logits.shape and _same(output, logits)]
        if not found:
            raise MisconfigurationException(
                f"{self._method} found no linear layer whose output is the logits {tuple(logits.shape)} that "
                f"{type(self._network).__name__} returns; {len(made)} linear layers ran. Name the one that makes them, if "
                "something is done to its output afterwards: classifier=<qualified name of an nn.Linear>."
            )
        return found[-1]


def _same(output: Tensor, logits: Tensor) -> bool:
    """Whether both are equal where the logits are finite."""
    finite = logits.isfinite()
    return bool(finite.any()) and torch.equal(output[finite], logits[finite])
