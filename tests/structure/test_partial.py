"""Checkpoints of what was trained: no base in the file, and exactly the same training and network with the base at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

import lightning_peft
from lightning_peft import PERP, LayerGrowth
from lightning_peft.structure.checkpoint import KEY, CheckpointError
from lightning_peft.structure.partial import digest
from lightning_peft.testing.callbacks import StopAfter, every_epoch
from lightning_peft.testing.modules import BatchNorm, Plain, deepened, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import ToyLowRank, ToyScale, ToyThreshold, ToyTuning
from lightning_peft.testing.trace import difference

BASE = 7  # the seed of the base; a module built with another has another base


class Small(ToyTuning):
    """Biases alone, in the file too."""

    checkpoint = "trained"


def low_rank() -> list[Any]:
    return [PERP(("bias",), rank=2, exclude=(), checkpoint="trained")]


def biases() -> list[Any]:
    return [Small(), ToyThreshold()]


def beside_a_reparametrisation() -> list[Any]:
    return [Small(), ToyScale(targets=["model.0"])]


def beside_parts() -> list[Any]:
    return [Small(), ToyLowRank()]


def run(methods: Any, **settings: Any) -> Any:
    return fit(methods(), **{"seed": BASE, "max_epochs": 3, **settings})


def built(style: type[Plain] = Plain) -> Plain:
    torch.manual_seed(BASE)
    return style()


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("style", [Plain, BatchNorm])
@pytest.mark.parametrize("methods", [low_rank, biases, beside_a_reparametrisation, beside_parts])
def test_resumes_and_loads_as_from_a_full_file(methods: Any, style: type[Plain], averaged: bool, tmp_path: Path) -> None:
    def others() -> list[Any]:
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    whole = run(methods, style=style, after=[*others(), every_epoch(tmp_path)])
    stopped = run(methods, style=style, after=[*others(), StopAfter()])
    stopped.trainer.save_checkpoint(tmp_path / "ended.ckpt")
    for name in ("epoch=0", "epoch=1", *([] if averaged else ["ended"])):  # a fit that has ended holds the average alone
        resumed = run(methods, style=style, after=others(), resume=tmp_path / f"{name}.ckpt")
        assert_same(whole, resumed, f"uninterrupted against resumed from {name}")
    wanted = dict(stopped.module.state_dict())
    for name in ("epoch=0", "ended"):
        path = tmp_path / f"{name}.ckpt"
        torch.manual_seed(BASE)
        loaded = lightning_peft.load_from_checkpoint(style, path)
        assert difference(wanted, dict(loaded.state_dict())) is None, name
        assert type(loaded) is style
        lightning_peft.bake_checkpoint(path, tmp_path / "baked.ckpt", base=built(style))
        style.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)
        baked = torch.load(tmp_path / "baked.ckpt", weights_only=True)["state_dict"]
        assert difference(wanted, {key: baked[key] for key in wanted}) is None, name


def test_a_weight_is_in_no_file_when_only_parts_beside_it_are_trained(tmp_path: Path) -> None:
    run(beside_parts, after=[every_epoch(tmp_path)], max_epochs=1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["model.0.bias", "model.2.bias", "model.4.bias"]
    assert checkpoint[KEY]["tensors"] == checkpoint[KEY]["part_weights"] == {}
    assert all(part["state"]["up"].any() for stack in checkpoint[KEY]["parts"].values() for part in stack)


def test_what_is_in_the_file(tmp_path: Path) -> None:
    run(low_rank, after=[every_epoch(tmp_path)], max_epochs=1)
    run(low_rank, after=[ModelCheckpoint(tmp_path, filename="light", save_weights_only=True)], max_epochs=1)
    for name in ("epoch=0", "light"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert list(checkpoint["state_dict"]) == ["model.0.bias", "model.2.bias", "model.4.bias"]
        weights = ["model.0.weight", "model.2.weight", "model.4.weight"]
        factors = [f"model.{layer}.parametrizations.weight.0.{factor}" for layer in (0, 2, 4) for factor in "ab"]
        assert list(checkpoint[KEY]["tensors"]) == factors
        assert checkpoint[KEY]["base"] == {each: digest(built().get_parameter(each)) for each in weights}


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
@pytest.mark.parametrize("methods", [low_rank, beside_parts])
@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_evaluates(same: bool, methods: Any, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.logits(batch[0]))

    run(methods, style=Watched, after=[every_epoch(tmp_path)], max_epochs=1)
    runner, path = trainer(callbacks=methods() if same else [ToyTuning()]), tmp_path / "epoch=0.ckpt"
    found: Any = runner.predict(built(), loader(8), ckpt_path=path, weights_only=True)
    torch.testing.assert_close(found[0], seen[0])


def test_another_base_is_refused(tmp_path: Path) -> None:
    run(low_rank, after=[every_epoch(tmp_path)], max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    match = r"trained on another base: model\.0\.weight holds other values in this model, and 2 more differ"
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        fit(low_rank(), module=module, resume=path, max_epochs=2)
    assert difference(before, dict(module.state_dict())) is None
    torch.manual_seed(1)
    with pytest.raises(CheckpointError, match=match):
        lightning_peft.load_from_checkpoint(Plain, path)
    with pytest.raises(CheckpointError, match=match):
        lightning_peft.bake_checkpoint(path, tmp_path / "x.ckpt", base=Plain())
    with pytest.raises(CheckpointError, match=r"only the trained tensors, not model\.0\.weight and 2 more .* give it to base="):
        lightning_peft.bake_checkpoint(path, tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_a_network_that_grows(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [Small(), LayerGrowth(start=1, to=2, at="step:2")]

    style = deepened(Plain)
    whole = run(methods, style=style, after=[every_epoch(tmp_path)])
    resumed = run(methods, style=style, resume=tmp_path / "epoch=0.ckpt")
    assert_same(whole, resumed, "uninterrupted against resumed, grown")
    torch.manual_seed(BASE)
    loaded = lightning_peft.load_from_checkpoint(style, tmp_path / "epoch=2.ckpt")
    assert difference(dict(whole.module.state_dict()), dict(loaded.state_dict())) is None


def test_a_second_fit_leaves_out_what_the_class_builds(tmp_path: Path) -> None:
    first = run(low_rank, max_epochs=1)
    again = fit(low_rank(), module=first.module, after=[every_epoch(tmp_path)])
    torch.manual_seed(BASE)
    loaded = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    assert difference(dict(again.module.state_dict()), dict(loaded.state_dict())) is None
