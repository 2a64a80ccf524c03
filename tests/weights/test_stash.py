from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lightning_peft.testing.callbacks import StopAfter
from lightning_peft.testing.modules import Configured, Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyLowRank, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference
from lightning_peft.weights import stash


def methods():
    return [ToyScale(), ToyThreshold(0.2), ToyEntropy()]


def test_the_stored_values_wait_beside_the_baked_module():
    run = fit(methods())
    kept = stash.peek(run.module)
    assert sorted(kept) == ["model.0.weight", "model.2.weight", "model.4.weight"]
    weight = run.module.model[0].weight
    stored = kept["model.0.weight"]
    assert (weight == 0).any()
    assert not (stored.value == 0).any(), "the values under the mask are what training goes on with"
    scaled = stored.value * stored.states[0]["scale"]
    assert torch.equal(weight, torch.where(scaled.abs() < 0.2, 0.0, scaled))


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "removed", "data", "data replaced", "vector", "swapped"])
def test_a_changed_module_has_no_stash(change):
    module = fit(methods()).module
    assert stash.peek(module)
    if change == "in place":
        with torch.no_grad():
            module.model[0].weight.add_(1)
    elif change == "replaced":
        module.model[0].weight = torch.nn.Parameter(torch.ones(16, 16))
    elif change == "loaded":
        module.load_state_dict(Plain().state_dict())
    elif change == "data":
        module.model[0].weight.data.zero_()
    elif change == "data replaced":
        module.model[0].weight.data = torch.zeros(16, 16)
    elif change == "vector":
        vector = torch.nn.utils.parameters_to_vector(module.parameters())
        torch.nn.utils.vector_to_parameters(vector * 2, module.parameters())
    elif change == "swapped":
        module.model[0].weight.data = module.model[0].weight.data.flip(0)
    else:
        module.model = torch.nn.Sequential(torch.nn.Linear(16, 3))
    assert stash.peek(module) == {}


@pytest.mark.parametrize("change", ["data", "vector"])
def test_a_layer_changed_through_data_has_no_stashed_parts(change):
    module = fit([ToyLowRank()]).module
    assert stash.peek_parts(module)
    if change == "data":
        module.model[2].bias.data.zero_()
    else:
        torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in module.parameters())), module.parameters())
    assert stash.peek_parts(module) == {}


def test_a_module_of_equal_values_keeps_its_stash():
    module = fit(methods()).module
    module.model[0].weight = torch.nn.Parameter(module.model[0].weight.detach().clone())
    assert stash.peek(module)


def test_a_changed_module_is_saved_as_it_is(tmp_path):
    run = fit(methods())
    with torch.no_grad():
        run.module.model[0].weight.fill_(0.5)
    run.trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["model.0.weight"], torch.full((16, 16), 0.5))
    assert "lightning_peft" not in checkpoint


def test_evaluation_between_two_fits_changes_nothing(tmp_path):
    full = fit(methods(), max_epochs=3)
    stopped = fit(methods(), after=[StopAfter()], max_epochs=3)
    weights = {name: value.clone() for name, value in stopped.module.state_dict().items()}
    for stage in ("validate", "test"):
        getattr(stopped.trainer, stage)(stopped.module, loader(8), verbose=False)
        getattr(trainer(callbacks=methods()), stage)(stopped.module, loader(8), verbose=False)
    assert all(torch.equal(weights[name], value) for name, value in stopped.module.state_dict().items())
    stopped.trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = fit(methods(), seed=5, resume=tmp_path / "x.ckpt", max_epochs=3)
    assert_same(full, resumed, "uninterrupted against stopped, evaluated four times, saved and resumed")


def test_the_next_fit_in_this_process_goes_on_from_the_stored_values():
    first = fit(methods())
    kept = stash.peek(first.module)["model.0.weight"].value.clone()
    seen = []

    class Look(ToyThreshold):
        def start(self, run):
            seen.append(run.module.model[0]._parameters["weight"].detach().clone())

    fit([ToyScale(), Look(0.2, name="toy_threshold")], module=first.module)
    assert torch.equal(seen[0], kept)


def test_other_maps_start_from_what_the_module_shows():
    first = fit(methods())
    shown = first.module.model[0].weight.detach().clone()
    seen = []

    class Look(ToyThreshold):
        def start(self, run):
            seen.append(run.module.model[0]._parameters["weight"].detach().clone())

    fit([Look(0.0)], module=first.module)
    assert torch.equal(seen[0], shown)


def test_a_stash_does_not_keep_its_module_alive():
    run = fit(methods())
    watch = weakref.ref(run.module)
    del run
    gc.collect()
    assert watch() is None


def test_plain_modules_have_none():
    assert stash.peek(Plain()) == {}
    assert stash.peek(fit([ToyEntropy()]).module) == {}


def test_configure_model_and_the_stash():
    configured, plain = (fit(methods(), module=fit(methods(), style=style).module).module for style in (Configured, Plain))
    assert difference(dict(plain.state_dict()), dict(configured.state_dict())) is None
