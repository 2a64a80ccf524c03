"""Folders of PEFT's other types of adapters, both ways: the same answers through `peft` itself."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from lightning_peft import SORSA, AdaLoRA, Bone, KaSA, MiSS, RandLoRA, SoKA
from lightning_peft.testing.modules import trainer

# PEFT's own AdaLoRA writes its ranks under names that PEFT takes for unknown, and uses them.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_a_base_that_cannot_be_found_again_is_rejected(init: str, tmp_path: Path) -> None:
    of_peft(peft.LoraConfig(r=2, target_modules=PLACES), tmp_path)
    configured(tmp_path, init_lora_weights=init)
    refused(tmp_path, f"initialised as '{init}', which changes the base.*path_initial_model_for_weight_conversion")


def test_the_base_of_a_merged_module_is_the_one_beneath(tmp_path: Path) -> None:
    module = trained(KaSA(2, alpha=6, **WHERE))
    with lightning_peft.merge(module):
        lightning_peft.save_peft(module, tmp_path / "adapter", own=True)
    torch.testing.assert_close(through_peft(tmp_path / "adapter")(INPUTS), module.model(INPUTS), atol=1e-6, rtol=1e-6)


def test_what_peft_has_no_place_for(tmp_path: Path) -> None:
    for method, message in (
        (lambda: SoKA(2, **WHERE), "is no product of thin matrices, and PEFT has no type"),
        (lambda: RandLoRA(3, **WHERE), "cuts the random matrices of all weights from one pair"),
        (lambda: SORSA(2, **WHERE), "takes another part off its weight than the smallest singular values"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            lightning_peft.save_peft(trained(method()), tmp_path / "adapter", own=True)
    assert not (tmp_path / "adapter").exists()


def configured(folder: Path, **settings: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | settings))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({name: value.contiguous() for name, value in change(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS)


def refused(folder: Path, message: str, module: Tuned | None = None) -> None:
    """See that a folder is rejected, and that nothing of the module is another afterwards."""
    module = module or Tuned()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    classes = [type(each) for each in module.modules()]
    with pytest.raises(MisconfigurationException, match=message):
        lightning_peft.load_peft(module, folder)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert classes == [type(each) for each in module.modules()]


def without(ending: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(ending)}


def all_as(ending: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: change(value) if name.endswith(ending) else value for name, value in tensors.items()}


DAMAGED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "miss: other outputs": ("miss", lambda f: rewritten(f, all_as("block", lambda t: t[:, :3])), "has shape .4, 3."),
    "miss: huge": ("miss", lambda f: rewritten(f, all_as("block", lambda t: t.new_zeros(0, 10**12))), "rank for .* is 0"),
    "miss: flat": ("miss", lambda f: rewritten(f, all_as("block", torch.flatten)), "rank for 'enter' is 0"),
    "miss: rank": ("miss", lambda f: rewritten(f, all_as("block", lambda t: t.repeat(9, 1))), "rank for 'enter' is 36"),
    "miss: whole": ("miss", lambda f: rewritten(f, all_as("block", Tensor.long)), "adapters are of floating point"),
    "miss: another tensor": (
        "miss",
        lambda f: rewritten(f, lambda t: {**t, "base_model.model.enter.miss_more": torch.zeros(1)}),
        "holds 'base_model.model.enter.miss_more', a kind of tensor",
    ),
    "miss: nothing": ("miss", lambda f: rewritten(f, lambda t: {}), "holds no adapter of any layer"),
    "miss: dropout": ("miss", lambda f: configured(f, miss_dropout="a lot"), "miss_dropout of .* is 'a lot'"),
    "miss: of a norm": (
        "miss",
        lambda f: rewritten(f, lambda t: {name.replace("enter", "norm"): value for name, value in t.items()}),
        "a layer 'norm', which Network does not have, or not with a weight",
    ),
    "bat: as plain": ("bat", lambda f: configured(f, init_weights=True), "rank for 'enter' is 0"),
    "bat: other blocks": ("bat", lambda f: rewritten(f, all_as("block", lambda t: t[1:])), "has shape .3, 2, 2."),
    "bat: blocks that do not divide": (
        "bat",
        lambda f: rewritten(f, all_as("block", lambda t: t.new_zeros(2, 5, 5))),
        "rank for 'enter' is 0",
    ),
    "randlora: half": ("randlora", lambda f: rewritten(f, without("gamma")), "randlora_gamma is missing"),
    "randlora: no bases": ("randlora", lambda f: rewritten(f, without("_A")), "lacks randlora_A or randlora_B"),
    "randlora: small bases": (
        "randlora",
        lambda f: rewritten(f, all_as("_B", lambda t: t[:2])),
        "random matrices have shapes .* trained beside another network",
    ),
    "randlora: flat bases": ("randlora", lambda f: rewritten(f, all_as("_A", torch.flatten)), "random matrices have shapes"),
    "randlora: rank": ("randlora", lambda f: configured(f, r=10**9), "r is 1000000000, and its tensors have the rank 3"),
    "randlora: a scalar": (
        "randlora",
        lambda f: rewritten(f, all_as("lambda", lambda t: t.sum())),
        "rank for 'enter' is 0",
    ),
    "randlora: alpha": ("randlora", lambda f: configured(f, randlora_alpha=None), "randlora_alpha is 'None', not a positive"),
    "adalora: half": ("adalora", lambda f: rewritten(f, without("lora_E")), "lora_E is missing"),
    "adalora: other values": ("adalora", lambda f: rewritten(f, all_as("_E", lambda t: t[:2])), "lora_E .* has shape .2, 1."),
    "adalora: rank": ("adalora", lambda f: configured(f, init_r="four"), "init_r is 'four', not a positive number"),
    "kasa: half": ("kasa", lambda f: rewritten(f, without("diag")), "lora_diag is missing"),
    "kasa: other values": ("kasa", lambda f: rewritten(f, all_as("diag", lambda t: t[:1])), "lora_diag .* has shape .1,."),
    "kasa: of dora": ("kasa", lambda f: configured(f, use_dora=True), "both KaSA and DoRA"),
    "pissa: half": ("pissa", lambda f: rewritten(f, without("lora_A.weight")), "lora_A.weight is missing"),
    "pissa: patterns": ("pissa", lambda f: configured(f, alpha_pattern={"(a+)+$": 2}), "regular expression"),
    "pissa: scale": ("pissa", lambda f: configured(f, lora_alpha=10**400), "alpha for 'enter' is '1000.*', not a number"),
    "pissa: no scale": ("pissa", lambda f: configured(f, lora_alpha=float("nan")), "alpha for 'enter' is 'nan', not a number"),
    "a variant for a type": ("miss", lambda f: configured(f, peft_type="MISS.bat"), "describes 'MISS.bat'"),
    "nested without end": ("miss", lambda f: (f / CONFIG).write_text("[" * 10**5), "is damaged"),
    "no folder at all": ("miss", lambda f: (f / CONFIG).rename(f / "elsewhere"), "has no adapter_config.json"),
    "a type of no text": ("miss", lambda f: configured(f, peft_type=["MISS"]), r"describes \['MISS'\]"),
    "cut off": (
        "miss",
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]),
        "is damaged",
    ),
    "half-written": ("miss", lambda f: (f / WEIGHTS).unlink(), "was not written to the end"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_folder_is_rejected_and_the_module_stays(how: str, tmp_path: Path) -> None:
    kind, damage, message = DAMAGED[how]
    of_peft(THEIRS[kind](), tmp_path)
    damage(tmp_path)
    refused(tmp_path, message)


def test_a_layer_that_takes_nothing_leaves_all_layers_as_they_were(tmp_path: Path) -> None:
    of_peft(THEIRS["miss"](), tmp_path)
    module = Tuned()
    module.model.inner.forward = module.model.inner.forward  # type: ignore[method-assign]
    refused(tmp_path, r"forward of model\.inner .* was replaced on the object", module)


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    of_peft(THEIRS["miss"](), tmp_path)
    module = Tuned()
    lightning_peft.load_peft(module, tmp_path)
    refused(tmp_path, "'mi_ss' is on the module already", module)
    lightning_peft.load_peft(module, tmp_path, name="second")


def test_settings_that_nobody_knows_are_named(tmp_path: Path) -> None:
    expected = of_peft(THEIRS["randlora"](), tmp_path)
    configured(tmp_path, of_tomorrow=3)
    module = Tuned()
    with pytest.warns(UserWarning, match="say nothing to this library: of_tomorrow"):
        lightning_peft.load_peft(module, tmp_path)
    torch.testing.assert_close(module.model(INPUTS), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["randlora", "kasa", "bat"])
def test_what_was_loaded_trains_on_and_is_in_checkpoints(kind: str, tmp_path: Path) -> None:
    of_peft(THEIRS[kind](), tmp_path / "adapter")
    method: Any = {"randlora": RandLoRA, "kasa": KaSA, "bat": Bone}[kind]
    module = Tuned()
    layers = lightning_peft.load_peft(module, tmp_path / "adapter")
    before = module.model(INPUTS)
    weight = module.model.enter._parameters["weight"].detach().clone()  # type: ignore[union-attr]
    runner = trainer(callbacks=[method(2, targets=layers, exclude=None, keep=True)], max_epochs=1)
    runner.fit(module, DataLoader(INPUTS, batch_size=3))  # type: ignore[arg-type]
    assert not torch.allclose(module.model(INPUTS), before, atol=1e-3)
    assert torch.equal(module.model.enter._parameters["weight"], weight)
    runner.save_checkpoint(tmp_path / "end.ckpt")
    again = Tuned()
    lightning_peft.load_peft(again, tmp_path / "adapter")
    resumed = trainer(callbacks=[method(2, targets=layers, exclude=None, keep=True)], max_epochs=1)
    resumed.fit(again, DataLoader(INPUTS, batch_size=3), ckpt_path=tmp_path / "end.ckpt")  # type: ignore[arg-type]
    assert torch.equal(again.model(INPUTS), module.model(INPUTS))
