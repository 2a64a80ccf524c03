"""Lightning traps T22, T23, T24: what a checkpoint may hold, what a weights-only one leaves out, what `test` restores."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_peft
from lightning_peft.testing import Plain, trainer
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import loader
from lightning_peft.testing.runs import assert_clean, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")

NOT_PLAIN = [np.float32(1), Path("x"), defaultdict(int, a=1), print, {1, 2}, Fraction(1, 2), {(1, 2): 3}]


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: type(value).__name__)
def test_t22_state_that_could_not_be_loaded_is_refused_when_saved(value, tmp_path):
    """T22: such state saves without a word and fails on resume under `weights_only`; the method is told at once."""

    class Careless(ToyEntropy):
        def state(self):
            return {"memory": {"deep": [1, value]}}

    with pytest.raises(MisconfigurationException, match=r"careless.*\['memory'\]\['deep'\]\[1\]"):
        fit([Careless()], after=[every_epoch(tmp_path)])


def test_t23_weights_only_files_carry_the_section(tmp_path):
    """T23: `save_weights_only` skips callbacks altogether, so the record of the maps goes through the module's hook."""
    saver = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True)
    run = fit([ToyScale(), ToyThreshold(), ToyEntropy()], after=[saver])
    checkpoint = torch.load(tmp_path / "light.ckpt", weights_only=True)
    assert "callbacks" not in checkpoint
    assert "optimizer_states" not in checkpoint
    assert checkpoint["lightning_peft"]["weights"]["model.0.weight"][1]["map"] == "toy_threshold"
    loaded = lightning_peft.load_from_checkpoint(Plain, tmp_path / "light.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), loaded.parameters(), strict=True))


def test_t23_weights_only_file_saved_after_the_fit(tmp_path):
    run = fit([ToyScale(), ToyThreshold()])
    run.trainer.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    loaded = lightning_peft.load_from_checkpoint(Plain, tmp_path / "light.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("with_methods", [True, False], ids=["methods", "plain-trainer"])
def test_t24_evaluation_restores_state_and_computes_what_was_trained(stage, with_methods, tmp_path):
    """T24: method state is restored in `test(ckpt_path=)` too; the checkpoint means the same in every stage."""
    full = fit([ToyScale(), ToyThreshold(), ToyEntropy()], after=[every_epoch(tmp_path)])
    method = ToyEntropy()
    callbacks = [ToyScale(), ToyThreshold(), method] if with_methods else []
    module = Plain()
    outputs = []
    original = module.logits
    module.logits = lambda inputs: outputs.append(original(inputs)) or outputs[-1]
    run = trainer(callbacks=callbacks)
    path = tmp_path / "epoch=0.ckpt" if with_methods else tmp_path / "baked.ckpt"
    if not with_methods:
        lightning_peft.bake_checkpoint(tmp_path / "epoch=0.ckpt", path)
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(module, loader(8), ckpt_path=path, weights_only=True, **quiet)
    inputs = next(iter(loader(8)))[0]
    full.module.eval()
    assert torch.allclose(outputs[-1], full.module(inputs), atol=1e-6)
    if with_methods:
        assert method.seen["optimizer_steps"] == 4
        del module.logits
        assert_clean(module, stage)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_last_is_found_only_in_a_folder_that_has_a_name(tmp_path):
    """Without a `dirpath` every Trainer with a logger has a folder of its own, where the next one finds nothing."""

    def train(epochs, saver, **resume):
        torch.manual_seed(0)
        module, data = Plain(), loader()
        runner = trainer(
            callbacks=[ToyScale(), saver], max_epochs=epochs, logger=CSVLogger(tmp_path), default_root_dir=tmp_path
        )
        runner.fit(module, data, loader(8), **resume)
        return runner, module

    train(1, ModelCheckpoint(save_last=True))
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        assert train(2, ModelCheckpoint(save_last=True), ckpt_path="last")[0].ckpt_path is None
    _, whole = train(2, ModelCheckpoint(tmp_path / "whole", save_last=True))
    train(1, ModelCheckpoint(tmp_path / "named", save_last=True))
    resumed, module = train(2, ModelCheckpoint(tmp_path / "named", save_last=True), ckpt_path="last")
    assert Path(resumed.ckpt_path).name == "last.ckpt"
    assert difference(dict(whole.state_dict()), dict(module.state_dict())) is None
