"""IncreLoRA: ranks that grow where they matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.arguments import decay, positive
from lightning_peft.compose.schedule import parse_point
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, fields, tensor, whole
from lightning_peft.weights.shards import read_whole
from lightning_peft_plugins.deltas._increlora.growing_form import GrowingForm
from lightning_peft_plugins.deltas._increlora.scored_part import ScoredPart
from lightning_peft_plugins.deltas._shared.growing_ranks import GrowingRanks
from lightning_peft_plugins.deltas._shared.orthogonality import orthogonality


class IncreLoRA(GrowingRanks):
    """IncreLoRA (Zhang et al. 2023): every weight begins with few triplets, and those that matter most get more.

    The next triplets of every weight learn in advance: their vectors are trained with a value of 1e-5 between them, which is
    trained too from when they count. There is room for ``most`` triplets of every weight from the start.

    Args:
        rank: Triplets of every weight at first.
        target: Triplets of a weight in the end, on average over the weights.
        alpha: Numerator of the scale, of which the present rank is the denominator; ``target`` by default.
        increment: Triplets that a weight gets at a time; half of ``target`` by default.
        top: Weights that get some at a time.
        warmup: After how long the first ones come: steps, ``"10%"`` or ``"1ep"``.
        every: Length between growths, written likewise; by default what brings the last one to half of the training.
        most: Largest rank of a weight; four times ``target`` by default.
        beta1: Decay of the average of a weight's score.
        beta2: Decay of the average of its uncertainty.
        gamma: Weight of the penalty that holds the vectors near orthonormal ones.
        rescale: Let a weight compute what it did when it grows; its product is divided by a larger rank from then on.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: A number out of range, or ``every`` is not given in a training without a known end.

    Example:
        >>> IncreLoRA(target=4).increment
        2
    """

    slots = Slots(form=("triplet",), control=("increlora",))
    kind = GrowingForm
    part = ScoredPart
    parts = (ScoredPart,)
    paper = (
        "Zhang et al., IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning, 2023, "
        "arXiv 2308.12043"
    )

    def __init__(
        self,
        rank: int = 1,
        target: int = 2,
        alpha: float | None = None,
        increment: int | None = None,
        top: int = 2,
        warmup: float | str = "10%",
        every: float | str | None = None,
        most: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        gamma: float = 0.1,
        rescale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, target, alpha, increment, warmup, most, gamma, rescale, **kwargs)
        decay("beta1", beta1)
        decay("beta2", beta2)
        positive("top", top)
        self.top, self.every = top, None if every is None else parse_point(every)
        self.beta1, self.beta2 = beta1, beta2
        self._scores, self._gaps = torch.zeros(0), torch.zeros(0)

    def arguments(self, place: Place) -> dict[str, Any]:
        given = super().arguments(place)
        return given | {"blocks": given["blocks"] + 1}  # one more, to be in reserve behind the last

    def start(self, run: Run) -> None:
        """Place the growths in the training."""
        super().start(run)
        if self.every is not None:
            self._length = max(1, run.place(self.every, "every="))
        else:
            rounds = -(-len(self._forms) * (self.target - self.rank) // (self.top * self.increment))
            self._length = max(1, (run.total_steps // 2 - self._first) // rounds)

    def _find_forms(self, module: nn.Module) -> None:
        super()._find_forms(module)
        if len(self._scores) != len(self._forms):
            self._scores, self._gaps = torch.zeros(len(self._forms)), torch.zeros(len(self._forms))
        for form in self._forms.values():
            form.watched = self._missing >= self.increment

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Go on with the weights there are now. Their scores are compared, so those of all are found anew."""
        self._scores = torch.zeros(0)
        self._find_forms(module)
        if self._missing >= self.increment and self.steps:
            for form in self._forms.values():
                form.reserve()

    def gap(self) -> Tensor:
        gaps, count = zip(*map(_penalty, self._forms.values()), strict=True)
        return torch.stack(gaps).sum() / sum(count)

    def consider(self, run: Run) -> None:
        """See how much the weights matter, and let the best grow when the time has come; before the step, as the authors do."""
        if run.step == 0:
            for form in self._forms.values():
                form.reserve()
        due = self.due(run.step)
        self._see(run)
        if due:
            self.grow((self._scores * self._gaps).tolist(), self.top, run.step)

    def _see(self, run: Run) -> None:
        """Take the scores of the step in."""
        first = next(iter(self._forms.values())).values[0]
        none = torch.zeros((), dtype=first.dtype, device=first.device)
        now = torch.stack([none if form.score is None else form.score for form in self._forms.values()])
        for form in self._forms.values():
            form.score = None
        now = run.trainer.strategy.reduce(now, reduce_op="mean")  # type: ignore[assignment]
        if (scaler := run.gradient_scaler) is not None:
            now = now / scaler.get_scale()
        self._scores = torch.lerp(now, self._scores.to(now), self.beta1)
        self._gaps = torch.lerp((now - self._scores).abs(), self._gaps.to(now), self.beta2)

    def finish(self, run: Run) -> None:
        """Let go of the forms."""
        for form in self._forms.values():
            form.watched, form.score = False, None
        super().finish(run)

    def state(self) -> dict[str, Any]:
        """What was seen of the weights; the blocks that count are with the forms."""
        return {"scores": self._scores, "gaps": self._gaps, "grown_at": self._grown_at}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"scores": tensor(), "gaps": tensor(), "grown_at": whole()})

    def load_state(self, state: dict[str, Any]) -> None:
        self._scores, self._gaps, self._grown_at = state["scores"], state["gaps"], state["grown_at"]


def _penalty(form: GrowingForm) -> tuple[Tensor, int]:
    """Distance of the vectors from orthonormal ones, of the first block together and of others one by one, and their number."""
    with read_whole(form):
        downs, ups = form.blocks_of(form.down), form.blocks_of(form.up)
    gap, matrices = orthogonality(downs[0]) + orthogonality(ups[0].mT), downs[0][..., 0, 0].numel()
    if (others := form.used - 1) > 0:
        down, up = torch.cat(downs[1:], -2), torch.cat(ups[1:], -1)
        gap = gap + (down.square().sum(-1) - 1).abs().sum() + (up.square().sum(-2) - 1).abs().sum()
    return gap, 2 * matrices * (1 + others * form.increment)
