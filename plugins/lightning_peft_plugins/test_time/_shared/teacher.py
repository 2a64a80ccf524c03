"""A teacher that follows the network as its moving average: what CoTTA and RMT share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.called_with import call_with
from lightning_peft.network.targets import TargetSpec
from lightning_peft_plugins.test_time._shared.descent import fine_copy
from lightning_peft_plugins.test_time._shared.views import ViewMethod


class TeacherMethod(ViewMethod):
    """Base of the methods that train the whole network towards its own moving average.

    Args:
        teacher_momentum: Share of the teacher that stays at every step.
        targets: Layers whose parameters move; ``None`` is the weights and biases of the whole module, as in the official codes:
            no class token, no embedding of positions.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.views.ViewMethod`.

    Attributes:
        teacher: Its parameters, by qualified name in the user's module; all others are the network's.
    """

    def __init__(self, *, teacher_momentum: float = 0.999, targets: TargetSpec | None = None, **kwargs: Any) -> None:
        super().__init__(targets=targets, **kwargs)
        self.teacher_momentum = teacher_momentum
        self.teacher: dict[str, Tensor] = {}

    def claims(self, module: nn.Module) -> Iterable[str]:
        found = list(super().claims(module))
        if self.targets is not None:
            return found
        return [name for name in found if name.rpartition(".")[2] in ("weight", "bias")] or found

    def adapt_start(self, run: Run) -> None:
        prefix = f"{run.network_name}." if run.network_name else ""
        self._inner_name = lambda name: name.removeprefix(prefix)
        super().adapt_start(run)

    def predict_with(self, call: Call, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits of a call with other values for the parameters that move."""
        assert self.run is not None
        named = {self._inner_name(name): value.to(self.source[name].dtype) for name, value in weights.items()}
        return self.logits(call_with(self.run.network, named, call.args, call.kwargs))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher towards the network."""
        for name, parameter in self.parameters.items():
            self.teacher[name].lerp_(parameter.to(self.teacher[name].dtype), 1 - self.teacher_momentum)

    def forget(self) -> None:
        self.teacher = fine_copy(self.source)
        super().forget()

    @torch.no_grad()
    def leave(self) -> None:
        super().leave()
        for name, value in self.teacher.items():
            self.parameters[name].copy_(value)

    def release(self) -> None:
        super().release()
        self.teacher = {}
