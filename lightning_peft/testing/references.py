"""Trainings written without the method under test, and the check that it ends where they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import Fit, fit, seed_all
from lightning_peft.testing.shared_runs import EPOCHS, Factory, SharedRuns


@dataclass(frozen=True)
class Task:
    """What a loop by hand is given: all that the training with the method has, but for the method.

    Attributes:
        module: A new module, built with the same seed, in training mode.
        optimizer: Its optimizer.
        epochs: Batches of each epoch, in their order.
    """

    module: Any
    optimizer: Optimizer
    epochs: Sequence[Sequence[Any]]

    @property
    def batches(self) -> list[Any]:
        """Batches of the whole training."""
        return [batch for epoch in self.epochs for batch in epoch]

    def loss(self, batch: Any) -> Tensor:
        """The loss that the module trains with: cross-entropy of a batch of ``(inputs, labels)``."""
        return F.cross_entropy(self.module.logits(batch[0]), batch[1])

    def step(self, loss: Tensor) -> None:
        """Make a usual step with a loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


@dataclass(frozen=True)
class Reference:
    """A loop in plain torch, or of official code, that a method must agree with.

    Write it from the paper and not from the method: it must not call the functions it is there to test.

    Args:
        loop: Trains the module of a :class:`Task` and leaves in it the weights with which its layers compute in the end. It
            may return the module's own loss at every step, to be compared too.
        method: Makes the method that the loop stands for; ``None`` is the tester's first configuration.
        style: Class of the module; ``None`` is the one that most checks of the tester train.
        optimizer: ``"adam"`` or ``"sgd"``.
        tolerance: Largest difference of a weight or a loss that counts as rounding; 0 asks for equal bits.
    """

    loop: Callable[[Task], Sequence[float] | None]
    method: Factory | None = None
    style: type[Plain] | None = None
    optimizer: str = "adam"
    tolerance: float = 1e-5

    def __str__(self) -> str:
        loop = getattr(self.loop, "func", self.loop)
        return f"{getattr(loop, '__name__', loop)} {'' if self.method is None else self.method()!r:.60}".strip()


class ReferenceChecks(SharedRuns):
    """Loops by hand and the method, from one seed over the same batches."""

    references: ClassVar[Sequence[Reference]] = ()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run the check for every loop by hand."""
        super().pytest_generate_tests(metafunc)
        if "by_hand" in metafunc.fixturenames:
            nothing: Any = pytest.param(None, marks=pytest.mark.skip(reason="no loop by hand is named in references"))
            metafunc.parametrize("by_hand", self.references or [nothing], ids=str)

    def test_agrees_with_a_loop_by_hand(self, by_hand: Reference) -> None:
        seed_all(0)
        module = (by_hand.style or self.style)(by_hand.optimizer)
        expected = by_hand.loop(Task(module.train(), module.configure_optimizers(), [list(loader())] * EPOCHS))
        run = self._trained_as(by_hand, [(by_hand.method or self.methods[0])()])
        name, error = farthest(run, module)
        assert error <= by_hand.tolerance, f"{name} differs from that of a loop by hand by {error:.3g} ({by_hand})"
        if expected is not None:
            error = max(abs(a - b) for a, b in zip(run.losses, expected, strict=True))
            assert error <= by_hand.tolerance, f"losses differ from those of a loop by hand by {error:.3g} ({by_hand})"
        _, moved = farthest(self._trained_as(by_hand, []), module)
        assert moved > 10 * by_hand.tolerance, (
            f"a training without the method ends as near the loop by hand ({moved:.3g}), which therefore proves nothing "
            f"({by_hand}): give the method a configuration that acts"
        )

    def _trained_as(self, by_hand: Reference, methods: Sequence[Any]) -> Fit:
        return fit(methods, style=by_hand.style or self.style, optimizer=by_hand.optimizer, max_epochs=EPOCHS)


def farthest(run: Fit, module: Plain) -> tuple[str, float]:
    """Find the tensor of a trained module that is farthest from its namesake in another, and say how far.

    Without a namesake of its shape a tensor is infinitely far.
    """
    ours, theirs = run.module.state_dict(), module.state_dict()
    errors = dict.fromkeys({**ours, **theirs}, torch.inf)
    for name in ours.keys() & theirs.keys():
        if ours[name].shape == theirs[name].shape:
            errors[name] = float((ours[name].double() - theirs[name].double()).abs().max().nan_to_num(nan=torch.inf))
    return max(errors.items(), key=lambda item: item[1])
