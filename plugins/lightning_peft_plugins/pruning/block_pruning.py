"""Block pruning: whole residual blocks that leave the network while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run, Schedule
from lightning_peft.arguments import one_of
from lightning_peft.compose.schedule import Shape, parse_point
from lightning_peft.network.block_lists import entry_names
from lightning_peft.network.targets import TargetSpec
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.depth import blocks_at, blocks_edit
from lightning_peft.structure.edits import Change, EditRequest
from lightning_peft.structure.forms import Form, dict_of, fields, maybe, whole
from lightning_peft.weights.choose import check_scores
from lightning_peft_plugins.pruning._block_pruning.block_activations import SEEN, BlockActivations, BlockWatch
from lightning_peft_plugins.pruning._block_pruning.budget import Choice, goal, lowest
from lightning_peft_plugins.pruning._block_pruning.prunable_lists import PrunableList, lists_form, lists_to_prune
from lightning_peft_plugins.pruning._block_pruning.weight_scores import magnitude_of, taylor_of
from lightning_peft_plugins.pruning._shared.timeline import PruningTimeline

SCORES = ("influence", "taylor", "magnitude")


class BlockPruning(Method):
    """Removes the residual blocks that matter least while the network trains, and trains on what is left.

    The depth twin of ``StructuredPruning``: a list of blocks gets shorter, and optimizers, averages and the maps and masks of
    other methods let go of what left. Lists are found by themselves (timm's ``blocks``, Hugging Face's ``layers``, ``h``,
    ``encoder.layer``, the stages of a ResNet). A block may go if it returns what it was given in the same shape, and another
    block of its list goes on with that; every list keeps one block. Checkpoints from before, between and after cuts resume
    bit-exactly, in a module built as the user's class builds it.

    Args:
        amount: Blocks to remove: a number of them, or a share (0 to 1) of those in all lists, rounded, at least one.
        score: What ranks blocks: ``"influence"``, one minus the cosine of a block's input and output, averaged over tokens
            and over the calls in the ``every`` steps before a cut; ``"taylor"``: the sum of ``|w g|`` over a block's weights,
            averaged over these steps; ``"magnitude"``: the sum of ``|w|`` at the cut.
        targets: Blocks that may go (``"layers.5"``), or lists of them (``"model.layers"``); by default all.
        exclude: Blocks that stay, or lists that are left out.
        start: First cut: steps, ``"25%"`` or ``"3ep"``; not before ``every``.
        end: Last cut, with the whole amount; by default there is one cut only.
        shape: How the amount grows in between.
        every: Length between cuts, same units, and how long blocks are watched before one.
        optimizer_state: ``"keep"``: what stays keeps its moments; ``"reset"``: every parameter starts anew.
        check: ``"class"``: a cut is refused if the network is built by its class from a configuration (``net.config``) and the
            class cannot build what is left; ``"off"``: it is not.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: An unknown choice, no list of residual blocks, an amount that cannot be reached, blocks that
            take or return something else than a tensor.

    Example:
        >>> BlockPruning(0.25, start="10%", end="50%", every="10%")
        BlockPruning(amount=0.25, score='influence', start='10%', end='50%', ...)
    """

    lane = Lane.STRUCTURE
    rank_state = frozenset({"seen"})
    writes = frozenset({Resource.STRUCTURE})
    paper = "Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, arXiv 2403.03853"

    def __init__(
        self,
        amount: int | float = 0.25,
        score: str = "influence",
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = None,
        *,
        start: int | float | str = "10%",
        end: int | float | str | None = None,
        shape: Shape = "cubic",
        every: int | float | str = "1%",
        optimizer_state: Literal["keep", "reset"] = "keep",
        check: Literal["class", "off"] = "class",
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        if isinstance(amount, bool) or not (0.0 < amount < 1.0 or (type(amount) is int and amount > 0)):
            raise MisconfigurationException(
                f"amount={amount!r} must be a share of the blocks between 0 and 1, or a whole number of blocks to remove."
            )
        one_of("score", score, SCORES)
        one_of("optimizer_state", optimizer_state, ("keep", "reset"))
        one_of("check", check, ("class", "off"))
        self.check = check
        self.amount, self.score, self.optimizer_state = amount, score, optimizer_state
        self.schedule = Schedule(start, start if end is None else end, "constant" if end is None else shape)
        self.every = parse_point(every)
        self.timeline: PruningTimeline | None = None
        self.watch = BlockWatch(self.in_training_step, self._scores_calls)
        self.lists: dict[str, PrunableList] = {}
        self._goal: int | None = None
        self._gone = 0
        self._cut_at: int | None = None
        self._due: list[tuple[str, list[int]]] = []

    def claims(self, module: nn.Module) -> list[str]:
        """No tensor is mapped."""
        return []

    def reads_now(self) -> frozenset[Resource]:
        return self.reads | {Resource.GRADIENT} if self.score == "taylor" else self.reads

    def start(self, run: Run) -> None:
        """Place the cuts in this training, and find the lists."""
        if not self.lists:
            self.lists = lists_to_prune(run.module, run.network_name, self.targets, self.exclude)
        self.timeline = PruningTimeline.of_cuts(self.schedule, self.every, run, watched=True)

    def _watches(self) -> bool:
        return self.timeline is not None and self.timeline.watched(self.steps)

    def _scores_calls(self) -> bool:
        return self.score == "influence" and self._watches()

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """See the gradients of a step."""
        if self.score != "taylor" or not self._watches() or run.skips(optimizer):
            return
        moved = trained_by(optimizer)
        for name in self._blocks(run):
            value = taylor_of(parameter for parameter in run.module.get_submodule(name).parameters() if parameter in moved)
            if value is not None:
                self.watch.of(name).add(value)

    def after_step(self, run: Run) -> None:
        """Let go of the activations of the step."""
        self.watch.let_go()

    def next_edit(self, run: Run) -> EditRequest | None:
        """Cut when the time has come, one list after the other."""
        if self.timeline is None:
            return None
        if not self._due and self._cut_at != self.steps:
            due = self.timeline.due(self.steps)
            if self._goal is None and self.steps > 0:
                self._settle(run, due)
            if due:
                self._cut_at = self.steps
                self._due = list(self._choose(run).items())
                self.watch.forget_scores()
        if self._due:
            self.watch.close()  # no block that leaves may be left with a shim
            path, places = self._due.pop(0)
            sources = [place for place in range(len(blocks_at(run.module, path))) if place not in places]
            edit = blocks_edit(run.module, path, sources, check=self.check) | {"by": self.name, "step": self.steps}
            return EditRequest(edit, optimizer_state="reset" if self.optimizer_state == "reset" else "pad")
        if self._goal is None or self._watches():
            self.watch.open(run.module, {path: found.blocks for path, found in self.lists.items()})
        else:
            self.watch.close()
        return None

    def _blocks(self, run: Run) -> list[str]:
        return [name for path, found in self.lists.items() for name in entry_names(run.module, path, found.blocks)]

    def _seen(self, run: Run) -> dict[str, BlockActivations]:
        return self.watch.reduced(self._blocks(run), run.trainer.strategy)

    def _settle(self, run: Run, due: bool) -> None:
        """After the first call of the network, leave out lists that are no trunk, and see whether the amount can be reached."""
        seen = self._seen(run)
        if not any(block.calls for block in seen.values()):
            if due:
                raise MisconfigurationException(
                    f"No block of {', '.join(self.lists)} was called in training before step {self.steps}. Name others with "
                    "targets=, or cut later with start=."
                )
            return
        trunks = {
            path: found
            for path, found in self.lists.items()
            if any(seen[name].links for name in entry_names(run.module, path, found.blocks))
        }
        self.lists = trunks if trunks and self.targets is None else self.lists
        self._goal = goal(self.amount, sum(len(found.blocks) for found in self.lists.values()))
        # A block that was not called yet may be one that is skipped now and then.
        stays = {name: why for name, block in seen.items() if block.calls and (why := self._why(run, name, block))}
        for name in self._named(run):
            if name in stays:
                rank_zero_warn(f"{self.name}: {name} stays, though targets= names it: it {stays[name]}.")
        self._check(run, self._goal, {path: self._free(run, path, stays) for path in self.lists}, stays)

    def _named(self, run: Run) -> list[str]:
        """Blocks that ``targets`` names one by one."""
        return [name for path, found in self.lists.items() for name in entry_names(run.module, path, found.named)]

    def _why(self, run: Run, name: str, block: BlockActivations) -> str:
        """Say why a block stays; nothing when it may go."""
        parameters = list(run.module.get_submodule(name).parameters())
        frozen = bool(parameters) and all(map(self.is_frozen, parameters))
        return "has frozen weights only" if frozen and name not in self._named(run) else block.why_it_stays()

    def _free(self, run: Run, path: str, stays: Mapping[str, str]) -> list[int]:
        places = self.lists[path].may_go
        return [place for place, name in zip(places, entry_names(run.module, path, places), strict=True) if name not in stays]

    def _check(self, run: Run, wanted: int, free: Mapping[str, list[int]], stays: Mapping[str, str]) -> None:
        """Refuse to remove more blocks than can go.

        Raises:
            MisconfigurationException: Too many; names those that must stay, each with the reason.
        """
        can = sum(min(len(places), len(self.lists[path].blocks) - 1) for path, places in free.items())
        if wanted <= can:
            return
        blocks = self._blocks(run)
        reasons = "".join(f" {name} {stays[name]}." for name in blocks if name in stays)
        raise MisconfigurationException(
            f"amount={self.amount!r} asks to remove {wanted} of the {len(blocks)} blocks of {', '.join(self.lists)}, but "
            f"only {can} can be removed.{reasons} Every list keeps one block. Blocks that targets= and exclude= leave out "
            "stay, and so does a block with parameters that no other block of its list has, unless targets= names it. Lower "
            "amount=, or name other lists."
        )

    def _choose(self, run: Run) -> Choice:
        assert self.timeline is not None
        assert self._goal is not None
        wanted = int(self._goal * self.timeline.amounts.value(self.steps) + 1e-9) - self._gone
        seen = self._seen(run)
        scores = {name: self._score(run, name, block) for name, block in seen.items()}
        scored = [name for name, block in seen.items() if block.scored or self.score == "magnitude"]
        when = f"in the {self.timeline.every} steps before the cut at step {self.steps}"
        if not scored:
            raise MisconfigurationException(
                f"No block of {', '.join(self.lists)} was called, or got a gradient, {when}, so none can be ranked by "
                f"{self.score}. Look at more steps with every=, or move the cut with start=."
            )
        for name in scored:
            check_scores(name, torch.tensor(scores[name]))
        stays = {name: f"was not called, or got no gradient, {when}" for name in seen if name not in scored}
        stays |= {name: why for name, block in seen.items() if (why := self._why(run, name, block))}
        free = {path: self._free(run, path, stays) for path in self.lists}
        self._check(run, wanted, free, stays)
        ranked = {
            path: dict(zip(places, (scores[name] for name in entry_names(run.module, path, places)), strict=True))
            for path, places in free.items()
        }
        return lowest(ranked, {path: len(found.blocks) - 1 for path, found in self.lists.items()}, wanted)

    def _score(self, run: Run, name: str, seen: BlockActivations) -> float:
        return magnitude_of(run.module.get_submodule(name)) if self.score == "magnitude" else seen.mean()

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Follow the blocks that stay to their new places."""
        path, sources = change.edit["path"], change.edit.get("sources")
        if change.edit.get("by") == self.name and sources is not None:
            self._gone += change.edit["from"] - len(sources)
            self.lists[path] = self.lists[path].without(sources)
            self.watch.rename(change.new_name)

    def awaited(self, run: Run) -> Iterator[str]:
        """The last cut, with the whole amount."""
        last = None if self.timeline is None else self.timeline.amounts.end
        if last is not None and (self._cut_at is None or self._cut_at < last):
            yield f"the last cut at step {last}"

    def finish(self, run: Run) -> None:
        """Stop looking at blocks."""
        self.watch.close()

    def describe(self, module: nn.Module) -> str:
        """Name how many go by what, and when."""
        given = self._arguments
        when = f"at {given['start']}" if given["end"] is None else f"{given['start']} to {given['end']}"
        much = f"{self.amount} blocks" if isinstance(self.amount, int) else f"{self.amount:.0%} of the blocks"
        return f"{much} by {given['score']}, {when}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Blocks removed so far."""
        return {"removed": float(self._gone)}

    def state(self) -> dict[str, Any]:
        """The lists as they are now, how far the cuts have come, and what was seen of blocks."""
        return {
            "lists": {path: asdict(found) for path, found in self.lists.items()},
            "goal": self._goal,
            "gone": self._gone,
            "cut_at": self._cut_at,
            "seen": self.watch.state(),
        }

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields(
            {
                "lists": lists_form(tensors),
                "goal": maybe(whole()),
                "gone": whole(),
                "cut_at": maybe(whole()),
                "seen": dict_of(SEEN),
            }
        )

    def pooled(self, key: str, states: Sequence[Any], rank: int) -> Any:
        return self.watch.pooled(states, rank)

    def load_state(self, state: dict[str, Any]) -> None:
        self.lists = {path: PrunableList(**found) for path, found in state["lists"].items()}
        self._goal, self._gone, self._cut_at, self._due = state["goal"], state["gone"], state["cut_at"], []
        self.watch.load_state(state["seen"])
