"""Whether growth left what the network computes what it was, as operators promise that keep the function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_peft import Run
from lightning_peft.capture.once_more import RandomState, attributes_kept, metrics_kept, silent, statistics_kept
from lightning_peft.capture.step_calls import bound_step
from lightning_peft.compose.loss import split_output
from lightning_peft.network.compiled import is_compiled
from lightning_peft.network.modes import modes_kept
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.growth._layer_growth.promise import tensors_in

_SAME = 1e-5  # distance of answers on a device that does not add in the same order each time
_VALUES = 1 << 16  # kept of an output, evenly spaced: logits of a language model can be gigabytes


class KeptFunction:
    """What the network answers in the user's own step on the batch at hand, in evaluation mode, before and after a growth.

    What a block passes on (:class:`~lightning_peft_plugins.growth._layer_growth.promise.Promise`) does not show what forward
    does beside it, once for each block, nor whether a width map is right. The step leaves no trace. Answers that are others
    when they are asked for twice say nothing.

    Args:
        run: The run, between two steps.
        operator: Name of the operator.
    """

    def __init__(self, run: Run, operator: str) -> None:
        self._run, self._operator, self._batch = run, operator, run.batch
        self._random = RandomState()
        first, again = self._answers(), self._answers()
        apart = None if first is None else _apart(first, again)
        self._before = first if apart is not None and apart < _SAME else None
        self._change: float | None = None

    def measure(self) -> None:
        """Ask again, after the growth; whatever came out before, because a step may wait for those of other ranks."""
        after = self._answers()
        self._change = None if self._before is None else _apart(self._before, after)
        self._before = self._batch = None

    def judge(self) -> None:
        """Say by how much the promise was missed."""
        precise = any(bits in str(self._run.trainer.precision) for bits in ("32", "64"))
        if self._change is not None and self._change > (1e-3 if precise else 5e-2):
            rank_zero_warn(
                f"{self._operator!r} promises that the grown network computes what it did, but its answers to a batch, in "
                f"evaluation mode, changed by {self._change:.1%}. Forward may do something once for each block, beside the "
                "blocks; at a width that is no multiple a norm may count units unevenly; or the width map misses something. "
                "Choose 'stack' if that is no matter."
            )

    @torch.no_grad()
    def _answers(self) -> list[Tensor] | None:
        """Outputs of the network and the loss; ``None`` where they cannot be asked without side effects, or at all."""
        module, trainer = self._run.module, self._run.trainer
        mapped = next(mapped_tensors(module), None) is not None  # maps may choose masks anew when the structure changes
        if self._batch is None or not module.automatic_optimization or mapped or is_compiled(module):  # would compile once more
            return None
        found: list[Tensor] = []
        kept = (silent(module), statistics_kept(module), metrics_kept(module), attributes_kept(module), modes_kept(module))
        with ExitStack() as stack:
            for context in (*kept, self._random.again(), trainer.precision_plugin.train_step_context()):
                stack.enter_context(context)
            hook = self._run.network.register_forward_hook(lambda network, inputs, output: found.extend(_kept(output)))
            try:
                return [*found, *_kept(split_output(bound_step(module, "training_step", *self._batch)()))]
            except Exception:  # a step that needs gradients, or one that fails: the training will say so
                return None
            finally:
                hook.remove()


def _kept(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else [output]
    flat = [tensor.detach().flatten() for tensor in tensors_in(list(values))]
    return [tensor[:: max(1, len(tensor) // _VALUES)].double() for tensor in flat]


def _apart(before: Sequence[Tensor], after: Sequence[Tensor] | None) -> float | None:
    """Largest relative distance of answers; ``None`` when they are no such answers."""
    if after is None or [len(tensor) for tensor in before] != [len(tensor) for tensor in after]:
        return None
    tiny = torch.finfo(torch.double).tiny
    apart = [float((b - a).norm() / a.norm().clamp_min(tiny)) for a, b in zip(before, after, strict=True)]
    return max(apart, default=0.0)
