"""Pruning by masks: any score, any group, any schedule, and what becomes of what is pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run, Schedule
from lightning_peft.arguments import one_of
from lightning_peft.compose.schedule import Shape, parse_point
from lightning_peft.contract import SHARDED, SPLIT
from lightning_peft.network.nm_layers import input_dim, wide_layers
from lightning_peft.network.targets import SENSITIVE, TargetSpec
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, fields, flag, maybe, whole
from lightning_peft.weights.choose import SCOPES, Scope, check_scores, keep_largest
from lightning_peft.weights.maps import MappedTensor, maps_of
from lightning_peft_plugins.pruning._masked_pruning.mask_map import MaskMap
from lightning_peft_plugins.pruning._masked_pruning.nm_grouping import NMGrouping, read_pattern
from lightning_peft_plugins.pruning._masked_pruning.rewind import Rewind, rewind_form
from lightning_peft_plugins.pruning._masked_pruning.rules import RULES, Decay, RuleName, make_rule
from lightning_peft_plugins.pruning._shared.layer_recorder import LayerRecorder
from lightning_peft_plugins.pruning._shared.layer_statistics import FROM_CALLS
from lightning_peft_plugins.pruning._shared.scores import SCORES
from lightning_peft_plugins.pruning._shared.timeline import PruningTimeline


class MaskedPruning(Method):
    """Sets the weights that matter least to zero while the network trains, and keeps them there.

    Four choices make a pruning method, and each can be combined with every other: the ``score`` that ranks weights, the
    ``pattern`` of weights that go together, the schedule (``start``, ``end``, ``shape``, ``every``), and the ``rule`` for what
    is pruned. ``MagnitudePruning``, ``Wanda``, ``GBLM``, ``ISSP``, ``SAP`` are such choices under the names of their papers.

    Scores: ``"magnitude"`` and its square, ``"energy"``; means over the ``every`` steps before each choice of the absolute
    ``"gradient"``, of ``"taylor"`` (``|w g|``), of ``"fisher"`` (``w^2 g^2``); ``"wanda"`` (magnitude times norm of the input)
    and ``"gblm"`` (plus magnitude times gradient); ``"beta"`` (Beta-Rank), magnitude times how much the output varies for what
    its filter sees.

    Args:
        amount: Share of the targets' weights to prune; not with an N:M pattern, which says it.
        score: What ranks weights.
        pattern: ``"unstructured"``, ``"N:M"``, ``"block:RxC"``, ``"channel"`` (all weights of an output) or ``"head:SIZE"``
            (consecutive inputs of the layer that reads attention heads).
        scope: What is ranked together: all layers (``"global"``), each ``"layer"``, or each output (``"row"``).
        targets: Layers to prune; Linear, Conv1d/2d/3d and HF ``Conv1D`` are possible.
        exclude: Layers to leave dense; by default the first layer, the head, depthwise convolutions, and what is tied to an
            embedding. Pass ``()`` for none.
        start: First choice: steps, ``"25%"`` or ``"3ep"``; for scores that need data not before ``every`` steps.
        end: Last choice, with the whole amount; by default there is one choice only. ``start="25%", end="75%"`` is what Jin
            et al. (ICLR 2025) found best for training a sparse language model from scratch.
        shape: How the amount grows in between; ``"cubic"`` is the gradual pruning of Zhu & Gupta (2017).
        every: Length between choices, same units.
        rule: ``"zero"``: what is pruned stays pruned and gets no gradient; ``"ste"``: it gets the gradient, and may come back
            at the next choice; ``"shrink"``: it is multiplied by ``alpha`` after every step until ``end``, and is zero from
            then on; ``"decay"``: it has a weight decay of its own until ``end``, and is zero from then on.
        alpha: Factor of the rule ``"shrink"``.
        strength: Weight decay that the rule ``"decay"`` reaches at ``end``, from 0 at ``start`` (Wang et al., ICLR 2021).
        rewind: Step whose weights, buffers and schedule the training goes back to after each choice, 0 for the first (lottery
            tickets); ``None`` to train on.
        mask: ``"keep"`` chooses nothing: what is zero when the training begins stays zero, as it was left by Wanda, SparseGPT
            or an earlier training.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: An unknown score, pattern, scope or rule; an amount out of range; targets that match nothing.

    Example:
        >>> MaskedPruning(0.8, score="taylor", start="25%", end="75%")
        MaskedPruning(amount=0.8, score='taylor', ... start='25%', end='75%', ...)
    """

    lane = Lane.MASK
    rank_state = frozenset({"calls"})
    writes = frozenset({Resource.MASK})
    weight_maps = (MaskMap,)
    commutes = True
    strategies = SPLIT
    paper = (
        "Zhu & Gupta, To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017, "
        "arXiv 1710.01878"
    )

    def __init__(
        self,
        amount: float | None = None,
        score: str = "magnitude",
        pattern: str = "unstructured",
        scope: Scope = "global",
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec = SENSITIVE,
        *,
        start: int | float | str = 0,
        end: int | float | str | None = None,
        shape: Shape = "cubic",
        every: int | float | str = "1%",
        rule: RuleName = "zero",
        alpha: float = 0.95,
        strength: float = 1.0,
        rewind: int | float | str | None = None,
        mask: Literal["choose", "keep"] = "choose",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        one_of("mask", mask, ("choose", "keep"))
        usual = {"amount": None, "score": "magnitude", "pattern": "unstructured", "start": 0, "end": None, "rule": "zero"}
        asked = {"amount": amount, "score": score, "pattern": pattern, "start": start, "end": end, "rule": rule}
        others = [key for key, value in asked.items() if value != usual[key]] + ["rewind"] * (rewind is not None)
        if mask == "keep" and others:
            raise MisconfigurationException(f'mask="keep" keeps the zeros there are: leave out {", ".join(others)}=.')
        self.keeps_zeros = mask == "keep"
        one_of("score", score, SCORES)
        one_of("scope", scope, SCOPES)
        one_of("rule", rule, RULES)
        self.grouping = read_pattern(pattern)
        self.amount = self._read_amount(amount, pattern)
        self.score, self.scope, self.score_name = SCORES[score], scope, score
        if self.score.reads & FROM_CALLS:  # of which each process sees a part
            self.strategies = SHARDED
        if scope == "row" and not self.grouping.single:
            raise MisconfigurationException(
                f'scope="row" ranks single weights, pattern={pattern!r} prunes groups: use "layer".'
            )
        last = start if end is None else end
        self.schedule = Schedule(start, last, "constant" if end is None else shape, (0.0, self.amount))
        self.every = parse_point(every)
        self.rule = make_rule(rule, alpha, strength, ends=end is not None)
        self.rewind = Rewind(None if rewind is None else parse_point(rewind))
        self.restarts = rewind is not None
        self.timeline: PruningTimeline | None = None
        self.recorder = LayerRecorder(self.score.reads, self._records, self.in_training_step)
        self._chosen_at: int | None = None
        self._again = 0  # step of a further choice, for layers that came later

    def reads_now(self) -> frozenset[Resource]:
        return self.reads | {Resource.GRADIENT} if self.score.reads - FROM_CALLS else self.reads

    def writes_now(self) -> frozenset[Resource]:
        return self.writes | {Resource.GRADIENT} if isinstance(self.rule, Decay) else self.writes

    def _read_amount(self, amount: float | None, pattern: str) -> float:
        if isinstance(self.grouping, NMGrouping):
            if amount is not None:
                raise MisconfigurationException(f"pattern={pattern!r} says how much is pruned: leave amount= out.")
            return self.grouping.pruned
        amount = 0.5 if amount is None else amount
        if isinstance(amount, bool) or not 0.0 < amount < 1.0:
            raise MisconfigurationException(f"amount={amount!r} must be the share of weights to prune, between 0 and 1.")
        return float(amount)

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Refuse layers whose inputs cannot be told apart, for scores that read inputs, or are fewer than M."""
        found = super().select(module)
        if isinstance(self.grouping, NMGrouping):
            found = wide_layers(found, dict.fromkeys(found, (self.grouping.n, self.grouping.m)), self.targets)
        for name, layer in found.items():
            input_dim(layer)
            if self.score.reads & FROM_CALLS and getattr(layer, "groups", 1) > 1:
                raise MisconfigurationException(
                    f"{name} is a grouped convolution, and score={self.score_name!r} reads all inputs of an output alike. "
                    f"Leave it out with exclude=[{name!r}], or use another score."
                )
        return found

    def attach(self, module: LightningModule) -> None:
        """Put one map on every target; without a mask it changes nothing."""
        for tensor in self.claims(module):
            self.map_weight(module, tensor, MaskMap(self.rule))

    def masks(self, module: nn.Module) -> Iterator[tuple[MappedTensor, MaskMap]]:
        """Yield the targets with their masks, in module order."""
        return maps_of(module, MaskMap, type(self).__name__)

    def start(self, run: Run) -> None:
        """Place the choices in this training, and make the first if it is due and needs no data."""
        self.timeline = PruningTimeline.of_choices(self.schedule, self.every, run, watched=bool(self.score.reads))
        self.rewind.start(run, self.timeline.amounts.start, self.name)
        if self.score.reads:
            self.recorder.open(mapped for mapped, _ in self.masks(run.module))
        elif self.timeline.due(self.steps) and self._chosen_at is None:
            (self._keep_zeros if self.keeps_zeros else self._choose)(run)

    def _records(self) -> bool:
        return self.timeline is not None and (self.timeline.watched(self.steps) or self.steps < self._again)

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Choose once more for the new layers, as soon as there is something to choose by."""
        if self._chosen_at is not None and self.timeline is not None:
            self._again = self.steps + (self.timeline.every if self.score.reads else 1)
        self.recorder.forget(change)
        if self.score.reads:
            self.recorder.open(mapped for mapped, _ in self.masks(module))

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """See the gradients of a step, and let pruned weights decay."""
        if self.score.reads and not run.skips(optimizer):
            self.recorder.see_gradients(((mapped.name, mapped.stored) for mapped, _ in self.masks(run.module)), optimizer)
        if self.timeline is not None:
            scale = run.gradient_scale(optimizer)
            self.rule.before_step(self.masks(run.module), optimizer, self.timeline.progress(self.steps), scale)

    def after_step(self, run: Run) -> None:
        """Choose masks when the time has come."""
        due = self.timeline is not None and (self.timeline.due(self.steps) or self.steps == self._again)
        if due and self._chosen_at != self.steps and not self.keeps_zeros:
            self._choose(run)
        self.rewind.take_when_due(run)
        if self.timeline is not None:
            self.rule.after_step(self.masks(run.module), run, self.timeline)

    @torch.no_grad()
    def _keep_zeros(self, run: Run) -> None:
        """Take the zeros of the weights for the mask."""
        zeros = 0
        for mapped, mask in self.masks(run.module):
            weight = mapped.entering(mask)
            zeros += weight.numel() - int(weight.count_nonzero())
            mask.hold(weight != 0)
        if not zeros:
            raise MisconfigurationException(
                f'{self.name}: mask="keep" keeps zeros, and no weight of the targets is zero. Load the pruned weights before '
                "the fit, or let masks be chosen, with amount= and without mask=."
            )
        self._chosen_at = self.steps

    @torch.no_grad()
    def _choose(self, run: Run) -> None:
        assert self.timeline is not None
        maps = list(self.masks(run.module))
        scores, sizes = {}, {}
        for mapped, mask in maps:
            seen, dim, weight = self.recorder.of(mapped.name), input_dim(mapped.layer), mapped.entering(mask)
            seen.reduce(run.trainer.strategy, weight, dim)
            if not seen.ready:
                raise MisconfigurationException(
                    f"{mapped.name} cannot be scored by {self.score_name!r}: its layer was not called, or got no "
                    f"gradient, in the {self.timeline.every} steps before step {self.steps}. Leave it out with exclude=, or "
                    "raise every=."
                )
            value = self.score.value(weight, seen, dim)
            check_scores(mapped.name, value)
            seen.clear()
            if isinstance(self.grouping, NMGrouping):
                mask.hold(self.grouping.mask(value, dim))
                continue
            if self.rule.masked and not self.rule.regrow and mask.holds(weight):
                value = value.masked_fill(~mask.held, -torch.inf)
            scores[mapped.name] = self.grouping.scores(value, dim)
            sizes[mapped.name] = self.grouping.sizes(weight.shape, dim)
        if scores:
            kept = self.keep(scores, sizes)
            for mapped, mask in maps:
                mask.hold(self.grouping.spread(kept[mapped.name], mapped.stored.shape, input_dim(mapped.layer)))
        self._chosen_at = self.steps
        self.rewind.chosen()

    def keep(self, scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decide which groups stay, from their scores and the number of their weights by tensor."""
        assert self.timeline is not None
        amount = self.timeline.amounts.value(self.steps)
        return keep_largest(scores, amount, self.scope, None if self.grouping.single else sizes)

    def batch_start(self, run: Run, batch: Any) -> None:
        """Go back after a choice; not at once, so that a validation in between sees what was pruned, trained."""
        self.rewind.restore_when_due(run)

    def finish(self, run: Run) -> None:
        """Stop looking at inputs."""
        self.recorder.close()

    def awaited(self, run: Run) -> Iterator[str]:
        """The last choice, with the whole amount, and the way back after it."""
        last = None if self.timeline is None else self.timeline.amounts.end
        if last is not None and self._chosen_at != last and self.steps < last:
            yield f"the last choice of masks at step {last}"
        elif self.rewind.due:
            yield f"going back to step {self.rewind.at}, for which a further step was needed"

    def describe(self, module: nn.Module) -> str:
        """Name what is pruned by what, and when."""
        given = self._arguments
        if self.keeps_zeros:
            return f"zeros stay zero, in {len(self.select(module))} layers"
        much = given["pattern"] if isinstance(self.grouping, NMGrouping) else f"{self.amount:.0%} {given['pattern']}"
        when = f"at {given['start']}" if given["end"] is None else f"{given['start']} to {given['end']}"
        return f"{much} by {self.score_name}, {self.scope}, {when}, in {len(self.select(module))} layers"

    @torch.no_grad()
    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of weights kept in the targets."""
        kept = total = 0
        for mapped, mask in self.masks(run.module):
            total += mapped.stored.numel()
            kept += mask.held.count_nonzero() if mask.holds(mapped.stored) else mapped.stored.numel()
        return {"density": kept / max(total, 1)}

    def state(self) -> dict[str, Any]:
        """What was seen since the last choice; the masks themselves are in the module's state."""
        return {
            "chosen_at": self._chosen_at,
            "shrunk_at": self.rule.faded_at,
            "again": self._again,
            "masked": self.rule.masked,
            "rewind": dict(self.rewind.values),
            "rewind_due": self.rewind.due,
            "seen": self.recorder.state(),
            "calls": self.recorder.of_calls(),
        }

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields(
            {
                "chosen_at": maybe(whole()),
                "shrunk_at": maybe(whole()),
                "again": whole(),
                "masked": flag,
                "rewind": rewind_form(tensors),
                "rewind_due": flag,
                "seen": self.recorder.form(tensors),
                "calls": self.recorder.calls_form(tensors),
            }
        )

    def pooled(self, key: str, states: Sequence[Any], rank: int) -> Any:
        return self.recorder.pooled(states, rank)

    def load_state(self, state: dict[str, Any]) -> None:
        self._chosen_at, self._again = state["chosen_at"], state["again"]
        self.rule.masked, self.rule.faded_at = state["masked"], state["shrunk_at"]
        self.rewind.values, self.rewind.due = dict(state["rewind"]), state["rewind_due"]
        self.recorder.load_state(state["seen"])
        self.recorder.load_state(state["calls"])
