"""Shared by all methods of the family: a stream of batches that starts at the source model, and may return to it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.attaching.averaging import swapped_in
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.logits import as_logits, with_logits
from lightning_peft.network.targets import TargetSpec
from lightning_peft.strategies.ranks import of_ranks
from lightning_peft.strategies.support import shards
from lightning_peft_plugins.test_time._shared.finite_samples import suspects_of, without_spoilt_samples
from lightning_peft_plugins.test_time._shared.independence import without_trace
from lightning_peft_plugins.test_time._shared.kept_statistics import KeptStatistics

Reset: TypeAlias = "Literal['never', 'dataloader', 'batch'] | int"


class StreamMethod(Method):
    """Base of the methods that act while a Trainer tests, validates (on its own) or predicts.

    The source model is what the module holds when the evaluation starts. It comes back at every reset and when the evaluation
    ends or fails, unless ``keep`` is set. The validation within a fit is not touched.

    Subclasses write :meth:`update` and :meth:`to_source`.

    Args:
        reset: When to return to the source: ``"never"``, at every new ``"dataloader"``, before every ``"batch"``, or before the
            batch that follows so many updates.
        keep: Leave the module adapted when the evaluation ends, so that it predicts on its own as it did last: BatchNorm layers
            are left the statistics of the last batch, methods with a teacher leave that.
        class_dim: Dimension of the classes in the logits; ``None``: the last, and from four dimensions on (maps of predictions)
            dimension 1.
        targets: Layers to act on.
        exclude: Layers to leave alone.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs.
    """

    lane = Lane.ADAPT
    reads = frozenset({Resource.LOGITS})
    writes = frozenset({Resource.PREDICTIONS})

    def __init__(
        self,
        *,
        reset: Reset = "never",
        keep: bool = False,
        class_dim: int | None = None,
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        if not (reset in ("never", "dataloader", "batch") or (type(reset) is int and reset > 0)):
            raise MisconfigurationException(
                f'reset={reset!r} is not "never", "dataloader", "batch" or a positive number of updates.'
            )
        self.reset, self.keep, self.class_dim = reset, keep, class_dim
        self._adapting = False
        self.kept = KeptStatistics()
        self._batch: dict[str, float] = {}

    def update(self, call: Call) -> Any:
        """Adapt to the samples of a call and return the network's output for them."""
        raise NotImplementedError

    def to_source(self) -> None:
        """Return to the source model and forget what was learnt of the stream."""
        raise NotImplementedError

    def adapt_start(self, run: Run) -> None:
        """Begin a stream; subclasses keep the source here.

        Should this fail half way, :meth:`to_source` and :meth:`release` are called all the same.
        """
        self._adapting = True
        if self.keep and (averaging := swapped_in(run.trainer)):
            raise MisconfigurationException(
                f"{type(averaging[0]).__name__} has put its average into the module for this validation, so {self.name} with "
                "keep=True would adapt the average and lose it. Leave keep=True out, or use trainer.test, which swaps nothing."
            )
        self.updates = self.batches = self._counted = 0
        self.kept = KeptStatistics()
        self._place: tuple[int, int] | None = None
        self._batch = {}

    def adapt(self, call: Call) -> Any:
        """Answer a call of the network: return to the source when it is time, then adapt and predict."""
        place = (call.dataloader_idx, call.batch_idx)
        new_loader = self._place is not None and self._place[0] != place[0]
        new_batch = self._place not in (None, place)
        if (self.reset == "dataloader" and new_loader) or (self.reset == "batch" and new_batch) or (new_batch and self._due()):
            self.to_source()
            self._counted = self.count()
        self.batches += self._place != place
        self._place = place
        self._keep_up(call)
        return without_spoilt_samples(call, self.update, self.logits)

    def _keep_up(self, call: Call) -> None:
        """Run the network to no effect where a process that shares its parameters does so for spoilt samples, and waits."""
        assert self.run is not None
        if shards(self.run.trainer.strategy):
            found = len(suspects_of(call)) > 0
            if any(of_ranks(found)) and not found:
                with without_trace(self.run.network):
                    call()

    def count(self) -> int:
        """What a number given as ``reset`` counts."""
        return self.updates

    def _due(self) -> bool:
        return type(self.reset) is int and self.count() - self._counted >= self.reset

    def finish(self, run: Run) -> None:
        """Give the module back as it was, or adapted."""
        if not self._adapting:
            return
        self._adapting = False
        if self.keep:
            self.leave()
        else:
            self.to_source()
        self.release()

    def leave(self) -> None:
        """Make the module one that predicts, without the method, as it did last; called for ``keep=True``.

        The statistics that BatchNorm layers predicted with are left in any case.
        """
        self.kept.leave()

    def release(self) -> None:
        """Let go of the module; subclasses undo here what is no adaptation."""

    def predicting(self) -> AbstractContextManager[None]:
        """Round a pass whose output is the prediction: a module that is kept normalises as in the last one."""
        return self.kept.predicting() if self.keep else nullcontext()

    def logits(self, output: Any) -> Tensor:
        """Read logits (samples, ..., classes) out of an output.

        Raises:
            MisconfigurationException: There are none, or only one class, whose entropy is always 0.
        """
        found = as_logits(output)
        logits = found.movedim(self._class_dim(found), -1) if found.ndim > 2 else found
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise MisconfigurationException(
                f"{self.name} needs logits of shape (samples, classes) with at least two classes, got {tuple(found.shape)}. "
                "A single sigmoid output has no class distribution to take the entropy of; return two logits."
            )
        return logits

    def with_logits(self, output: Any, logits: Tensor) -> Any:
        """Put logits as :meth:`logits` reads them into an output, in the network's own order of dimensions."""
        return with_logits(output, logits.movedim(-1, self._class_dim(logits)) if logits.ndim > 2 else logits)

    def one_a_sample(self, logits: Tensor, size: int, why: str) -> None:
        """Refuse anything but one prediction a sample.

        Raises:
            MisconfigurationException: There are several, or rows that are no samples.
        """
        if logits.ndim != 2 or len(logits) != size:
            raise MisconfigurationException(
                f"{self.name} needs one prediction a sample, because {why}; of {size} samples it was given logits of shape "
                f"{tuple(logits.shape)}, classes last. Take Tent or ETA for predictions of tokens or pixels."
            )

    def no_layers_to_choose(self, instead: str) -> None:
        """Refuse ``targets`` and ``exclude`` for a method that moves no layer.

        Args:
            instead: What to give, to end a sentence with.

        Raises:
            MisconfigurationException: One of them was given.
        """
        if self.targets is not None or self.exclude is not None:
            raise MisconfigurationException(
                f"{self.name} moves nothing in the network, so there are no layers to choose. Leave targets= and exclude= out; "
                f"{instead}."
            )

    def _class_dim(self, logits: Tensor) -> int:
        return self.class_dim if self.class_dim is not None else 1 if logits.ndim > 3 else -1

    def note(self, **values: float) -> None:
        """Say what happened to a batch, for the log."""
        self._batch = values

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Figures of the last batch."""
        return self._batch
