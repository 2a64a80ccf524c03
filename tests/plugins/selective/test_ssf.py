"""SSF: what a scale and a shift do to features is what they do to weight and bias, and what the training learns."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft import SSF, BitFit, LoRA, NMSparsity, StructuredPruning
from lightning_peft.functional import is_nm, scale_and_shift, scaled_weight, shifted_bias
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import BatchNorm, Conv, Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.weights.parts import placed_parts, put_part
from lightning_peft_plugins.selective._ssf.channels import channels_of
from lightning_peft_plugins.selective._ssf.scale_shift_part import ScaleShiftPart


class Ada(nn.Module):
    """A scale and a shift as a module of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


def modules_by_hand(task: Task) -> list[float]:
    """Scales and shifts written into the network as modules, and folded in the end."""
    module, layers = task.module, task.module.model
    module.requires_grad_(False)
    layers[4].requires_grad_(True)
    first, second = Ada(16), Ada(16)
    module.model = nn.Sequential(layers[0], first, layers[1], layers[2], second, layers[3], layers[4])
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=module.lr)
    losses = []
    for batch in task.batches:
        loss = task.loss(batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for layer, ada in ((layers[0], first), (layers[2], second)):
            layer.weight.copy_(torch.diag(ada.gamma) @ layer.weight)
            layer.bias.copy_(torch.diag(ada.gamma) @ layer.bias + ada.beta)
    module.model = layers
    return losses


class TestSSF(MethodTester):
    methods = [
        lambda: SSF(checkpoint="full"),
        lambda: SSF(head=False, exclude=None, noise=0.02, checkpoint="full"),
        lambda: SSF(targets=["model.2"], checkpoint="full"),
    ]
    references = [Reference(modules_by_hand)]


KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 5), (2, 4, 3)),
    "linear without a bias": (nn.Linear(3, 5, bias=False), (2, 3)),
    "transformers' Conv1D": (Conv1D(5, 3), (2, 4, 3)),
    "convolution over time": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "convolution without a batch": (nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "convolution in space": (nn.Conv3d(2, 3, 2, bias=False), (1, 2, 3, 3, 3)),
    "batch norm": (nn.BatchNorm2d(4), (3, 4, 2, 2)),
    "batch norm of vectors": (nn.BatchNorm1d(4), (3, 4)),
    "layer norm": (nn.LayerNorm(4), (3, 2, 4)),
    "group norm": (nn.GroupNorm(2, 4), (3, 4, 5)),
    "rms norm": (nn.RMSNorm(4), (3, 4)),
    "Llama's norm": (LlamaRMSNorm(4), (3, 2, 4)),
    "timm's norm of images": (LayerNorm2d(4), (3, 4, 2, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_done_to_features_can_be_done_to_weight_and_bias(kind: str, training: bool) -> None:
    layer, shape = copy.deepcopy(KINDS[kind][0]).double().train(training), KINDS[kind][1]
    generator = torch.Generator().manual_seed(1)
    channels = channels_of(layer)
    assert channels is not None
    assert channels.shifted == (getattr(layer, "bias", None) is not None)
    part = ScaleShiftPart(channels.count, channels.axis, channels.dim, channels.shifted).double()
    for parameter in [*part.parameters(), *layer.parameters()]:
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    said = copy.deepcopy(layer)(inputs).movedim(channels.axis, -1)
    expected = (said * part.scale + (0 if part.shift is None else part.shift)).movedim(-1, channels.axis)
    net = nn.Sequential(layer)
    put_part(net, "0", part)
    torch.testing.assert_close(net(inputs), expected, rtol=0, atol=1e-12)
    baked = lightning_peft.bake(net)
    assert type(baked[0]) is type(KINDS[kind][0])
    torch.testing.assert_close(baked(inputs), expected, rtol=0, atol=1e-12)
    assert not list(placed_parts(baked))


def test_layers_that_compute_in_their_own_way_are_left_alone() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, inputs: Tensor) -> Tensor:
            return self._conv_forward(inputs, self.weight / self.weight.std(), self.bias)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    for layer in (GemmaRMSNorm(4), BatchNormAct2d(4), Standardised(2, 3, 3), normed, nn.Linear(2, 2, device="meta")):
        assert channels_of(layer) is None
    net = nn.ModuleDict(
        {"norm": GemmaRMSNorm(4), "mix": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
    )
    printed = str(lightning_peft.plan(net, [SSF()]))
    assert (
        "scales of 1 layers, 8 parameters, leaves 3 alone (norm, mix.out_proj, mix.in_proj_weight), the head (out)" in printed
    )
    for layers in (["norm"], ["mix.out_proj", "fc"]):
        with pytest.raises(MisconfigurationException, match=r"Leave it out: exclude=\['(norm|mix\.out_proj)'\]"):
            lightning_peft.plan(net, [SSF(targets=layers)])
    assert "scales of 1 layers" in str(
        lightning_peft.plan(net, [SSF(targets=["mix.out_proj", "fc"], exclude=["mix.out_proj"])])
    )


def test_a_vision_transformer_gets_what_the_official_code_gives_it() -> None:
    """Channels behind patch embedding, norms, qkv, projections and both layers of every MLP: vision_transformer.py."""
    net = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    width, depth = 192, 2
    behind_a_block = width + 3 * width + width + width + 4 * width + width
    expected = 2 * (width + depth * behind_a_block + width) + 3 * width + 3
    trained = f"{expected - 3 * width - 3:,} parameters, the head (head)"
    assert trained in str(lightning_peft.plan(net, [SSF()]))


def test_a_start_with_noise_is_that_of_the_paper_and_the_same_each_time() -> None:
    def start(noise: float, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        module = Plain()
        module.model = nn.Sequential(nn.Linear(16, 4000), nn.Linear(4000, 3))
        state = torch.random.get_rng_state()
        SSF(noise=noise).attach(module)
        assert torch.equal(state, torch.random.get_rng_state())
        part: Any = next(placed_parts(module)).part
        return part.scale.detach(), part.shift.detach()

    scale, shift = start(0.02, 0)
    assert abs(scale.mean() - 1) < 2e-3
    assert abs(shift.mean()) < 2e-3
    for drawn in (scale, shift):
        assert 0.019 < drawn.std() < 0.021
    assert not torch.equal(scale - 1, shift)
    assert torch.equal(start(0.02, 0)[0], scale)
    assert not torch.equal(start(0.02, 1)[0], scale)
    quiet = start(0.0, 0)
    assert torch.equal(quiet[0], torch.ones(4000))
    assert not quiet[1].any()


def test_scales_do_not_decay() -> None:
    class Decaying(Plain):
        def base_loss(self, batch: Any) -> Tensor:
            return 0.0 * super().base_loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.5)

    torch.manual_seed(0)
    before = copy.deepcopy(Decaying().state_dict())
    after = fit([SSF(head=False, exclude=None)], style=Decaying, max_epochs=2).module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_a_delta_adds_is_scaled_with_the_rest() -> None:
    torch.manual_seed(0)
    module = Plain()
    inputs = next(iter(loader(8)))[0]
    for method in (LoRA(rank=2, targets=["model.2"]), SSF(targets=["model.2"])):
        method.attach(module)
    adapter, scales = (placed.part for placed in placed_parts(module))
    for part in (adapter, scales):
        for parameter in part.parameters():
            parameter.data = torch.randn_like(parameter)
    layer: Any = module.model[2]
    form: Any = adapter.form
    weight = layer.weight + form.up @ form.down
    hidden = module.model[:2](inputs)
    torch.testing.assert_close(layer(hidden), scales.scale * (hidden @ weight.T + layer.bias) + scales.shift)


def test_zeros_stay_and_a_delta_is_scaled_with_its_weight(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        mask = NMSparsity("2:4", "one-shot", exclude=())
        return [SSF(checkpoint="full"), mask, LoRA(rank=2, exclude=["model.0", "head"], checkpoint="full")]

    run = fit(methods(), after=[every_epoch(tmp_path)], max_epochs=2)
    assert is_nm(run.module.model[0].weight, 2, 4)
    assert is_nm(run.module.model[2].weight, 2, 4)
    resumed = fit(methods()[::-1], resume=tmp_path / "epoch=0.ckpt", seed=3, max_epochs=2)
    assert_same(run, resumed, "uninterrupted against resumed")


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
def test_biases_trained_beside_are_folded_too(tmp_path: Path) -> None:
    """Files in which some biases are the base's and some are not, read by Lightning alone, baked and resumed."""

    class Pretrained(BatchNorm):
        def build(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                super().build()

    def methods() -> list[Any]:
        return [SSF(), BitFit(head=False, targets=["model.0"])]

    run = fit(methods(), style=Pretrained, after=[every_epoch(tmp_path)], max_epochs=2)
    again = lightning_peft.load_from_checkpoint(Pretrained, tmp_path / "epoch=1.ckpt")
    for name, value in run.module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    resumed = fit(methods(), style=Pretrained, resume=tmp_path / "epoch=0.ckpt", seed=5, max_epochs=2)
    assert_same(run, resumed, "uninterrupted against resumed")
    seen: Any = trainer(callbacks=methods()).predict(
        Pretrained(), loader(8), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True
    )
    with torch.no_grad():
        torch.testing.assert_close(seen[0], run.module.eval().logits(next(iter(loader(8)))[0]))


def test_scales_follow_a_cut_of_channels(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [SSF(noise=0.3, checkpoint="full"), StructuredPruning(0.3, start=2)]

    whole = fit(methods(), style=Conv, after=[every_epoch(tmp_path)], max_epochs=3)
    plain = fit(methods()[:1], style=Conv, max_epochs=3)
    shapes = [[p.shape for p in run.module.parameters()] for run in (whole, plain)]
    assert shapes[0] != shapes[1], "nothing was cut"
    resumed = fit(methods(), style=Conv, resume=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(whole, resumed, "uninterrupted against resumed after the cut")
    lightning_peft.bake_checkpoint(tmp_path / "epoch=2.ckpt", tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state, dict(whole.module.state_dict()), atol=1e-6, rtol=1e-6)


def test_what_stays_can_be_switched_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    inputs = next(iter(loader(8)))[0]
    before = module.logits(inputs).detach()
    fit([SSF(head=False, exclude=None, keep=True)], module=module)
    assert len(list(placed_parts(module))) == 3
    after = module.logits(inputs).detach()
    lightning_peft.switch(module, "ssf", on=False)
    assert torch.equal(module.logits(inputs), before)
    lightning_peft.switch(module, "ssf", on=True)
    assert torch.equal(module.logits(inputs), after)
    torch.testing.assert_close(lightning_peft.bake(module).logits(inputs), after)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
@settings(deadline=None)
def test_the_fold_of_a_product(outputs: int, inputs: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((outputs, inputs), (5, inputs)))
    bias, scale, shift = torch.randn(3, outputs, generator=draw, dtype=torch.float64)
    features = scale_and_shift(x @ weight.T + bias, scale, shift)
    folded = x @ scaled_weight(weight, scale).T + shifted_bias(bias, scale, shift)
    torch.testing.assert_close(features, folded, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled_weight(weight.T, scale, 1), scaled_weight(weight, scale).T)


def test_halves_keep_their_type() -> None:
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    assert scale_and_shift(half, torch.ones(3), torch.ones(3)).dtype is torch.bfloat16
    third = torch.full((2,), 1 / 3)
    assert torch.equal(scaled_weight(3 * half, third), (3 * half.float() * third[:, None]).bfloat16())


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(MisconfigurationException, match=re.escape("noise=-1 must not be negative")):
        SSF(noise=-1)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    assert "tied to another layer" in str(lightning_peft.plan(gpt, [SSF()]))
