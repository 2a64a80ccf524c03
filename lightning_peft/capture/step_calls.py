"""What the network is called with inside the user's own step, for whoever has to run it on those inputs again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_peft.capture.evaluation import Call
from lightning_peft.capture.once_more import RandomState, metrics_kept, silent
from lightning_peft.capture.shim import Shim
from lightning_peft.capture.tap import forward_attribute
from lightning_peft.namespaces import own
from lightning_peft.network.batches import plain
from lightning_peft.network.modes import modes_kept

StepName = Literal["training_step", "validation_step", "test_step", "predict_step"]
_STAGES = {
    "training_step": RunningStage.TRAINING,
    "validation_step": RunningStage.VALIDATING,
    "test_step": RunningStage.TESTING,
    "predict_step": RunningStage.PREDICTING,
}


class _ReachedError(BaseException):
    """The network was called: what a step does with its output is of no interest. No ``except Exception`` stops it."""


class FirstCall:
    """Records what a network is called with while it is open; calls made within such a call are not its own.

    Args:
        network: The network.
        name: Its qualified name, for messages.

    Attributes:
        calls: What was recorded.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self._network, self._name = network, name
        self.calls: list[Call] = []

    @contextmanager
    def open(self, *, leave: bool) -> Iterator[None]:
        """Record the first call made inside.

        Args:
            leave: Leave the step when its network is called, so that nothing of its rest happens: no metric counts the batch,
                no list of the user's grows.
        """
        self.calls = []
        inside = False

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or self.calls:
                return inner(*args, **kwargs)
            with torch.inference_mode(False):
                own_args, own_kwargs = apply_to_collection((args, kwargs), Tensor, plain)
            self.calls.append(Call(inner, own_args, own_kwargs))
            if leave:
                raise _ReachedError
            inside = True
            try:
                return inner(*args, **kwargs)
            finally:
                inside = False

        shim = Shim(self._network, forward_attribute(self._network), forward, traced=False).install()
        try:
            yield
        except _ReachedError:
            pass
        finally:
            shim.remove()

    def first(self, step: str) -> Call:
        """Return the call.

        Raises:
            MisconfigurationException: There was none.
        """
        if not self.calls:
            raise MisconfigurationException(
                f"{step} did not call the network {self._name or '(the module itself)'!r}, so its inputs are unknown. "
                f'Name the submodule that {step} calls: network="<name>".'
            )
        return self.calls[0]


def step_calls(
    trainer: Any, module: LightningModule, network: nn.Module, name: str, batches: Iterable[Any], steps: Sequence[StepName]
) -> Iterator[Call]:
    """Take batches of a loader through the user's own step, up to its network, and yield what that would be called with.

    Transfer hooks, normalisation and the choice of inputs are the user's. A step is left when it calls the network; it logs
    nothing, metrics and random numbers are as before.

    Args:
        trainer: The Trainer, which runs.
        module: The user's module.
        network: Its network.
        name: Qualified name of the network, for messages.
        batches: As the loader gives them.
        steps: Steps to try, in this order, on the first batch; the first that takes it takes all.

    Raises:
        MisconfigurationException: No step takes the batches, or the one that does calls no network.
    """
    calls, chosen = FirstCall(network, name), list(steps)
    random = RandomState()
    with random.again():
        iterator = iter(batches)  # draws a seed
    for index in range(2**63):
        with random.again():
            batch = next(iterator, calls)
        if batch is calls:
            return
        error: Exception | None = None
        for step in chosen:
            try:
                _run(trainer, module, step, batch, index, calls)
            except Exception as found:
                error = error or found
                continue
            chosen = [step]
            yield calls.first(step)
            break
        else:
            raise MisconfigurationException(
                f"{chosen[0]} does not take these batches ({type(error).__name__}: {error}). Give a loader whose batches are "
                "like those of your own loaders: they go through your step, so that the network sees what it sees there."
            ) from error


def own_steps(module: LightningModule, names: Iterable[StepName]) -> list[StepName]:
    """Those of some steps that a module defines."""
    return [name for name in names if is_overridden(name, module, own(LightningModule, module))]


def _run(trainer: Any, module: LightningModule, step: StepName, batch: Any, index: int, calls: FirstCall) -> None:
    with _as_in(trainer, module, step), silent(module), metrics_kept(module), RandomState().again(), torch.no_grad():
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with trainer.precision_plugin.forward_context(), calls.open(leave=True):
            bound_step(module, step, batch, index)()


def bound_step(module: LightningModule, step: StepName, batch: Any, index: int) -> Callable[[], Any]:
    """A call of the user's own step on a batch, without the terms and hooks that methods add to it.

    Raises:
        MisconfigurationException: The step fetches batches itself.
    """
    method = getattr(module, step)
    while isinstance(method, Shim):  # what methods make of a step is no part of it
        method = method._inner
    parameters = inspect.signature(method).parameters
    if "dataloader_iter" in parameters:
        raise MisconfigurationException(f"{step} fetches batches itself (dataloader_iter), so none can be given to it.")
    known = {"batch_idx": index, "dataloader_idx": 0}
    kwargs = {key: value for key, value in known.items() if key in parameters}
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not kwargs and len(positional) > 1:  # by another name, as Lightning allows
        return partial(method, batch, index)
    return partial(method, batch, **kwargs)


@contextmanager
def _as_in(trainer: Any, module: LightningModule, step: StepName) -> Iterator[None]:
    """Make Trainer and module say of themselves what they say in a step."""
    stage = trainer.state.stage
    trainer.state.stage = _STAGES[step]
    try:
        with modes_kept(module, evaluate=step != "training_step"):
            yield
    finally:
        trainer.state.stage = stage
