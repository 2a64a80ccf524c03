"""EMA and SWA average what is stored, pair it by position with the module in training, and swap it in at the end."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from lightning_peft import LayerGrowth
from lightning_peft.structure.checkpoint import bake_state_dict, section_of
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import BatchNorm, Configured, Plain, deepened, loader
from lightning_peft.testing.runs import assert_clean, assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold

DECAY = 0.5


class ByHand(Callback):
    """The average computed here, by name, from the weights after each step."""

    average = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        if self.average is None:
            self.average = now
        else:
            self.average = {
                name: DECAY * self.average[name] + (1 - DECAY) * now[name] if now[name].is_floating_point() else now[name]
                for name in now
            }
        self.section = section_of(pl_module, [])


def methods():
    return [ToyScale(), ToyThreshold(), ToyEntropy()]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize("style", [Plain, Configured, BatchNorm])
@pytest.mark.parametrize("first", [True, False], ids=["ema-first", "ema-last"])
def test_the_result_is_the_average_of_what_was_stored(style, first):
    hand, ema = ByHand(), EMAWeightAveraging(decay=DECAY)
    run = fit(methods(), style=style, before=[ema] if first else [], after=[hand] if first else [hand, ema], max_epochs=2)
    wanted = bake_state_dict(hand.average, hand.section)
    found = run.module.state_dict()
    assert list(found) == list((BatchNorm if style is BatchNorm else Plain)().state_dict())
    for name, value in found.items():
        if name.endswith("num_batches_tracked"):  # of which torch takes the mean, rounded
            continue
        assert torch.allclose(value, wanted[name], atol=1e-6), name
        assert value.ndim < 2 or (value == 0).any(), "the mask was averaged instead of applied last"


def test_statistics_of_averaged_weights():
    module = fit(methods(), style=BatchNorm, after=[StochasticWeightAveraging(1e-2, swa_epoch_start=1)], max_epochs=3).module
    assert_clean(module, "SWA")
    seen = torch.stack([module.model[0](inputs).mean(0) for inputs, _ in loader()])
    torch.testing.assert_close(module.model[1].running_mean, seen.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("averaging", ["EMA", "SWA"])
def test_resume_under_averaging(averaging, tmp_path):
    def average():
        return EMAWeightAveraging(decay=DECAY) if averaging == "EMA" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)

    plain_full = fit([], after=[average(), every_epoch(tmp_path / "plain")], max_epochs=4)
    plain = fit([], seed=3, after=[average()], resume=tmp_path / "plain/epoch=1.ckpt", max_epochs=4)
    full = fit(methods(), after=[average(), every_epoch(tmp_path / "ours")], max_epochs=4)
    resumed = fit(methods(), seed=3, after=[average()], resume=tmp_path / "ours/epoch=1.ckpt", max_epochs=4)
    assert_same(plain_full, plain, f"{averaging} without methods")
    assert_same(full, resumed, f"{averaging} with methods")


def test_an_average_goes_on_counting_when_the_structure_changes():
    class Counted(Callback):
        def on_train_end(self, trainer, pl_module):
            self.count = int(ema._average_model.n_averaged)

    ema, counted = EMAWeightAveraging(decay=DECAY), Counted()
    run = fit([LayerGrowth(at="step:3", start=2)], style=deepened(Plain), before=[counted, ema], max_epochs=2)
    assert len(run.module.blocks) == 4
    assert counted.count == run.trainer.global_step
