"""Structured pruning: channels and attention heads that really leave the network while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run, Schedule
from lightning_peft.arguments import one_of
from lightning_peft.attaching.first_call import FirstCall
from lightning_peft.compose.schedule import Shape, parse_point
from lightning_peft.network.layers import is_norm, own_parameters
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.structure.coupled.dependency import torch_pruning
from lightning_peft.structure.coupled.example import example_form
from lightning_peft.structure.edits import Change, Edit, EditRequest
from lightning_peft.structure.forms import Form, dict_of, fields, maybe, number, text, whole
from lightning_peft.weights.choose import check_scores
from lightning_peft_plugins.pruning._shared.layer_recorder import LayerRecorder
from lightning_peft_plugins.pruning._shared.layer_statistics import FROM_CALLS
from lightning_peft_plugins.pruning._shared.scores import SCORES
from lightning_peft_plugins.pruning._shared.timeline import PruningTimeline
from lightning_peft_plugins.pruning._structured_pruning.budget import Limits, StructuredScope
from lightning_peft_plugins.pruning._structured_pruning.channels import Baseline, Channels, Counted

# By name, the score of single weights that is summed over a unit.
GROUP_SCORES = {"magnitude": "energy", "l1": "magnitude", "taylor": "taylor", "gradient": "gradient", "fisher": "fisher"}
KINDS = ("channels", "heads")


class StructuredPruning(Method):
    """Removes the channels and attention heads that matter least while the network trains, and trains on what is left.

    Nothing is masked: weights, statistics, optimizer state, averages and the masks of other methods lose the same coordinates,
    and the next step runs the smaller network. Which channels must leave together is found by Torch-Pruning's dependency graph
    (``pip install lightning-peft[prune]``), from one call of the network. Checkpoints from before, between and after cuts
    resume bit-exactly, in a module built as the user's class builds it.

    Args:
        amount: Share of the cost to remove, measured against the network before the first cut.
        score: What ranks units: ``"magnitude"`` (squared, as Torch-Pruning's group norm) or ``"l1"``; means over the ``every``
            steps before each cut of ``"taylor"`` (``|w g|``), ``"gradient"`` (``|g|``), ``"fisher"`` (``w^2 g^2``). Summed over
            all coupled tensors, relative to the mean of the group.
        of: What ``amount`` is a share of: ``"params"``, ``"flops"`` of a forward pass, or ``"channels"`` and heads by number.
        what: What may go: ``"channels"``, ``"heads"`` or both.
        scope: What is ranked together: all groups (``"global"``), or the same share of each (``"layer"``).
        targets: Layers whose outputs may go; by default all.
        exclude: Layers whose outputs stay. What the network returns always does.
        start: First cut: steps, ``"25%"`` or ``"3ep"``; not before step 1, for scores of gradients not before ``every``.
        end: Last cut, with the whole amount; by default there is one cut only.
        shape: How the amount grows in between.
        every: Length between cuts, same units.
        round_to: The number of channels that stay is a multiple of this, where a layer has so many.
        min_kept: Share of its first units that every layer keeps, at least one.
        optimizer_state: ``"slice"``: what stays keeps its moments; ``"reset"``: every parameter starts anew.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: Torch-Pruning is missing; an unknown choice; an amount that cannot be reached; a network that
            cannot be traced, or breaks when it is cut.

    Example:
        >>> StructuredPruning(0.5, "taylor", of="flops", start="10%", end="50%", round_to=8)
        StructuredPruning(amount=0.5, score='taylor', of='flops', ... start='10%', end='50%', ...)
    """

    lane = Lane.STRUCTURE
    spares_frozen = True
    reads = frozenset({Resource.INPUTS})
    writes = frozenset({Resource.STRUCTURE})
    paper = "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv 2301.12900"

    def __init__(
        self,
        amount: float = 0.5,
        score: str = "magnitude",
        of: Counted = "params",
        what: str | Sequence[str] = KINDS,
        scope: StructuredScope = "global",
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = None,
        *,
        start: int | float | str = "10%",
        end: int | float | str | None = None,
        shape: Shape = "cubic",
        every: int | float | str = "1%",
        round_to: int = 1,
        min_kept: float = 0.1,
        optimizer_state: Literal["slice", "reset"] = "slice",
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        if isinstance(amount, bool) or not 0.0 < amount < 1.0:
            raise MisconfigurationException(f"amount={amount!r} must be the share of the cost to remove, between 0 and 1.")
        self.what = _known("what", [what] if isinstance(what, str) else what, KINDS)
        self.of: Counted = _known("of", [of], get_args(Counted))[0]  # type: ignore[assignment]
        self.scope: StructuredScope = _known("scope", [scope], get_args(StructuredScope))[0]  # type: ignore[assignment]
        self.score = SCORES[GROUP_SCORES[_known("score", [score], GROUP_SCORES)[0]]]
        if type(round_to) is not int or round_to < 1:
            raise MisconfigurationException(f"round_to={round_to!r} must be a whole number, 1 for no rounding.")
        if not 0.0 <= min_kept < 1.0:
            raise MisconfigurationException(
                f"min_kept={min_kept} must be the share of its units that a layer keeps, from 0 to below 1."
            )
        self.optimizer_state: Any = _known("optimizer_state", [optimizer_state], ("slice", "reset"))[0]
        self.limits = Limits(min_kept, round_to)
        last = start if end is None else end
        self.schedule = Schedule(start, last, "constant" if end is None else shape, (0.0, float(amount)))
        self.every = parse_point(every)
        self.timeline: PruningTimeline | None = None
        self.recorder = LayerRecorder(self.score.reads, self._records, self.in_training_step)
        self._call = FirstCall(self.in_training_step)
        self._baseline: Baseline | None = None
        self._failed: dict[str, str] = {}
        self._cut_at: int | None = None
        self._cost = 0.0

    def claims(self, module: nn.Module) -> list[str]:
        """No tensor is mapped."""
        return []

    def reads_now(self) -> frozenset[Resource]:
        return self.reads | {Resource.GRADIENT} if self.score.reads - FROM_CALLS else self.reads

    def start(self, run: Run) -> None:
        """Place the cuts in this training, and wait for a call of the network."""
        torch_pruning()  # its absence must show before the training, not at the first cut
        self.timeline = PruningTimeline.of_cuts(self.schedule, self.every, run, watched=bool(self.score.reads))
        self._allowed(run)
        self._call.wait(run)

    def left_alone(self, module: nn.Module) -> list[str]:
        """Name the layers whose outputs stay because their weights are frozen."""
        return list(self.spared(module, self._targeted(module)))

    def _targeted(self, module: nn.Module) -> dict[str, nn.Module]:
        return select(module, "all-weights" if self.targets is None else self.targets, self.exclude)

    def _allowed(self, run: Run) -> set[str] | None:
        layers = self._targeted(run.module)
        frozen = self.spared(run.module, layers)
        if self.targets is None and self.exclude is None:
            return {name for name, _ in run.module.named_modules()}.difference(frozen) if frozen else None
        return set(layers).difference(frozen)

    def _records(self) -> bool:
        return self.timeline is not None and self.timeline.watched(self.steps)

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """See the gradients of a step."""
        if self.score.reads and not run.skips(optimizer):
            self.recorder.see_gradients(_weights(run), optimizer)

    def next_edit(self, run: Run) -> EditRequest | None:
        """Cut when the time has come."""
        # Asked before every step, and in the same step again after a cut until it says None: `_cut_at` remembers that it has
        # cut. Tracing needs the shapes of one call of the network in training, so nothing happens before there was one. The
        # first trace then comes at once, long before a cut is due, because all shares are of the cost of the whole network,
        # and an amount that cannot be reached must stop the fit at its beginning, not in its middle.
        self._call.settle()
        if self.timeline is None or self._cut_at == self.steps:
            return None
        due = self.timeline.due(self.steps)
        if self._call.example is None:
            if due:
                raise MisconfigurationException(
                    f"The network {run.network_name or '(the module itself)'!r} was not called in training before step "
                    f'{self.steps}, so it cannot be traced. Name the submodule your training_step calls with network="<name>".'
                )
            return None
        if self._baseline is not None and not due:
            return None
        channels = Channels(
            run.module,
            run.network_name,
            run.network,
            self._call.example,
            self.what,
            self._allowed(run),
            self.of,
            () if self.exclude is None else select(run.module, self.exclude),
            self._failed,
        )
        self._failed = channels.failed
        if self._baseline is None:
            self._baseline = Baseline(channels.cost(), channels.units)
            self._cost = self._baseline.cost
            if left := channels.left_whole():
                rank_zero_warn(f"{self.name} leaves whole what it cannot cut, while the rest is cut. {left}")
            channels.check(self.timeline.amounts.value(self.timeline.amounts.end), self._baseline, self.limits)
        if not due:
            return None
        self._cut_at = self.steps
        share = self.timeline.amounts.value(self.steps)
        edit, self._cost = channels.choose(self._values(run, channels), share, self._baseline, self.limits, self.scope)
        self.recorder.seen.clear()
        return None if edit is None else EditRequest(self._signed(edit), optimizer_state=self._rule)

    @property
    def _rule(self) -> Literal["reset", "pad"]:
        return "reset" if self.optimizer_state == "reset" else "pad"

    def _signed(self, edit: Edit) -> Edit:
        return edit | {"by": self.name, "step": self.steps}

    @torch.no_grad()
    def _values(self, run: Run, channels: Channels) -> dict[str, Tensor]:
        """Score every weight that any unit has a part of; the network sees masked weights, and so does the score."""
        values = {}
        prefix = f"{run.network_name}." if run.network_name else ""
        for name in sorted({place.tensor for group in channels.groups for place in group.places if place.scored}):
            path, _, attribute = name.rpartition(".")
            seen = self.recorder.of(prefix + name)
            weight = getattr(run.network.get_submodule(path), attribute).detach()
            if seen.ready:
                values[name] = self.score.value(weight, seen, 1)
            elif any(parameter.requires_grad for parameter in own_parameters(run.network.get_submodule(path)).values()):
                raise MisconfigurationException(
                    f"{prefix + name} cannot be scored by {self._arguments['score']!r}: it got no gradient in the steps before "
                    f"step {self.steps}. Leave its layer out with exclude=[{prefix + path!r}], or raise every=."
                )
            else:
                values[name] = torch.zeros_like(weight)  # frozen: the gradient says nothing of it
            check_scores(prefix + name, values[name])
        return values

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Let go of what was seen of tensors that are no more what they were."""
        self.recorder.forget(change)

    def awaited(self, run: Run) -> Iterator[str]:
        """The last cut, with the whole amount."""
        last = None if self.timeline is None else self.timeline.amounts.end
        if last is not None and (self._cut_at is None or self._cut_at < last):
            yield f"the last cut at step {last}"

    def finish(self, run: Run) -> None:
        """Stop waiting for a call."""
        self._call.stop()

    def describe(self, module: nn.Module) -> str:
        """Name what goes by what, and when."""
        given = self._arguments
        when = f"at {given['start']}" if given["end"] is None else f"{given['start']} to {given['end']}"
        return f"{given['amount']:.0%} of {self.of} in {' and '.join(self.what)} by {given['score']}, {self.scope}, {when}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the cost that is left."""
        return {"kept": self._cost / self._baseline.cost if self._baseline is not None else 1.0}

    def state(self) -> dict[str, Any]:
        """How the network is called, what it was at first, what of it cannot be cut, and what was seen since the last cut."""
        return {
            "example": self._call.example,
            "baseline": None if self._baseline is None else asdict(self._baseline),
            "failed": self._failed,
            "cut_at": self._cut_at,
            "cost": self._cost,
            "seen": self.recorder.state(),
        }

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        forms = {
            "example": maybe(example_form),
            "baseline": maybe(fields({"cost": number(0.0), "units": dict_of(whole(1))})),
            "cut_at": maybe(whole()),
            "cost": number(0.0),
            "seen": self.recorder.form(tensors),
        }
        proven = forms | {"failed": dict_of(text)}  # earlier versions proved nothing
        return lambda value, place: fields(forms if isinstance(value, dict) and "failed" not in value else proven)(value, place)

    def load_state(self, state: dict[str, Any]) -> None:
        self._call.example, self._cut_at, self._cost = state["example"], state["cut_at"], state["cost"]
        self._failed = dict(state.get("failed", {}))
        self._baseline = None if state["baseline"] is None else Baseline(**state["baseline"])
        self.recorder.load_state(state["seen"])


def _known(argument: str, given: Sequence[str], choices: Any) -> list[str]:
    for value in given:
        one_of(argument, value, choices)
    if not given:
        raise MisconfigurationException(f"{argument}= is empty. Choose one or more of {', '.join(choices)}.")
    return list(given)


def _weights(run: Run) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of the layers and norms of the network, as optimizers hold them."""
    prefix = f"{run.network_name}." if run.network_name else ""
    for path, layer in run.network.named_modules():
        weight = own_parameters(layer).get("weight")
        if isinstance(weight, nn.Parameter) and (weight.ndim > 1 or is_norm(layer)):
            yield f"{prefix}{path}.weight" if path else f"{prefix}weight", weight
