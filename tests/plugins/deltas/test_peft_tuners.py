"""PeftAdapter beside PEFT itself: the same training for every tuner, and what it rejects."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import LoRA, MagnitudePruning, PeftAdapter
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing import Plain, trainer
from lightning_peft.weights.parts import placed_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
STEPS = 6


class Kernels(nn.Module):
    """An embedding, two convolutions, linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.image = nn.Embedding(50, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.mixed, self.out = nn.Linear(32, 16), nn.Linear(16, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.image(self.conv(self.table(ids).mT).relu().unsqueeze(1)).mean(-1).flatten(1)
        return self.out(self.mixed(x).relu())


BATCHES = [torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(STEPS)]


LOADER = DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]


def loss_of(network: nn.Module, ids: Tensor) -> Tensor:
    return (network(ids) - 1).square().mean()


class Tuned(LightningModule):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.losses = Kernels().to(dtype), list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Start(Callback):
    """Notes what adapters begin with, under PEFT's names, and the names of the module while they are on it."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.adapters = {
            f"base_model.{placed.path}.{name}": tensor.detach().clone()
            for placed in placed_parts(pl_module)
            for name, tensor in placed.part.tuner.state_dict().items()
        }
        self.names = list(pl_module.state_dict())
        self.ordered = [id(parameter) for parameter in pl_module.model.parameters()]


def tuned(config: Any, **arguments: Any) -> tuple[Tuned, Start]:
    module, start = Tuned(), Start()
    trainer(callbacks=[PeftAdapter(config, **arguments), start]).fit(module, LOADER)
    return module, start


def by_peft(
    config: Any, adapters: dict[str, Tensor], after_step: Any = lambda model, step: None
) -> tuple[nn.Module, list[float]]:
    """Train PEFT's own model from the same adapters, and merge it."""
    model = peft.get_peft_model(Tuned().model, copy.deepcopy(config))
    missing = model.load_state_dict(adapters, strict=False)
    assert not missing.unexpected_keys
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for step, ids in enumerate(BATCHES):
        loss = loss_of(model, ids)
        losses.append(float(loss.detach()))
        (loss + penalty(model)).backward()
        optimizer.step()
        after_step(model, step)
        optimizer.zero_grad()
    return model.merge_and_unload(), losses


def penalty(model: nn.Module) -> Tensor | float:
    """AdaLoRA's term as the paper has it; in PEFT only models that compute their own loss add it."""
    config = model.peft_config["default"]
    if config.peft_type != peft.PeftType.ADALORA:
        return 0.0
    terms = []
    for name, factor in model.named_parameters():
        if "lora_A" in name:
            terms.append((factor @ factor.T - torch.eye(factor.shape[0])).square().sum().sqrt())
        elif "lora_B" in name:
            terms.append((factor.T @ factor - torch.eye(factor.shape[1])).square().sum().sqrt())
    return config.orth_reg_weight * sum(terms) / len(terms)


MIXED = ["mixed", "out"]
TUNERS = {
    "lora": peft.LoraConfig(r=2, target_modules=["table", "conv", "image", "mixed"], rank_pattern={"mixed": 3}),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=[*MIXED, "image"]),
    "rslora": peft.LoraConfig(r=2, use_rslora=True, bias="all", target_modules=MIXED),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=2, total_step=STEPS, target_modules=MIXED),
    "loha": peft.LoHaConfig(r=2, init_weights=False, target_modules=[*MIXED, "image"]),
    "lokr": peft.LoKrConfig(r=2, init_weights=False, target_modules=MIXED),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=MIXED),
    "hra": peft.HRAConfig(r=2, target_modules=MIXED),
    "ia3": peft.IA3Config(target_modules=MIXED, feedforward_modules=MIXED),
    "fourierft": peft.FourierFTConfig(n_frequency=10, target_modules=MIXED),
    "miss": peft.MissConfig(r=2, target_modules=MIXED),
    "delora": peft.DeloraConfig(r=2, target_modules=MIXED),
    "hira": peft.HiraConfig(r=2, target_modules=MIXED),
}


@pytest.mark.parametrize("name", TUNERS)
def test_a_training_is_that_of_peft_and_ends_in_its_merge(name) -> None:
    config = TUNERS[name]
    module, start = tuned(config)
    step = (lambda model, step: model.base_model.update_and_allocate(step)) if name == "adalora" else (lambda model, step: None)
    theirs, losses = by_peft(config, start.adapters, step)
    assert module.losses == pytest.approx(losses, rel=1e-5)
    assert losses[-1] != losses[0]
    plain = Tuned()
    assert start.names == list(plain.state_dict()) == list(module.state_dict())
    moved = 0
    for (key, ours), old in zip(module.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs.state_dict()[key].to(ours.dtype), atol=2e-5), key
        moved += not torch.equal(ours, old)
    assert moved >= 1
    assert type(module.model.mixed) is nn.Linear


def test_parameters_of_the_network_stay_the_objects_they_were_in_their_order() -> None:
    module, start = tuned(TUNERS["oft"])
    assert start.ordered == [id(parameter) for parameter in module.model.parameters()]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_files_hold_the_adapter_and_load_on_the_base(tmp_path) -> None:
    module = Tuned()
    runner = trainer(callbacks=[PeftAdapter(TUNERS["hra"])])
    runner.fit(module, LOADER)
    runner.save_checkpoint(tmp_path / "trained.ckpt")
    held = torch.load(tmp_path / "trained.ckpt", weights_only=True)
    assert held["state_dict"] == {}
    loaded = lightning_peft.load_from_checkpoint(Tuned, tmp_path / "trained.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    lightning_peft.bake_checkpoint(tmp_path / "trained.ckpt", tmp_path / "baked.ckpt", base=Tuned())
    assert Tuned.load_from_checkpoint(tmp_path / "baked.ckpt", weights_only=True)


def test_what_is_kept_can_be_switched_and_trained_on() -> None:
    module, ids = Tuned(), BATCHES[0]
    plain = module.model(ids)
    trainer(callbacks=[PeftAdapter(TUNERS["loha"], keep=True)]).fit(module, LOADER)
    live = module.model(ids)
    lightning_peft.switch(module, "peft_adapter", on=False)
    assert torch.equal(module.model(ids), plain)
    lightning_peft.switch(module, "peft_adapter", on=True)
    assert torch.equal(module.model(ids), live)
    trainer(callbacks=[PeftAdapter(TUNERS["loha"], keep=True)]).fit(module, LOADER)
    assert not torch.equal(module.model(ids), live)
    assert torch.allclose(lightning_peft.bake(copy.deepcopy(module)).model(ids), module.model(ids), atol=1e-5)


def test_targets_of_this_library_are_taken_literally() -> None:
    module = Plain()
    module.model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 3))
    method = PeftAdapter({"peft_type": "LORA", "r": 2}, targets=["model.0"])
    assert list(method.claims(module)) == ["model.0.weight"]  # a list ["0"] would take PEFT to model.1.0 too
    assert list(PeftAdapter({"peft_type": "LORA", "r": 2}, targets="all-linear", exclude=["head"]).claims(module)) == [
        "model.0.weight",
        "model.1.0.weight",
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_networks_of_transformers(kind) -> None:
    class Language(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            if kind == "llama":
                self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=24))
            else:
                config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
                self.model = transformers.GPT2LMHeadModel(config)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    module, before = Language(), Language()
    config = peft.LoraConfig(r=2, target_modules="all-linear" if kind == "llama" else ["c_attn"], fan_in_fan_out=kind == "gpt2")
    trainer(callbacks=[PeftAdapter(config)]).fit(module, LOADER)
    old = before.state_dict()
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, old[key])}
    assert moved
    assert all(("proj" in key) if kind == "llama" else key.endswith("c_attn.weight") for key in moved)
    assert not hasattr(module.model, "peft_config")


class Ranks(Callback):
    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.kept = sum(int(placed.part.tuner.lora_E["default"].count_nonzero()) for placed in placed_parts(pl_module))


def test_ranks_of_adalora_end_at_their_budget() -> None:
    module, ranks = Tuned(), Ranks()
    trainer(callbacks=[PeftAdapter(TUNERS["adalora"]), ranks]).fit(module, LOADER)
    assert ranks.kept == 2 * 2  # target_r for each of two layers


def test_ranks_that_never_came_to_their_budget_are_told() -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=MIXED)
    with pytest.warns(UserWarning, match="total_step= as many steps"):
        trainer(callbacks=[PeftAdapter(config)]).fit(Tuned(), LOADER)


REJECTED = {
    "bias": (peft.LoraConfig(lora_bias=True, target_modules=["mixed"]), "changes the bias too", {"target_modules": ["out"]}),
    "pissa": (peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=MIXED), "init_lora_weights=True", {"r": 2}),
    "modules_to_save": (peft.LoraConfig(r=2, target_modules=["mixed"], modules_to_save=["table"]), "tune=\\('head',\\)", {}),
    "shared": (peft.RandLoraConfig(r=2, target_modules=MIXED), "share randlora_A", {"target_modules": ["mixed"]}),
    "model": (peft.VeraConfig(r=2, target_modules=MIXED), "shared state", None),
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "prompt learning", None),
    "nothing": (peft.LoraConfig(target_modules=["absent"]), "not found in the base model", {"target_modules": ["out"]}),
    "remembers": (
        peft.LoraConfig(r=2, target_modules=["mixed"], velora_config=peft.VeloraConfig()),
        "remembers lora_velora_initialized",
        {},
    ),
    "unmerged": (peft.LilyConfig(r=2, target_modules=MIXED), "cannot be merged", None),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_could_not_be_kept_is_rejected_and_the_advice_works(name) -> None:
    config, words, cure = REJECTED[name]
    module = Tuned(torch.float32)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=words):
        trainer(callbacks=[PeftAdapter(config)]).fit(module, LOADER)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    if cure is not None:
        data = {"peft_type": config.peft_type.value, "target_modules": ["mixed"], "r": 2, **cure}
        tune = ("head",) if name == "modules_to_save" else ()
        trainer(callbacks=[PeftAdapter(data, tune=tune)]).fit(module, LOADER)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"peft_type": "NOPE"}, "config needs a peft_type"),
        ({}, "config needs a peft_type"),
        ({"peft_type": "LORA", "rnk": 3}, "no argument 'rnk'"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "os"}, "modules to import"),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, "pass over data"),
        ({"peft_type": "ADALORA"}, "total_step"),
        ({"peft_type": "ADAMSS", "use_asa": True}, "Leave use_asa out"),
        ({"peft_type": "LORA", "monteclora_config": {"monteclora_n": 4}}, "Leave monteclora_config out"),
    ],
)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_configurations_that_make_no_sense(data, words) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        PeftAdapter(data)


def test_without_peft_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning-peft\[interop\]"'):
        PeftAdapter({"peft_type": "LORA"})


def test_two_deltas_on_one_weight_and_masks_beside_are_a_conflict() -> None:
    for other in (LoRA(rank=2, targets=["mixed"]), MagnitudePruning(0.5, targets=["mixed"], exclude=())):
        with pytest.raises(MisconfigurationException, match="mixed"):
            trainer(callbacks=[PeftAdapter(TUNERS["oft"]), other]).fit(Tuned(torch.float32), LOADER)


def test_what_is_excluded_stays_free_for_others() -> None:
    module = Tuned(torch.float32)
    adapter = PeftAdapter(TUNERS["oft"], exclude=["mixed"])
    trainer(callbacks=[adapter, MagnitudePruning(0.5, targets=["mixed"], exclude=())]).fit(module, LOADER)
    assert list(adapter.claims(module)) == ["model.out.weight"]
    for arguments in ({"targets": ["mixed"]}, {"exclude": ["mixed"]}):
        theirs = {"target_modules": ["mixed"], "exclude_modules": ["out"]}
        with pytest.raises(MisconfigurationException, match="say the same"):
            PeftAdapter({"peft_type": "LORA", **theirs}, **arguments)


def test_layers_that_no_file_could_rebuild_are_rejected() -> None:
    class Own(nn.Linear):
        pass

    module = Tuned(torch.float32)
    module.model.mixed = Own(32, 16)
    config = {"peft_type": "LORA", "r": 2, "target_modules": MIXED}
    with pytest.raises(MisconfigurationException, match=r"exclude=\['model.mixed'\]"):
        trainer(callbacks=[PeftAdapter(config)]).fit(module, LOADER)
    trainer(callbacks=[PeftAdapter(config, exclude=["model.mixed"])]).fit(module, LOADER)
    assert type(module.model.mixed) is Own


def test_a_module_of_several_networks_is_looked_at_as_a_whole() -> None:
    class Two(Tuned):
        def __init__(self) -> None:
            super().__init__(torch.float32)
            self.other = nn.Linear(4, 300)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.other(self.model(batch)) - 1).square().mean()

    module, before = Two(), Two()
    data = {"peft_type": "HRA", "r": 2, "target_modules": ["model.mixed", "other"]}
    trainer(callbacks=[PeftAdapter(data)]).fit(module, LOADER)
    old = before.state_dict()
    moved = [key for key, value in module.state_dict().items() if not torch.equal(value, old[key])]
    assert moved == ["model.mixed.weight", "other.weight"]
    kept = Two()
    trainer(callbacks=[PeftAdapter(data, keep=True)]).fit(kept, LOADER)
    again = copy.deepcopy(kept)  # its adapters are on it already, and PEFT has not seen it
    trainer(callbacks=[PeftAdapter(data, keep=True)]).fit(again, LOADER)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), Two().model.parameters(), strict=True))
    with pytest.raises(MisconfigurationException, match="network='mode'"):
        trainer(callbacks=[PeftAdapter(TUNERS["hra"], network="mode")]).fit(Two(), LOADER)


def test_a_damaged_file_is_told_and_imports_nothing(tmp_path) -> None:
    module = Tuned()
    runner = trainer(callbacks=[PeftAdapter(TUNERS["lora"])])
    runner.fit(module, LOADER)
    runner.save_checkpoint(tmp_path / "whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    damages = [
        {"config": {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"}},
        {"layer": {"kind": "Module", "bias": True, "arguments": {}}},
        {"path": "elsewhere"},
    ]
    for damage in damages:
        broken = copy.deepcopy(whole)
        record = broken[KEY]["parts"]["model.mixed"][0]
        record["config"] = {**record["config"], **damage}
        torch.save(broken, tmp_path / "broken.ckpt")
        with pytest.raises(CheckpointError, match="do not fit"):
            lightning_peft.load_from_checkpoint(Tuned, tmp_path / "broken.ckpt")


def test_a_damaged_state_of_adalora_is_told(tmp_path) -> None:
    runner = trainer(callbacks=[PeftAdapter(TUNERS["adalora"])])
    runner.fit(Tuned(), LOADER)
    runner.save_checkpoint(tmp_path / "whole.ckpt")
    broken = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    (key,) = broken["callbacks"]
    assert broken["callbacks"][key]["state"]["rank_pattern"]
    broken["callbacks"][key]["state"]["rank_pattern"] = {"mixed": ["yes"]}
    torch.save(broken, tmp_path / "broken.ckpt")
    with pytest.raises(MisconfigurationException, match="rank_pattern"):
        trainer(callbacks=[PeftAdapter(TUNERS["adalora"])], max_epochs=2).fit(
            Tuned(), LOADER, ckpt_path=tmp_path / "broken.ckpt"
        )
