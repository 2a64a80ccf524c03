"""Merging the best checkpoints of a fit when it ends."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_peft.merging import outputs
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.greedy import greedy_soup
from lightning_peft.merging.judge import Judge, state_of
from lightning_peft.merging.merge import merge
from lightning_peft.merging.merge_function import find
from lightning_peft.merging.opening import Source, open_model
from lightning_peft.namespaces import both
from lightning_peft.strategies.support import shards
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.weights.detach import attachments

GREEDY, MERGED = "greedy", "merged.ckpt"


@dataclass(frozen=True)
class MergeResult:
    """What came of a merge at the end of a fit.

    Attributes:
        models: Checkpoints that were merged, the best first.
        score: What the merged model is worth.
        best: What the best of them is worth.
        path: The file of the merged model; ``None`` where it was worth less and nothing was replaced.
    """

    models: tuple[str, ...]
    score: float
    best: float
    path: str | None


class MergeAtEnd(Callback):
    """Merges the best checkpoints of ``ModelCheckpoint`` at the end of ``fit``, and keeps the result if it is no worse.

    The best checkpoint and the merged model are validated, one after the other, by the module's own ``validation_step`` on its
    validation data. If the merged one is worth as much or more, the module holds it after the fit, it is written as
    ``merged.ckpt`` beside the checkpoints, and it is what ``ckpt_path="best"`` means. Else everything stays as it would be
    without this callback, and that is said. Batch norms of the merged model get their statistics from training data first.

    It goes together with the methods of this library: they have left the module by then. A killed fit that is resumed merges
    when it ends, also one that was killed while it merged.

    Args:
        method: Name of a merge function, ``"soup"`` for the mean; or ``"greedy"``, where models join the mean while it gets
            no worse.
        top: How many checkpoints are merged, at most; ``ModelCheckpoint(save_top_k=...)`` must keep as many.
        base: For methods that combine differences: ``"start"``, the weights that the module has before the fit, or a file.
        only_if_better: Whether the merged model must be worth at least what the best checkpoint is. Without it, it is taken
            whatever it is worth.
        norm_batches: Training batches that batch norms are estimated from.
        **options: Of the merge, see :func:`lightning_peft.merge`: ``scale``, ``seed``, and those of the method.

    Attributes:
        result: What came of it; ``None`` before, and where there was nothing to merge.

    Raises:
        MisconfigurationException: ``method`` or an option does not exist, or ``top`` is below 2.

    Example:
        .. code-block:: python

            best = ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=5)
            trainer = Trainer(max_epochs=20, callbacks=[best, MergeAtEnd("greedy", top=5)])
            trainer.fit(module, train_loader, val_loader)
            trainer.test(module, test_loader, ckpt_path="best")
    """

    def __init__(
        self,
        method: str = "soup",
        top: int = 5,
        *,
        base: Source | None = None,
        only_if_better: bool = True,
        norm_batches: int = 100,
        **options: Any,
    ) -> None:
        if top < 2:
            raise MisconfigurationException(f"MergeAtEnd(top={top}) merges nothing: two checkpoints are the least.")
        if method != GREEDY:
            of_merge = ("scale", "seed", "weights", "per_tensor", "dtype")
            function = find(method, {key: value for key, value in options.items() if key not in of_merge})
            if function.of_deltas and base is None:
                raise MisconfigurationException(
                    f'The method {method!r} combines differences to what all checkpoints were trained from. Give base="start", '
                    "for the weights that the module has before the fit, or a file."
                )
        elif options:
            raise MisconfigurationException(f"The method 'greedy' takes no options, so not {', '.join(options)}.")
        self.method, self.top, self.base, self.options = method, top, base, options
        self.only_if_better, self.norm_batches = only_if_better, norm_batches
        self.result: MergeResult | None = None
        self._start: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could not be merged, before the training."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.result = None
        keeper = _keeper(trainer)
        if keeper is None:
            raise MisconfigurationException(
                "MergeAtEnd merges the best checkpoints of a fit, and nothing keeps several of them. Give the Trainer "
                f'ModelCheckpoint(monitor="...", save_top_k={self.top}) with a metric that validation_step logs.'
            )
        if 0 < keeper.save_top_k < self.top:
            raise MisconfigurationException(
                f"MergeAtEnd(top={self.top}) needs {self.top} checkpoints, and ModelCheckpoint(save_top_k={keeper.save_top_k}) "
                f"keeps {keeper.save_top_k}. Raise save_top_k, or lower top."
            )
        if shards(trainer.strategy):
            raise MisconfigurationException(
                "MergeAtEnd does not validate a network whose weights are in shards. Leave it out, and merge afterwards: "
                "lightning_peft.merge(list(checkpoint.best_k_models), out=...)."
            )
        if self.base == "start":
            self._start = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the last word: a Trainer calls ``teardown`` in the order of its list, where methods leave the module."""
        # A new list: Lightning goes through the old one right now.
        others = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge, validate and keep the better one."""
        start, self._start = self._start, {}
        keeper = _keeper(trainer)
        if stage != "fit" or trainer.interrupted or trainer.fast_dev_run or keeper is None:  # type: ignore[attr-defined]
            return
        try:
            self._merge(trainer, pl_module, keeper, start)
        except (MisconfigurationException, CheckpointError, OSError) as error:  # a training is not lost for it
            rank_zero_warn(f"MergeAtEnd has merged nothing, and the module is as the training left it. {error}")

    def _merge(self, trainer: Trainer, module: LightningModule, keeper: ModelCheckpoint, start: Mapping[str, Tensor]) -> None:
        sign = 1 if keeper.mode == "max" else -1
        ranked = sorted(keeper.best_k_models, key=lambda path: -sign * float(keeper.best_k_models[path]))
        paths = trainer.strategy.broadcast([path for path in ranked if Path(path).exists()][: self.top])
        if len(paths) < 2:
            rank_zero_warn(
                f"MergeAtEnd has merged nothing: there are {len(paths)} checkpoints, since validation ran too seldom for more. "
                "Train for more epochs, or set val_check_interval."
            )
            return
        if stays := next(iter(attachments(module)), None):
            raise MergeError(
                f"{stays.method!r} stays on the module (keep=True), so files of ordinary weights do not fit. Merge without "
                "keep=True."
            )
        judge = Judge(trainer, module, str(keeper.monitor), self.norm_batches)
        left = state_of(module)
        try:
            merged = self._merged(judge, paths, start, keeper.mode)
        except BaseException:
            module.load_state_dict(left)
            raise
        good = not self.only_if_better or sign * merged.score >= sign * merged.best
        good = trainer.strategy.broadcast(good)
        module.load_state_dict(merged.state if good else left)
        path = Path(paths[0]).with_name(MERGED)
        if good:
            if trainer.is_global_zero:
                record = {
                    "method": self.method,
                    "options": self.options,
                    "models": merged.models,
                    str(keeper.monitor): merged.score,
                }
                outputs.write(merged.state, open_model(paths[0]), path, record)
            keeper.best_model_path, keeper.best_model_score = str(path), torch.tensor(merged.score)
        trainer.strategy.barrier()
        self.result = MergeResult(merged.models, merged.score, merged.best, str(path) if good else None)
        rank_zero_info(
            f"MergeAtEnd, {self.method} of {len(merged.models)} checkpoints: {keeper.monitor} {merged.score:.4g}, the best of "
            f"them {merged.best:.4g}. "
            + (f"The module holds the merged weights, and so does {path}." if good else "The module is as training left it.")
        )

    def _merged(self, judge: Judge, paths: list[str], start: Mapping[str, Tensor], mode: str) -> _Merged:
        """Merge checkpoints, and find what they and the merged model are worth."""
        if self.method == GREEDY:
            scores = [judge.alone(path) for path in paths]
            soup = greedy_soup(paths, judge, mode=mode, scores=scores)  # type: ignore[arg-type]
            taken = tuple(paths[place] for place in soup.taken)
            state = judge.ready(soup.state_dict) if len(taken) > 1 else soup.state_dict
            return _Merged(state, soup.score, scores[soup.taken[0]], taken)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Running statistics")  # the judge estimates them again
            base = start if self.base == "start" else self.base
            merged = merge(list(paths), self.method, base=base, **self.options)
        best = judge.alone(paths[0])
        score = judge(merged)
        return _Merged(state_of(judge.module), score, best, tuple(paths))


@dataclass(frozen=True)
class _Merged:
    state: dict[str, Any]
    score: float
    best: float
    models: tuple[str, ...]


def _keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps several checkpoints by what they are worth."""
    listed = [each for each in trainer.checkpoint_callbacks if isinstance(each, both(ModelCheckpoint))]
    return next((each for each in listed if each.monitor is not None and each.save_top_k not in (0, 1)), None)
