"""The training step: loss terms join the user's loss inside it, and what was optimised is logged beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.attaching.hand_steps import HandSteps
from lightning_peft.attaching.trained import explained
from lightning_peft.capture.tap import Tap, step_compiler
from lightning_peft.compose.lanes import Resource
from lightning_peft.compose.loss import Loss, Step, check_finite, combine, join_output, split_output
from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract, overrides
from lightning_peft.strategies.support import shards
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.shards import read_whole


class StepTerms:
    """Stands in front of ``training_step``: opens the taps that methods read, and adds their terms to the loss.

    Args:
        run: The run; its network is known.
        methods: All methods, in plan order.
        active: Whether the Trainer runs its own callbacks at the moment (a tuner's trial fit does not).

    Attributes:
        batch: The batch at hand and its place in the epoch.
        seen: Told of every call, when somebody may want it once more.
    """

    def __init__(self, run: Run, methods: Sequence[Contract], active: Callable[[], bool]) -> None:
        self.run = run
        self.batch: tuple[Any, int] = (None, 0)
        self.seen: Callable[[tuple[Any, ...], dict[str, Any], tuple[Any, int]], None] | None = None
        self._methods = methods
        self._terms = [method for method in methods if overrides(method, "loss")]
        self._active = active
        self._losses: dict[str, Tensor] | None = None
        reads_network = any(method.reads_now() & {Resource.LOGITS, Resource.INPUTS} for method in methods)
        compiler = step_compiler(run.module)
        self._network = Tap(run.network, run.network_name, compiler) if reads_network else None
        if self._network is not None:
            self._network.install()
        self._hand_steps = HandSteps(run, methods)
        self._sharded = shards(run.trainer.strategy)

    def remove(self) -> None:
        """Take the tap off and stop watching."""
        self._hand_steps.remove()
        if self._network is not None:
            self._network.remove()

    def training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the user's step and return what it returned, its loss with all terms."""
        if not self._active():
            return inner(*args, **kwargs)
        # Noted before it runs, with the random numbers it is about to draw.
        if self.seen is not None and not self.run.repeated:
            self.seen(args, kwargs, self.batch)
        if self._network is not None:
            self._network.open()
        self.run.in_step = True
        try:
            if self.run.repeated:
                output = inner(*args, **kwargs)
                return output if output is None else join_output(output, self.apply(split_output(output)))
            self._losses = None
            with explained(self.run):
                output = self._hand_steps.watch(inner, *args, **kwargs)
            if self.run.module.automatic_optimization:
                if output is None:
                    return None
                return join_output(output, self.apply(split_output(output)))
            self._check_applied()
            return output
        finally:
            self.run.in_step = False
            if self._network is not None:
                self._network.close()

    def end_epoch(self) -> None:
        """Refuse a module whose steps the methods did not see all epoch long."""
        if self._active():
            self._hand_steps.end_epoch()

    def _reading(self, method: Contract) -> AbstractContextManager[None]:
        """Let a method read what it put on the module whole, where the rest of it is with other processes."""
        if not self._sharded:
            return nullcontext()
        return read_whole(*(each for each in attachments(self.run.module) if each.method == method.name))

    def _check_applied(self) -> None:
        if self._terms and self._losses is None:
            names = ", ".join(method.name for method in self._terms)
            raise MisconfigurationException(
                f"{type(self.run.module).__name__} uses manual optimization, so {names} cannot reach its loss. "
                "In training_step write: loss = lightning_peft.apply_terms(self, loss) before manual_backward."
            )

    def apply(self, loss: Tensor) -> Tensor:
        """Add every loss term to the user's loss; before the methods are started the loss stays as it is.

        A loss that is not finite stops the training, whatever the methods: none of them may learn from it.
        """
        if not self._active() or not self.run.started:
            return loss
        terms: dict[str, Loss] = {}
        check = self._checks(loss)
        if check:
            check_finite(loss, terms)
        if not self._terms:
            return loss
        step = Step(loss, *self.batch, self.run, self._network, self.run.repeated)
        for method in self._terms:
            with self._reading(method):
                term = method.loss(step)
            if term is not None:
                terms[method.name] = term if isinstance(term, Loss) else Loss(value=term)
        if check:
            check_finite(loss, terms)
        total = combine(loss, terms)
        if self.run.repeated:
            return total
        self._losses = {"base": loss.detach(), "total": total.detach()}
        self._losses |= {name: torch.as_tensor(term.value).detach() for name, term in terms.items()}
        return total

    def _checks(self, loss: Tensor) -> bool:
        """Whether to ask if the loss is finite: another device would have to be waited for, and a gradient scaler skips it."""
        return (loss.is_cpu or self._should_log) and self.run.gradient_scaler is None

    @property
    def _should_log(self) -> bool:
        every: int = self.run.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and self.run.step % every == 0

    def log(self) -> None:
        """Log losses of the step as ``peft/loss/<name>``, and each method's own metrics, where somebody looks at them.

        That is where Lightning hands them to loggers, and where an epoch or the training ends; in between only for a callback
        that monitors one of them, since logging takes as long as a small network's whole step.
        """
        trainer, module = self.run.trainer, self.run.module
        regular = self._should_log or trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if self._losses and (regular or self._monitored):
            module.log_dict({f"peft/loss/{name}": value for name, value in self._losses.items()}, on_step=True, on_epoch=False)
        if regular:
            for method in self._methods:
                for key, value in method.metrics(self.run).items():
                    module.log(
                        f"peft/{method.name}/{key}", float(torch.as_tensor(value).detach()), on_step=True, on_epoch=False
                    )

    @cached_property
    def _monitored(self) -> bool:
        callbacks: Sequence[object] = self.run.trainer.callbacks  # type: ignore[attr-defined]
        return any(str(getattr(callback, "monitor", "")).startswith("peft/loss/") for callback in callbacks)
