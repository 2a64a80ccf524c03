"""BitFit and NormTuning: what they train, as a loop by hand does, and what they leave alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

import lightning_peft
from lightning_peft import BitFit, LoRA, NormTuning
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import BatchNorm, Plain, deepened
from lightning_peft.testing.runs import assert_clean, fit


def by_hand(task: Task, *trained: str) -> None:
    for name, parameter in task.module.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    for batch in task.batches:
        task.step(task.loss(batch))


def biases_by_hand(task: Task) -> None:
    by_hand(task, "bias", "model.4.")


def inner_biases_by_hand(task: Task) -> None:
    by_hand(task, "model.2.bias")


def norms_by_hand(task: Task) -> None:
    by_hand(task, ".norm.", "blocks.3.fc2.")  # the last linear layer that the module holds


class TestBitFit(MethodTester):
    methods = [
        lambda: BitFit(checkpoint="full"),
        lambda: BitFit(head=False, targets=["model.2"], checkpoint="full"),
    ]
    references = [
        Reference(biases_by_hand, tolerance=0.0),
        Reference(inner_biases_by_hand, lambda: BitFit(head=False, targets=["model.2"]), tolerance=0.0),
    ]


class TestNormTuning(MethodTester):
    methods = [lambda: NormTuning(checkpoint="full"), lambda: NormTuning(head=False, exclude=["blocks.1"], checkpoint="full")]
    adapted = staticmethod(deepened)
    no_styles = {"TwoOptimizers": "neither of its optimizers has the blocks"}
    references = [Reference(norms_by_hand, tolerance=0.0)]


class Watch(Callback):
    """Which parameters can be trained, and which an optimizer has moved."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.moved = {names[id(p)] for p, state in trainer.optimizers[0].state.items() if state}


def trained(method: Any, style: type[Plain] = BatchNorm) -> set[str]:
    watch = Watch()
    run = fit([method], after=[watch], style=style)
    assert watch.trained == watch.moved
    assert_clean(run.module, "tuning")
    return watch.trained


def test_only_what_is_named_is_trained() -> None:
    # 0 Linear, 1 BatchNorm, 2 ReLU, 3 Linear, 4 ReLU, 5 the head
    head = {"model.5.weight", "model.5.bias"}
    assert trained(BitFit()) == {"model.0.bias", "model.1.bias", "model.3.bias"} | head
    assert trained(BitFit(head=False)) == {"model.0.bias", "model.1.bias", "model.3.bias", "model.5.bias"}
    assert trained(BitFit(exclude="norm")) == {"model.0.bias", "model.3.bias"} | head
    assert trained(BitFit(targets="norm", head=False)) == {"model.1.bias"}
    assert trained(NormTuning()) == {"model.1.weight", "model.1.bias"} | head
    assert trained(NormTuning(head=False)) == {"model.1.weight", "model.1.bias"}


def test_biases_of_attention_are_trained_and_half_of_them_on_request() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    names = {parameter: name for name, parameter in bert.named_parameters()}
    found = {names[p] for p in BitFit(targets=["attention.self.query", "intermediate.dense"]).trained(bert)}
    layers = [f"bert.encoder.layer.{i}.{name}.bias" for i in (0, 1) for name in ("attention.self.query", "intermediate.dense")]
    assert found == {*layers, "classifier.weight", "classifier.bias"}
    everywhere = {names[p] for p in BitFit().trained(bert)}
    assert everywhere == {name for name in names.values() if name.endswith("bias")} | {"classifier.weight"}
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
    assert len(list(BitFit(head=False).trained(attention))) == 3


def test_a_tied_head_stays_frozen_and_the_plan_says_so() -> None:
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    assert all(parameter is not gpt.lm_head.weight for parameter in BitFit().trained(gpt))
    assert "the head (lm_head) is tied to another layer and stays frozen" in str(lightning_peft.plan(gpt, [BitFit()]))
    assert "tied" not in str(lightning_peft.plan(gpt, [BitFit(head=False)]))
    assert "3 biases, the head (model.4), 83 parameters" in str(lightning_peft.plan(Plain(), [BitFit()]))


def test_files_hold_what_was_trained(tmp_path: Path) -> None:
    class Pretrained(Plain):
        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                super().build()

    run = fit([BitFit()], style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=2)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"model.0.bias", "model.2.bias", "model.4.weight", "model.4.bias"}
    assert set(saved[KEY]["base"]) == {"model.0.weight", "model.2.weight"}
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_tuned_is_refused_with_what_can() -> None:
    class NoBias(Plain):
        def build(self) -> None:
            self.model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 3))

    with pytest.raises(MisconfigurationException, match=re.escape("NoBias has no bias that can be trained, but in its head")):
        fit([BitFit()], style=NoBias)
    fit([NormTuning()], style=NoBias)
    fit([LoRA(rank=2)], style=NoBias)
    with pytest.raises(MisconfigurationException, match="Plain has no normalisation layer that can be trained"):
        fit([NormTuning()])
    fit([BitFit()])
    with pytest.raises(MisconfigurationException, match="no normalisation layer among its targets"):
        fit([NormTuning(targets=["model.0"])], style=BatchNorm)


def test_two_of_them_and_a_delta_train_side_by_side() -> None:
    watch = Watch()
    fit([BitFit(head=False), NormTuning(head=False), LoRA(rank=2, targets=["model.3"])], after=[watch], style=BatchNorm)
    biases = {f"model.{place}.bias" for place in (0, 1, 3, 5)}
    product = {f"model.3.layer_parts.lora:delta.form.{name}" for name in ("down", "up")}
    assert watch.moved == biases | product | {"model.1.weight"}
