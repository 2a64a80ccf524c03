"""Fisher information of the trained network, taken where the clean data is: at the end of a fit, or in a validation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.capture.once_more import RandomState
from lightning_peft.capture.shim import Shim
from lightning_peft.capture.step_calls import FirstCall, StepName, step_calls
from lightning_peft.network.layers import parameter_names
from lightning_peft.network.targets import TargetSpec
from lightning_peft.structure.forms import Form, fields, tensors_like
from lightning_peft.weights.fisher import diagonal_fisher
from lightning_peft_plugins.test_time._shared.batch_statistics import UseBatchStatistics, batch_norms
from lightning_peft_plugins.test_time._shared.finite_samples import sound_rows
from lightning_peft_plugins.test_time._shared.source_calls import source_calls

Convention = Literal["batch", "sample", "expected"]


class FisherEstimator(Method):
    """Estimates at the end of a fit how much each norm parameter matters to the trained network, for :class:`EATA`.

    The scores travel in the checkpoint, so that a later ``trainer.test(ckpt_path=...)`` with ``EATA()`` needs no clean data.
    For a network that is trained already, ``trainer.validate`` on clean data does the same. Several ranks score together.

    Args:
        data: ``"val"`` or ``"train"``: whose batches are scored.
        samples: How many samples are scored, over all ranks.
        convention: As in :func:`lightning_peft.functional.diagonal_fisher`; ``"batch"`` is that of EATA's official code.
        statistics: ``"batch"``: BatchNorm layers normalise with each batch's statistics, as they do during adaptation.
        targets: Layers whose parameters are scored.
        exclude: Layers to leave out.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Example:
        >>> FisherEstimator(samples=500).samples
        500
    """

    lane = Lane.REPORT
    reads = frozenset({Resource.LOGITS})
    paper = "Niu et al.: Efficient Test-Time Model Adaptation without Forgetting, ICML 2022, https://arxiv.org/abs/2204.02610"

    def __init__(
        self,
        data: Literal["val", "train"] = "val",
        samples: int = 2000,
        convention: Convention = "batch",
        statistics: Literal["batch", "source"] = "batch",
        targets: TargetSpec = "norm",
        exclude: TargetSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        if data not in ("val", "train"):
            raise MisconfigurationException(f'data={data!r} is neither "val" nor "train".')
        self.data, self.samples, self.convention, self.statistics = data, samples, convention, statistics
        self.scores: dict[str, Tensor] = {}
        self._scored: weakref.ref[nn.Module] | None = None
        self._watch: Shim | None = None

    def claims(self, module: nn.Module) -> Iterable[str]:
        return []

    def attach(self, module: nn.Module) -> None:
        if self.run is not None and self.run.trainer.state.fn == TrainerFn.FITTING:
            self._watch = Shim(module, self._step, self._try_out, traced=False).install()

    @property
    def _step(self) -> StepName:
        return "validation_step" if self.data == "val" else "training_step"

    def start(self, run: Run) -> None:
        if self.data == "val" and not run.trainer.enable_validation:
            raise MisconfigurationException(
                'FisherEstimator(data="val") scores the validation data at the end of the fit, and this fit has none. Give the '
                'Trainer a validation loader (and the module a validation_step), or use data="train".'
            )
        if self.data == "val" and not run.trainer.num_sanity_val_steps:
            batches = few_samples(_validation_loader(run))
            for call in step_calls(run.trainer, run.module, run.network, run.network_name, batches, [self._step]):
                self._unwatch()
                self._check(call)

    def _try_out(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Score a sample of the first step, so that what cannot be scored is known before the fit, not at its end."""
        run = self.run
        assert run is not None
        self._unwatch()
        calls = FirstCall(run.network, run.network_name)
        with calls.open(leave=False):
            output = inner(*args, **kwargs)
        self._check(calls.first(self._step))
        return output

    def _check(self, call: Call) -> None:
        assert self.run is not None
        names = parameter_names(self.select(self.run.module))
        with RandomState().again(), torch.autocast(self.run.module.device.type, enabled=False):
            call_fisher(self.run, names, [call.take(slice(0, 1))], 1, self.convention, self.statistics)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def finish(self, run: Run) -> None:
        self._unwatch()

    def epoch_end(self, run: Run) -> None:
        if _is_last(run):
            self._estimate(run)

    def awaited(self, run: Run) -> Iterator[str]:
        """The estimate."""
        if not self.scores:
            yield "its estimate at the end of the last epoch"

    def validation_end(self, run: Run) -> None:
        """Score in a validation on its own, unless a checkpoint brought scores or this module has some."""
        if run.trainer.state.fn != TrainerFn.VALIDATING:
            return
        if self.scores and self._scored is None:  # from a checkpoint
            self._scored = weakref.ref(run.module)
        if self._scored is None or self._scored() is not run.module:
            with torch.inference_mode(False):
                self._estimate(run)

    def _estimate(self, run: Run) -> None:
        validation = self.data == "val" or run.trainer.state.fn == TrainerFn.VALIDATING
        step: StepName = "validation_step" if validation else "training_step"
        loader = _validation_loader(run) if validation else _combined(run)
        calls = step_calls(run.trainer, run.module, run.network, run.network_name, loader, [step])
        names = parameter_names(self.select(run.module))
        ranks = run.trainer.world_size
        samples = -(-self.samples // ranks)
        own = call_fisher(run, names, calls, samples, self.convention, self.statistics)
        # Every rank reads its own share of the data.
        scores = {name: run.trainer.strategy.reduce(score, reduce_op="mean") for name, score in own.items()}
        if all(score.isfinite().all() for score in scores.values()):
            self.scores, self._scored = scores, weakref.ref(run.module)
        else:
            rank_zero_warn(
                f"{self.name} scored nothing after step {run.step}: the gradients of the network are NaN or infinite."
            )

    def state(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"scores": tensors_like(tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self.scores, self._scored = dict(state["scores"]), None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_scored": None, "_watch": None}


def _is_last(run: Run) -> bool:
    trainer = run.trainer
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else float("inf")
    # As Lightning counts: all optimizers, when the module optimises by hand.
    return trainer.should_stop or run.epoch + 1 >= epochs or 0 <= trainer.max_steps <= trainer.global_step


def network_fisher(
    run: Run, names: Iterable[str], batches: Iterable[Any], samples: int, convention: Convention, statistics: str
) -> dict[str, Tensor]:
    """Diagonal Fisher information of named parameters during an evaluation, from the first batches that hold so many samples.

    Args:
        run: The run, with its network.
        names: Qualified names in the user's module.
        batches: Batches as the user's step takes them: that of the evaluation, or another that takes them.
        samples: Samples to score.
        convention: As in :func:`lightning_peft.functional.diagonal_fisher`.
        statistics: ``"batch"`` or ``"source"``, what BatchNorm layers normalise with.

    Returns:
        Qualified name to scores of the parameter's shape.
    """
    return call_fisher(run, names, source_calls(run, batches), samples, convention, statistics)


def call_fisher(
    run: Run, names: Iterable[str], calls: Iterable[Call], samples: int, convention: Convention, statistics: str
) -> dict[str, Tensor]:
    """The same from calls of the network."""
    prefix = f"{run.network_name}." if run.network_name else ""
    layers = batch_norms(run.network).values() if statistics == "batch" else ()
    batch_statistics = UseBatchStatistics(layers)
    try:
        scores = diagonal_fisher(
            run.network,
            _first(calls, samples),
            convention=convention,
            parameters=[name.removeprefix(prefix) for name in names],
            forward=lambda network, call: network(*call[0], **call[1]),
        )
    finally:
        batch_statistics.restore()
    return {prefix + name: score for name, score in scores.items()}


def _validation_loader(run: Run) -> Iterable[Any]:
    """The first validation loader, made now if no validation has come by: a resumed fit need not begin with one."""
    if run.trainer.val_dataloaders is None:
        run.trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return first_loader(run.trainer.val_dataloaders)


def first_loader(loaders: Any) -> Iterable[Any]:
    """The first of several dataloaders, however they are held."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def few_samples(loader: Any) -> list[Any]:
    """A small batch of a loader that is not iterated for it; none where that cannot be had."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return []
    with RandomState().again():
        try:
            dataset: Any = loader.dataset
            first = dataset[0] if loader.batch_size is None and loader.batch_sampler is None else [dataset[0], dataset[1]]
            return [loader.collate_fn(first)]
        except (LookupError, TypeError):  # datasets that are asked by other keys
            return []


def _combined(run: Run) -> Iterator[Any]:
    """Batches of the training loaders, combined as the fit combines them."""
    fitted = run.trainer.fit_loop._combined_loader
    assert fitted is not None
    fresh = CombinedLoader(fitted.iterables, fitted._mode)
    return (batch for batch, *_ in fresh)


def _first(calls: Iterable[Call], samples: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the first calls that hold so many samples, without samples that are NaN or infinite."""
    seen = 0
    for call in calls:
        rows = sound_rows(call)
        if len(rows):
            call = call.take(rows)
            yield call.args, call.kwargs
            seen += call.size
        if seen >= samples:
            return
