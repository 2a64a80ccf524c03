"""Trained beside `peft` from one start, step by step: the same factors and losses in double precision."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA
from lightning_peft.deltas.delta_map import DeltaMap
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.testing.modules import trainer
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
STEPS, RANK, ALPHA = 6, 3, 5
BATCHES = [torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(STEPS)]


class Kernels(nn.Module):
    """An embedding, a convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.out = nn.Embedding(50, 8), nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.conv(self.table(input_ids).mT).relu().mean(-1))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in ("kernels", "linear"):
        return Kernels().double()
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)).double()


TARGETS = {"kernels": ["table", "conv", "out"], "linear": ["conv", "out"], "llama": ["q_proj", "v_proj", "down_proj"]}


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    said = net(input_ids=ids)
    return ((said if isinstance(said, Tensor) else said.logits) - 1).square().mean()


class Tuned(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.losses = network(kind), list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Starts(Callback):
    """Gives our factors the values that PEFT began with, and notes them after every step."""

    def __init__(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.factors, self.seen = factors, list[dict[str, Tensor]]()

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for name, part in parts(pl_module).items():
                part.form.down.copy_(self.factors[name][0])
                part.form.up.copy_(self.factors[name][1])

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append({name: part.form.delta().detach().clone() for name, part in parts(pl_module).items()})


def parts(module: nn.Module) -> dict[str, DeltaPart | DeltaMap]:
    beside = {each.path: each.part for each in placed_parts(module) if isinstance(each.part, DeltaPart)}
    within = {each.name.removesuffix(".weight"): entry for each in mapped_tensors(module) for entry in each.maps}
    return {path.removeprefix("model."): delta for path, delta in (beside | within).items()}  # type: ignore[misc]


def layers_of(wrapped: nn.Module) -> dict[str, Any]:
    found = {name.removeprefix("base_model.model."): layer for name, layer in wrapped.named_modules()}
    return {name: layer for name, layer in found.items() if isinstance(layer, peft.tuners.lora.LoraLayer)}


def factors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` in the layout of ours."""
    if layer.lora_embedding_A:
        return layer.lora_embedding_B["default"].T, layer.lora_embedding_A["default"].T
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight.flatten(1)


CASES = [("kernels", False, False), ("kernels", True, False), ("llama", False, False), ("llama", True, False)]
CASES += [("linear", False, True), ("llama", False, True)]


@pytest.mark.parametrize(("kind", "root", "lengths"), CASES)
def test_every_step_is_that_of_peft(kind: str, root: bool, lengths: bool) -> None:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[kind], use_rslora=root, use_dora=lengths)
    wrapped = peft.get_peft_model(network(kind), config, autocast_adapter_dtype=False).double()
    layers = layers_of(wrapped)
    begun = {name: tuple(factor.detach().clone() for factor in factors_of(layer)) for name, layer in layers.items()}
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    theirs, losses = [], []
    for batch in BATCHES:
        optimizer.zero_grad()
        loss = loss_of(wrapped, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        theirs.append({name: layer.get_delta_weight("default").detach().clone() for name, layer in layers.items()})

    module, starts = Tuned(kind), Starts(begun)  # type: ignore[arg-type]
    method = (DoRA if lengths else LoRA)(RANK, ALPHA, "root" if root else "rank", targets=TARGETS[kind], exclude=None)
    trainer(callbacks=[method, starts], precision="64-true").fit(module, torch.stack(BATCHES))  # type: ignore[arg-type]

    assert len(starts.seen) == STEPS
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(losses), atol=1e-12, rtol=1e-12)
    for ours, expected in zip(starts.seen, theirs, strict=True):
        assert ours.keys() == expected.keys()
        for name, delta in ours.items():
            torch.testing.assert_close(delta, expected[name].flatten(1), atol=1e-11, rtol=1e-10)
    after = module.state_dict()
    merged = wrapped.merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(after[f"model.{name}"], value, atol=1e-11, rtol=1e-10)
