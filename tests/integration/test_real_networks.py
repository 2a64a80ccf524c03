"""The methods on networks of the two libraries users bring: Hugging Face (ModelOutput, tied weights, Conv1D) and timm."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import PERP, PSKD, NMSparsity, TrainedRankPruning, Wanda, WeightCompander, plan, split_low_rank
from lightning_peft.baking.nm_proof import assert_nm
from lightning_peft.testing import trainer

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


class Language(LightningModule):
    """What a user of transformers writes: the whole batch goes in, the loss comes out of a ModelOutput."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def gpt2() -> Language:
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return Language(transformers.GPT2LMHeadModel(config))


def bert() -> Language:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return Language(transformers.BertForSequenceClassification(config))


def sentences(labels: str) -> DataLoader:
    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    wanted = tokens if labels == "tokens" else tokens[:, 0] % 3
    return DataLoader([{"input_ids": x, "labels": y} for x, y in zip(tokens, wanted, strict=True)], batch_size=8)


def test_gpt2_conv1d_groups_run_along_its_inputs_and_the_tied_head_stays_dense():
    module = gpt2()
    trainer(max_epochs=2, callbacks=[NMSparsity("2:4"), WeightCompander(targets="all-linear")]).fit(module, sentences("tokens"))
    weight = module.model.transformer.h[1].mlp.c_fc.weight  # stored as (inputs, outputs)
    assert weight.shape == (16, 64)
    assert (weight.T.unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all()
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    assert (module.model.lm_head.weight != 0).all()


def test_a_tied_weight_that_is_named_is_refused_with_what_to_exclude():
    with pytest.raises(MisconfigurationException, match=r"model\.lm_head\.weight, which is the same parameter as .*wte"):
        plan(gpt2(), [NMSparsity("2:4", targets=["lm_head"], exclude=())])


def test_bert_with_all_three_methods_reads_logits_from_its_model_output():
    module = bert()
    runner = trainer(max_epochs=3, callbacks=[PSKD(), NMSparsity("2:4"), WeightCompander(targets="all-linear")])
    runner.fit(module, sentences("classes"))
    assert runner.callback_metrics["peft/loss/pskd"] > 0
    assert_nm(module.model.bert.encoder, (2, 4))
    assert (module.model.classifier.weight != 0).all()


def test_gpt2_is_pruned_by_its_data_and_retrained_by_low_rank_maps():
    module = gpt2()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer(max_epochs=2, callbacks=[Wanda(0.5, every=2), PERP(("bias", "norm"), rank=2)]).fit(module, sentences("tokens"))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == ("wte" in name or "wpe" in name), name
        if parameter.ndim > 1 and ".h." in name:
            assert (parameter == 0).float().mean() == 0.5, name


@pytest.mark.parametrize("network", [gpt2, bert])
def test_layers_trained_to_low_rank_are_split(network):
    module, data = network(), sentences("tokens" if network is gpt2 else "classes")
    trainer(max_epochs=1, callbacks=[TrainedRankPruning(0.6, period=2)]).fit(module, data)
    module.eval()
    batch = next(iter(data))
    expected = module.model(**batch).logits
    assert len(split_low_rank(module)) >= 8
    torch.testing.assert_close(module.model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_timm_networks_keep_first_layer_head_and_depthwise_dense(name):
    class Vision(Language):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            return nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    size = {"img_size": 32} if name.startswith("vit") else {}
    module = Vision(timm.create_model(name, num_classes=3, **size))
    data = DataLoader([(torch.randn(3, 32, 32), index % 3) for index in range(8)], batch_size=4)
    method = NMSparsity("2:4", targets="all-weights")
    trainer(max_epochs=2, callbacks=[method, PSKD()]).fit(module, data)
    layers = method.select(module)
    assert layers
    for layer in layers.values():
        inputs = layer.weight.flatten(2).transpose(1, -1) if layer.weight.ndim > 2 else layer.weight
        whole = inputs[..., : inputs.shape[-1] // 4 * 4]
        assert (whole.unflatten(-1, (-1, 4)).count_nonzero(-1) <= 2).all()
    dense = [layer for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert all(layer not in layers.values() for layer in (*dense, module.model.get_classifier()))
