"""HFT: what each round freezes, that it stays to the bit, and what the optimizer keeps."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

import lightning_peft
from lightning_peft import HFT, BitFit, LayerGrowth, LoRA
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, deepened
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.selective._hft.categories import Category, categories_of


def frozen_by_hand(task: Task) -> None:
    """Rounds of an epoch, with a new optimizer state for what a round takes up again."""
    for turn, batches in enumerate(task.epochs):
        frozen = Category("/matrices", 0, ("model.0", "model.2")).draw(0, turn)
        assert len(frozen) == 1
        for name, parameter in task.module.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen[0]))
            if name.startswith(frozen[0]):
                task.optimizer.state.pop(parameter, None)
        for batch in batches:
            task.step(task.loss(batch))


class TestHFT(MethodTester):
    methods = [
        lambda: HFT(seed=1),
        lambda: HFT(every=2, others=False, seed=3),
        lambda: HFT(every="50%"),
    ]
    references = [Reference(frozen_by_hand, HFT, tolerance=0.0)]


def llama(layers: int = 4) -> nn.Module:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def test_half_of_every_category_is_frozen() -> None:
    """Two of four projections, one or two of three matrices of the MLP in turn, one of two norms (figure 2 of the paper)."""
    net = llama()
    method = HFT()
    for turn in range(5):
        names = list(method.frozen(net, turn).values())
        for block in range(4):
            own = [name.removeprefix(f"model.layers.{block}.") for name in names if f".layers.{block}." in name]
            kinds = Counter(name.partition(".")[0] for name in own)
            assert kinds["self_attn"] == 2
            assert kinds["mlp"] == (1, 2)[block % 2]
            assert kinds["input_layernorm"] + kinds["post_attention_layernorm"] == 1
        assert all(".layers." in name for name in names)
        parameters = dict(net.named_parameters())
        for kind in ("self_attn", "mlp", "layernorm"):
            inside = {name: parameter.numel() for name, parameter in parameters.items() if kind in name and ".layers." in name}
            assert sum(inside[name] for name in names if name in inside) / sum(inside.values()) == 0.5
    assert len({tuple(method.frozen(net, turn).values()) for turn in range(5)}) == 5
    assert method.frozen(net, 3) == HFT().frozen(net, 3)
    assert method.frozen(net, 3) != HFT(seed=1).frozen(net, 3)
    outside = set(HFT(others=False).frozen(net, 0).values()) - set(method.frozen(net, 0).values())
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_every_layer_has_its_turn() -> None:
    """Over many rounds each projection is frozen half of the time: 200 draws of a fair coin stay within 30 of 100."""
    counts: Counter[str] = Counter()
    for turn in range(200):
        counts.update(Category("b/attn", 0, ("q", "k", "v", "o")).draw(0, turn))
    assert all(70 <= counts[name] <= 130 for name in "qkvo")


def test_categories_of_networks_that_are_no_llama() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    first = {each.name.partition("/")[2]: each.layers for each in categories_of(bert) if each.place == 0}
    path = "bert.encoder.layer.0."
    assert first == {
        "attention": tuple(f"{path}attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")),
        "vectors": (f"{path}attention.output.LayerNorm", f"{path}output.LayerNorm"),
        "matrices": (f"{path}intermediate.dense", f"{path}output.dense"),
    }
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    assert [each.name for each in categories_of(vit)][:3] == ["blocks.0/vectors", "blocks.0/attn", "blocks.0/mlp"]
    resnet = timm.create_model("resnet18", num_classes=3)
    found = categories_of(resnet)
    assert {each.place for each in found} == set(range(8))
    assert {each.name for each in found if each.place == 0} == {"layer1.0/matrices", "layer1.0/vectors"}
    odd = [each.more for each in found if len(each.layers) == 3]
    assert odd == [False, False, True, True, False, False], "convolutions and norms of the three blocks that change the size"
    assert [each.layers for each in categories_of(Plain())] == [("model.0", "model.2")]


class Rounds(Callback):
    """What is frozen at every step, its values, and the bytes that the optimizer keeps."""

    def __init__(self) -> None:
        self.frozen: list[set[str]] = []
        self.changed: list[set[str]] = []
        self.bytes: list[int] = []
        self.stateful: list[set[str]] = []
        self.draws: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = dict(pl_module.named_parameters())
        self.frozen.append({name for name, p in now.items() if not p.requires_grad})
        self.changed.append({name for name, p in now.items() if not torch.equal(p, self.before[name])})
        names = {p: name for name, p in now.items()}
        kept = {names[p]: state for p, state in trainer.optimizers[0].state.items() if state}
        self.stateful.append(set(kept))
        moments = [state[key] for state in kept.values() for key in ("exp_avg", "exp_avg_sq")]
        self.bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in moments))
        self.draws.append(torch.rand(1))


def test_what_is_frozen_stays_for_a_round_and_costs_no_optimizer_state() -> None:
    rounds = Rounds()
    run = fit([HFT(seed=2)], style=deepened(Plain), after=[rounds], max_epochs=4)
    everything = {name: p.numel() for name, p in run.module.named_parameters()}
    method = HFT(seed=2)
    for step, frozen in enumerate(rounds.frozen):
        assert frozen == set(method.frozen(run.module, step // 4).values())
        assert rounds.changed[step] == rounds.stateful[step] == everything.keys() - frozen
        assert rounds.bytes[step] == 2 * 4 * sum(everything[name] for name in rounds.stateful[step])
    assert len({tuple(sorted(frozen)) for frozen in rounds.frozen}) > 2
    blocks = {name for name in everything if name.startswith("blocks.")}
    shares = [sum(everything[name] for name in frozen) / sum(everything[name] for name in blocks) for frozen in rounds.frozen]
    assert all(0.45 < share < 0.55 for share in shares)
    assert all(p.requires_grad for p in run.module.parameters())
    plain = Rounds()
    fit([], style=deepened(Plain), after=[plain], max_epochs=4)
    assert all(torch.equal(a, b) for a, b in zip(rounds.draws, plain.draws, strict=True)), "the global generator was used"


def test_rounds_in_steps_resume_in_their_middle(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [HFT(every=6)]

    run = fit(methods(), after=[every_epoch(tmp_path)], max_epochs=4)
    for epoch in range(3):
        resumed = fit(methods(), resume=tmp_path / f"epoch={epoch}.ckpt", seed=9, max_epochs=4)
        assert_same(run, resumed, f"uninterrupted against resumed after epoch {epoch}")


def test_files_of_what_was_trained_leave_out_what_no_round_took_up(tmp_path: Path) -> None:
    class Pretrained(Plain):
        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                super().build()

    run = fit([HFT(every="100%", checkpoint="trained")], style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=2)
    frozen = set(HFT().frozen(Pretrained(), 0).values())
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert not frozen & set(saved["state_dict"])
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(run.module.parameters(), again.parameters(), strict=True))


def test_what_nobody_optimises_and_what_was_frozen_before_stay_so() -> None:
    class Partly(Plain):
        def build(self) -> None:
            super().build()
            self.model[4].bias.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return self.make_optimizer(
                [p for name, p in self.named_parameters() if name not in ("model.2.bias", "model.4.bias")]
            )

    rounds = Rounds()
    run = fit([HFT()], style=Partly, after=[rounds], max_epochs=3)
    assert all({"model.2.bias", "model.4.bias"} <= frozen for frozen in rounds.frozen)
    assert {name for name, p in run.module.named_parameters() if not p.requires_grad} == {"model.4.bias"}


def test_gradients_that_are_set_to_zero_bring_no_state_back() -> None:
    class Zeroed(Plain):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    rounds = Rounds()
    fit([HFT(every=3)], style=Zeroed, after=[rounds], max_epochs=4)
    assert any(now != later for now, later in zip(rounds.frozen, rounds.frozen[1:], strict=False))
    assert not any(frozen & moved for frozen, moved in zip(rounds.frozen, rounds.stateful, strict=True))


def test_others_name_what_they_train_beside() -> None:
    rounds = Rounds()
    fit([HFT(), LoRA(rank=2, targets=["model.2"]), BitFit(head=False)], after=[rounds], max_epochs=2)
    half = [set(HFT().frozen(Plain(), turn).values()) for turn in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert rounds.frozen == [{name for name in names if not name.endswith("bias")} for names in half]


def test_what_cannot_be_halved_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=re.escape("every=0 is a round without length")):
        HFT(every=0)
    with pytest.raises(MisconfigurationException, match="finds no two layers of a kind in Plain"):
        fit([HFT(exclude=["model.0"])])
    fit([HFT(exclude=["head"])])
    with pytest.raises(MisconfigurationException, match="which layer_growth changes"):
        fit([HFT(), LayerGrowth(start=1, to=2, at="step:2")], style=deepened(Plain))
    printed = str(lightning_peft.plan(llama(), [HFT()]))
    assert "18 of 36 layers of 4 blocks are frozen in each round" in printed
    assert "1 of 2 layers of the network, which has no list of blocks" in str(lightning_peft.plan(Plain(), [HFT()]))
