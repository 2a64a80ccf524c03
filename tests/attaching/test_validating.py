"""What validations within a fit judge, and that callbacks which compare epochs are not misled in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_peft import MagnitudePruning, NMSparsity, bake_checkpoint
from lightning_peft.functional import is_nm
from lightning_peft.testing.modules import Plain, loader, trainer

SOFT: list[dict[str, Any]] = [
    {"recipe": "mdgf-linear"},
    {"recipe": "sr-ste", "dense": "50%"},
    {"recipe": "sdgf-stepwise"},
    {"recipe": "sdgf-stepwise", "refresh": 3},
    {"recipe": "one-shot", "dense": "50%"},
]


class Scored(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", nn.functional.cross_entropy(self.logits(batch[0]), batch[1]))


def fit(module: Plain, *callbacks: Callback, **options: Any) -> None:
    settings: dict[str, Any] = {"max_epochs": 6, "num_sanity_val_steps": 2, **options}
    settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer(callbacks=list(callbacks), **settings).fit(module, loader(), loader(batch_size=32))


def monitored(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor="score", save_top_k=-1, filename="{epoch}")


def score(path: Path) -> float:
    module = Scored.load_from_checkpoint(path)
    with torch.no_grad():
        return nn.functional.cross_entropy(
            module.logits(next(iter(loader(batch_size=32)))[0]), loader().dataset.tensors[1]
        ).item()


@pytest.mark.parametrize("settings", SOFT, ids=str)
def test_epochs_are_compared_by_what_is_shipped(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = monitored(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compares epochs")
        fit(Scored(), NMSparsity("1:4", exclude=(), validate="baked", **settings), saved)
    for path, seen in saved.best_k_models.items():
        baked = bake_checkpoint(path, tmp_path / "baked.ckpt")
        assert score(tmp_path / "baked.ckpt") == pytest.approx(seen.item(), abs=1e-5), baked
    assert len(saved.best_k_models) == 6


def test_training_is_the_same_whatever_is_validated(tmp_path: Path) -> None:
    found = []
    for validate in ("trained", "baked"):
        torch.manual_seed(0)
        module = Scored()
        fit(module, NMSparsity("1:4", exclude=(), validate=validate), val_check_interval=2)
        found.append(module.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert all(is_nm(layer.weight, 1, 4) for layer in module.model if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("settings", SOFT, ids=str)
@pytest.mark.parametrize("judge", [lambda: EarlyStopping("score"), lambda: ModelCheckpoint(monitor="score")])
def test_a_judge_of_the_soft_network_is_warned_of(settings: dict[str, Any], judge: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"compares epochs, and those before masks .*NMSparsity\(validate=\"baked\"\)"):
        fit(Scored(), NMSparsity("1:4", exclude=(), **settings), judge(), default_root_dir=tmp_path, max_epochs=2)


def test_a_judge_of_gradual_pruning_is_warned_of_and_one_without_a_score_is_not(tmp_path: Path) -> None:
    gradual = MagnitudePruning(0.5, exclude=(), end="80%")
    with pytest.warns(UserWarning, match=r"those before the last choice of masks at step 19 .*for instance the last\.$"):
        fit(Scored(), gradual, monitored(tmp_path))
    fit(Scored(), NMSparsity("1:4", exclude=()), ModelCheckpoint(tmp_path / "plain"))
    fit(Scored(), NMSparsity("1:4", recipe="ste", exclude=()), monitored(tmp_path / "hard"))


def test_a_failed_validation_leaves_nothing_baked(tmp_path: Path) -> None:
    class Failing(Scored):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step:
                raise RuntimeError("on purpose")

    method = NMSparsity("1:4", exclude=(), validate="baked")
    method.stays = True
    module = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, method)
    assert not any(getattr(part, "as_baked", False) for part in module.modules())


def test_beside_an_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = monitored(tmp_path)
    fit(Scored(), NMSparsity("1:4", exclude=(), validate="baked"), EMAWeightAveraging(decay=0.5), saved)
    assert all(torch.isfinite(value) for value in saved.best_k_models.values())
