"""Gradient descent during an evaluation: which parameters move, by which optimizer, and back to the source."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Run
from lightning_peft.arguments import one_of
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.layers import parameter_names
from lightning_peft.network.targets import TargetSpec, excluded
from lightning_peft.strategies.ranks import of_ranks
from lightning_peft_plugins.test_time._shared.batch_statistics import UseBatchStatistics, batch_norms
from lightning_peft_plugins.test_time._shared.fine_parameters import FineParameters
from lightning_peft_plugins.test_time._shared.stream import StreamMethod


class DescentMethod(StreamMethod):
    """Base of the methods that take optimizer steps on what they are evaluated on.

    The parameters that move are those of the layers ``targets`` selects; for the duration nothing else requires a gradient. At
    a reset they and the optimizer's state are as at the start, bit for bit.

    Subclasses write :meth:`descend`, and :meth:`forget` when they remember more than the parameters. Parameters of their own
    that are to move too they put into ``beside``, before they call :meth:`new_optimizer`.

    Args:
        lr: Learning rate.
        momentum: Momentum of an optimizer that has one (SGD, RMSprop).
        optimizer: Name of an optimizer of ``torch.optim``, or a class.
        optimizer_kwargs: Its other arguments, ``{"weight_decay": 0.01}``.
        steps: Updates for each batch; the predictions of the last forward pass are returned.
        statistics: ``"batch"``: BatchNorm layers normalise with the statistics of the batch; ``"source"``: with the running
            ones. Networks without BatchNorm do not care.
        sync: ``"mean"`` averages gradients over the samples of all ranks, so that all ranks stay one model; with ``"none"``
            each rank adapts to its own share of the data.
        targets: Layers whose parameters move; ``None`` is the whole module without ``exclude``.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.stream.StreamMethod`.
    """

    def __init__(
        self,
        *,
        lr: float = 2.5e-4,
        momentum: float = 0.9,
        optimizer: str | type[Optimizer] = "SGD",
        optimizer_kwargs: Mapping[str, Any] | None = None,
        steps: int = 1,
        statistics: Literal["batch", "source"] = "batch",
        sync: Literal["none", "mean"] = "none",
        targets: TargetSpec | None = "norm",
        **kwargs: Any,
    ) -> None:
        super().__init__(targets=targets, **kwargs)
        one_of("statistics", statistics, ("batch", "source"))
        one_of("sync", sync, ("none", "mean"))
        if steps < 1:
            raise MisconfigurationException(f"steps={steps!r} must be at least 1.")
        self.steps_per_batch, self.statistics, self.sync = steps, statistics, sync
        self._optimizer_class = optimizer_class(optimizer)
        self._optimizer_kwargs = {"lr": lr, **(optimizer_kwargs or {})}
        if "momentum" in inspect.signature(self._optimizer_class).parameters:
            self._optimizer_kwargs.setdefault("momentum", momentum)
        self.parameters: dict[str, nn.Parameter] = {}
        self.source: dict[str, Tensor] = {}
        self.beside: list[nn.Parameter] = []
        self.optimizer: Optimizer | None = None
        self._held: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        self._batch_statistics = UseBatchStatistics(())
        self._fine = FineParameters(())

    # What an author overrides.

    def descend(self, call: Call) -> Any:
        """Take one step on the samples of a call and return the network's output for them, from before that step."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what was learnt of the stream beside the parameters."""

    # The life of a stream.

    def claims(self, module: nn.Module) -> Iterable[str]:
        if self.targets is not None:
            return parameter_names(self.select(module))
        spared = {id(p) for part in excluded(module, self.exclude) for p in part.parameters()}
        found = [name for name, p in module.named_parameters() if id(p) not in spared]
        if not found:
            raise MisconfigurationException(
                f"{self.name}: exclude={self.exclude!r} leaves no parameter to adapt. Exclude less, or take the method out."
            )
        return found

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        if self.sync == "mean":
            check_equal_numbers(self.name, run.trainer)
        everything = dict(run.module.named_parameters())
        self.parameters = {name: everything[name] for name in self.claims(run.module) if name in everything}
        self._held = [(p, p.requires_grad, p.grad) for p in everything.values()]
        for name, parameter in everything.items():
            parameter.requires_grad_(name in self.parameters)
            parameter.grad = None
        self.source = {name: p.detach().clone() for name, p in self.parameters.items()}
        layers = list(batch_norms(run.network).values()) if self.statistics == "batch" else []
        self._batch_statistics = UseBatchStatistics(layers, self.kept)
        self.coupled = bool(layers)
        self.new_optimizer()
        self._warned = False
        self.forget()

    def new_optimizer(self) -> None:
        """Begin with an optimizer that has no state."""
        self._fine = FineParameters(self.moving())
        try:
            self.optimizer = self._optimizer_class(self._fine.stepped_on, **self._optimizer_kwargs)
        except TypeError as error:
            raise MisconfigurationException(
                f"{self.name}: {self._optimizer_class.__name__} does not take these arguments ({error}). Put what it takes "
                "into optimizer_kwargs."
            ) from error

    def update(self, call: Call) -> Any:
        output = None
        for _ in range(self.steps_per_batch):
            output = self.descend(call)
        return output

    def to_source(self) -> None:
        self.put_back()
        if self.optimizer is not None:
            self.new_optimizer()
        self.forget()

    def release(self) -> None:
        self._batch_statistics.restore()
        for parameter, required, gradient in self._held:
            parameter.requires_grad_(required)
            # Lightning moves a module to the CPU before it calls teardown, and gradients held here do not move with it.
            parameter.grad = None if gradient is None else gradient.to(parameter.device, parameter.dtype)
        self.parameters, self.source, self.beside, self._held, self.optimizer = {}, {}, [], [], None
        self._fine = FineParameters(())

    # What subclasses call.

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the parameters their values in the source, and leave everything else."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.source[name])

    def step(self, samples: int) -> None:
        """Move the parameters along their gradients, a mean over ``samples``.

        Without a sample nothing moves, momentum included. Gradients that are NaN or infinite are dropped, with one warning.
        """
        parameters = self.moving()
        if self.sync == "mean" and self.run is not None and self.run.trainer.world_size > 1:
            samples = average_over_ranks(parameters, samples)
        if samples > 0 and self.optimizer is not None:
            if all_finite([p.grad for p in parameters if p.grad is not None]):
                self._fine.take_gradients()
                self.optimizer.step()
                self._fine.give_values()
                self.updates += 1
            else:
                self._warn_once()
        self.drop_gradients()

    def shared(self, value: float | None) -> float | None:
        """With ``sync="mean"`` the mean of a number over the ranks that have one, so that all of them decide alike."""
        if self.sync == "none" or self.run is None or self.run.trainer.world_size == 1:
            return value
        pair = torch.tensor([value or 0.0, float(value is not None)], device=self.run.module.device, dtype=torch.float32)
        torch.distributed.all_reduce(pair)
        return float(pair[0] / pair[1]) if pair[1] else None

    def drop_gradients(self) -> None:
        """Clear the gradients of what moves."""
        for parameter in self.moving():
            parameter.grad = None

    def moving(self) -> list[nn.Parameter]:
        """What the optimizer moves: parameters of the module, and those of the method's own."""
        return [*self.parameters.values(), *self.beside]

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name} did not adapt to a batch, because its gradients are NaN or infinite; this is said once. Its "
                "predictions are those of the network as it was.",
                stacklevel=2,
            )


def optimizer_class(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    """Find an optimizer by name.

    Raises:
        MisconfigurationException: ``torch.optim`` has none of that name.

    Example:
        >>> optimizer_class("SGD").__name__
        'SGD'
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return optimizer
    known = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    found = known.get(optimizer) if isinstance(optimizer, str) else None
    if found is None or not issubclass(found, Optimizer):
        names = ", ".join(sorted(name for name, value in known.items() if issubclass(value, Optimizer)))
        raise MisconfigurationException(f"optimizer={optimizer!r} is not in torch.optim: {names}.")
    return found


def fine_copy(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in at least float32, for averages: in a half precision a thousandth of a step is nothing.

    Example:
        >>> fine_copy({"weight": torch.ones(1, dtype=torch.bfloat16)})["weight"].dtype
        torch.float32
    """
    return {
        name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True) for name, value in values.items()
    }


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value is NaN or infinite; asks the device once.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([float("nan")])])
        False
    """
    norms = torch._foreach_norm(list(tensors), float("inf")) if tensors else ()
    return not norms or bool(torch.stack(norms).isfinite().all())


def check_equal_numbers(name: str, trainer: Trainer) -> None:
    """Refuse ranks with unequal numbers of batches, the first of which to end would leave the others waiting.

    Raises:
        MisconfigurationException: They have; streams without a length are not known to.
    """
    loops = {TrainerFn.VALIDATING: trainer.num_val_batches, TrainerFn.PREDICTING: trainer.num_predict_batches}
    found = of_ranks(loops.get(trainer.state.fn, trainer.num_test_batches))
    if any(counts != found[0] for counts in found):
        counted = " and ".join(str(sum(counts)) for counts in found)
        raise MisconfigurationException(
            f'{name} adapts all ranks as one with every batch (sync="mean"), and they have {counted} batches. Give every rank '
            'as many, as Lightning\'s own sampler does, or let each adapt to its own, sync="none".'
        )


def average_over_ranks(parameters: Sequence[nn.Parameter], samples: int) -> int:
    """Turn each rank's mean gradient over its samples into the mean over all ranks' samples; return how many those are."""
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() * samples for p in parameters]
    flat = torch.cat([*parts, torch.tensor([float(samples)], device=parameters[0].device, dtype=torch.float32)])
    torch.distributed.all_reduce(flat)
    total = round(float(flat[-1]))
    for p, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = (part / max(1, total)).view_as(p).to(p.dtype)
    return total
