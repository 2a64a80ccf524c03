"""Folders of PEFT's other types of adapters, both ways: the same answers through `peft` itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import AdaLoRA, Bone, KaSA, MiSS, RandLoRA
from lightning_peft.testing.modules import trainer

# PEFT's own AdaLoRA writes its ranks under names that PEFT takes for unknown, and uses them.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")

INPUTS = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.later = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.later(self.inner(self.enter(inputs).tanh()).tanh())
        return self.head(self.norm(hidden))


def network() -> Network:
    torch.manual_seed(1)
    return Network()


class Tuned(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.model(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def trained(*methods: Any) -> Tuned:
    module = Tuned()
    trainer(callbacks=list(methods), max_epochs=4).fit(module, DataLoader(INPUTS, batch_size=3))  # type: ignore[arg-type]
    return module.eval()


def through_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(network(), str(folder)).eval()


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


WHERE: dict[str, Any] = {"targets": ["enter", "inner"], "keep": True, "exclude": None}
ALIKE: dict[str, Any] = WHERE | {"targets": ["inner", "later"]}
OURS: dict[str, tuple[Callable[[], Any], str]] = {
    "miss": (lambda: MiSS(4, **WHERE), "MISS"),
    "bone": (lambda: Bone(2, **WHERE), "MISS"),
    "randlora": (lambda: RandLoRA(3, alpha=6, **ALIKE), "RANDLORA"),
    "adalora": (lambda: AdaLoRA(3, 2, alpha=6, tfinal="25%", **WHERE), "ADALORA"),
    "kasa": (lambda: KaSA(2, alpha=6, **WHERE), "LORA"),
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_answers_as_the_module_does(kind: str, tmp_path: Path) -> None:
    method, peft_type = OURS[kind]
    module = trained(method())
    expected = module.model(INPUTS)
    assert not torch.allclose(expected, network()(INPUTS), atol=1e-3), "nothing was learnt"
    lightning_peft.save_peft(module, tmp_path / "own", own=True)
    assert config_of(tmp_path / "own")["peft_type"] == peft_type
    torch.testing.assert_close(through_peft(tmp_path / "own")(INPUTS), expected, atol=1e-6, rtol=1e-6)
    again = Tuned()
    lightning_peft.load_peft(again, tmp_path / "own")
    torch.testing.assert_close(again.model(INPUTS), expected, atol=1e-6, rtol=1e-6)
    if kind != "bone":
        lightning_peft.save_peft(module, tmp_path / "lora")
        assert config_of(tmp_path / "lora")["peft_type"] == "LORA"
        torch.testing.assert_close(through_peft(tmp_path / "lora")(INPUTS), expected, atol=1e-6, rtol=1e-6)


def of_peft(config: Any, folder: Path, net: nn.Module | None = None, **saving: Any) -> Tensor:
    """Save an adapter of PEFT with numbers of its own, and return its answers."""
    wrapped = peft.get_peft_model(net or network(), config)
    generator = torch.Generator().manual_seed(2)
    if saving:
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(str(folder / "begun"))
        wrapped.peft_config["default"].init_lora_weights = config.init_lora_weights
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    expected: Tensor = wrapped.eval()(INPUTS)
    wrapped.save_pretrained(str(folder), **saving)
    return expected


PLACES = ["enter", "inner"]
THEIRS: dict[str, Callable[[], Any]] = {
    "miss": lambda: peft.MissConfig(r=4, target_modules=PLACES, miss_dropout=0.1),
    "a miss that does not divide": lambda: peft.MissConfig(r=5, target_modules=PLACES),
    "bat": lambda: peft.MissConfig(r=2, target_modules=PLACES, init_weights="bat"),
    "mini": lambda: peft.MissConfig(r=4, mini_r=2, target_modules=PLACES, init_weights="mini"),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=[*PLACES, "head"]),
    "a sparse randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=PLACES, sparse=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=6, target_modules=PLACES),
    "kasa": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=PLACES, kasa_config=peft.KasaConfig()),
    "pissa": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=PLACES, init_lora_weights="pissa"),
    "a pissa of dora": lambda: peft.LoraConfig(
        r=2, target_modules=PLACES, init_lora_weights="pissa", use_dora=True, use_rslora=True
    ),
    "olora": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=PLACES, init_lora_weights="olora"),
    "eva": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=PLACES, init_lora_weights="eva"),
    "all biases": lambda: peft.LoraConfig(r=2, target_modules=PLACES, bias="all", modules_to_save=["head", "norm"]),
    "biases of its layers": lambda: peft.MissConfig(r=2, target_modules=PLACES, bias="miss_only", modules_to_save=["head"]),
}


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'", "ignore:.*EVA")
@pytest.mark.parametrize("kind", THEIRS)
def test_a_folder_of_peft_answers_as_peft_does(kind: str, tmp_path: Path) -> None:
    expected = of_peft(THEIRS[kind](), tmp_path)
    module = Tuned()
    layers = lightning_peft.load_peft(module, tmp_path)
    assert {"model.enter", "model.inner"} <= set(layers)
    torch.testing.assert_close(module.eval().model(INPUTS), expected, atol=1e-6, rtol=1e-6)
    baked = lightning_peft.bake(module)
    torch.testing.assert_close(baked.model(INPUTS), expected, atol=2e-6, rtol=1e-5)


def test_the_random_matrices_of_a_seed_are_those_of_peft(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Specified to not save"):
        config = peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=PLACES, save_projection=False, projection_prng_key=5)
    expected = of_peft(config, tmp_path)
    module = Tuned()
    lightning_peft.load_peft(module, tmp_path)
    torch.testing.assert_close(module.model(INPUTS), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_folder_is_a_lora(init: Any, tmp_path: Path) -> None:
    """PEFT changes the base of such an adapter, and writes a LoRA of twice the rank beside the unchanged one."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=PLACES, init_lora_weights=init)
    begun = str(tmp_path / "begun")
    expected = of_peft(config, tmp_path, path_initial_model_for_weight_conversion=begun)
    module = Tuned()
    lightning_peft.load_peft(module, tmp_path)
    torch.testing.assert_close(module.model(INPUTS), expected, atol=1e-6, rtol=1e-6)


def test_an_adapter_that_lost_ranks_goes_both_ways(tmp_path: Path) -> None:
    """A layer of PEFT's AdaLoRA may be left nothing at all."""
    config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=10, lora_alpha=6, target_modules=PLACES)
    config.rank_pattern = {"enter.lora_E": [True, False, True], "inner.lora_E": [False] * 3}  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="invalid shape"):
        of_peft(config, tmp_path / "theirs")
    module = Tuned()
    assert lightning_peft.load_peft(module, tmp_path / "theirs") == ["model.enter"]
    lightning_peft.save_peft(module, tmp_path / "ours", own=True)
    assert config_of(tmp_path / "ours")["init_r"] == 2
    torch.testing.assert_close(through_peft(tmp_path / "ours")(INPUTS), module.model(INPUTS), atol=1e-6, rtol=1e-6)
