"""A calibration with a folder goes on where it was killed, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_toys import calibrate, deep, values
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.structure import journal
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.low_rank_pair import LowRankPair
from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.toys import ToyWanda
from lightning_peft.testing.trace import difference


class Killed(RuntimeError):
    pass


class Drawing(ToyWanda):
    """Prunes, and adds noise of its own; dies at a block."""

    def __init__(self, dies: int = -1, **settings: Any) -> None:
        super().__init__(**settings)
        self.dies = dies

    def config(self) -> dict[str, Any]:
        return {}

    def calibrate(self, block: CalibrationBlock) -> None:
        super().calibrate(block)
        for layer in block.inside(self.select(block.root)).values():
            noise: Any = layer
            noise.weight += 0.01 * torch.randn(noise.weight.shape, generator=block.generator) + 0.01 * torch.rand(())
        if block.position == self.dies:
            raise Killed


@pytest.mark.parametrize("dies", [0, 2, 3])
@pytest.mark.parametrize("kept", [False, True], ids=["a new module", "the module as it was left"])
def test_a_killed_calibration_goes_on_bit_for_bit(dies: int, kept: bool, tmp_path: Path) -> None:
    expected, whole = deep(), Drawing()
    calibrate(expected, whole)
    module = deep()
    with pytest.raises(Killed):
        calibrate(module, Drawing(dies), folder=tmp_path)
    again, target = Drawing(), module if kept else deep()
    calibrate(target, again, folder=tmp_path)
    assert difference(values(expected), values(target)) is None
    assert again.pruned == whole.pruned


def test_a_finished_calibration_is_not_done_again(tmp_path: Path) -> None:
    module = deep()
    calibrate(module, ToyWanda(), folder=tmp_path)
    other, method = deep(), ToyWanda()
    method.calibrate = lambda block: pytest.fail("done already")  # type: ignore[method-assign]
    calibrate(other, method, folder=tmp_path)
    assert difference(values(module), values(other)) is None


OTHERS: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], str]] = {
    "weights": (lambda: (deep(1), ToyWanda(), loader()), "with other weights"),
    "methods": (lambda: (deep(), ToyWanda(0.25), loader()), "with other methods or arguments"),
    "batches": (lambda: (deep(), ToyWanda(), loader(seed=1)), "with other batches"),
    "blocks": (lambda: (deepened(Plain, 2)(), ToyWanda(), loader()), "with other blocks"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_another_calibration_is_refused(what: str, tmp_path: Path) -> None:
    calibrate(deep(), ToyWanda(), folder=tmp_path)
    make, message = OTHERS[what]
    module, method, batches = make()
    before = values(module)
    with pytest.raises(CheckpointError, match=message):
        calibrate(module, method, batches, folder=tmp_path)
    assert difference(before, values(module)) is None


@pytest.mark.parametrize("content", [b"", b"no file of torch"])
def test_a_damaged_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    calibrate(deep(), ToyWanda(), folder=tmp_path)
    (tmp_path / "block-0001.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?s)block-0001\.pt is damaged.*Remove it"):
        calibrate(deep(), ToyWanda(), folder=tmp_path)
    for path in sorted(tmp_path.iterdir())[1:]:
        path.unlink()
    calibrate(deep(), ToyWanda(), folder=tmp_path)


class Splitting(Method):
    """Replaces a layer of each block by a journalled edit."""

    lane = Lane.STRUCTURE
    replacements = (LowRankPair,)

    def calibrate(self, block: CalibrationBlock) -> None:
        journal.edit(block.root, self.put(block.root, f"{block.name}.fc1", LowRankPair(2)))


class Breaking(Method):
    lane = Lane.STRUCTURE

    def calibrate(self, block: CalibrationBlock) -> None:
        block.module.fc1 = nn.Linear(16, 16, bias=False)


def test_journalled_changes_of_structure_go_on_too(tmp_path: Path) -> None:
    module = deep()
    calibrate(module, [Splitting(), ToyWanda()], folder=tmp_path)
    assert len(journal.journal_of(module)) == 4
    (tmp_path / "block-0003.pt").unlink()
    again = deep()
    calibrate(again, [Splitting(), ToyWanda()], folder=tmp_path)
    assert difference(values(module), values(again)) is None
    assert journal.journal_of(again) == journal.journal_of(module)
    with pytest.raises(MisconfigurationException, match=r"breaking changed the names or shapes.*with an edit"):
        calibrate(deep(), Breaking())


def test_a_loader_that_shuffles_with_the_global_random_numbers_is_the_same_in_every_pass(tmp_path: Path) -> None:
    batches = torch.utils.data.DataLoader(loader().dataset, batch_size=8, shuffle=True)
    module, again = deep(), deep()
    calibrate(module, ToyWanda(), batches, folder=tmp_path)
    (tmp_path / "block-0003.pt").unlink()
    torch.manual_seed(9)  # as another process may begin
    calibrate(again, ToyWanda(), batches, folder=tmp_path)
    assert difference(values(module), values(again)) is None
