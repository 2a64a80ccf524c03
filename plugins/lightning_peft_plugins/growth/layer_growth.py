"""Growing a network during its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_peft.attach.network import resolve_network
from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.run import Run
from lightning_peft.method import Method
from lightning_peft.registry import suggest
from lightning_peft.structure.carry import RULES
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.depth_settings import drop_rates, redrawn
from lightning_peft.structure.edits import Growth
from lightning_peft_plugins.growth.block_lists import check_equal, find_blocks
from lightning_peft_plugins.growth.depth_operators import DEPTH_OPERATORS
from lightning_peft_plugins.growth.lr_rules import parse_lr_rule
from lightning_peft_plugins.growth.triggers import Plateau, Trigger, parse_trigger, tokens_in


class LayerGrowth(Method):
    """Trains a shallow network first and deepens it in the same fit, with optimizer, schedulers and averages carried over.

    The module is either built as it shall end, and begins with ``start`` of its blocks, or built small and grown to ``to``.
    The list of blocks is found by itself (timm's ``blocks``, Hugging Face's ``layers``, ``h``, ``encoder.layer``, any
    ``ModuleList`` or ``Sequential`` of equal blocks). Checkpoints from before, between and after growth resume bit-exactly, in
    a module built as the user's class builds it.

    Operators: ``"stack"`` repeats the whole stack (G_stack; the loss jumps and then falls faster), ``"interpolate"`` repeats
    each block in its place, ``"last-k"`` copies the last blocks on top, ``"zero"`` stacks copies whose output layers are zero,
    so that the network computes what it did, ``"stackedbert"`` stacks and copies the optimizer's moments, ``"net2net"``,
    ``"aki"`` and ``"lemon"`` are the depth rules of Net2Net, bert2BERT and LEMON.

    Args:
        operator: How the grown network is made from the small one.
        at: When: ``"step:5000"``, ``"epoch:2"``, ``"30%"``, ``"tokens:1e9"``, ``"plateau"``, or a list of them.
        to: Blocks after each growth; ``None`` for as many as were built, which needs ``start``.
        start: Blocks to begin with; ``None`` for all that were built.
        optimizer_state: ``"reset"`` begins anew for all parameters, ``"copy"`` gives copies the state of their source,
            ``"pad"`` lets copies begin anew beside the old. By default what the operator's official code does.
        lr: ``"continue"``, ``"restart"`` (the schedule begins again) or ``"rewarm:<length>@<peak>"`` (a linear warm-up of that
            many steps or percent, to that multiple of the scheduled rate). By default ``"rewarm:1%"`` for ``stack`` and
            ``interpolate``, else ``"continue"``.
        blocks: Qualified name of the list of blocks, when it cannot be found.
        outputs: Names, inside a block, of the layers that write into the residual stream, when ``zero`` cannot find them.
        follow: ``"new"``: other methods (masks, weight maps) act on new blocks too; ``"none"``: new blocks stay plain.
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
        to: int | Sequence[int] | None = None,
        *,
        start: int | None = None,
        optimizer_state: str | None = None,
        lr: str | None = None,
        blocks: str | None = None,
        outputs: Sequence[str] = (),
        follow: str = "new",
        monitor: str | None = None,
        patience: int = 3,
        min_delta: float = 0.01,
        seed: int = 0,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(network=network, name=name)
        if operator not in DEPTH_OPERATORS:
            raise MisconfigurationException(f"There is no operator {operator!r}.{suggest(operator, list(DEPTH_OPERATORS))}")
        if optimizer_state not in (None, *RULES):
            raise MisconfigurationException(f"optimizer_state={optimizer_state!r} must be one of {', '.join(RULES)}.")
        if follow not in ("new", "none"):
            raise MisconfigurationException(f'follow={follow!r} must be "new" or "none".')
        self.operator = DEPTH_OPERATORS[operator]
        self.triggers = [parse_trigger(spec) for spec in ([at] if isinstance(at, (str, int, float)) else at)]
        self.sizes = _sizes(to, len(self.triggers), start)
        self.first = start
        self.optimizer_state = optimizer_state or self.operator.optimizer_state
        self.lr_rule = parse_lr_rule(lr or self.operator.lr)
        self.blocks, self.outputs, self.follow = blocks, list(outputs), follow == "new"
        self.monitor, self.seed = monitor, seed
        self.plateau = Plateau(patience, min_delta)
        self._done = 0
        self._tokens = 0
        self._grown_at: int | None = None
        self._points: list[int | None] = []
        self._warmup = 0
        self._path = ""
        self._built: int | None = None
        self._ends: dict[str, tuple[float, float]] = {}

    def first_edit(self, module: LightningModule) -> Growth | None:
        """Begin with the first blocks, if asked to."""
        self._done, self._grown_at, self._tokens = 0, None, 0
        self._find(module)
        if self.first is None:
            return None
        rates = drop_rates(list(module.get_submodule(self._path).children()))
        edit = blocks_edit(module, self._path, list(range(self.first)))
        if any(edit["old_rates"].values()) and self.first == 1 and any(max(values) for values in rates.values()):
            raise MisconfigurationException("A single block has no stochastic depth to grow from: begin with start=2 or more.")
        return Growth({**edit, "follow": self.follow, "by": self.name, "step": 0})

    def _find(self, module: nn.Module) -> None:
        """Find the blocks and check every size, before anything is changed.

        Raises:
            MisconfigurationException: No blocks, or sizes that do not grow.
        """
        path = resolve_network(module, self.network)[0] if self.network is not None else ""
        self._path = find_blocks(module, self.blocks, path)
        check_equal(module, self._path)
        blocks = list(module.get_submodule(self._path).children())
        self._built = len(blocks)
        self._ends = {name: (rates[0], rates[-1]) for name, rates in drop_rates(blocks).items() if redrawn(rates, 2)}
        self.operator.settings(blocks[0], self.outputs)
        if self.first is not None and not 0 < self.first <= len(blocks):
            raise MisconfigurationException(f"start={self.first}: {self._path} has {len(blocks)} blocks to begin with.")
        now = self.first or len(blocks)
        for size in self._targets():
            if size <= now:
                raise MisconfigurationException(
                    f"{self._path} has {now} blocks by then and cannot grow to={size}: give a larger number, or begin with "
                    "fewer by start=."
                )
            self.operator.sources(now, size)
            now = size

    def _targets(self) -> list[int]:
        return [self._built if size is None else size for size in self.sizes]  # type: ignore[misc]

    def start(self, run: Run) -> None:
        """Place the triggers in this training.

        Raises:
            MisconfigurationException: The module cannot grow any more.
        """
        steps = run.total_steps if any(_is_fraction(trigger) for trigger in self.triggers) else None
        self._points = [
            None if trigger.point is None else trigger.point.resolve(steps, run.steps_per_epoch) for trigger in self.triggers
        ]
        length = self.lr_rule.length
        self._warmup = 0 if length is None else max(1, length.resolve(run.total_steps, run.steps_per_epoch))
        now = len(run.module.get_submodule(self._path)) if self._path else None  # type: ignore[arg-type]
        if now is None:
            self._find_again(run)
        elif self._done < len(self.sizes) and self._targets()[self._done] <= now:
            raise MisconfigurationException(
                f"{self._path} has {now} blocks already, so it cannot grow to={self._targets()[self._done]}. Was the "
                "checkpoint written by a training that did not begin small? Start without it, or leave LayerGrowth out."
            )

    def _find_again(self, run: Run) -> None:
        """A module that was grown by an earlier fit: sizes count from what it has now."""
        first, self.first = self.first, None
        try:
            self._find(run.module)
        finally:
            self.first = first

    def next_edit(self, run: Run) -> Growth | None:
        """Grow when the time of the next event has come."""
        if self._done == len(self.sizes) or not self._due(run):
            return None
        blocks = list(run.module.get_submodule(self._path).children())
        size = self._targets()[self._done]
        sources = self.operator.sources(len(blocks), size)
        rates = {name: redrawn(ends, size) or [] for name, ends in self._ends.items()}
        edit = blocks_edit(run.module, self._path, sources, rates=rates or None)
        edit |= self.operator.settings(blocks[0], self.outputs)
        edit |= {"follow": self.follow, "by": self.name, "step": self.steps, "seed": self.seed + self._done}
        self._done += 1
        self._grown_at = self.steps
        self.plateau.restart()
        return Growth(
            edit,
            self.operator.values,
            self.optimizer_state,
            restart_steps=self.operator.restart_steps,
            restart_schedulers=self.lr_rule.restart,
        )

    def _due(self, run: Run) -> bool:
        trigger = self.triggers[self._done]
        if trigger.kind == "plateau":
            return self.plateau.reached
        if trigger.kind == "tokens":
            return self._tokens >= trigger.tokens
        return self.steps >= (self._points[self._done] or 0)

    def lr_factor(self) -> float:
        """Warm up after growth."""
        if self._grown_at is None or self._warmup == 0:
            return 1.0
        return self.lr_rule.peak * min(1.0, (self.steps - self._grown_at + 1) / self._warmup)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count tokens, after the batch had its chance to be the first of a larger network."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if any(trigger.kind == "tokens" for trigger in self.triggers):
            seen = torch.tensor(tokens_in(batch), device=trainer.strategy.root_device)
            self._tokens += int(trainer.strategy.reduce(seen, reduce_op="sum"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric a plateau is made of."""
        if trainer.sanity_checking or not any(trigger.kind == "plateau" for trigger in self.triggers):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        name = self.monitor or next((key for key in metrics if "val" in key and "loss" in key), None)
        if name not in metrics:
            raise MisconfigurationException(
                f'at="plateau" watches {name or "a validation loss"}, which was not logged. Choose one with monitor=; logged '
                f"are {', '.join(sorted(metrics)) or 'none'}."
            )
        self.plateau.look(trainer.strategy.broadcast(metrics[name]))

    def describe(self, module: nn.Module) -> str:
        """Name the list, its sizes and when they come."""
        path = self._path or find_blocks(module, self.blocks)
        now = len(list(module.get_submodule(path).children()))
        sizes = " -> ".join(str(size or self._built or "as built") for size in self.sizes)
        return f"{path}: {now} blocks, {self._arguments['operator']} -> {sizes} at {self._arguments['at']}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Blocks now, and what learning rates are multiplied with."""
        return {"blocks": float(len(list(run.module.get_submodule(self._path).children()))), "lr_factor": self.lr_factor()}

    def state(self) -> dict[str, Any]:
        """How far growth has come."""
        return {
            "done": self._done,
            "grown_at": self._grown_at,
            "tokens": self._tokens,
            "plateau": [self.plateau.best, self.plateau.waited],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._done, self._grown_at, self._tokens = state["done"], state["grown_at"], state["tokens"]
        self.plateau.best, self.plateau.waited = state["plateau"]


def _is_fraction(trigger: Trigger) -> bool:
    return trigger.point is not None and trigger.point.unit == "fraction"


def _sizes(to: int | Sequence[int] | None, events: int, start: int | None) -> list[int | None]:
    """Sizes after each event; ``None`` stands for what was built.

    Raises:
        MisconfigurationException: Not one for each event, or nothing to grow to.
    """
    if to is None:
        if start is None:
            raise MisconfigurationException(
                "Say what to grow to: to=<blocks>, or start=<blocks> to begin small and grow to what was built."
            )
        sizes: list[int | None] = [None]
    else:
        sizes = [to] if isinstance(to, int) else list(to)
    if len(sizes) != events:
        raise MisconfigurationException(f"at= names {events} events and to= {len(sizes)} sizes; give one size for each event.")
    return sizes
