"""First values found in the first batches: those of PEFT or of the paper, and nothing is trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from lightning_peft import EVA, CorDA, LoRASB
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import trainer

LOOKS, SIZE = 3, 10
BATCHES = torch.randn(LOOKS + 2, 40, SIZE, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(1.0, SIZE + 1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, 8), nn.Tanh(), nn.Linear(8, 6))


class Tuned(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.model(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Notes(Callback):
    """What the forms hold, and what the network computes, after every step."""

    def __init__(self, method: Any) -> None:
        self.method, self.states, self.outputs = method, list[dict[str, dict[str, Tensor]]](), list[Tensor]()

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        forms = self.method.forms(pl_module)
        self.states.append({name: {k: v.clone() for k, v in form.state_dict().items()} for name, form in forms})
        self.outputs.append(pl_module.model(BATCHES[0]).detach().clone())


def trained(method: Any, **settings: Any) -> Notes:
    method.targets, method.exclude = ["model.0", "model.2"], None
    notes = Notes(method)
    trainer(callbacks=[method, notes], max_epochs=1, **settings).fit(Tuned(), BATCHES)  # type: ignore[arg-type]
    return notes


def expected(config: peft.LoraConfig) -> peft.LoraConfig:
    config.target_modules = {"0", "2"}
    return config


@pytest.mark.parametrize("make", [EVA, CorDA, LoRASB])
def test_nothing_is_trained_before_it_begins(make: Any) -> None:
    notes = trained(make(2, looks=LOOKS))
    first = network()(BATCHES[0])
    for output in notes.outputs[: LOOKS - 1]:
        torch.testing.assert_close(output, first)
    assert (notes.outputs[LOOKS] - first).abs().max() > 1e-3
    changed = (notes.outputs[LOOKS - 1] - first).abs().max()
    assert changed > 1e-4 if make is LoRASB else changed < 1e-4  # which takes its first step by beginning


def components_of_peft(rho: float) -> dict[str, Tensor]:
    config = expected(peft.LoraConfig(r=3, init_lora_weights="eva", eva_config=EvaConfig(rho=rho)))
    found: dict[str, Tensor] = get_eva_state_dict(
        network(),
        [BATCHES[0]],
        config,
        forward_fn=lambda net, x: net(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return found


def test_eva_reads_the_principal_components_that_peft_finds() -> None:
    notes = trained(EVA(3, looks=1))
    for name, components in components_of_peft(rho=1.0).items():
        ours = notes.states[0][f"model.{name}.weight"]["down"]
        cosines = torch.nn.functional.cosine_similarity(ours, components.float()).abs()
        torch.testing.assert_close(cosines, torch.ones(3), atol=1e-3, rtol=0)


def test_eva_gives_weights_the_ranks_that_peft_gives_them() -> None:
    notes = trained(EVA(3, looks=1, rho=2.0))
    theirs = {name: len(components) for name, components in components_of_peft(rho=2.0).items()}
    assert sorted(theirs.values()) != [3, 3], "the ranks differ"
    for name, rank in theirs.items():
        form, last = notes.states[0][f"model.{name}.weight"], notes.states[-1][f"model.{name}.weight"]
        assert len(form["down"]) == 6
        assert [bool(row.any()) for row in form["down"]] == [True] * rank + [False] * (6 - rank)
        assert last["up"].any(0).tolist() == [True] * rank + [False] * (6 - rank), "and they stay so"


def test_eva_adds_up_all_it_sees() -> None:
    notes = trained(EVA(2, looks=LOOKS))
    inputs = BATCHES[:LOOKS].flatten(0, 1).double()
    vectors = torch.linalg.svd(inputs - inputs.mean(0)).Vh[:2]
    ours = notes.states[LOOKS - 1]["model.0.weight"]["down"].double()
    torch.testing.assert_close((ours @ vectors.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("part", "mode"), [("first", "ipm"), ("last", "kpm")])
def test_corda_begins_as_in_peft(part: Any, mode: str) -> None:
    notes = trained(CorDA(3, 6, looks=1, directions=part))
    net = network()
    corda = CordaConfig(corda_method=mode)
    config = expected(peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="corda", corda_config=corda))
    preprocess_corda(net, config, run_model=lambda: net(BATCHES[0]))
    wrapped = peft.get_peft_model(net, config)
    for name in ("0", "2"):
        ours = notes.states[0][f"model.{name}.weight"]
        theirs = wrapped.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(2 * ours["up"] @ ours["down"], theirs, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(ours["taken_up"] @ ours["taken_down"], theirs, atol=1e-3, rtol=1e-3)


def test_lora_sb_begins_as_a_step_along_the_sign_of_the_gradient() -> None:
    notes = trained(LoRASB(2, looks=LOOKS))
    net = network()
    for batch in BATCHES[:LOOKS]:
        (net(batch) - 1).square().mean().backward()
    for name in ("0", "2"):
        step = -1e-2 * net.get_submodule(name).weight.grad.sign()  # type: ignore[union-attr]
        left, values, right = torch.linalg.svd(step, full_matrices=False)
        state = notes.states[LOOKS - 1][f"model.{name}.weight"]
        torch.testing.assert_close(state["up"] @ state["core"] @ state["down"], left[:, :2] * values[:2] @ right[:2])


@pytest.mark.parametrize("make", [EVA, CorDA])
def test_lengths_are_learned_beside_the_same_first_values(make: Any) -> None:
    plain, lengths = trained(make(2, looks=LOOKS)), trained(make(2, looks=LOOKS, form="dora"))
    for name, state in lengths.states[LOOKS - 1].items():
        weight = network().get_submodule(name.split(".")[1]).weight
        torch.testing.assert_close(state["magnitude"], weight.norm(dim=1))
        for key, value in plain.states[LOOKS - 1][name].items():
            if name.startswith("model.0"):  # later layers are given what one of the two computes in another order
                assert torch.equal(state[key], value), key
            torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lengths.outputs[LOOKS - 1], network()(BATCHES[0]), atol=1e-4, rtol=0)
    assert lengths.states[-1]["model.0.weight"]["magnitude"].ne(lengths.states[0]["model.0.weight"]["magnitude"]).any()


class Image(Tuned):
    """A convolution with stride and padding in front."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="reflect", groups=groups)
        self.model = nn.Sequential(nn.Unflatten(1, (2, SIZE // 2)), conv, nn.Flatten(), nn.Linear(4 * 3, 6))


BOTH: dict[str, Any] = {"targets": ["model.1", "model.3"], "exclude": None, "keep": True}


def test_convolutions_begin_in_lora_sb_too() -> None:
    method, module = LoRASB(2, looks=LOOKS, **BOTH), Image()
    notes = Notes(method)
    trainer(callbacks=[method, notes], max_epochs=1).fit(module, BATCHES)  # type: ignore[arg-type]
    begun, last = (notes.states[at]["model.1.weight"] for at in (LOOKS - 1, -1))
    alone = Image()
    for batch in BATCHES[:LOOKS]:
        alone.training_step(batch, 0).backward()
    step = -1e-2 * alone.model[1].weight.grad.flatten(1).sign()  # type: ignore[union-attr, operator, index]
    left, values, right = torch.linalg.svd(step, full_matrices=False)
    torch.testing.assert_close(begun["up"] @ begun["core"] @ begun["down"], left[:, :2] * values[:2] @ right[:2])
    assert not torch.equal(begun["core"], last["core"])


@pytest.mark.parametrize("make", [EVA, CorDA])
def test_layers_that_are_not_linear_begin_as_in_lora_and_the_plan_says_so(make: Any) -> None:
    method, module = make(1, looks=1, **BOTH), Image()
    assert "1 of them begin as in LoRA" in method.describe(module)
    trainer(callbacks=[method], max_epochs=1).fit(module, BATCHES)  # type: ignore[arg-type]
    forms = dict(method.forms(module))
    assert forms["model.1.weight"].up.abs().max() > 0 < forms["model.3.weight"].up.abs().max()


def test_lora_sb_refuses_what_it_finds_no_core_for() -> None:
    with pytest.raises(MisconfigurationException, match=r"model\.1 is none of these.*exclude=\['model\.1'\]"):
        trainer(callbacks=[LoRASB(1, looks=1, **BOTH)], max_epochs=1).fit(Image(groups=2), BATCHES)  # type: ignore[arg-type]
    left_out = {**BOTH, "exclude": ["model.1"]}
    trainer(callbacks=[LoRASB(1, looks=1, **left_out)], max_epochs=1).fit(Image(groups=2), BATCHES)  # type: ignore[arg-type]


def test_a_training_that_is_too_short_says_so() -> None:
    with pytest.warns(UserWarning, match="before step 9, from which it trains"):
        trained(EVA(2, looks=8))


def test_an_adapter_that_stayed_is_trained_on_from_where_it_is() -> None:
    method = EVA(2, looks=1, targets=["model.0"], exclude=None, keep=True)
    module = Tuned()
    trainer(callbacks=[method], max_epochs=1).fit(module, BATCHES)  # type: ignore[arg-type]
    kept = {name: form.down.clone() for name, form in method.forms(module)}
    again = EVA(2, looks=1, targets=["model.0"], exclude=None, keep=True)
    trainer(callbacks=[again], max_steps=1).fit(module, BATCHES)  # type: ignore[arg-type]
    ((_, form),) = again.forms(module)
    assert 0 < (form.down - kept["model.0.weight"]).abs().max() < 0.02  # one step of Adam


def test_a_gradient_scaler_is_refused_and_bf16_is_not() -> None:
    class Scaled(Callback):
        def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
            trainer.precision_plugin.scaler = object()

    method = EVA(2, looks=1, targets=["model.0"], exclude=None)
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        trainer(callbacks=[Scaled(), method], max_epochs=1).fit(Tuned(), BATCHES)  # type: ignore[arg-type]
    trained(EVA(2, looks=1), precision="bf16-mixed")


class ByEpoch(Tuned):
    """Another batch in every epoch of one step, so that a training resumes where it was."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(BATCHES[self.current_epoch], batch_idx)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_was_seen_is_in_the_checkpoint(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> Notes:
        method = EVA(2, looks=LOOKS, targets=["model.0", "model.2"], exclude=None)
        notes, saves = Notes(method), [] if resume else [every_epoch(tmp_path)]
        trainer(callbacks=[method, notes, *saves], max_epochs=len(BATCHES)).fit(ByEpoch(), BATCHES[:1], ckpt_path=resume)  # type: ignore[arg-type]
        return notes

    whole, resumed = run(), run(tmp_path / "epoch=1.ckpt")
    assert len(resumed.states) == len(BATCHES) - 2
    for name, state in whole.states[-1].items():
        for key, value in state.items():
            assert torch.equal(resumed.states[-1][name][key], value), (name, key)
