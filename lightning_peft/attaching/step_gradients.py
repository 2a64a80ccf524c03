"""The gradients of an optimizer step: how they are computed, once more if a method asks, and a look at them when clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.attaching.steps import StepTerms
from lightning_peft.capture.once_more import RandomState, metrics_kept, silent, statistics_kept
from lightning_peft.capture.shim import Shim
from lightning_peft.compose.loss import split_output
from lightning_peft.compose.run import Run
from lightning_peft.compose.step_closure import StepClosure
from lightning_peft.contract import Contract, overrides
from lightning_peft.namespaces import both
from lightning_peft.optim.optimizers import trained_by


@dataclass(frozen=True)
class SeenStep:
    """One call of ``training_step``, to be made again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: tuple[Any, int]
    positions: list[int] | None
    random: RandomState


class StepGradients:
    """Chains what methods do where the gradients of an optimizer step are computed, and after they are clipped.

    Lightning computes gradients in a closure that it hands to ``strategy.optimizer_step``, both under automatic and under
    manual optimization: with a gradient scaler before the optimizer's own step, without one inside it. A closure around that
    closure is therefore right in both, and what comes afterwards (unscaling, ``on_before_optimizer_step``, clipping, the
    scaler's decision to skip) sees the gradients that methods settled on.

    Args:
        run: The run.
        methods: All methods, in plan order.
        terms: What adds the methods' terms to every loss.
        active: Whether the Trainer runs its own callbacks at the moment.
    """

    def __init__(self, run: Run, methods: Sequence[Contract], terms: StepTerms, active: Callable[[], bool]) -> None:
        self._run, self._terms = run, terms
        self._computing = [method for method in methods if overrides(method, "compute_gradients")]
        self._clipped = [method for method in methods if overrides(method, "after_clipping")]
        self._active = active
        self._window: dict[int, SeenStep] = {}
        self._cleared: Optimizer | None = None
        self._carried = False

    def shims(self) -> list[Shim]:
        """Return what is to be installed; nothing when no method acts here.

        Raises:
            MisconfigurationException: A method may want a step again whose batches the module fetches itself.
        """
        module, strategy = self._run.module, self._run.trainer.strategy
        found = []
        if self._computing:
            self._check_step()
            found.append(Shim(strategy, "optimizer_step", self._step))
            if self._manual:
                found.append(Shim(strategy, "backward", self._backward))
            else:
                self._terms.seen = self.note
        if self._clipped and not self._manual:
            found.append(Shim(module, "configure_gradient_clipping", self._clip))
        return found

    def _check_step(self) -> None:
        if is_param_in_hook_signature(self._run.module.training_step, "dataloader_iter", explicit=True):
            names = ", ".join(method.name for method in self._computing)
            raise MisconfigurationException(
                f"training_step takes a dataloader_iter and fetches batches itself, so {names} cannot evaluate a step again. "
                "Let training_step take the batch."
            )

    # After clipping.

    def _clip(self, inner: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        inner(optimizer, *args, **kwargs)
        self.after_clipping(optimizer)

    def after_clipping(self, optimizer: Optimizer) -> None:
        """Show methods the gradients that a step will use."""
        if self._active() and self._run.started:
            for method in self._clipped:
                method.after_clipping(self._run, optimizer)

    # Around the closure.

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: tuple[Any, int]) -> None:
        """Remember a call of ``training_step`` until its window ends with an optimizer step.

        By its place, for an optimizer such as LBFGS evaluates one batch several times.
        """
        samples = self._run.samples
        self._window[batch[1]] = SeenStep(args, kwargs, batch, None if samples is None else samples.current, RandomState())

    def _step(self, inner: Callable[..., Any], optimizer: Optimizer, closure: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self._active() and self._run.started):
            return inner(optimizer, closure, *args, **kwargs)
        try:
            return inner(optimizer, partial(self._compute, optimizer, closure), *args, **kwargs)
        finally:
            self._window.clear()

    def _compute(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """Let every method compute the gradients in its own way, those of higher lanes around those of lower ones."""
        # A chain of closures, the user's own in the middle. What a method calls, `closure()` or `closure.again()`, runs all
        # methods before it, so that one which climbs and one which scales compose without knowing of each other. Only the
        # user's own closure tells first from again: the first is the step that Lightning logs, counts and returns.
        self._cleared, self._carried = optimizer, False
        again = partial(self._by_hand, optimizer, closure, RandomState()) if self._manual else partial(self._again, optimizer)
        link = users = StepClosure(closure, again, self._scale)
        for method in self._computing:
            link = link.within(partial(method.compute_gradients, self._run, optimizer))
        link()
        return users.loss  # Lightning does not step under a gradient scaler if this is None

    def _scale(self) -> float:
        scaler = self._run.gradient_scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    # Once more.

    @contextmanager
    def _once_more(self, optimizer: Optimizer, statistics: bool) -> Iterator[None]:
        """Clear the gradients, and let what runs within leave nothing but new ones."""
        run, module = self._run, self._run.module
        before = run.in_step, run.repeated, self._terms.batch, None if run.samples is None else run.samples.current
        optimizer.zero_grad()
        run.repeated = True
        kept = nullcontext() if statistics else statistics_kept(module)
        try:
            with torch.enable_grad(), silent(module), metrics_kept(module), kept:
                yield
        finally:
            run.in_step, run.repeated, self._terms.batch = before[:3]
            if run.samples is not None:
                run.samples.current = before[3]

    def _again(self, optimizer: Optimizer, statistics: bool) -> Tensor:
        losses = [torch.zeros((), device=self._run.module.device)]
        with self._once_more(optimizer, statistics):
            for left, seen in zip(reversed(range(len(self._window))), self._window.values(), strict=True):
                with self._ranks_apart() if left else nullcontext(), seen.random.again():
                    losses += self._evaluate(seen)
        return torch.stack(losses).sum()

    def _ranks_apart(self) -> AbstractContextManager[None]:
        """Leave gradients of a batch that is not the window's last to their rank, as Lightning does."""
        strategy = self._run.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, both(ParallelStrategy)) else nullcontext()

    def _evaluate(self, seen: SeenStep) -> list[Tensor]:
        trainer = self._run.trainer
        self._terms.batch = seen.batch
        if self._run.samples is not None:
            self._run.samples.current = seen.positions
        # Through the strategy, whose wrapper of the module brings ranks together.
        output = trainer.strategy.training_step(*seen.args, **seen.kwargs)
        if output is None:  # as the first time: the user left this batch out
            return []
        loss = split_output(output) / trainer.accumulate_grad_batches
        self._propagate(loss)
        return [loss.detach()]

    def _propagate(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass, but for the ``on_before_backward`` and ``on_after_backward`` of everybody's callbacks."""
        scaler = self._run.gradient_scaler
        self._run.module.backward(loss if scaler is None else scaler.scale(loss), *args, **kwargs)

    # Once more, by hand.

    @property
    def _manual(self) -> bool:
        return not self._run.module.automatic_optimization

    def _backward(self, inner: Callable[..., Any], loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Before a closure's first backward pass, see whether it adds to gradients that it cannot bring about again."""
        if self._run.repeated:
            self._run.trainer.strategy.pre_backward(loss)
            return self._propagate(loss, *args, **kwargs)
        stepped, self._cleared = self._cleared, None
        if stepped is not None:
            self._carried = any(p.grad is not None and bool(p.grad.any()) for p in trained_by(stepped))
        return inner(loss, optimizer, *args, **kwargs)

    def _by_hand(self, optimizer: Optimizer, closure: Callable[[], Any], random: RandomState, statistics: bool) -> Any:
        # By name: Lightning has two of them, one for each name it is imported under.
        if getattr(closure, "__name__", "") == do_nothing_closure.__name__ or self._carried:
            names = ", ".join(method.name for method in self._computing)
            raise MisconfigurationException(
                f"{type(self._run.module).__name__} optimizes by hand and {names} evaluates its step again, "
                + (
                    "but its closure adds to the gradients of the last call. "
                    if self._carried
                    else "but optimizer.step() got no closure. "
                )
                + "In training_step write: def closure(): optimizer.zero_grad(); loss = lightning_peft.apply_terms(self, "
                "<your loss>); self.manual_backward(loss); return loss. Then call optimizer.step(closure=closure)."
            )
        with self._once_more(optimizer, statistics), random.again():
            return closure()
