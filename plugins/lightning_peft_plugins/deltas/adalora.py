"""AdaLoRA: a budget of ranks that moves to the weights where they matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Run, Step
from lightning_peft.arguments import decay, not_negative, positive
from lightning_peft.compose.schedule import ResolvedSchedule, parse_point
from lightning_peft.deltas.slots import Slots
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, dict_of, fields, list_of, tensor, whole
from lightning_peft.weights.shards import spread_as
from lightning_peft_plugins.deltas._adalora.triplet_importance import TripletImportance
from lightning_peft_plugins.deltas._shared.orthogonality import factor_gaps
from lightning_peft_plugins.deltas._shared.scaled_delta import ScaledDelta
from lightning_peft_plugins.deltas._shared.triplet_form import TripletForm

_LEAST = 1e-5  # added to the rank under the scale, as PEFT does


class AdaLoRA(ScaledDelta):
    """AdaLoRA (Zhang et al. 2023): ``B diag(E) A`` with numbers set to zero where a triplet of all weights matters least.

    The budget, triplets over all weights, falls by a cubic schedule from ``rank`` to ``target`` on average. Values that were
    set to zero go on to be trained, and come back if their triplet matters again, until the final choice.

    Args:
        rank: Triplets of every weight at the start.
        target: Triplets of a weight in the end, on average over the weights.
        alpha: Numerator of the scale; the rank by default.
        tinit: Where the budget begins to fall: steps, ``"10%"`` or ``"1ep"``.
        tfinal: How long before the end of training the final choice is made, written likewise.
        every: Optimizer steps between choices.
        beta1: Decay of the average of the sensitivity.
        beta2: Decay of the average of its uncertainty.
        gamma: Weight of the penalty that holds the vectors near orthonormal ones.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: A number out of range, no step between ``tinit`` and ``tfinal``, or a training without a
            known end.

    Example:
        >>> AdaLoRA(rank=12, target=8, tinit="10%", tfinal="30%").target
        8
    """

    slots = Slots(form=("triplet",), control=("adalora",))
    fixed_arguments = frozenset({"scaling"})
    kind = TripletForm
    paper = "Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023, arXiv 2303.10512"

    def __init__(
        self,
        rank: int = 12,
        target: int = 8,
        alpha: float | None = None,
        tinit: float | str = 0,
        tfinal: float | str = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        gamma: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, "rank", **kwargs)
        if not 0 < target <= rank:
            raise MisconfigurationException(f"target={target} must be from 1 to rank={rank}, of which the rest is given away.")
        decay("beta1", beta1)
        decay("beta2", beta2)
        not_negative("gamma", gamma, "Zero leaves the penalty out.")
        positive("every", every)
        self.target, self.every, self.gamma = target, every, gamma
        self.tinit, self.tfinal = parse_point(tinit), parse_point(tfinal)
        self.importance = TripletImportance(beta1, beta2)
        self.budgets: ResolvedSchedule | None = None
        self._kept: dict[str, list[int]] = {}
        self._masks: dict[str, Tensor] = {}
        self._forms: dict[str, TripletForm] = {}
        self._moving: dict[str, TripletForm] = {}
        self._gradient_scale = 1.0

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + _LEAST)

    @property
    def ranks(self) -> dict[str, int]:
        """Triplets that each weight was left in the end, by the name of its tensor; empty before the final choice."""
        return {name: len(kept) for name, kept in self._kept.items()}

    def start(self, run: Run) -> None:
        """Tie the budget to the training."""
        first, last = run.place(self.tinit, "tinit="), run.place_from_end(self.tfinal, "tfinal=")
        if first >= last:
            raise MisconfigurationException(
                f"The budget would fall from step {first} (tinit=) to step {last} (tfinal= before the end, which is step "
                f"{run.total_steps}). Give a smaller tinit= or tfinal=, or train longer."
            )
        self._find_forms(run.module, first, last)
        if not self.importance.fits(self._forms):
            self.importance.clear()

    def _find_forms(self, module: nn.Module, first: int, last: int) -> None:
        self._forms, self._moving, self._masks = dict(self.forms(module)), {}, {}
        self.budgets = ResolvedSchedule(first, last, "cubic", (self._matrices * self.rank, self._matrices * self.target))

    @property
    def _matrices(self) -> int:
        return sum(form.values.numel() for form in self._forms.values()) // self.rank

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Go on with the triplets there are now. Their importance is compared, so that of all is found anew."""
        self.importance.clear()
        if self.budgets is None:
            return
        self._find_forms(module, self.budgets.start, self.budgets.end)
        if self._kept:
            kept = {name: indices for old, indices in self._kept.items() if (name := change.new_name(old)) is not None}
            for name, form in self._forms.items():
                every = list(range(form.values.numel()))
                kept.setdefault(name, self._kept.get(change.source(name) or "", every))
            self._kept = kept

    def loss(self, step: Step) -> Tensor | None:
        if not self.gamma:
            return None
        return self.gamma * factor_gaps(self._forms.values()) / (2 * self._matrices)

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Note which triplets the step moves."""
        moved = trained_by(optimizer)
        self._moving = {name: form for name, form in self._forms.items() if form.values in moved}
        self._gradient_scale = run.gradient_scale(optimizer)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """See how much the triplets matter, and set to zero those beyond the budget."""
        moving, self._moving = self._moving, {}
        if not moving or self.budgets is None:
            return
        if self._kept:
            self._masks = self._masks or self._final_masks()
            self._keep(self._masks)
            return
        final = self.steps >= self.budgets.end
        if not final or not self.importance.sensitivity:
            # weights after the step with its gradients, as in the official code
            self.importance.see(moving, self._gradient_scale)
        if final:
            self._masks = self._chosen()
            self._keep(self._masks)
            self._kept = {name: mask.flatten().nonzero().flatten().tolist() for name, mask in self._masks.items()}
            rank_zero_info(f"{self.name}: the ranks at step {self.steps} are final: {_grouped(self.ranks)}.")
        elif self.steps > self.budgets.start and self.steps % self.every == 0:
            self._keep(self._chosen())

    def _chosen(self) -> dict[str, Tensor]:
        """Mark the triplets that matter most, as many as the budget allows; of equal ones the first."""
        scores = self.importance.of(self._forms)
        flat = torch.cat([score.flatten() for score in scores.values()])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.argsort(descending=True, stable=True)[: self._budget]] = True
        parts = kept.split([score.numel() for score in scores.values()])
        return {name: part.view_as(score) for part, (name, score) in zip(parts, scores.items(), strict=True)}

    @property
    def _budget(self) -> int:
        assert self.budgets is not None
        return int(self.budgets.value(self.steps))

    def _final_masks(self) -> dict[str, Tensor]:
        found = {}
        for name, form in self._forms.items():
            mask = torch.zeros(form.values.numel(), dtype=torch.bool)
            mask[self._kept[name]] = True
            found[name] = mask.view_as(form.values).to(form.values.device)
        return found

    def _keep(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            values = self._forms[name].values
            values.masked_fill_(spread_as(values, ~mask), 0)

    def finish(self, run: Run) -> None:
        """Let go of the forms."""
        self._forms, self._moving, self._masks = {}, {}, {}

    def awaited(self, run: Run) -> Iterator[str]:
        """The final choice."""
        if self.budgets is not None and self.steps < self.budgets.end:
            yield f"the final choice of ranks at step {self.budgets.end}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained, and triplets in the budget."""
        budget = {} if self.budgets is None else {"budget": float(self._budget)}
        return {**super().metrics(run), **budget}

    def state(self) -> dict[str, Any]:
        """What was seen of the triplets, and the final choice."""
        sensitivity, uncertainty = self.importance.averages()
        return {"sensitivity": sensitivity, "uncertainty": uncertainty, "kept": dict(self._kept)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        averages = dict_of(tensor())
        return fields({"sensitivity": averages, "uncertainty": averages, "kept": dict_of(list_of(whole()), tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        seen = self.importance  # which changes its tensors in place
        seen.sensitivity, seen.uncertainty = (
            {key: value.clone() for key, value in state[name].items()} for name in ("sensitivity", "uncertainty")
        )
        self._kept = dict(state["kept"])


def _grouped(ranks: Mapping[str, int]) -> str:
    """Tell ranks by value, largest first.

    Example:
        >>> _grouped({"a": 2, "b": 0, "c": 2})
        '2 of a, c; 0 of b'
    """
    names: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        names.setdefault(rank, []).append(name)
    return "; ".join(f"{rank} of {', '.join(names[rank])}" for rank in sorted(names, reverse=True))
