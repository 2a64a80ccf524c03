"""Deltas beside layers whose channels are cut, and adapters that stay: files, switches, further training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_peft
from lightning_peft import DoRA, LoRA, PiSSA, StructuredPruning
from lightning_peft.attaching.hook_checks import ConflictError
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv, Plain
from lightning_peft.testing.runs import assert_same, fit


def both() -> list[Any]:
    return [LoRA(rank=2, targets="all-weights", exclude=None, checkpoint="full"), StructuredPruning(0.3, start=2)]


def test_deltas_follow_a_cut_and_resume(tmp_path: Path) -> None:
    whole = fit(both(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=3)
    plain = fit([LoRA(rank=2, targets="all-weights", exclude=None)], style=Conv, max_epochs=3)
    assert sizes(whole.module) != sizes(plain.module), "nothing was cut"
    resumed = fit(both(), style=Conv, resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(whole, resumed, "uninterrupted against resumed after the cut")


def test_what_was_taken_off_a_weight_follows_its_cut(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [PiSSA(rank=2, targets="all-weights", exclude=None, checkpoint="full"), StructuredPruning(0.3, start=2)]

    whole = fit(methods(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=3)
    plain = fit([PiSSA(rank=2, targets="all-weights", exclude=None)], style=Conv, max_epochs=3)
    assert sizes(whole.module) != sizes(plain.module), "nothing was cut"
    resumed = fit(methods(), style=Conv, resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(whole, resumed, "uninterrupted against resumed after the cut")


def test_a_file_of_a_cut_network_bakes(tmp_path: Path) -> None:
    whole = fit(both(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=2)
    lightning_peft.bake_checkpoint(tmp_path / "epoch=1.ckpt", tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state, dict(whole.module.state_dict()), atol=1e-6, rtol=1e-6)


def sizes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters()]


class Wide(Plain):
    """A base much larger than its adapter."""

    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))


def test_a_file_of_what_was_trained_is_small_and_needs_its_base(tmp_path: Path) -> None:
    def saved(name: str, checkpoint: Any) -> Path:
        keep = ModelCheckpoint(tmp_path / name, save_last=True)
        torch.manual_seed(0)
        fit([LoRA(rank=2, checkpoint=checkpoint), keep], module=Wide())
        return tmp_path / name / "last.ckpt"

    small, large = saved("small", "trained"), saved("large", "full")
    assert small.stat().st_size < large.stat().st_size / 20
    torch.manual_seed(0)
    base, other = Wide(), Wide()
    lightning_peft.bake_checkpoint(small, tmp_path / "plain.ckpt", base=base)
    expected = torch.load(large, weights_only=True)["state_dict"]
    found = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"model\.0\.weight"):
        lightning_peft.bake_checkpoint(small, tmp_path / "wrong.ckpt", base=other)


def answer(module: Plain) -> Tensor:
    with torch.no_grad():
        found = module.eval().model(torch.linspace(-1, 1, 64).view(4, 16))
    module.train()
    return found  # type: ignore[no-any-return]


def test_an_adapter_that_stays_is_switched_and_trains_on() -> None:
    torch.manual_seed(0)
    module = Plain()
    before = answer(module)
    fit([LoRA(rank=2, keep=True)], module=module)
    learnt = answer(module)
    assert not torch.equal(learnt, before)
    with lightning_peft.switch(module, "lora", on=False):
        assert torch.equal(answer(module), before)
    fit([LoRA(rank=2)], module=module)
    assert not torch.equal(answer(module), learnt)
    with pytest.raises(Exception, match="nothing at all"):
        lightning_peft.switch(module, "lora", on=False)


def test_two_adapters_on_layers_of_their_own_and_not_on_one() -> None:
    first, second = (LoRA(rank=2, targets=[f"model.{place}"], name=f"of_{place}", keep=True) for place in (0, 2))
    torch.manual_seed(0)
    module = Plain()
    before = answer(module)
    fit([first, second], module=module)
    with lightning_peft.switch(module, "of_0", on=False), lightning_peft.switch(module, "of_2", on=False):
        assert torch.equal(answer(module), before)
    with lightning_peft.switch(module, "of_0", on=False):
        assert not torch.equal(answer(module), before)
    with pytest.raises(ConflictError, match=r"lora and dora both put a low-rank delta on model\.0\.weight|dora and lora both"):
        fit([LoRA(rank=2), DoRA(rank=2)], style=Plain)
