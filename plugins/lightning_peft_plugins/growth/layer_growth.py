"""Growing a network during its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.network.compiled import is_compiled
from lightning_peft.network.resolve import resolve_network
from lightning_peft.structure.block_names import block_name
from lightning_peft.structure.carry import RULES
from lightning_peft.structure.edits import Change, EditRequest
from lightning_peft.structure.forms import Form, whole
from lightning_peft.structure.journal import journal_of
from lightning_peft.structure.width_map import WidthMap
from lightning_peft_plugins.growth._layer_growth.depth_operators import new_places
from lightning_peft_plugins.growth._layer_growth.growth_plan import GrowthPlan
from lightning_peft_plugins.growth._layer_growth.kept_function import KeptFunction
from lightning_peft_plugins.growth._layer_growth.ligo_growth import LearntOperator
from lightning_peft_plugins.growth._layer_growth.masking import Masks
from lightning_peft_plugins.growth._layer_growth.msg import mask_at
from lightning_peft_plugins.growth._layer_growth.new_blocks import new_blocks
from lightning_peft_plugins.growth._layer_growth.operators import OPERATORS
from lightning_peft_plugins.growth._layer_growth.promise import Promise
from lightning_peft_plugins.growth._layer_growth.sizes import To, read_sizes
from lightning_peft_plugins.growth._shared.timed import TimedMethod


class LayerGrowth(TimedMethod):
    """Trains a small network first and grows it in the same fit, with optimizer, schedulers and averages carried over.

    The module is either built as it shall end, and begins with ``start`` of its blocks, or built small and grown to ``to``.
    The list of blocks is found by itself (timm's ``blocks``, Hugging Face's ``layers``, ``h``, ``encoder.layer``, any
    ``ModuleList`` or ``Sequential`` of equal blocks). Checkpoints from before, between and after growth resume bit-exactly, in
    a module built as the user's class builds it.

    Operators that deepen: ``"stack"`` repeats the whole stack (G_stack; the loss jumps and then falls faster),
    ``"interpolate"`` repeats each block in its place, ``"last-k"`` copies the last blocks on top, ``"zero"`` stacks copies
    whose output layers are zero, so that the network computes what it did, ``"stackedbert"`` stacks and copies the optimizer's
    moments. Operators that widen too: ``"net2net"`` and ``"fpi"`` repeat units, ``"aki"`` takes them from the next block,
    ``"lemon"`` is lossless for any width, ``"msg"`` adds random units and blocks behind a mask that opens gradually,
    ``"ligo"`` learns how to mix the old weights in a hundred batches.

    Args:
        operator: How the grown network is made from the small one.
        at: When: ``"step:5000"``, ``"epoch:2"``, ``"30%"``, ``"tokens:1e9"``, ``"plateau"``, or a list of them.
        to: Size after each growth: a number of blocks, or sizes by axis, ``{"depth": 12, "width": 384, "heads": 6, "ffn":
            1536}`` (heads and ffn follow the width when left out); ``None`` for as many blocks as were built, which needs
            ``start``.
        start: Blocks to begin with; ``None`` for all that were built.
        optimizer_state: ``"reset"`` begins anew for all parameters, ``"copy"`` gives new units the state of their source,
            ``"pad"`` lets new units begin anew beside the old. By default what the operator's official code does.
        lr: ``"continue"``, ``"restart"`` (the schedule begins again) or ``"rewarm:<length>@<peak>"`` (a linear warm-up of that
            many steps or percent, to that multiple of the scheduled rate). By default ``"rewarm:1%"`` for ``stack`` and
            ``interpolate``, else ``"continue"``.
        blocks: Qualified name of the list of blocks, when it cannot be found.
        sources: Block, counted from 0, that each position holds a copy of after growth, in place of the operator's rule:
            ``[0, 0, 1, 1]``. The first to name a block is that block.
        train: ``"all"``; or ``"new"``: from growth on new blocks train alone, also if those they are copied from are frozen
            (LLaMA-Pro, with the operator ``"zero"``).
        outputs: Names, inside a block, of the layers that write into the residual stream, when ``zero`` cannot find them.
        width_map: Which axes the layers of a network read and write, when its class is not known.
        grow_time: Steps in which the mask of ``"msg"`` opens; a growth that falls due before waits for it.
        operator_steps: Batches on which ``"ligo"`` learns its operator, at the moment of growth.
        operator_lr: Learning rate of that.
        follow: ``"new"``: other methods (masks, weight maps) act on new blocks too; ``"none"``: new blocks stay plain.
        check: ``"class"``: a network that its class builds from a configuration (``net.config``) is refused if the class cannot
            build what it grows into, and each block gets what the class gives to its position; ``"off"``: neither.
        monitor: Metric that ``"plateau"`` watches, by default the first logged one with "val" and "loss" in its name.
        patience: Looks at it without progress that make a plateau.
        min_delta: Relative fall that counts as progress.
        seed: Seed of operators that draw.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: Unknown operator or rule, no list of blocks (candidates are listed), sizes that do not grow.

    Example:
        >>> LayerGrowth("stack", at="20%", start=2)
        LayerGrowth(operator='stack', at='20%', start=2, ...)
    """

    lane = Lane.STRUCTURE
    writes = frozenset({Resource.STRUCTURE})
    paper = (
        "Du et al., Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training, NeurIPS 2024, "
        "arXiv 2405.15319"
    )

    def __init__(
        self,
        operator: str = "stack",
        at: str | float | Sequence[str | float] = "20%",
        to: To = None,
        *,
        start: int | None = None,
        optimizer_state: str | None = None,
        lr: str | None = None,
        blocks: str | None = None,
        sources: Sequence[int] | None = None,
        train: str = "all",
        outputs: Sequence[str] = (),
        width_map: WidthMap | None = None,
        grow_time: int = 5000,
        operator_steps: int = 100,
        operator_lr: float = 0.01,
        follow: str = "new",
        check: str = "class",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        one_of("operator", operator, OPERATORS)
        super().__init__(at=at, lr=lr or OPERATORS[operator].lr, **kwargs)
        one_of("optimizer_state", optimizer_state, (None, *RULES))
        one_of("follow", follow, ("new", "none"))
        one_of("check", check, ("class", "off"))
        one_of("train", train, ("all", "new"))
        recipe = _read_sources(sources, to, self.moments)
        to = len(recipe) if recipe is not None else to
        self.operator = OPERATORS[operator]
        self.plan = GrowthPlan(
            operator,
            read_sizes(to, len(self.moments), start),
            start,
            blocks,
            list(outputs),
            width_map,
            follow == "new",
            check,
            recipe,
        )
        self.train_new = train == "new"
        self.optimizer_state: Any = optimizer_state or self.operator.optimizer_state
        self.seed, self.grow_time = seed, grow_time
        self.operator_steps, self.operator_lr = operator_steps, operator_lr
        self._masks: list[Masks] = []
        self._promise: Promise | None = None
        self._kept_function: KeptFunction | None = None
        self._parts = 0

    def first_edit(self, module: LightningModule) -> EditRequest | None:
        """Begin with the first blocks, if asked to."""
        self.plan.find(module, self._network_name(module))
        edit = self.plan.first_edit(module)
        return None if edit is None else EditRequest(edit | {"by": self.name, "step": 0})

    def _network_name(self, module: nn.Module) -> str:
        try:
            return resolve_network(module, self.network)[0]
        except MisconfigurationException:
            if self.network is not None:
                raise
            return ""

    def start(self, run: Run) -> None:
        """Place the triggers in this training.

        Raises:
            MisconfigurationException: The module cannot grow any more.
        """
        super().start(run)
        if not self.plan.found:
            self.plan.find(run.module, self._network_name(run.module), grown=True)
        if not self.restored and self.plan.past:
            self.done = self.plan.past
            rank_zero_info(
                f"{self.name}: the module has been grown before to what to= asks for, so it trains on as it is. To grow it "
                "further, give a larger to=; to grow again, build a new module."
            )
        self.plan.check_next(run.module, self.done, self._parts)
        self._mask_again(run.module)

    def next_edit(self, run: Run) -> EditRequest | None:
        """Grow when the time of the next event has come: first wider, then deeper."""
        if self._parts == 0 and (self._masks or not self.due(run)):
            return None
        edit, operator, last = self.plan.edit(run.module, self.done, self._parts)
        if elsewhere := self.plan.other_place(run.module, edit):
            rank_zero_warn(elsewhere)
        elif self.plan.keeps(edit):
            self._kept_function = KeptFunction(run, self.plan.kind)
        edit |= {"by": self.name, "event": self.done, "step": self.steps, "seed": self.seed + self.done}
        if self.operator.learnt:
            operator = LearntOperator(run, self.operator_steps, self.operator_lr)
        restart = self._parts == 0 and self.lr_rule.restart
        self._parts = 0 if last else self._parts + 1
        self.mark_done(last)
        return EditRequest(
            edit,
            operator,
            self.optimizer_state,
            restart_steps=self.operator.restart_steps,
            restart_schedulers=restart,
            train_new=self.train_new,
        )

    def trained(self, module: nn.Module) -> list[nn.Parameter] | None:
        """New blocks alone, if asked for and once there are any.

        A training that is resumed makes its optimizers first: they hold what was trained before growth too.
        """
        blocks = new_blocks(module, self.name) if self.train_new else []
        found = [parameter for block in blocks for parameter in block.parameters()]
        for parameter in found:
            parameter.requires_grad_(parameter.is_floating_point())  # copies of what was frozen are frozen
        return found if found and self.run is not None and self.run.started else None

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Put the mask of a masked growth on what is new, and watch whether blocks with zeroed outputs pass on their input."""
        edit = change.edit
        if edit.get("by") != self.name:
            return
        if self.operator.masked:
            self._masks.append(Masks.install(module, edit))
        if edit["op"] == "blocks" and edit.get("zeroed"):
            self._forget_promise()
            if not is_compiled(module):  # hooks would have it compiled anew, into one that rounds otherwise
                names = [block_name(edit, place) for place in new_places(edit["sources"])]
                self._promise = Promise({name: module.get_submodule(name) for name in names}, self.plan.kind)
        if self._kept_function is not None:
            self._kept_function.measure()

    def _forget_promise(self) -> None:
        if self._promise is not None:
            self._promise.remove()
        self._promise = None

    def _mask_again(self, module: LightningModule) -> None:
        """Put the mask of the last growth back, in another run."""
        if not self.operator.masked or self.changed_at is None or self.steps - self.changed_at >= self.grow_time:
            return
        edits, mask = journal_of(module), mask_at(self.steps - self.changed_at, self.grow_time)
        for place, edit in enumerate(edits):
            if edit.get("by") == self.name and edit.get("event") == self.done - (self._parts == 0):
                self._masks.append(Masks.install(module, edit, mask, edits[place + 1 :]))

    def adapt_start(self, run: Run) -> None:
        """Evaluate a checkpoint from the middle of a masked growth as it was trained."""
        if self.restored:
            self._mask_again(run.module)

    def after_step(self, run: Run) -> None:
        """Open the mask of the last growth a little; after the first step, say whether the operator did what it promises."""
        missed = self._promise is not None and self._promise.judge()
        if self._kept_function is not None and not missed:
            self._kept_function.judge()
        self._promise = self._kept_function = None
        if self._masks and self.changed_at is not None:
            for mask in self._masks:
                mask.set(mask_at(self.steps - self.changed_at, self.grow_time))
            if self._masks[0].full:
                self._unmask()

    def finish(self, run: Run) -> None:
        """Take the mask off; a fit that ends before it is open ends in another network than it trained."""
        if self._masks and run.started and run.trainer.training:
            rank_zero_warn(
                f"{self.name}: training ended with the mask of the last growth at {self._masks[0].value:.2f}. The module left "
                "behind computes as with 1; evaluate its last checkpoint, or shorten grow_time."
            )
        self._unmask()
        self._forget_promise()
        self._kept_function = None

    def _unmask(self) -> None:
        for mask in self._masks:
            mask.remove()
        self._masks = []

    def describe(self, module: nn.Module) -> str:
        """Name what grows, how, and when."""
        return f"{self.plan.describe(module)} at {self._arguments['at']}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Present number of blocks, if there is a list of them, and the factor on learning rates."""
        blocks = {"blocks": float(self.plan.blocks_now(run.module))} if self.plan.path else {}
        mask = {"mask": self._masks[0].value} if self._masks else {}
        return {**blocks, **mask, "lr_factor": self.lr_factor()}

    def state(self) -> dict[str, Any]:
        """How far growth has come."""
        return super().state() | {"parts": self._parts}

    def state_fields(self) -> dict[str, Form]:
        return super().state_fields() | {"parts": whole()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._parts = state["parts"]


def _read_sources(sources: Sequence[int] | None, to: To, moments: Sequence[object]) -> list[int] | None:
    """Read which block each position copies.

    Raises:
        MisconfigurationException: No numbers of blocks, another number of positions than ``to``, or several events.
    """
    if sources is None:
        return None
    if not sources or not all(type(source) is int and source >= 0 for source in sources):
        raise MisconfigurationException(f"sources={sources!r} must list blocks, counted from 0, one for each position.")
    if to not in (None, len(sources)) or len(moments) != 1:
        raise MisconfigurationException(
            f"sources={list(sources)} says what one growth leads to, {len(sources)} blocks: leave out to=, and give one at=."
        )
    if len(set(sources)) == len(sources):
        raise MisconfigurationException(f"sources={list(sources)} copies no block: let a number stand at several positions.")
    return list(sources)
