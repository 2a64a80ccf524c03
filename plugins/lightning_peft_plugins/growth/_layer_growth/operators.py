"""The ways to grow a network, each with its rule for depth, its rule for width, and what its official code does besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_peft.structure.edits import Edit, Operator
from lightning_peft_plugins.growth._layer_growth import depth_operators as depth
from lightning_peft_plugins.growth._layer_growth.lemon import lemon, with_eps
from lightning_peft_plugins.growth._layer_growth.msg import msg
from lightning_peft_plugins.growth._layer_growth.net2net import aki, net2net
from lightning_peft_plugins.growth._layer_growth.residual_writers import writers_of_all


@dataclass(frozen=True)
class GrowthOperator:
    """A way to grow.

    Attributes:
        sources: ``(blocks now, blocks then)`` to the old position of every block.
        blocks: What gives new blocks other values than those of their source.
        width: What gives wider tensors their values; ``None`` for operators that only deepen.
        prepare: Completes a width edit.
        optimizer_state: What the official code does with the optimizer.
        restart_steps: Whether it counts Adam's steps from 0 again.
        lr: What it does with the learning rate.
        masked: Whether new parts are let in gradually.
        learnt: Whether values come from an operator that is learnt at the moment of growth.
    """

    sources: Callable[[int, int], list[int]]
    blocks: Operator | None = None
    width: Operator | None = None
    prepare: Callable[[Edit], Edit] = dict
    optimizer_state: Literal["reset", "copy", "pad"] = "reset"
    restart_steps: bool = False
    lr: str = "continue"
    masked: bool = False
    learnt: bool = False

    @property
    def widens(self) -> bool:
        """Whether it can give wider tensors their values."""
        return self.learnt or self.width is not None

    def settings(self, blocks: Iterable[nn.Module], outputs: list[str]) -> dict[str, Any]:
        """What a depth edit that copies some blocks must say for :attr:`blocks`."""
        return {"zeroed": writers_of_all(blocks, outputs)} if self.keeps_function else {}

    @property
    def keeps_function(self) -> bool:
        """Whether it promises that a deepened network computes what it did."""
        return self.blocks is depth.zeroed


OPERATORS = {
    "stack": GrowthOperator(depth.stacked, lr="rewarm:1%"),
    "interpolate": GrowthOperator(depth.interpolated, lr="rewarm:1%"),
    "last-k": GrowthOperator(depth.last_repeated, optimizer_state="pad"),
    "zero": GrowthOperator(depth.stacked, depth.zeroed, optimizer_state="pad"),
    "stackedbert": GrowthOperator(depth.stacked, optimizer_state="copy", restart_steps=True),
    "net2net": GrowthOperator(depth.stacked, depth.zeroed, net2net),
    "fpi": GrowthOperator(depth.stacked, None, net2net),
    "aki": GrowthOperator(depth.last_repeated, None, aki),
    "lemon": GrowthOperator(depth.paired, depth.zeroed, lemon, with_eps),
    "msg": GrowthOperator(depth.last_repeated, depth.drawn, msg, optimizer_state="pad", masked=True),
    "ligo": GrowthOperator(depth.stacked, learnt=True),
}
