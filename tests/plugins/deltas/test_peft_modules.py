"""What is trained as it is beside an adapter goes into folders of PEFT by itself, and comes back from them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import Bone, LoRA, MiSS
from lightning_peft.testing.modules import trainer

INPUTS = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Network(nn.Module):
    """A body, a normalisation with statistics, an output layer under a name of choice."""

    def __init__(self, last: str = "head") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.ModuleDict({"head": nn.Linear(6, 8), "fc": nn.Linear(8, 8)})
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = last
        setattr(self, last, nn.Linear(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body["fc"](self.body["head"](inputs).tanh()).tanh()
        written: Tensor = getattr(self, self.last)(self.norm(self.fc(hidden)))
        return written


class Tuned(LightningModule):
    def __init__(self, last: str = "head") -> None:
        super().__init__()
        self.model = Network(last)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.model(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)


def trained(method: Any, last: str = "head") -> Tuned:
    module = Tuned(last)
    trainer(callbacks=[method], max_epochs=2).fit(module, DataLoader(INPUTS, batch_size=3))  # type: ignore[arg-type]
    return module.eval()


def through_peft(folder: Path, last: str = "head") -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers: Tensor = peft.PeftModel.from_pretrained(Network(last), str(folder)).eval()(INPUTS)
    return answers


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


KEPT: dict[str, Any] = {"targets": ["model.fc"], "exclude": None, "keep": True}


@pytest.mark.parametrize("method", [LoRA(2, **KEPT, tune=("bias", "norm", "head")), Bone(2, **KEPT, tune=("norm", "head"))])
def test_what_tune_names_goes_along(method: Any, tmp_path: Path) -> None:
    module = trained(method)
    lightning_peft.save_peft(module, tmp_path / "one")
    expected = module.model(INPUTS)
    torch.testing.assert_close(through_peft(tmp_path / "one"), expected, atol=1e-6, rtol=1e-6)
    config = config_of(tmp_path / "one")
    assert set(config["modules_to_save"]) == {"norm", "head"}
    assert config["bias"] == ("all" if isinstance(method, LoRA) else "none")
    assert config["target_modules"] == "fc"  # an expression: a list would name body.fc too
    again = Tuned().eval()
    lightning_peft.load_peft(again, tmp_path / "one")
    torch.testing.assert_close(again.model(INPUTS), expected, atol=1e-6, rtol=1e-6)
    lightning_peft.save_peft(again, tmp_path / "two")
    first, second = (load_file(tmp_path / each / WEIGHTS) for each in ("one", "two"))
    assert first.keys() == second.keys()
    # PEFT takes "head" for the end of "body.head" as well, wraps both, and wants both in the file
    assert set(config_of(tmp_path / "two")["modules_to_save"]) == {"norm", "head", "body.head"}
    torch.testing.assert_close(through_peft(tmp_path / "two"), expected, atol=1e-6, rtol=1e-6)


def test_a_name_that_peft_cannot_part_is_said_and_goes_along(tmp_path: Path) -> None:
    """PEFT finds modules by the ends of their names, and calls a layer of its own lora_dropout."""
    module = trained(LoRA(2, **KEPT, tune=("norm", "head")), "out")
    with pytest.warns(UserWarning, match="'out' is also the end of 'fc.lora_dropout'"):
        lightning_peft.save_peft(module, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["modules_to_save"] == ["norm"]
    torch.testing.assert_close(through_peft(tmp_path / "adapter", "out"), module.model(INPUTS), atol=1e-6, rtol=1e-6)
    again = Tuned("out").eval()
    lightning_peft.load_peft(again, tmp_path / "adapter")
    torch.testing.assert_close(again.model(INPUTS), module.model(INPUTS), atol=1e-6, rtol=1e-6)


class TiedNetwork(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        written: Tensor = self.head(self.fc(self.table(ids)))
        return written


def test_a_tied_head_goes_along_in_both_places(tmp_path: Path) -> None:
    module, ids = Tuned(), torch.arange(9)
    module.model = TiedNetwork()  # type: ignore[assignment]
    trainer(callbacks=[LoRA(2, **KEPT, tune="head")], max_epochs=2).fit(module, DataLoader(ids, batch_size=3))  # type: ignore[arg-type]
    lightning_peft.save_peft(module, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(TiedNetwork(), str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(ids), module.model(ids), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(theirs(ids), TiedNetwork()(ids), atol=1e-2), "nothing was learnt"


def test_a_new_head_is_named_by_the_user(tmp_path: Path) -> None:
    module = trained(MiSS(2, **KEPT, tune="norm"))
    with torch.no_grad():
        module.model.get_parameter("head.weight").fill_(0.5)
    lightning_peft.save_peft(module, tmp_path / "without", own=True)
    lightning_peft.save_peft(module, tmp_path / "with", own=True, also=["head"])
    assert config_of(tmp_path / "without")["modules_to_save"] == ["norm"]
    assert config_of(tmp_path / "with")["modules_to_save"] == ["head", "norm"]
    torch.testing.assert_close(through_peft(tmp_path / "with"), module.model(INPUTS), atol=1e-6, rtol=1e-6)


def test_names_of_modules_are_checked(tmp_path: Path) -> None:
    module = trained(MiSS(2, **KEPT))
    with pytest.raises(MisconfigurationException, match=r"'haed', which Network does not have.*'norm'"):
        lightning_peft.save_peft(module, tmp_path / "adapter", also=["haed"])
    with pytest.raises(MisconfigurationException, match=r"'fc', and fc has an adapter"):
        lightning_peft.save_peft(module, tmp_path / "adapter", also=["fc"])
    assert not (tmp_path / "adapter").exists()


def test_modules_that_are_not_whole_are_rejected(tmp_path: Path) -> None:
    lightning_peft.save_peft(trained(MiSS(2, **KEPT, tune="norm")), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors["base_model.model.norm.bias"]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    module = Tuned()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"'norm' among modules_to_save, and its file lacks norm\.bias"):
        lightning_peft.load_peft(module, tmp_path / "adapter")
    config = config_of(tmp_path / "adapter") | {"modules_to_save": "norm"}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(MisconfigurationException, match="no list of names"):
        lightning_peft.load_peft(module, tmp_path / "adapter")
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class Doubled(nn.Module):
    """Two layers of which one has the end of the other's name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.ModuleDict({"fc": nn.Linear(6, 6)})
        self.fc = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        written: Tensor = self.fc(self.body["fc"](inputs))
        return written


def test_ranks_and_scales_are_those_of_each_layer(tmp_path: Path) -> None:
    """PEFT takes the names of patterns for the ends of names as well."""
    config = peft.LoraConfig(
        r=3, lora_alpha=3, target_modules=["fc"], init_lora_weights=False, rank_pattern={"^fc": 2}, alpha_pattern={"^fc": 7}
    )
    wrapped = peft.get_peft_model(Doubled(), config).eval()
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    module = Doubled()
    lightning_peft.load_peft(module, tmp_path / "theirs")
    torch.testing.assert_close(module(INPUTS), wrapped(INPUTS), atol=1e-6, rtol=1e-6)
    lightning_peft.save_peft(module, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Doubled(), str(tmp_path / "ours"))
    torch.testing.assert_close(again(INPUTS), wrapped(INPUTS), atol=1e-6, rtol=1e-6)


def test_a_layer_that_its_owner_never_calls_has_no_place(tmp_path: Path) -> None:
    """PEFT would put an adapter on it that changes nothing."""
    module = Tuned()
    module.model.add_module("attention", nn.MultiheadAttention(8, 2))
    method = LoRA(2, targets=["attention.out_proj", "model.fc"], exclude=None, keep=True)
    method.attach(module)
    with pytest.raises(MisconfigurationException, match=r"no place for a delta of model\.attention\.out_proj\.weight"):
        lightning_peft.save_peft(module, tmp_path / "adapter")


def test_a_head_outside_the_network_is_said(tmp_path: Path) -> None:
    module = Tuned()
    module.head = nn.Linear(4, 2)
    method = LoRA(2, **KEPT, tune="head")
    method.attach(module)
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias were trained too, and are not within the network 'model'"):
        lightning_peft.save_peft(module, tmp_path / "adapter", network="model")
    assert config_of(tmp_path / "adapter")["modules_to_save"] is None
    lightning_peft.save_peft(module, tmp_path / "whole", network="")
    assert "base_model.model.head.weight" in load_file(tmp_path / "whole" / WEIGHTS)
