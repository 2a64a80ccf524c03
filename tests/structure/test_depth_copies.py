"""Copies of blocks: what belongs to a block goes with it, who watches it stays with the original."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import nn

from lightning_peft.structure.depth import copied


class Watcher:
    """Cannot be copied, as a profiler's records."""

    def __init__(self) -> None:
        self.calls, self.lock = 0, threading.Lock()

    def see(self, *args: Any, name: str = "") -> None:
        self.calls += 1


def test_hooks_of_others_are_left_out() -> None:
    block, watcher = nn.Sequential(nn.Linear(2, 2)), Watcher()
    block.register_forward_hook(watcher.see)
    block[0].register_forward_pre_hook(functools.partial(watcher.see, name="0"))
    twin = copied(block, masked=True)
    twin(torch.ones(1, 2))
    assert watcher.calls == 0
    block(torch.ones(1, 2))
    assert watcher.calls == 2


class Scaling(nn.Module):
    """Hooks into a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(2.0)), nn.Linear(2, 2)
        self.layer.register_forward_hook(self.scaled)

    def scaled(self, layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def test_hooks_of_its_own_go_with_a_block() -> None:
    block, inputs = Scaling(), torch.ones(1, 2)
    twin = copied(block, masked=True)
    assert torch.equal(twin(inputs), block(inputs))
    twin.scale.data.mul_(3.0)
    assert torch.allclose(twin(inputs), 3 * block(inputs)), "it computes with its own parameters"
