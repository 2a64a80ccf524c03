from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft_plugins.regularizers._pskd import soft_label_memory as module
from lightning_peft_plugins.regularizers._pskd.batch_index import index_in_batch
from lightning_peft_plugins.regularizers._pskd.prediction_outbox import PredictionOutbox
from lightning_peft_plugins.regularizers._pskd.soft_label_memory import SoftLabelMemory, fits_memory

torch.set_num_threads(1)
writes = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=5), max_size=8)


def distributions(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)).softmax(1)


@settings(deadline=None, max_examples=50)
@given(writes, st.sampled_from(["ram", "mapped"]), st.booleans())
def test_behaves_like_a_dict(batches: list[list[int]], storage: str, fixed: bool) -> None:
    memory = SoftLabelMemory(12 if fixed else None, 3, storage=storage)
    expected: dict[int, Tensor] = {}
    for number, batch in enumerate(batches):
        rows = distributions(len(batch), number)
        index = torch.tensor(batch)
        got, seen = memory.read(index)
        assert seen == sum(i in expected for i in batch)
        assert torch.equal(got, torch.stack([expected.get(i, torch.zeros(3)) for i in batch]))
        memory.write(index, rows)
        expected.update(zip(batch, rows, strict=True))
    assert {i for i, seen in enumerate(memory.seen.tolist()) if seen} == set(expected)
    highest = 1 + max((i for batch in batches for i in batch), default=-1)
    assert memory.size == (12 if fixed else highest)
    assert len(memory.state()["probabilities"]) == memory.size


@pytest.mark.parametrize("size", [4, None])
def test_nobody_is_counted_who_was_not_seen_at_an_epochs_end(size: int | None) -> None:
    memory, first, later = SoftLabelMemory(size, 3), torch.tensor([0, 1, 2]), torch.tensor([2, 3])
    memory.write(first, distributions(3))
    memory.forget_visits()
    assert (memory.read(first)[1], memory.read(later)[1]) == (3, 1)
    memory.write(later, distributions(2))
    memory.forget_visits()
    assert memory.read(later)[1] == 2


def test_mapped_file_has_no_name_and_goes_with_the_memory(tmp_path: Path) -> None:
    memory = SoftLabelMemory(1000, 3, storage="mapped", folder=tmp_path / "new")
    memory.write(torch.tensor([999]), distributions(1))
    assert memory.mapped
    assert list((tmp_path / "new").iterdir()) == []
    assert torch.equal(memory.probabilities[999], distributions(1)[0])


def test_auto_maps_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAPPED_FROM", 1200)
    assert not SoftLabelMemory(99, 3, folder=tmp_path).mapped
    assert SoftLabelMemory(100, 3, folder=tmp_path).mapped
    assert not SoftLabelMemory(100, 3, dtype=torch.float16, folder=tmp_path).mapped
    growing = SoftLabelMemory(None, 3, folder=tmp_path)
    growing.write(torch.tensor([1]), distributions(1))
    assert not growing.mapped
    growing.write(torch.tensor([400]), distributions(1, 1))
    assert growing.mapped
    assert torch.equal(growing.probabilities[[1, 400]], torch.cat([distributions(1), distributions(1, 1)]))


def test_a_full_disk_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="could not be mapped to a file"):
        SoftLabelMemory(2**42, 3, storage="mapped", folder=tmp_path)


def test_half_precision_rows_come_back_as_float32() -> None:
    memory = SoftLabelMemory(4, 3, dtype=torch.float16)
    memory.write(torch.tensor([2]), distributions(1))
    rows, _ = memory.read(torch.tensor([2]))
    assert rows.dtype == torch.float32
    assert memory.state()["probabilities"].dtype == torch.float16
    assert torch.allclose(rows, distributions(1), atol=1e-3)


def test_rows_that_are_not_finite_are_left_out() -> None:
    memory = SoftLabelMemory(4, 3)
    memory.write(torch.tensor([0, 1]), distributions(2))
    broken = distributions(3, 5)
    broken[1, 2] = float("nan")
    memory.write(torch.tensor([0, 1, 2]), broken)
    assert torch.equal(memory.probabilities[1], distributions(2)[1])
    assert torch.equal(memory.probabilities[[0, 2]], broken[[0, 2]])
    assert memory.seen.tolist() == [True, True, True, False]


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"Sample index {index} is outside"):
        SoftLabelMemory(4, 3).read(torch.tensor([0, index]))


def test_identifiers_are_not_positions() -> None:
    with pytest.raises(MisconfigurationException, match="must be the sample's position"):
        SoftLabelMemory(None, 3).read(torch.tensor([987654321]))


@pytest.mark.parametrize("storage", ["ram", "mapped"])
def test_state_round_trip(storage: Any) -> None:
    memory = SoftLabelMemory(6, 3, storage=storage)
    memory.write(torch.tensor([1, 4]), distributions(2))
    state = memory.state()
    again = SoftLabelMemory(6, 3, storage=storage)
    again.load(state["probabilities"], state["seen"])
    assert torch.equal(again.probabilities, memory.probabilities)
    assert torch.equal(again.seen, memory.seen)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"probabilities": torch.full((6, 3), torch.inf)}, False),
        ({"probabilities": torch.full((6, 3), torch.nan)}, False),
        ({"probabilities": torch.full((6, 3), -0.1)}, False),
        ({"probabilities": torch.ones(6, 3, dtype=torch.int64)}, False),
        ({"probabilities": torch.ones(6)}, False),
        ({"seen": torch.ones(5, dtype=torch.bool)}, False),
        ({"seen": torch.ones(6)}, False),
        ({"fixed": 1}, False),
    ],
)
def test_what_a_state_may_hold(change: dict[str, Any], fits: bool) -> None:
    assert fits_memory(SoftLabelMemory(6, 3).state() | change) is fits


class Ranks:
    """Threads that stand for ranks: a collective stacks what each of them brings."""

    def __init__(self, count: int) -> None:
        self.brought: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count)

    def all_gather(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(tensor: Tensor) -> Tensor:
            self.brought[rank] = tensor.clone()
            self.barrier.wait(20)
            stack = torch.stack([item for item in self.brought if item is not None])
            self.barrier.wait(20)
            return stack

        return gather

    def merge(self, memories: list[SoftLabelMemory]) -> None:
        threads = [threading.Thread(target=memory.merge, args=(self.all_gather(r),)) for r, memory in enumerate(memories)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 11), max_size=4)] * 3), max_size=6), st.booleans(), st.integers(1, 5))
def test_merge_equals_gathering_every_step(steps: list[tuple[list[int], ...]], fixed: bool, chunk: int) -> None:
    """Against the published way: after each step all ranks write what all ranks saw, in rank order."""
    memories = [SoftLabelMemory(12 if fixed else None, 3) for _ in range(3)]
    expected, seen = torch.zeros(12, 3), torch.zeros(12, dtype=torch.bool)
    for number, batches in enumerate(steps):
        for rank, (memory, batch) in enumerate(zip(memories, batches, strict=True)):
            rows = distributions(len(batch), 10 * number + rank)
            memory.write(torch.tensor(batch, dtype=torch.int64), rows)
            for index, row in zip(batch, rows, strict=True):
                expected[index], seen[index] = row, True
        if number == 2:  # a checkpoint in the middle of the epoch
            Ranks(3).merge(memories)
    before, module.MERGE_BYTES = module.MERGE_BYTES, chunk * 12
    try:
        Ranks(3).merge(memories)
    finally:
        module.MERGE_BYTES = before
    for memory in memories:
        size = memory.size
        assert torch.equal(memory.probabilities, expected[:size])
        assert torch.equal(memory.seen, seen[:size])
        assert not seen[size:].any()


def test_outbox_keeps_an_interrupted_batch_back() -> None:
    from types import SimpleNamespace as Space

    progress = Space(processed=3)
    trainer: Any = Space(current_epoch=1, fit_loop=Space(epoch_loop=Space(batch_progress=Space(current=progress))))
    memory, outbox = SoftLabelMemory(4, 3), PredictionOutbox()
    outbox.put(1, 3, torch.tensor([2]), distributions(1))
    assert outbox.holds(1, 3)
    outbox.deliver_processed(memory, trainer)
    assert not memory.seen.any()
    progress.processed = 4
    outbox.deliver_processed(memory, trainer)
    assert memory.seen.tolist() == [False, False, True, False]
    assert not outbox.holds(1, 3)


def test_index_of_a_named_tuple_and_an_object() -> None:
    from dataclasses import dataclass
    from typing import NamedTuple

    class Row(NamedTuple):
        x: Tensor
        index: list[int]

    @dataclass
    class Batch:
        ids: Tensor

    assert index_in_batch(Row(torch.zeros(2), [4, 1]), "index").tolist() == [4, 1]
    assert index_in_batch(Batch(torch.tensor([3, 0], dtype=torch.int32)), "ids").dtype == torch.int64
    with pytest.raises(MisconfigurationException, match="one integer per sample"):
        index_in_batch(Batch(torch.tensor([[3], [0]])), "ids")
