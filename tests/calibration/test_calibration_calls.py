"""What blocks are called with while they are calibrated: recorded, bounded in memory, repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_toys import calibrate, deep
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.capture.recorded_calls import RecordedCalls
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method


class Recording(Method):
    """Remembers what its blocks were given."""

    lane = Lane.MASK

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.spilled: list[int] = []
        self.kept: list[int] = []

    def calibrate(self, block: CalibrationBlock) -> None:
        self.given += [call.args[0] for call in block.calls]
        self.spilled.append(block.calls.spilled)
        self.kept.append(block.calls._used)


def test_no_more_inputs_are_kept_in_memory_than_was_asked_for(tmp_path: Path) -> None:
    whole, bounded = Recording(), Recording()
    calibrate(deep(), whole)
    size = whole.given[0].nbytes
    calibrate(deep(), bounded, memory=size + 1, folder=tmp_path)
    assert whole.spilled == [0] * 4
    assert bounded.spilled == [3] * 4
    assert max(bounded.kept) == size
    assert all(torch.equal(a, b) for a, b in zip(whole.given, bounded.given, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"block-{place:04d}.pt" for place in range(4)]


def test_calls_run_under_the_precision_of_the_step() -> None:
    class Typed(Method):
        lane = Lane.MASK

        def calibrate(self, block: CalibrationBlock) -> None:
            inner: Any = block.module
            block.watch({"fc2": inner.fc2}, lambda name, inputs: seen.append(inputs.dtype))

    seen: list[torch.dtype] = []
    calibrate(deep(), Typed(), precision="bf16-mixed")
    assert seen == [torch.bfloat16] * 16


class Growing:
    """Such a cache as attention changes while it runs."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


def test_a_call_is_given_back_as_it_was_every_time(tmp_path: Path) -> None:
    for memory in (10**6, 0):
        calls, cache, mask = RecordedCalls(memory, tmp_path), Growing(), torch.ones(2)
        cache.keys.append(mask)
        calls.record((torch.zeros(3), None), {"cache": cache, "mask": mask, "run": print, "scale": 0.5})
        cache.keys.append(torch.ones(1))
        mask.zero_()
        for _ in range(2):
            (given,) = calls
            assert given.args[1] is None
            assert given.kwargs["run"] is print
            assert given.kwargs["scale"] == 0.5
            assert given.kwargs["mask"].tolist() == [1, 1]
            assert given.kwargs["cache"].keys[0] is given.kwargs["mask"]
            assert len(given.kwargs["cache"].keys) == 1
            given.kwargs["cache"].keys.append(given.args[0])
            given.args[0].fill_(7)
        assert len(list(tmp_path.iterdir())) == (memory == 0)
        assert calls[0:1][0].args[0].tolist() == [0, 0, 0]
        calls.clear()
        assert not list(tmp_path.iterdir())


def test_a_generator_among_the_arguments_is_refused() -> None:
    calls = RecordedCalls(10, Path())
    with pytest.raises(MisconfigurationException, match="cannot be copied"):
        calls.record(((n for n in range(2)),), {})


def test_gradients_can_be_enabled_on_what_was_recorded() -> None:
    class Learning(Method):
        lane = Lane.MASK

        def calibrate(self, block: CalibrationBlock) -> None:
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                block.run(block.calls[0]).sum().backward()
            learnt.append(all(parameter.grad is not None for parameter in block.module.parameters()))

    learnt: list[bool] = []
    calibrate(deep(), Learning())
    assert learnt == [True] * 4
