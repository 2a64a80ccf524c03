"""Calibration block after block: against a loop by hand, in the order of the calls, without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibration_toys import Deep, calibrate, deep
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.calibration import calibrate as calibration
from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.testing.modules import Plain, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyWanda
from lightning_peft.testing.trace import difference, trace


@torch.no_grad()
def pruned_by_hand(layers: dict[str, nn.Linear], run: Callable[[], None], share: float = 0.5) -> None:
    """Wanda on the layers of one block: ``run`` calls the block on its inputs."""
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            squares[name] = squares.get(name, torch.zeros(rows.shape[1])) + (rows**2).sum(0)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    run()
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        scores = layer.weight.abs() * squares[name].sqrt()
        for row, score in zip(layer.weight, scores, strict=True):
            row[score.argsort(stable=True)[: int(share * len(score))]] = 0


class TinyLlama(LightningModule):
    """A language model whose blocks are called with a mask and position embeddings by keyword, and with a cache."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, attn_implementation="eager",
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["ids"])
        self.log("loss", output.loss)


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    masks = [torch.ones(2, 7, dtype=torch.long) for _ in range(3)]
    masks[1][0, 5:] = 0
    return [{"ids": torch.randint(0, 32, (2, 7), generator=generator), "mask": mask} for mask in masks]


@torch.no_grad()
def test_a_llama_is_pruned_as_in_a_loop_by_hand() -> None:
    torch.manual_seed(0)
    module = TinyLlama()
    torch.manual_seed(0)
    expected = TinyLlama().eval()
    inner: Any = expected.model.model
    states, rest = [], []
    for batch in sentences():
        hidden = inner.embed_tokens(batch["ids"])
        positions = torch.arange(7)[None]
        causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None].repeat(2, 1, 1, 1)
        causal = causal.masked_fill(batch["mask"][:, None, None, :] == 0, torch.finfo(torch.float32).min)
        states.append(hidden)
        rest.append({"attention_mask": causal, "position_embeddings": inner.rotary_emb(hidden, positions)})
    for block in inner.layers:
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        assert len(layers) == 7

        def run(block: Any = block, states: list[Tensor] = states) -> list[Tensor]:
            found = [block(state, **given) for state, given in zip(states, rest, strict=True)]
            return [output[0] if isinstance(output, tuple) else output for output in found]

        pruned_by_hand(layers, run)  # type: ignore[arg-type]
        states = run()
    method = ToyWanda()
    assert calibrate(module, method, sentences()) == [f"model.model.layers.{place}" for place in range(3)]
    assert len(method.pruned) == 21
    for name, tensor in expected.state_dict().items():
        assert ((tensor == 0) == (module.state_dict()[name] == 0)).all(), name
        torch.testing.assert_close(module.state_dict()[name], tensor)


def test_a_vision_transformer_is_pruned_as_in_a_loop_by_hand() -> None:
    timm = pytest.importorskip("timm")

    class Vision(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)

        def forward(self, images: Tensor) -> Any:
            return self.net(images)

    torch.manual_seed(0)
    module = Vision()
    torch.manual_seed(0)
    net = Vision().eval().net
    images = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(place)) for place in range(2)]
    with torch.no_grad():
        states = [net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(image)))) for image in images]
        for block in net.blocks:
            layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
            pruned_by_hand(layers, lambda block=block, states=states: [block(state) for state in states])  # type: ignore[misc]
            states = [block(state) for state in states]
    assert calibrate(module, ToyWanda(), images) == ["net.blocks.0", "net.blocks.1"]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], tensor)


class Looped(Plain):
    """Calls its first block twice, its second in some batches only, its third never, and its fourth before the others."""

    def build(self) -> None:
        super().build()
        self.parts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.passed: list[int] = []

    def forward(self, inputs: Tensor) -> Any:
        first, second, _, fourth = self.parts
        hidden = first(first(fourth(inputs)))
        if inputs.sum() > 0:
            hidden = second(hidden)
        return super().forward(hidden)


class Noting(Method):
    """Notes how often each block was called, and makes its layer the zero map."""

    lane = Lane.MASK

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def calibrate(self, block: CalibrationBlock) -> None:
        self.seen[block.name] = len(block.calls)
        for call, output in zip(block.calls, block.outputs(), strict=True):
            assert output.shape == call.args[0].shape

    def state(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])


def test_blocks_come_in_the_order_of_their_calls_with_as_many_as_there_were() -> None:
    module, method = Looped(), Noting()
    batches = list(loader())
    positive = sum(bool(inputs.sum() > 0) for inputs, *_ in batches)
    assert 0 < positive < 4
    with pytest.warns(UserWarning, match=r"never calls parts\.2: not calibrated"):
        order = calibrate(module, method, batches, blocks="parts")
    assert order == ["parts.3", "parts.0", "parts.1"]
    assert method.seen == {"parts.3": 4, "parts.0": 8, "parts.1": positive}


def test_nothing_is_left_on_the_module() -> None:
    module = fit([], module=deep()).module
    module.blocks[1].eval()
    before, owner = trace(module), module._trainer
    calibrate(module, Noting())
    assert difference(before, trace(module)) is None
    assert module._trainer is owner
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    calibrate(module, Noting())
    assert torch.equal(torch.rand(2), expected), "random numbers of the caller"


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_step_that_is_asked_for_runs(stage: Any) -> None:
    ran = []

    class Stages(Deep):  # type: ignore[misc,valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            ran.append("validate")
            super().validation_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            ran.append("test")
            super().test_step(batch, batch_idx)

    calibrate(Stages(), ToyWanda(), stage=stage)
    assert set(ran) == {stage}
    assert len(ran) == 4 * (4 + 1)


def test_a_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(deep(), ToyWanda(), progress=True)
    assert "calibrate" in capsys.readouterr().out
    calibrate(deep(), ToyWanda())
    assert "calibrate" not in capsys.readouterr().out
    assert calibration.GIB == 2**30
