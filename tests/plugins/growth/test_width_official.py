"""Growth in width beside runs of the official codes; what those made of the same networks is in tests/fixtures."""

from __future__ import annotations

import pytest
import torch
from growth_official_networks import VIT, bert, free, pictures, tokens, vit, waves
from official_training import Learner
from official_values import filled, marks, values_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LayerGrowth
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.growth._layer_growth import lemon, ligo, ligo_training

RECORDED = values_of("growth_official")


def seen(method):
    """A small ViT that grew between two looks at the same pictures, of which it learnt nothing."""
    module = Learner(filled(vit(), 0.5), lr=0.0)
    pairs = DataLoader(TensorDataset(pictures(), torch.arange(4) % 3), batch_size=4)
    trainer(callbacks=[method], max_epochs=2, precision="64-true").fit(module, pairs)
    return module


@pytest.mark.parametrize("run", RECORDED["LEMON"]["runs"])
def test_lemon_expands_as_the_official_code(run, monkeypatch):
    pytest.importorskip("timm")
    expected, solve = RECORDED["LEMON"]["runs"][run], lemon.project_columns
    monkeypatch.setattr(lemon, "project_columns", lambda *given: solve(*given[:-1], free(given[-1].shape)))
    module = seen(LayerGrowth("lemon", at="step:1", to=expected["to"]))
    assert module.losses[1] == pytest.approx(module.losses[0], abs=1e-12)
    for name, tensor in module.net.named_parameters():
        if "norm" in name and name.endswith("weight"):
            tensor = tensor[: len(tensor) // VIT["embed_dim"] * VIT["embed_dim"]]  # the others face zeros
        assert marks(tensor.detach()) == pytest.approx(expected["marks"][name], abs=1e-9), name
    for norm in (layer for layer in module.net.modules() if isinstance(layer, nn.LayerNorm)):
        assert norm.eps == pytest.approx(expected["eps"])


@pytest.mark.parametrize("run", RECORDED["bert2BERT"]["runs"])
def test_bert2bert_copies_units_as_a_published_code(run):
    pytest.importorskip("timm")
    expected = RECORDED["bert2BERT"]["runs"][run]
    module = seen(LayerGrowth(run[:3], at="step:1", to=expected["to"]))
    for name, values in expected["marks"].items():
        assert marks(module.net.get_parameter(name).detach()) == pytest.approx(values, abs=1e-9), name


class Speller(Learner):
    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch[0], labels=batch[0]).loss


@pytest.mark.parametrize("run", RECORDED["LiGO"]["runs"])
def test_ligo_mixes_as_the_official_code(run, monkeypatch):
    pytest.importorskip("transformers")
    expected = RECORDED["LiGO"]["runs"][run]
    monkeypatch.setattr(ligo, "init_extra", lambda old, new, *_: waves(new - old, old))
    monkeypatch.setattr(ligo_training, "init_coefficients", lambda sources, old, *_: waves(len(sources), old))
    module = Speller(filled(bert(), 0.5), lr=0.0)
    method = LayerGrowth("ligo", at="step:1", to=expected["to"], operator_steps=expected["steps"], operator_lr=0.02)
    loader = DataLoader(TensorDataset(tokens()), batch_size=4)
    trainer(callbacks=[method], max_epochs=2, precision="64-true").fit(module, loader)
    assert module.losses[1] == pytest.approx(expected["loss"], abs=1e-9)
    for name, values in expected["marks"].items():
        assert marks(module.net.state_dict()[name]) == pytest.approx(values, abs=1e-9), name
