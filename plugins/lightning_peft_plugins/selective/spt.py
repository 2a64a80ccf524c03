"""SPT: few numbers, where a task's first batches say that they matter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Resource, Run, Step
from lightning_peft.arguments import positive
from lightning_peft.attaching.averaging import averaged_modules
from lightning_peft.deltas.form import Form
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.sides import places
from lightning_peft.network.seeds import named_seed
from lightning_peft.network.targets import TargetSpec, excluded
from lightning_peft.network.tunable import tunable
from lightning_peft.optim.optimizers import owner, trained_by
from lightning_peft.strategies.support import waits_for_gradients
from lightning_peft.structure.forms import Form as StateForm
from lightning_peft.structure.forms import dict_of, fields, tensor
from lightning_peft.weights.maps import MappedTensor
from lightning_peft.weights.shards import spread_as, whole
from lightning_peft_plugins.selective._shared.sparse_update import SparseUpdate
from lightning_peft_plugins.selective._shared.whole_gradients import WholeGradients
from lightning_peft_plugins.selective._spt.ranked_tensors import Ranked, ranked_matrix, ranked_vectors
from lightning_peft_plugins.selective._spt.sensitive_values import SensitiveValues
from lightning_peft_plugins.selective.functional.spt import sensitive_entries


class SPT(SparseUpdate):
    """Trains the entries that are most sensitive to the task, within a budget, and a LoRA on matrices that hold many of them.

    For ``looks`` optimizer steps nothing of it is trained, and the squared gradients of all ranked entries are added up: those
    of the targets, of biases and of normalisation layers. Then the entries with the largest sums are chosen, as many as the
    budget pays for. A matrix among whose entries there are ``1 / ease`` of the numbers that a LoRA has gets a LoRA in place of
    values at these entries; a vector of which a share of ``1 / vector_ease`` is chosen is trained as a whole.

    Args:
        budget: How many numbers are trained at most: a share of the ranked entries below 1, else a count.
        rank: Rank of the LoRAs.
        looks: Optimizer steps in which gradients are added up.
        ease: How easily a matrix gets a LoRA.
        vector_ease: How easily a vector is trained as a whole.
        tune: Which parameters are trained as they are, beside the budget: ``"bias"``, ``"norm"``, ``"head"`` (the layers that
            write the logits).
        targets: Layers whose weights are ranked; biases and normalisation layers are wherever they stand.
        exclude: Layers of which nothing is.
        checkpoint: ``"trained"`` leaves what did not change out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A budget that pays for nothing, an ease below 1, or a training with a gradient scaler, which
            wants a gradient in every step.

    Example:
        >>> SPT(budget=0.01, tune=("head",))
        SPT(budget=0.01, rank=8, looks=16, ease=10.0, vector_ease=5.0, tune=('head',), targets='auto', exclude=('head',), ...)
    """

    writes = SparseUpdate.writes | {Resource.GRADIENT}
    weight_maps = (SensitiveValues,)
    paper = "He et al., Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, ICCV 2023, arXiv 2303.08566"

    def __init__(
        self,
        budget: float = 0.005,
        rank: int = 8,
        looks: int = 16,
        ease: float = 10.0,
        vector_ease: float = 5.0,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head",),
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(tune, targets, exclude, checkpoint=checkpoint, name=name)
        if budget <= 0:
            raise MisconfigurationException(f"budget={budget} must be above 0: a share of the entries, or a count.")
        positive("rank", rank)
        positive("looks", looks)
        if min(ease, vector_ease) < 1:
            raise MisconfigurationException(
                f"ease={ease} and vector_ease={vector_ease} must be at least 1: from as many sensitive entries on as the "
                "numbers that are trained then."
            )
        self.budget, self.rank, self.looks = budget, rank, looks
        self.ease, self.vector_ease = ease, vector_ease
        self.seen_squares: dict[str, Tensor] = {}
        self._gradients = WholeGradients()

    def ranked(self, module: nn.Module) -> dict[str, Ranked]:
        """The tensors whose entries are ranked, by name.

        Raises:
            MisconfigurationException: A target holds no matrix, or one that is parametrised or quantised.
        """
        matrices = places(self, module, Form)
        tuned = tunable(module, self.tune, {place.path for place in matrices})
        found = [ranked_matrix(place, self.rank, self.ease) for place in matrices]
        found += ranked_vectors(module, excluded(module, self.exclude), tuned, self.vector_ease)
        return {each.name: each for each in found}

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The tensors whose entries are ranked."""
        return list(self.ranked(module))

    def affordable(self, ranked: Mapping[str, Ranked]) -> int:
        """How many numbers may be trained.

        Raises:
            MisconfigurationException: Not one.
        """
        entries = sum(each.size for each in ranked.values())
        count = int(self.budget * entries + 1e-6) if self.budget < 1 else int(self.budget)
        if not count:
            raise MisconfigurationException(
                f"{self.name}: budget={self.budget} of {entries:,} entries is not one. Give at least budget={1 / entries:.2g}."
            )
        return count

    def attach(self, module: LightningModule) -> None:
        """Put values that have no coordinates yet on the tensors, and forms that do not act."""
        ranked, present = self.ranked(module), {mapped.name for mapped, _ in self.maps(module)}
        budget = self.affordable(ranked)
        for name, each in ranked.items():
            if name in present:
                continue
            form, seen = None, each.seen
            if each.layout is not None and each.least <= each.size:
                form = LowRankForm(each.layout, self.rank)
                drawn = torch.Generator().manual_seed(named_seed(f"{self.name}/{name}"))
                form.reset(each.layout.matrix(seen), drawn)
            values = SensitiveValues(each.size, each.room(budget), form)
            if seen.dtype == torch.float64:
                values.to(seen.dtype)
            self.map_weight(module, name, values.to(seen.device))

    def sensitive(self, module: nn.Module) -> Iterator[tuple[MappedTensor, SensitiveValues]]:
        """The values on a module or on an average of it, each with its tensor."""
        return ((mapped, values) for mapped, values in self.maps(module) if isinstance(values, SensitiveValues))

    def start(self, run: Run) -> None:
        """Have what was loaded where the weights are.

        Raises:
            MisconfigurationException: A gradient scaler is in use.
        """
        if run.step < self.looks and run.gradient_scaler is not None:
            raise MisconfigurationException(
                f"{self.name} trains nothing in its first {self.looks} steps, and the gradient scaler of 16-mixed wants a "
                "gradient in every step. Train with precision='bf16-mixed'."
            )
        for mapped, _ in self.sensitive(run.module):
            if (seen := self.seen_squares.get(mapped.name)) is not None:
                placed = seen.to(mapped.stored.device).view_as(mapped.stored)
                self.seen_squares[mapped.name] = spread_as(mapped.stored, placed)

    def batch_start(self, run: Run, batch: Any) -> None:
        """Have all ranked tensors get a gradient in the first steps."""
        if run.step < self.looks:
            self._gradients.watch(mapped.stored for mapped, _ in self.sensitive(run.module))

    def loss(self, step: Step) -> Tensor | None:
        """Zero; ranks wait for a gradient of everything."""
        if not waits_for_gradients(step.run.trainer.strategy):
            return None
        idle = [0 * each.sum() for _, values in self.sensitive(step.run.module) for each in values.idle()]
        return torch.stack(idle).sum() if idle else None

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Add up squared gradients."""
        for mapped, values in self.sensitive(run.module):
            if owner([optimizer], values.values) is None:
                continue
            if (found := self._gradients.take(run, mapped.stored)) is not None:
                seen = self.seen_squares.get(mapped.name)
                self.seen_squares[mapped.name] = found.square() if seen is None else seen + found.square()

    def after_clipping(self, run: Run, optimizer: Optimizer) -> None:
        """Let no optimizer begin a state for what takes no part."""
        moved = trained_by(optimizer)
        for _, values in self.sensitive(run.module):
            for parameter in values.idle():
                if parameter in moved:
                    parameter.grad = None

    def after_step(self, run: Run) -> None:
        """Choose what is trained, once enough was seen."""
        if run.step < self.looks or not self.seen_squares:
            return
        self._gradients.close()
        ranked = self.ranked(run.module)
        seen = {name: self.seen_squares.get(name, torch.zeros(each.size)) for name, each in ranked.items()}
        costs, least = ({name: getattr(each, key) for name, each in ranked.items()} for key in ("whole", "least"))
        squares = {name: whole(each).cpu() for name, each in seen.items()}
        chosen = sensitive_entries(squares, costs, least, self.affordable(ranked))
        for module in (run.module, *averaged_modules(run.trainer)):
            for mapped, values in self.sensitive(module):
                indices, each = chosen[mapped.name], ranked[mapped.name]
                many = len(indices) >= each.least
                everything = torch.arange(each.size) if many and each.layout is None else indices
                values.choose(everything, low_rank=many and each.layout is not None)
        self.seen_squares = {}
        rank_zero_info(f"{self.name}: {self._said(run.module)} from step {run.step + 1} on.")

    def _said(self, module: nn.Module) -> str:
        every = [values for _, values in self.sensitive(module)]
        loras = sum(values.low_rank for values in every)
        return (
            f"{sum(values.tuned for values in every):,} numbers are trained, a LoRA on {loras} matrices and values in "
            f"{sum(len(values.indices) > 0 for values in every)} tensors"
        )

    def finish(self, run: Run) -> None:
        """Leave the weights as frozen as they were."""
        self._gradients.close()

    def awaited(self, run: Run) -> Iterable[str]:
        """What is trained, where the training ended before it was chosen."""
        if run.step <= self.looks:
            yield f"step {self.looks + 1}, from which it trains"

    def describe(self, module: nn.Module) -> str:
        """Say what is ranked, and the budget."""
        ranked = self.ranked(module)
        entries = sum(each.size for each in ranked.values())
        parts = [f"at most {self.affordable(ranked):,} numbers for {entries:,} entries of {len(ranked)} tensors"]
        return ", ".join([*parts, f"trained from step {self.looks + 1}", *(f"{part} as they are" for part in self.tune)])

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """How many numbers are trained."""
        return {"tuned": float(sum(values.tuned for _, values in self.sensitive(run.module)))}

    def state(self) -> dict[str, Any]:
        """What was added up, until it was used."""
        return {"seen": dict(self.seen_squares)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> StateForm:
        return fields({"seen": dict_of(tensor(), tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen_squares = dict(state["seen"])
