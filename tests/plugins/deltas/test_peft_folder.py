"""Adapters in folders of PEFT: the same answers through `peft` itself, both ways; what is damaged is rejected whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft.deltas.peft_folder import load_peft, save_peft
from lightning_peft.testing.modules import trainer
from lightning_peft.weights.switch import switch
from lightning_peft_plugins.deltas._shared.product_delta import ProductDelta
from lightning_peft_plugins.deltas.dora import DoRA
from lightning_peft_plugins.deltas.lora import LoRA

# peft asks transformers by a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))


class Kernels(nn.Module):
    """A convolution between the usual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.out = nn.Embedding(50, 8), nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.conv(self.table(ids).mT).mean(-1))


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=4, **STILL
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, **QUIET))


NETWORKS = {"bert": bert, "gpt2": gpt2, "kernels": Kernels, "convolutions": Kernels}
TARGETS: dict[str, Any] = {
    "bert": "all-linear",
    "gpt2": "all-linear",
    "kernels": ["all-weights", nn.Embedding],
    "convolutions": "all-weights",
}


class Tuned(LightningModule):
    def __init__(self, network: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = NETWORKS[network]()
        self.train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (answers(self.model, batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def answers(network: nn.Module, ids: Tensor = IDS) -> Tensor:
    said = network(input_ids=ids) if hasattr(network, "config") else network(ids)
    return said if isinstance(said, Tensor) else said.logits


def adapted(network: str, kind: type[ProductDelta] = LoRA, **settings: Any) -> Tuned:
    """A module with an adapter on it that has learnt something."""
    module = Tuned(network)
    method = kind(rank=3, alpha=5, keep=True, targets=TARGETS[network], **settings)
    trainer(callbacks=[method], max_epochs=4).fit(module, DataLoader(IDS, batch_size=3))  # type: ignore[arg-type]
    return module.eval()


@pytest.mark.parametrize("scaling", ["rank", "root"])
@pytest.mark.parametrize("network", ["bert", "gpt2", "kernels"])
def test_peft_answers_as_the_module_does(network: str, scaling: Any, tmp_path: Path) -> None:
    module = adapted(network, scaling=scaling)
    save_peft(module, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(Tuned(network).model, tmp_path / "adapter")
    theirs, ours, plain = answers(wrapped), answers(module.model), answers(Tuned(network).model)
    assert not torch.allclose(plain, ours, atol=1e-4), "the adapter has learnt nothing"
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("network", ["bert", "gpt2", "kernels"])
def test_a_folder_of_peft_answers_as_peft_does(network: str, root: bool, tmp_path: Path) -> None:
    names = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"], "kernels": ["table", "conv", "out"]}[network]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=names,
        use_rslora=root,
        fan_in_fan_out=network == "gpt2",
        rank_pattern={names[0]: 2},
        alpha_pattern={names[1]: 3},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(Tuned(network).model, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    module = Tuned(network)
    before = answers(module.model)
    assert len(load_peft(module, tmp_path / "adapter")) >= 2
    torch.testing.assert_close(answers(module.model), answers(wrapped), atol=2e-6, rtol=1e-5)
    with switch(module, "lora", on=False):
        assert torch.equal(answers(module.model), before)


@pytest.mark.parametrize("network", ["bert", "convolutions"])
def test_lengths_of_rows_go_both_ways(network: str, tmp_path: Path) -> None:
    module = adapted(network, DoRA)
    save_peft(module, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(Tuned(network).model, tmp_path / "adapter")
    torch.testing.assert_close(answers(wrapped), answers(module.model), atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "longer")
    again = Tuned(network)
    load_peft(again, tmp_path / "longer")
    torch.testing.assert_close(answers(again.model.eval()), answers(wrapped), atol=2e-6, rtol=1e-5)


def test_a_tuned_head_goes_along(tmp_path: Path) -> None:
    module = adapted("bert", tune=("head",))
    save_peft(module, tmp_path / "adapter", also=("classifier",))
    wrapped = peft.PeftModel.from_pretrained(Tuned("bert").model, tmp_path / "adapter")
    torch.testing.assert_close(answers(wrapped), answers(module.model), atol=2e-6, rtol=1e-5)
    again = Tuned("bert")
    load_peft(again, tmp_path / "adapter")
    assert torch.equal(answers(again.model), answers(module.model))


def test_what_was_loaded_trains_on(tmp_path: Path) -> None:
    save_peft(adapted("bert"), tmp_path / "adapter")
    module = Tuned("bert")
    load_peft(module, tmp_path / "adapter")
    before = answers(module.model)
    frozen = module.model.bert.encoder.layer[0].attention.self.query.weight  # type: ignore[union-attr,index]
    base = frozen.detach().clone()
    trainer(callbacks=[LoRA(rank=3, alpha=5, keep=True)]).fit(module, DataLoader(IDS, batch_size=3))  # type: ignore[arg-type]
    assert not torch.equal(answers(module.model.eval()), before)
    assert torch.equal(frozen, base)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def changed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], Any]:
    """Rewrite the tensors of a folder."""
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def configured(folder: Path, **settings: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")


BREAKS: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "pickle": pickled,
    "cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "half a config": lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text()[:20]),
    "another kind": lambda folder: (folder / CONFIG).write_text(json.dumps({"peft_type": "IA3"})),
    "one factor": changed(lambda tensors: dict(list(tensors.items())[1:])),
    "another layer": changed(lambda tensors: {name.replace("layer.0", "layer.9"): value for name, value in tensors.items()}),
    "a path": changed(lambda tensors: {name.replace("layer.0", "..0"): value for name, value in tensors.items()}),
    "another shape": changed(lambda tensors: {name: torch.zeros(999, *value.shape[1:]) for name, value in tensors.items()}),
    "no alpha": lambda folder: configured(folder, lora_alpha="8"),
    "alpha of zero": lambda folder: configured(folder, lora_alpha=0),
    "flat": changed(lambda tensors: {name: value.flatten() for name, value in tensors.items()}),
    "a strange name": changed(lambda tensors: {**tensors, "strange": torch.zeros(1)}),
}
BROKEN = {
    "no weights": "was not written to the end",
    "pickle": "is a pickle",
    "cut off": "is damaged",
    "no config": "has no adapter_config.json",
    "half a config": "is damaged",
    "another kind": "describes 'IA3'",
    "one factor": "not all of the adapter of",
    "another layer": "does not have",
    "a path": "does not have",
    "another shape": "rank for .* is 999|another network|have shapes",
    "no alpha": "not a number",
    "alpha of zero": "not a number",
    "flat": "rank for .* is 0",
    "a strange name": "no name that PEFT gives",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_rejected_and_the_module_stays(how: str, tmp_path: Path) -> None:
    save_peft(adapted("bert"), tmp_path / "adapter")
    BREAKS[how](tmp_path / "adapter")
    module = Tuned("bert")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=BROKEN[how]):
        load_peft(module, tmp_path / "adapter")
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_settings_that_nobody_knows_are_named(tmp_path: Path) -> None:
    save_peft(adapted("bert"), tmp_path / "adapter")
    configured(tmp_path / "adapter", of_tomorrow=3)
    with pytest.warns(UserWarning, match="of_tomorrow"):
        load_peft(Tuned("bert"), tmp_path / "adapter")


def test_nothing_to_save_and_a_folder_in_use(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="keep=True"):
        save_peft(Tuned("bert"), tmp_path / "adapter")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("")
    with pytest.raises(MisconfigurationException, match="is in use"):
        save_peft(adapted("bert"), tmp_path / "adapter")
