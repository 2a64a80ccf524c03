"""Every full checkpoint is an ordinary one: plain names, the weights layers saw, and what training needs in the section."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor

import lightning_peft
from lightning_peft import PERP, MaskedPruning, Method, NMSparsity, WeightCompander
from lightning_peft.structure.checkpoint import KEY, CheckpointError
from lightning_peft.testing.callbacks import FailAt, PlannedError, StopAfter, every_epoch
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import BatchNorm, Configured, Conv, Plain, Shared, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference

OLD = Path(__file__).parents[1] / "fixtures" / "format2.ckpt.gz"


def toys() -> list[Method]:
    return [ToyScale(), ToyThreshold(), ToyEntropy()]


def pruned() -> list[Method]:
    return [MaskedPruning(0.5, "magnitude", start=2, every=2), WeightCompander()]


class Seen(Callback):
    """What each validation of a fit answered, with ``x`` in the precision of the Trainer."""

    def __init__(self) -> None:
        self.epochs: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self.epochs.append(pl_module.logits(batch[0]).clone())


def answer(module: Any, **settings: Any) -> Tensor:
    """The same of a module on its own, from a Trainer without a method."""
    seen = Seen()
    trainer(callbacks=[seen], **settings).validate(module, loader(8), verbose=False)
    return seen.epochs[0]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
@pytest.mark.parametrize(
    ("methods", "style"),
    [
        (toys, Plain),
        (toys, Configured),
        (toys, Shared),
        (pruned, BatchNorm),
        (lambda: [NMSparsity("2:4", "mdgf-linear", exclude=())], Plain),
        (lambda: [MaskedPruning(0.5, "magnitude", start=2, every=2, pattern="channel"), PERP(exclude=())], Conv),
    ],
    ids=["toys", "configured", "shared", "pruned", "soft", "low-rank"],
)
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"averaged": True}], ids=["plain", "amp", "ema"])
def test_lightning_alone_loads_what_validation_saw(
    methods: Callable[[], list[Method]], style: type[Plain], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = dict(settings)
    seen, average = Seen(), [EMAWeightAveraging(decay=0.5)] if settings.pop("averaged", False) else []
    fit(methods(), style=style, before=average, after=[seen, every_epoch(tmp_path)], max_epochs=3, **settings)
    for epoch, answered in enumerate(seen.epochs):
        path = tmp_path / f"epoch={epoch}.ckpt"
        module = style.load_from_checkpoint(path, weights_only=True)
        assert list(torch.load(path, weights_only=True)["state_dict"]) == list(module.state_dict())
        assert torch.equal(answered, answer(module, **settings)), epoch


def test_a_file_grows_only_by_what_differs(tmp_path: Path) -> None:
    """Three weights of 16 x 16, 16 x 16 and 3 x 16 in float32 are 2,240 bytes; those of which some are zero differ."""

    class Narrow(ToyThreshold):
        def __init__(self, threshold: float = 0.05) -> None:
            super().__init__(threshold, targets=["model.4"])

    fit([ToyThreshold(0.0)], after=[every_epoch(tmp_path / "same")])
    fit([Narrow()], after=[every_epoch(tmp_path / "one")])
    same, one = (torch.load(tmp_path / each / "epoch=0.ckpt", weights_only=True) for each in ("same", "one"))
    assert same[KEY]["tensors"] == {}
    assert list(one[KEY]["tensors"]) == ["model.4.parametrizations.weight.original"]
    assert list(same[KEY]["seen"]) == ["model.0.weight", "model.2.weight", "model.4.weight"]


@pytest.mark.parametrize("first", [True, False], ids=["ema-first", "ema-last"])
@pytest.mark.parametrize("methods", [toys, pruned])
def test_files_of_an_averaging_fit(methods: Callable[[], list[Method]], first: bool, tmp_path: Path) -> None:
    """During the fit, after it and after a failure: resumed exactly, and baked to what plain Lightning loads."""

    def average() -> dict[str, Any]:
        return {"before": [EMAWeightAveraging(decay=0.5)]} if first else {}

    def behind() -> list[Callback]:
        return [] if first else [EMAWeightAveraging(decay=0.5)]

    full = fit(methods(), after=[*behind(), every_epoch(tmp_path)], max_epochs=3, **average())
    stopped = fit(methods(), after=[*behind(), StopAfter()], max_epochs=3, **average())
    stopped.trainer.save_checkpoint(tmp_path / "ended.ckpt")
    for name in ("epoch=0", "epoch=1", "ended"):
        path = tmp_path / f"{name}.ckpt"
        plain = Plain.load_from_checkpoint(path, weights_only=True)
        baked = lightning_peft.load_from_checkpoint(Plain, path)
        found = difference(dict(baked.state_dict()), dict(plain.state_dict()))
        assert found is None, f"{name}: {found}"
    for name in ("epoch=0", "epoch=1"):
        resumed = fit(methods(), seed=4, after=behind(), resume=tmp_path / f"{name}.ckpt", max_epochs=3, **average())
        assert_same(full, resumed, name)
    ended = torch.load(tmp_path / "ended.ckpt", weights_only=True)["state_dict"]
    assert difference(dict(ended), dict(stopped.module.state_dict())) is None


class Failing(FailAt):
    """Saves once the methods have left the module."""

    def __init__(self, path: Path) -> None:
        super().__init__(6)
        self.path = path

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_file_saved_after_a_failure(averaged: bool, tmp_path: Path) -> None:
    def others() -> list[Callback]:
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    full = fit(toys(), after=others(), max_epochs=3, data=loader(8))
    with pytest.raises(PlannedError):
        fit(toys(), after=[*others(), _fail_at(2, tmp_path / "x.ckpt")], max_epochs=3, data=loader(8))
    resumed = fit(toys(), seed=4, after=others(), resume=tmp_path / "x.ckpt", max_epochs=3, data=loader(8))
    assert_same(full, resumed, "uninterrupted against resumed after a failure")
    assert list(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == list(Plain().state_dict())


def _fail_at(step: int, path: Path) -> Failing:
    failing = Failing(path)
    failing.step = step
    return failing


class Hooked(Plain):
    """Leaves its first bias out of checkpoints, as one leaves out a backbone that is at hand, and notes the names it sees."""

    names: dict[str, list[str]]

    def build(self) -> None:
        super().build()
        self.names = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.names["saved"] = list(checkpoint["state_dict"])
        self.left_out = checkpoint["state_dict"].pop("model.0.bias").clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.names["loaded"] = list(checkpoint["state_dict"])
        checkpoint["state_dict"]["model.0.bias"] = torch.full((16,), 0.25)


def test_hooks_of_the_module_see_an_ordinary_checkpoint(tmp_path: Path) -> None:
    first = fit(toys(), style=Hooked, after=[every_epoch(tmp_path)]).module
    assert first.names["saved"] == list(Plain().state_dict())
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    run = fit(toys(), style=Hooked, after=[Look()], resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert run.module.names["loaded"] == [name for name in Plain().state_dict() if name != "model.0.bias"]
    assert torch.equal(seen[0]["model.0.bias"], torch.full((16,), 0.25))
    tensors = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)[KEY]["tensors"]
    assert all(torch.equal(seen[0][key], value) for key, value in tensors.items())


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_a_weight_that_the_modules_hook_exchanges_is_the_one_that_counts(how: str, tmp_path: Path) -> None:
    class Exchanging(Plain):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            if how == "in place":
                state["model.2.weight"].fill_(0.5)
            else:
                state["model.2.weight"] = torch.full((16, 16), 0.5)

    fit(toys(), style=Exchanging, after=[every_epoch(tmp_path)])
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append([pl_module.model[index].weight.detach().clone() for index in (0, 2)])

    fit(toys(), style=Exchanging, after=[Look()], resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(seen[0][0], saved["model.0.weight"])
    assert torch.equal(seen[0][1], torch.full((16, 16), 0.5))


def test_a_weight_edited_in_the_file(tmp_path: Path) -> None:
    """Evaluation takes it, resuming and baking refuse, and the refusal's advice works."""
    fit(toys(), after=[every_epoch(tmp_path)])
    path = tmp_path / "edited.ckpt"
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.2.weight"] = torch.full((16, 16), 0.5)
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"model\.2\.weight was changed in the file after it was saved"):
        fit(toys(), resume=path, max_epochs=2)
    with pytest.raises(CheckpointError, match=r"ModelClass\.load_from_checkpoint\(path\)"):
        lightning_peft.bake_checkpoint(path, tmp_path / "baked.ckpt")
    module = Plain.load_from_checkpoint(path, weights_only=True)
    wanted = answer(module)
    seen = Seen()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using")
        trainer(callbacks=[*toys(), seen]).validate(Plain(), loader(8), ckpt_path=path, weights_only=True, verbose=False)
    assert torch.allclose(seen.epochs[0], wanted, atol=1e-6)
    fit(toys(), module=module)


def test_weights_only_and_asynchronous_files(tmp_path: Path) -> None:
    seen = Seen()
    light = ModelCheckpoint(tmp_path, filename="light-{epoch}", save_top_k=-1, save_weights_only=True)
    fit(toys(), after=[seen, light], plugins=[AsyncCheckpointIO()], max_epochs=3)
    for epoch, answered in enumerate(seen.epochs):
        path = tmp_path / f"light-epoch={epoch}.ckpt"
        assert torch.equal(answered, answer(Plain.load_from_checkpoint(path, weights_only=True)))
        trained = trainer(callbacks=toys()).predict(Plain(), loader(8), ckpt_path=path, weights_only=True)
        assert torch.equal(answered, trained[0])  # type: ignore[index,arg-type]


def on_rank(folder: str) -> dict[str, Any]:
    inputs: list[Tensor] = []

    class Inputs(Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            inputs.append(batch[0])

    seen = Seen()
    run = fit(toys(), after=[Inputs(), seen, every_epoch(Path(folder))], strategy="ddp", devices=2, max_epochs=2)
    resumed = fit(toys(), seed=4, resume=Path(folder, "epoch=0.ckpt"), strategy="ddp", devices=2, max_epochs=2)
    same = difference(dict(run.module.state_dict()), dict(resumed.module.state_dict()))
    return {"answer": seen.epochs[0], "inputs": inputs[0], "resumed": same}


def test_two_processes(tmp_path: Path) -> None:
    ranks = run_ddp(f"{__file__}:on_rank", {"folder": str(tmp_path)})
    module = Plain.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True).eval()
    for rank in ranks:
        assert rank["resumed"] is None
        assert torch.equal(rank["answer"], module.logits(rank["inputs"]))


def test_names_in_training_stay_those_of_training() -> None:
    names = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            names.extend(pl_module.state_dict())

    fit([ToyScale()], after=[Look()])
    assert names[:2] == ["model.0.parametrizations.weight.original", "model.0.bias"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that the library wrote when checkpoints held training-time names: toys(), one epoch of Plain."""
    path = tmp_path / "format2.ckpt"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    return path


def test_a_file_of_format_2_resumes_evaluates_and_bakes(old: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(old, weights_only=True)
    assert checkpoint[KEY]["version"] == 2
    stored = checkpoint["state_dict"]
    wanted = {name: value for name, value in stored.items() if "parametrizations" not in name}
    for layer in (0, 2, 4):  # what ScaleMap and ThresholdMap say
        weight = (
            stored[f"model.{layer}.parametrizations.weight.original"] * stored[f"model.{layer}.parametrizations.weight.0.scale"]
        )
        wanted[f"model.{layer}.weight"] = weight * (weight.abs() >= 0.05)
    baked = lightning_peft.load_from_checkpoint(Plain, old)
    for name, value in baked.state_dict().items():
        torch.testing.assert_close(value, wanted[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using")
        predicted = trainer(callbacks=toys()).predict(Plain(), loader(8), ckpt_path=old, weights_only=True)
    torch.testing.assert_close(predicted[0], answer(baked))  # type: ignore[index]
    whole = fit(toys(), max_epochs=2)
    resumed = fit(toys(), seed=3, resume=old, max_epochs=2)
    for name, value in resumed.module.state_dict().items():
        torch.testing.assert_close(value, whole.module.state_dict()[name], rtol=1e-3, atol=1e-4)
    lightning_peft.bake_checkpoint(old, tmp_path / "baked.ckpt")
    Plain.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)
