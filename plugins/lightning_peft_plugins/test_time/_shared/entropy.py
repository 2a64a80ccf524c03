"""Entropy minimisation on chosen samples, with no more backward passes than they need: the base of Tent, ETA, EATA and DeYO."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Run
from lightning_peft.arguments import one_of, positive
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import separable, take
from lightning_peft_plugins.test_time._shared.costs import Costs, Way, candidates
from lightning_peft_plugins.test_time._shared.descent import DescentMethod
from lightning_peft_plugins.test_time._shared.independence import Comparison, compare_parts
from lightning_peft_plugins.test_time._shared.padding import attention_mask
from lightning_peft_plugins.test_time._shared.walks import Walk, Walker
from lightning_peft_plugins.test_time._shared.ways import Ways
from lightning_peft_plugins.test_time._shared.window import Window
from lightning_peft_plugins.test_time._shared.workers import fits
from lightning_peft_plugins.test_time.functional.predictions import softmax_entropy

Backward: TypeAlias = Literal["auto", "whole", "chunks", "second-pass"]
_log = logging.getLogger(__name__)
BACKWARDS = ("auto", "whole", "chunks", "second-pass")


class EntropyMethod(DescentMethod):
    """Minimises the weighted mean entropy of the predictions it chooses.

    Subclasses write :meth:`weigh`, and :meth:`settle` when the choice depends on the past.

    The official codes build a graph of the whole batch and walk back through all of it, also for the samples that were not
    chosen. Where samples do not depend on each other (no batch statistics) there are cheaper ways to the same update:
    ``"chunks"`` runs the batch in small parts and walks back only through parts with a chosen sample, several parts at a time,
    each on one core, where that is safe (see :func:`~lightning_peft_plugins.test_time._shared.workers.fits`);
    ``"second-pass"`` predicts without a graph and runs the chosen samples again with one. Before either, parts of a batch are
    compared with the whole, once; where they differ by more than rounding, ``"auto"`` takes batches whole and the others are
    refused. ``"auto"`` times the ways on the first batches, with several sizes of chunks, and takes what is cheapest for the
    share of samples chosen of late; what it learnt holds for later evaluations of a network of the same shape. With BatchNorm
    on batch statistics all this is ``"whole"``.

    Args:
        backward: ``"whole"``, ``"chunks"``, ``"second-pass"`` or ``"auto"``.
        chunk_size: Samples in a chunk; ``None`` tries several if ``backward="auto"``, and is 1 otherwise.
        window: For streams that come one by one: adapt to the last so many samples, each time that so many new ones have come.
            In between, BatchNorm layers on batch statistics take them from the window.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.descent.DescentMethod`.

    Attributes:
        weighs_in_threads: Whether :meth:`weigh` may be called for parts of a batch in any order and at the same time: it
            changes nothing and draws no random numbers. A subclass says so to have chunks side by side.
        way: What the last batch was run with.
    """

    weighs_in_threads = False

    def __init__(self, *, backward: Backward = "auto", chunk_size: int | None = None, window: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of("backward", backward, BACKWARDS)
        if chunk_size is not None:
            positive("chunk_size", chunk_size)
        if window < 0:
            raise MisconfigurationException(f"window={window!r} is negative; 0 means that batches are taken as they come.")
        self.backward, self.chunk_size = backward, chunk_size
        self._window = Window(window) if window else None
        self._costs = Costs([])
        self._costs_hold_for: Any = None
        self._ways: Ways | None = None

    # What an author overrides.

    def weigh(self, call: Call, logits: Tensor, entropy: Tensor) -> Tensor:
        """Weigh every prediction; 0 leaves it out.

        Args:
            call: The samples; may run the network again.
            logits: Shape ``(samples, positions, classes)``; one position for plain classification.
            entropy: Shape ``(samples, positions)``.

        Returns:
            Weights, shape ``(samples, positions)``, without a graph.
        """
        return torch.ones_like(entropy)

    def settle(self, chosen: Tensor) -> None:
        """Take note of the probabilities of the predictions chosen in a batch, shape ``(chosen, classes)``."""

    def add_penalty(self) -> None:
        """Add the gradient of a penalty to the gradients of the entropy."""

    # The update.

    def update(self, call: Call) -> Any:
        if self._window is None:
            return super().update(call)
        crowd = self._window.extend(call)
        if self._window.take_turn():
            output = super().update(crowd)
        elif self.independent(crowd):
            return call()
        else:
            with self.predicting():
                output = crowd()
        return take(output, crowd.size, slice(crowd.size - call.size, None))

    def forget(self) -> None:
        if self._window is not None:
            self._window.clear()

    def descend(self, call: Call) -> Any:
        output, count = self.walk(call)
        if count:
            self.add_penalty()
        self.step(count)
        if count:
            self.settle(torch.cat(self._chosen))
        return output

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        self._choices: list[Way] | None = None
        self._comparison: Comparison | None = None
        parameters = list(self.parameters.values())
        self._ways = Ways(Walker(self.predictions, self.weights, parameters, self.independent, self.predicting))

    def release(self) -> None:
        if self._ways is not None:
            self._ways.close()
            self._ways = None
        super().release()

    def walk(self, call: Call) -> tuple[Any, int]:
        """Run the network and leave the gradients of the weighted mean entropy; return its output and how many were chosen."""
        assert self._ways is not None
        way = self.way = self._way(call)
        self._chosen: list[Tensor] = []
        self._loss = torch.zeros(())
        with self._costs.timed(way, call.size) as timing:
            output = self._ways.take(way, call, self._keep)
            count = sum(len(part) for part in self._chosen)
            timing.chosen = min(count, call.size)
            loss = float(self._loss) / max(1, count)
        if count:
            torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], 1.0 / count)
        if way.name == "whole" and any(way.chunk_size for way in self._costs.ways) and not separable(output, call.size):
            self._costs.ways = [way for way in self._costs.ways if not way.chunk_size]
        predicted = self.predictions(output)
        self.note(selected=count / max(1, predicted.shape[0] * predicted.shape[1]), loss=loss)
        return output, count

    def independent(self, call: Call) -> bool:
        """Whether the samples of a call may be run in parts: measured once, on the first batch that can tell."""
        if self.coupled or call.size == 1:
            return False
        if self._comparison is None:
            assert self.run is not None
            found = compare_parts(call, self.predictions, self.run.network)
            if math.isnan(found.difference):
                return False
            self._comparison = found
            if not found.independent:
                self._say_coupled(found)
        return self._comparison.independent

    def _say_coupled(self, found: Comparison) -> None:
        if self.backward in ("chunks", "second-pass"):
            raise MisconfigurationException(
                f'{self.name}: backward="{self.backward}" runs a batch in parts, but its samples cannot be run apart: '
                f'{found.reason}. Take backward="auto", which runs such batches whole.'
            )
        _log.info("%s takes batches whole, because their samples depend on each other: %s.", self.name, found.reason)

    def _way(self, call: Call) -> Way:
        if self.backward == "whole" or not self.independent(call):
            return Way("whole")
        if self._choices is None:
            self._choices = self._find_choices(call)
        return self._choices[0] if len(self._choices) == 1 else self._costs.cheapest()

    def _find_choices(self, call: Call) -> list[Way]:
        """What ``backward`` asks for, as far as it can be had; several ways are to be timed."""
        if self.backward == "second-pass":
            return [Way("second-pass")]
        threads = torch.get_num_threads() if self.weighs_in_threads and fits(call) else 1
        if self.backward != "auto":
            return [Way("workers" if threads > 1 else "chunks", self.chunk_size or 1)]
        choices = candidates(call.size, self.chunk_size, threads)
        shapes = [(name, p.shape) for name, p in self.run.network.named_parameters()] if self.run is not None else []
        key = (choices, shapes, list(self.parameters), torch.get_num_threads())
        if self._costs_hold_for != key:
            self._costs, self._costs_hold_for = Costs(list(choices)), key
        return choices

    def _keep(self, walk: Walk | None) -> None:
        """Add what a walk brought to that of the walks before."""
        if walk is None:
            return
        for parameter, gradient in zip(self.parameters.values(), walk.gradients, strict=True):
            if gradient is not None:  # a copy, because autograd may give one tensor to several
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        self._loss = self._loss.to(walk.loss.device) + walk.loss
        self._chosen.append(walk.chosen)

    def weights(self, call: Call, logits: Tensor) -> Tensor:
        """Weigh every prediction of a call as :meth:`weigh` does; padding and what is not finite count nothing."""
        entropy = softmax_entropy(logits)
        weights = self.weigh(call, logits, entropy)
        mask = attention_mask(call)
        if mask is not None and mask.numel() == weights.numel():  # padding is no prediction, also where tokens are rows
            weights = weights * mask.reshape(weights.shape)
        return torch.where(entropy.isfinite(), weights, 0.0)  # a prediction that is NaN teaches nothing

    def predictions(self, output: Any) -> Tensor:
        """Read logits of shape (samples, positions, classes) out of an output."""
        logits = self.logits(output)
        return logits.flatten(1, -2) if logits.ndim > 2 else logits[:, None]
