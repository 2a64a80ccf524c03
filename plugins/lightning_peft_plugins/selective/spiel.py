"""Sparse fine-tuning with coordinates that come and go."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Resource, Run
from lightning_peft.network.seeds import named_seed
from lightning_peft.network.targets import TargetSpec
from lightning_peft.optim.optimizers import owner
from lightning_peft.optim.wrapped import innermost
from lightning_peft.structure.forms import Form, dict_of, fields, tensor
from lightning_peft.weights.shards import opened, whole
from lightning_peft.weights.sparse_values import SparseValues, carried
from lightning_peft_plugins.selective._shared.sparse_update import SparseUpdate
from lightning_peft_plugins.selective._shared.whole_gradients import WholeGradients
from lightning_peft_plugins.selective._spiel.aged_adam import AgedAdam, counts_ages
from lightning_peft_plugins.selective._spiel.candidates import Candidates, candidates_form, summed
from lightning_peft_plugins.selective.functional.spiel import reallocated, seeded_moments


class SpIEL(SparseUpdate):
    """Trains values at few coordinates of every weight, drops the smallest now and then, and grows others by their gradients.

    Every ``every`` steps the gradients of whole weights are looked at for ``window`` steps: in the first, as many candidates
    are noted as there are values; then the smallest values go, and the candidates with the largest summed gradients take their
    places. The first time all values may go, later ``rate`` of them, less and less until the training ends. The optimizer keeps
    state for the chosen coordinates alone; with Adam each has an age, and grown ones begin with the moments of what was seen.

    Args:
        density: Share of the weights of each target that is trained.
        every: Optimizer steps between two windows.
        window: Optimizer steps in which gradients are summed.
        rate: Share of the values that is replaced, at the start of a linear descent to zero.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights are trained.
        exclude: Layers whose weights are not.
        checkpoint: ``"trained"`` leaves what did not change out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A share that is none, a window that is longer than the time between two, or a form of Adam
            without room for ages.

    Example:
        >>> SpIEL(density=0.05)
        SpIEL(density=0.05, every=20, window=5, rate=0.2, tune=(), targets='auto', exclude=('head',), ...)
    """

    writes = SparseUpdate.writes | {Resource.OPTIMIZER}
    paper = "Ansell et al., Scaling Sparse Fine-Tuning to Large Language Models, 2024, arXiv 2401.16405"

    def __init__(
        self,
        density: float = 0.01,
        every: int = 20,
        window: int = 5,
        rate: float = 0.2,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head",),
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(tune, targets, exclude, checkpoint=checkpoint, name=name or "spiel")
        for argument, value in (("density", density), ("rate", rate)):
            if not 0 < value <= 1:
                raise MisconfigurationException(f"{argument}={value} must be above 0 and at most 1.")
        if not 1 <= window < every:
            raise MisconfigurationException(f"window={window} must be at least 1 and below every={every}.")
        self.density, self.every, self.window, self.rate = density, every, window, rate
        self._candidates: dict[str, Candidates] = {}
        self._ages: dict[str, Tensor] = {}
        self._adams: list[AgedAdam] = []
        self._gradients = WholeGradients()

    def count(self, weight: Tensor) -> int:
        """The density's share, at least one."""
        return max(1, int(weight.numel() * self.density))

    def first(self, tensor: str, weight: Tensor) -> Tensor:
        """A random choice."""
        seed = torch.Generator().manual_seed(named_seed(f"{self.name}/{tensor}"))
        drawn = torch.randperm(weight.numel(), generator=seed)[: self.count(weight)]
        return drawn.sort().values.to(weight.device)

    def wrap_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Let Adam count the age of every coordinate."""
        if not counts_ages(innermost(optimizer)):
            return optimizer
        self._adams.append(AgedAdam(optimizer, lambda: self._all_ages(run)))
        return self._adams[-1]

    def _all_ages(self, run: Run) -> dict[nn.Parameter, Tensor]:
        return {values.values: self._age(mapped.name, values) for mapped, values in self.maps(run.module)}

    def _age(self, name: str, values: SparseValues) -> Tensor:
        """Steps that Adam has taken with each coordinate."""
        if name not in self._ages:
            self._ages[name] = torch.zeros(len(values.indices), device=values.indices.device)
        return self._ages[name]

    # The gradients of whole weights, in a window.

    def batch_start(self, run: Run, batch: Any) -> None:
        """Have the weights get a gradient in a window."""
        if run.step % self.every < self.window:
            self._gradients.watch(mapped.stored for mapped, _ in self.maps(run.module))

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Take the gradients of the weights away before the optimizer uses them, and sum those of the candidates."""
        skips = run.skips(optimizer)
        for mapped, values in self.maps(run.module):
            if owner([optimizer], values.values) is None:
                continue
            if (found := self._gradients.take(run, mapped.stored)) is not None and not skips:
                seen, gradient = self._candidates.get(mapped.name), whole(found).flatten()
                self._candidates[mapped.name] = summed(seen, gradient, len(values.indices))

    def after_step(self, run: Run) -> None:
        """Drop and grow when a window is over."""
        if self._candidates and run.step % self.every == self.window:
            self._gradients.close()
            first = run.step < self.every
            self._reallocate(run, 1.0 if first else self.rate * max(0.0, 1 - run.step / run.total_steps))
            self._candidates = {}

    @torch.no_grad()
    def _reallocate(self, run: Run, share: float) -> None:
        seen, chosen, grown = self._candidates, {}, {}
        for mapped, values in self.maps(run.module):
            if (candidates := seen.get(mapped.name)) is None:
                continue
            count = int(len(values.indices) * share)
            slots, places = reallocated(whole(values.values), values.indices, candidates.indices, candidates.total, count)
            indices = values.indices.clone()
            indices[slots] = candidates.indices[places]
            chosen[mapped.name], grown[mapped.name] = indices.sort().values, places
            self._ages[mapped.name] = carried(self._age(mapped.name, values), values.indices, chosen[mapped.name])
        self.move(run, chosen, fold=False)
        for mapped, values in self.maps(run.module):
            if mapped.name in grown:
                self._seed(run, mapped.name, values, seen[mapped.name], grown[mapped.name])

    def _seed(self, run: Run, name: str, values: SparseValues, candidates: Candidates, places: Tensor) -> None:
        """Let Adam know of grown coordinates what was seen of them."""
        found = owner(self._adams, values.values)
        state = {} if found is None else self._adams[found[0]].state.get(values.values, {})
        if found is None or not state:  # another optimizer, or one that has taken no step yet
            return
        betas = self._adams[found[0]].param_groups[found[1]]["betas"]
        at = torch.searchsorted(values.indices, candidates.indices[places])
        moments = seeded_moments(candidates.total[places], candidates.squares[places], candidates.samples, betas)
        for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            with opened(state[key]) as full:
                full[at] = moment.to(full.dtype)
        self._ages[name][at] = candidates.samples

    def finish(self, run: Run) -> None:
        """Leave the weights as frozen as they were."""
        self._gradients.close()

    def awaited(self, run: Run) -> Iterable[str]:
        """The first choice by gradients."""
        if run.step < self.window:
            yield f"coordinates were chosen by their gradients, after step {self.window}"

    def state(self) -> dict[str, Any]:
        """What was seen in the window that is open, and the ages of coordinates."""
        return {"seen": {name: candidates.state() for name, candidates in self._candidates.items()}, "ages": self._ages}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"seen": candidates_form(tensors), "ages": dict_of(tensor(), tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self._candidates = {name: Candidates(**seen) for name, seen in state["seen"].items()}
        self._ages = {name: age.clone() for name, age in state["ages"].items()}

    def start(self, run: Run) -> None:
        """Have what was loaded where the weights are."""
        for mapped, values in self.maps(run.module):
            self._ages[mapped.name] = self._age(mapped.name, values).to(mapped.stored.device)
            if mapped.name in self._candidates:
                self._candidates[mapped.name].to(mapped.stored.device)
