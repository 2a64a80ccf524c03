"""MEMO: each sample on its own, over many views of it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import detached, join
from lightning_peft.network.targets import TargetSpec
from lightning_peft_plugins.test_time._shared.batch_statistics import BlendStatistics, batch_norms
from lightning_peft_plugins.test_time._shared.views import ViewMethod
from lightning_peft_plugins.test_time.functional.predictions import marginal_entropy


class MEMO(ViewMethod):
    """For every sample: makes views of it, moves all parameters so that their mean prediction is sure, predicts, and returns.

    Samples do not influence each other, so it works for batches of one, and it costs a training step on ``views`` images each.

    Args:
        views: Views of a sample.
        prior: How many samples the source's BatchNorm statistics count against the views as one; ``None``: they count alone.
        episodic: Return to the source after every sample, as published.
        targets: Layers whose parameters move; ``None`` is the whole module.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.views.ViewMethod`.

    Example:
        >>> MEMO(lr=0.005, views=32).views
        32
    """

    paper = (
        "Zhang, Levine, Finn: MEMO: Test Time Robustness via Adaptation and Augmentation, NeurIPS 2022, "
        "https://arxiv.org/abs/2110.09506"
    )

    def __init__(
        self,
        *,
        momentum: float = 0.0,
        views: int = 64,
        prior: float | None = 16.0,
        episodic: bool = True,
        statistics: Literal["source"] = "source",
        targets: TargetSpec | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(momentum=momentum, statistics=statistics, targets=targets, **kwargs)
        if views < 1 or statistics != "source" or (prior is not None and prior < 0):
            raise MisconfigurationException(
                f"MEMO takes views > 0 (got {views!r}), prior >= 0 or None (got {prior!r}), and statistics='source' (got "
                f"{statistics!r}): a sample has no batch, its views are blended into the source's statistics by prior."
            )
        if self.keep and episodic:
            raise MisconfigurationException(
                "MEMO(keep=True) has nothing to keep, because it returns to the source after every sample. Pass episodic=False "
                "beside it, or leave keep=True out."
            )
        self.views, self.prior, self.episodic = views, prior, episodic
        self._blend: BlendStatistics | None = None

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        layers = list(batch_norms(run.network).values())
        if self.prior is not None and layers:
            self._blend = BlendStatistics(layers, 1.0 / (self.prior + 1.0), kept=self.kept)

    def update(self, call: Call) -> Any:
        outputs = []
        for index in range(call.size):
            sample = call.take(slice(index, index + 1))
            for _ in range(self.steps_per_batch):
                self.descend(sample)
            with self.predicting():
                outputs.append(detached(sample()))
            if self.episodic:
                self.put_back()
                self.new_optimizer()
        return join(outputs, [1] * call.size)

    def descend(self, call: Call) -> Any:
        crowd = call.take(torch.zeros(self.views, dtype=torch.int64)).with_inputs(self.augment)
        with torch.enable_grad():
            output = crowd()
            logits = self.logits(output)
            self.aligned(crowd, logits)
            if len(logits) != crowd.size:
                self.one_a_sample(logits, crowd.size, "it takes the mean prediction over views of a sample")
            loss = marginal_entropy(logits).mean()
        loss.backward()
        self.note(selected=1.0, loss=float(loss))
        self.step(1)
        return output

    def release(self) -> None:
        super().release()
        if self._blend is not None:
            self._blend.restore()
            self._blend = None
