"""Evaluation: a method may answer the network's calls in ``test``, ``validate`` and ``predict``, with gradients if it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_peft.capture.shim import Shim
from lightning_peft.capture.tap import forward_attribute
from lightning_peft.network.batches import batch_size, detached, join, plain, take, tensors_of

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the network during evaluation; calling it runs the network as it stands on these inputs.

    Attributes:
        forward: The network's own forward pass.
        args: Positional arguments; tensors usable by autograd, whatever mode the Trainer evaluates in.
        kwargs: Keyword arguments, the same.
        batch_idx: Batch of the dataloader.
        dataloader_idx: Dataloader.
        batch: The batch as the user's step was given it; ``None`` in calls made of others, which methods may keep for long.
    """

    forward: Forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_idx: int = 0
    dataloader_idx: int = 0
    batch: Any = None

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    @property
    def size(self) -> int:
        """Samples in the call."""
        return batch_size((self.args, self.kwargs))

    def take(self, samples: slice | Tensor) -> Call:
        """Return the same call for some of its samples."""
        args, kwargs = take((self.args, self.kwargs), self.size, samples)
        return replace(self, args=args, kwargs=kwargs, batch=None)

    @staticmethod
    def gather(calls: Sequence[Call]) -> Call:
        """Put calls of one structure together into one."""
        args, kwargs = join([(call.args, call.kwargs) for call in calls], [call.size for call in calls])
        return replace(calls[0], args=args, kwargs=kwargs, batch=None)

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the same call with its floating point tensors changed: images, not token ids or masks."""
        args, kwargs = apply_to_collection(
            (self.args, self.kwargs), Tensor, lambda tensor: change(tensor) if tensor.is_floating_point() else tensor
        )
        return replace(self, args=args, kwargs=kwargs)


@dataclass(slots=True)
class Passes:
    """Samples that went through the network, whoever called it, in whatever thread and with whatever weights.

    Attributes:
        forward: Samples of all forward passes.
        backward: Samples in forward passes that were backpropagated through, whether or not they entered the loss.
    """

    forward: int = 0
    backward: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def count(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run the network's own forward pass and count it."""
        size = batch_size((args, kwargs))
        with self._lock:
            self.forward += size
        output = inner(*args, **kwargs)
        graph = next((tensor for tensor in tensors_of(output) if tensor.requires_grad), None)
        if graph is not None:

            def walked(gradient: Tensor) -> None:
                with self._lock:
                    self.backward += size

            graph.register_hook(walked)  # type: ignore[no-untyped-call]
        return output


class EvaluationShim:
    """Stands in front of the network's forward pass while a Trainer evaluates.

    Lightning evaluates in inference mode, where no graph can be built even under ``torch.enable_grad``. A call is answered
    outside of it, with copies of the inputs that were made inside, and without autocast's cache of cast weights, which would
    serve old weights after an update and weights without a graph after a pass without one.

    Args:
        network: The network.
        adapt: Answers a call; gradients are off when it is called, and it may enable them.
        compiler: What :func:`~lightning_peft.capture.tap.step_compiler` gave for the LightningModule.

    Attributes:
        active: Whether calls are answered; otherwise the network answers itself.
        passes: What went through the network while calls were answered.
        place: Numbers of the batch and the dataloader that the next calls belong to, and the batch.
    """

    def __init__(
        self,
        network: nn.Module,
        adapt: Callable[[Call], Any],
        compiler: Callable[[Forward], Forward] | None = None,
    ) -> None:
        self.place: tuple[int, int, Any] = (0, 0, None)
        self.active = False
        self.passes = Passes()
        self._adapt = adapt
        self._device_type = next((p.device.type for p in network.parameters()), "cpu")
        self._busy = False
        attribute = forward_attribute(network)
        self._shim = Shim(network, attribute, self._forward, traced=False, compiler=compiler)

    def install(self) -> EvaluationShim:
        """Start answering."""
        self._shim.install()
        return self

    def remove(self) -> None:
        """Stop answering."""
        self._shim.remove()

    def _forward(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return inner(*args, **kwargs)
        if self._busy:  # the method itself calls the network, perhaps with other weights
            return self.passes.count(inner, *args, **kwargs)
        self._busy = True
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(self._uncached_autocast())
                args, kwargs = apply_to_collection((args, kwargs), Tensor, plain)
                call = Call(partial(self.passes.count, inner), args, kwargs, *self.place)
                if call.size == 0:
                    raise MisconfigurationException(
                        "The network was called without a tensor of samples, so there is nothing to adapt to. Name the "
                        'submodule your step calls with tensors: network="<name>".'
                    )
                return detached(self._adapt(call))
        finally:
            self._busy = False

    def _uncached_autocast(self) -> AbstractContextManager[Any]:
        device = self._device_type
        enabled = torch.is_autocast_enabled(device)
        return torch.autocast(device, torch.get_autocast_dtype(device), enabled, cache_enabled=False)
