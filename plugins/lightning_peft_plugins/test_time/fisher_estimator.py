"""Fisher information of the trained network, taken where the clean data is: at the end of a fit, or in a validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.network.batches import batch_size
from lightning_peft.network.layers import parameter_names
from lightning_peft.network.targets import TargetSpec
from lightning_peft.structure.forms import Form, fields, tensors_like
from lightning_peft.weights.fisher import diagonal_fisher
from lightning_peft_plugins.test_time._shared.batch_statistics import UseBatchStatistics, batch_norms

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

    def claims(self, module: nn.Module) -> Iterable[str]:
        return []

    def epoch_end(self, run: Run) -> None:
        if not _is_last(run):
            return
        loaders = run.trainer.val_dataloaders if self.data == "val" else run.trainer.train_dataloader
        if loaders is None:
            raise MisconfigurationException(
                f'FisherEstimator(data={self.data!r}) finds no such dataloader. Give the Trainer one, or use data="train".'
            )
        self._estimate(run, loaders)

    def awaited(self, run: Run) -> Iterator[str]:
        """The estimate."""
        if not self.scores:
            yield "its estimate at the end of the last epoch"

    def validation_end(self, run: Run) -> None:
        """Score in a validation on its own, unless a checkpoint brought scores."""
        if run.trainer.state.fn == TrainerFn.VALIDATING and not self.scores:
            with torch.inference_mode(False):
                self._estimate(run, run.trainer.val_dataloaders)

    def _estimate(self, run: Run, loaders: Any) -> None:
        names = parameter_names(self.select(run.module))
        ranks = run.trainer.world_size
        samples = -(-self.samples // ranks)
        own = network_fisher(run, names, first_loader(loaders), samples, self.convention, self.statistics)
        # Every rank reads its own share of the data.
        scores = {name: run.trainer.strategy.reduce(score, reduce_op="mean") for name, score in own.items()}
        if all(score.isfinite().all() for score in scores.values()):
            self.scores = scores
        else:
            rank_zero_warn(
                f"{self.name} scored nothing after step {run.step}: the gradients of the network are NaN or infinite."
            )

    def state(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"scores": tensors_like(tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self.scores = dict(state["scores"])


def _is_last(run: Run) -> bool:
    trainer = run.trainer
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else float("inf")
    # As Lightning counts: all optimizers, when the module optimises by hand.
    return trainer.should_stop or run.epoch + 1 >= epochs or 0 <= trainer.max_steps <= trainer.global_step


def network_fisher(
    run: Run, names: Iterable[str], batches: Iterable[Any], samples: int, convention: Convention, statistics: str
) -> dict[str, Tensor]:
    """Diagonal Fisher information of named parameters, from the first batches that hold so many samples.

    Args:
        run: The run, with its network.
        names: Qualified names in the user's module.
        batches: Batches as the network takes them.
        samples: Samples to score.
        convention: As in :func:`lightning_peft.functional.diagonal_fisher`.
        statistics: ``"batch"`` or ``"source"``, what BatchNorm layers normalise with.

    Returns:
        Qualified name to scores of the parameter's shape.
    """
    prefix = f"{run.network_name}." if run.network_name else ""
    layers = batch_norms(run.network).values() if statistics == "batch" else ()
    batch_statistics = UseBatchStatistics(layers)
    try:
        scores = diagonal_fisher(
            run.network,
            _first(batches, samples),
            convention=convention,
            parameters=[name.removeprefix(prefix) for name in names],
        )
    finally:
        batch_statistics.restore()
    return {prefix + name: score for name, score in scores.items()}


def first_loader(loaders: Any) -> Iterable[Any]:
    """The first of several dataloaders."""
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def _first(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        yield batch
        seen += batch_size(batch)
        if seen >= samples:
            return
