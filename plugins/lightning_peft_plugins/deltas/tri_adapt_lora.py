"""TriAdaptLoRA: ranks that grow where the middle of the product has grown most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_peft import Run
from lightning_peft.arguments import one_of
from lightning_peft.compose.schedule import parse_point
from lightning_peft.deltas.slots import Slots
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, fields, tensor, whole
from lightning_peft.weights.shards import read_whole
from lightning_peft_plugins.deltas._shared.growing_ranks import GrowingRanks
from lightning_peft_plugins.deltas._shared.orthogonality import orthogonality
from lightning_peft_plugins.deltas._tri_adapt_lora.triangular_form import TriangularForm


class TriAdaptLoRA(GrowingRanks):
    """TriAdaptLoRA (Liang et al., 2025): products ``B (C A)``, whose ``C`` is larger where it has gained most.

    ``C`` is a lower and an upper triangle of blocks, and grows by a border. How many weights grow at a time is a share of the
    ranks that are missing, which rises over the training. There is room for a rank of ``most`` from the start.

    Args:
        rank: Rank of every weight at first.
        target: Rank of a weight in the end, on average over the weights.
        alpha: Numerator of the scale, of which the present rank is the denominator; ``target`` by default.
        increment: What a weight gains at a time; half of ``target`` by default.
        growth: How the number of weights that grow rises: ``"linear"``, the missing ranks times the share of the training that
            has passed, or ``"exponential"``, the missing ranks to the power of it. One weight grows at least.
        warmup: After how long the first growth may come: steps, ``"10%"`` or ``"1ep"``. The share begins there.
        every: Length between growths, written likewise.
        end: When the share is one.
        most: Largest rank of a weight; four times ``target`` by default.
        gamma: Weight of the penalty that holds ``A`` and ``B`` near orthonormal ones.
        rescale: Let a weight compute what it did when it grows; its product is divided by a larger rank from then on.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: A number out of range, or a length that is a part of a training without a known end.

    Example:
        >>> TriAdaptLoRA(target=6).increment
        3
    """

    slots = Slots(form=("triangular",), control=("triadaptlora",))
    kind = TriangularForm
    paper = (
        "Liang et al., TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient "
        "Fine-Tuning, 2025, arXiv 2501.08008"
    )

    def __init__(
        self,
        rank: int = 1,
        target: int = 8,
        alpha: float | None = None,
        increment: int | None = None,
        growth: Literal["linear", "exponential"] = "linear",
        warmup: float | str = 0,
        every: float | str = "5%",
        end: float | str = "100%",
        most: int | None = None,
        gamma: float = 0.5,
        rescale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, target, alpha, increment, warmup, most, gamma, rescale, **kwargs)
        one_of("growth", growth, ("linear", "exponential"))
        self.growth, self.every, self.end = growth, parse_point(every), parse_point(end)
        self._sizes, self._last = torch.zeros(0), 1

    def start(self, run: Run) -> None:
        """Place the growths in the training; weights are judged by what they gain from here on."""
        super().start(run)
        self._length, self._last = max(1, run.place(self.every, "every=")), run.place(self.end, "end=")
        if self._last <= self._first:
            raise MisconfigurationException(
                f"warmup= ends at step {self._first}, and end= is step {self._last}. Give a later end=, or an earlier warmup=."
            )
        if len(self._sizes) != len(self._forms):
            self._sizes = self._present()

    @torch.no_grad()
    def _present(self) -> Tensor:
        found = []
        for form in self._forms.values():
            with read_whole(form):
                found.append(form.size())
        return torch.stack(found)

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Go on with the weights there are now, judged by what they gain from here on."""
        self._find_forms(module)
        self._sizes = self._present()

    def gap(self) -> Tensor:
        gaps, matrices = [], 0
        for form in self._forms.values():
            with read_whole(form):
                down, up = form.joined()
            gaps.append(orthogonality(down) + orthogonality(up.mT))
            matrices += down[..., 0, 0].numel()
        return torch.stack(gaps).sum() / (2 * matrices)

    def consider(self, run: Run) -> None:
        """Let those grow whose ``C`` has gained most since the last growth."""
        if not self.due(run.step):
            return
        before, self._sizes = self._sizes, self._present()
        share = min(1.0, (run.step - self._first) / (self._last - self._first))
        count = growing(self._missing, share, self.growth == "exponential")
        self.grow((self._sizes - before.to(self._sizes)).tolist(), count, run.step)

    def state(self) -> dict[str, Any]:
        """What the weights had gained at the last growth; the blocks that count are with the forms."""
        return {"sizes": self._sizes, "grown_at": self._grown_at}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"sizes": tensor(), "grown_at": whole()})

    def load_state(self, state: dict[str, Any]) -> None:
        self._sizes, self._grown_at = state["sizes"], state["grown_at"]


def growing(missing: int, share: float, exponential: bool = False) -> int:
    """How many weights grow at a time, at least one.

    Args:
        missing: Ranks that are still to come, over all weights.
        share: Share of the training that has passed, 0 to 1.
        exponential: Take ``missing`` to the power of the share, and not the product of both.

    Example:
        >>> growing(64, 0.25), growing(64, 0.5, exponential=True), growing(64, 0.0)
        (16, 8, 1)
    """
    return max(1, int((missing**share if exponential else missing * share) + 1e-6))
