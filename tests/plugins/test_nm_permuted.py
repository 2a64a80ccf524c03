"""Channels in an order in which N:M keeps more: nothing but the masks changes, in training and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import NMSparsity, bake, plan
from lightning_peft.attaching import hub
from lightning_peft.functional import is_nm, nm_mask
from lightning_peft.structure.coupled.example import record
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.sparsity._nm_sparsity.channel_order import ChannelOrder, Sparse, channel_order

pytest.importorskip("torch_pruning")


def norm(width: int) -> nn.Module:
    layer = nn.BatchNorm2d(width)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    return layer


class Residual(nn.Module):
    """A stem, a block that adds to it, a depthwise convolution, two branches side by side, and a linear layer over the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 24, 1), norm(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), norm(16))
        self.depthwise, self.one = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1)
        self.reader, self.hidden, self.head = nn.Conv2d(8 + 16, 12, 1), nn.Linear(12 * 4, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        maps = self.depthwise(maps + self.block(maps))
        return self.head(self.hidden(self.reader(torch.cat((self.one(maps), maps), 1)).flatten(1)).relu())


class Moved(nn.Module):
    """One layer whose channels are mixed up on their way, after one whose are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.moved, self.reader, self.head = (nn.Linear(a, b) for a, b in ((6, 8), (8, 16), (16, 8), (8, 3)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.reader(self.moved(self.stem(inputs).relu()).roll(3, -1)).relu())


def vit() -> nn.Module:
    timm = pytest.importorskip("timm.models")
    return timm.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, mlp_ratio=2)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **special, num_hidden_layers=1, vocab_size=11))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SMALL = IMAGES[..., :4, :4]
IDS = torch.tensor([[1, 5, 3, 8, 2, 2], [9, 4, 4, 1, 7, 6]])


def sparse_of(network: nn.Module, first: int = 1) -> dict[str, Sparse]:
    """All linear layers and whole convolutions but the first ones and the last."""
    layers = [(n, p) for n, p in network.named_modules() if isinstance(p, (nn.Linear, nn.Conv2d)) and p.weight.shape[1] > 3]
    return {f"{name}.weight": Sparse(part.weight.detach(), 2, 4, 1) for name, part in layers[first - 1 : -1]}


def searched(network: nn.Module, inputs: Tensor, **settings: Any) -> ChannelOrder:
    example = record((inputs,), {})
    return channel_order(network, "", network, example, sparse_of(network), escapes=0, **settings)


def logits(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = network.eval()(inputs)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize(
    ("build", "inputs", "groups"), [(Residual, SMALL, 3), (vit, IMAGES, 3), (llama, IDS, 2)], ids=["residual", "vit", "llama"]
)
def test_the_network_computes_the_same_and_the_pattern_keeps_more(build: Any, inputs: Tensor, groups: int) -> None:
    torch.manual_seed(1)
    network = build()
    before, sparse = logits(network, inputs), sparse_of(network)
    found = searched(network, inputs)
    assert (found.groups, found.left) == (groups, {})
    total = sum(float(weight.weight.abs().sum()) for weight in sparse.values())
    kept = sum(float((w.weight.abs() * nm_mask(w.weight, 2, 4, 1)).sum()) for w in sparse.values()) / total
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, dims in found.orders.items():
        for dim, order in dims.items():
            tensors[name].data = tensors[name].data.index_select(dim, order)
    after = sum(float((w.weight.abs() * nm_mask(w.weight, 2, 4, 1)).sum()) for w in sparse_of(network).values()) / total
    assert (found.before, found.kept) == (pytest.approx(kept), pytest.approx(after))
    assert after > kept + 0.005
    assert torch.allclose(logits(network, inputs), before, atol=1e-5 * float(before.abs().max()))


def test_what_moves_on_its_way_stays_and_is_named() -> None:
    network = Moved()
    found = searched(network, torch.randn(2, 6))
    assert [*found.left] == ["moved"]
    assert "another order" in found.left["moved"]
    assert found.groups == 1
    assert {*found.orders} == {"stem.weight", "stem.bias", "moved.weight"}


def test_frozen_layers_stay() -> None:
    network = Moved()
    found = searched(network, torch.randn(2, 6), frozen=lambda tensor: tensor is network.stem.bias)
    assert found.left["stem"] == "stem.bias is frozen"


class Wide(Plain):
    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
        with torch.no_grad():  # neighbours alike, so that their order matters
            self.model[2].weight.mul_(torch.rand(24).sort().values)


def permuted(recipe: str = "one-shot", **settings: Any) -> NMSparsity:
    return NMSparsity("2:4", recipe, permute=True, **settings)


@pytest.mark.parametrize("settings", [{}, {"dense": 4}, {"recipe": "sr-ste"}, {"recipe": "ste", "refresh": 2}])
def test_masks_begin_when_channels_are_permuted(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    seen: list[Any] = []
    apply = hub.reorder_training

    def spy(trainer: Any, module: Any, orders: Any) -> None:
        assert not is_nm(module.model[2].weight, 2, 4)
        apply(trainer, module, orders)
        seen.append(trainer.global_step)

    monkeypatch.setattr(hub, "reorder_training", spy)
    method = permuted(**settings)
    module = fit([method], style=Wide, max_epochs=2).module
    assert seen == [max(1, settings.get("dense", 0))]
    assert method.permutation.kept[1] > method.permutation.kept[0] + 0.01
    assert is_nm(module.model[2].weight, 2, 4)
    assert not is_nm(module.model[0].weight, 2, 4)


@pytest.mark.parametrize("dense", [0, "60%"])
def test_it_resumes_bit_for_bit_from_before_and_after(dense: Any, tmp_path: Path) -> None:
    whole = fit([permuted(dense=dense)], style=Wide, max_epochs=3, after=[every_epoch(tmp_path)])
    for epoch in range(2):
        again = fit([permuted(dense=dense)], style=Wide, max_epochs=3, seed=9, resume=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(again, whole, f"resumed after epoch {epoch}")


def test_a_baked_file_loads_in_plain_lightning(tmp_path: Path) -> None:
    done = fit([permuted()], style=Wide, max_epochs=1)
    done.trainer.save_checkpoint(tmp_path / "last.ckpt")
    plain = Wide()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(plain(torch.ones(1, 16)), bake(done.module)(torch.ones(1, 16)))
    assert is_nm(plain.model[2].weight, 2, 4)


def test_the_plan_says_what_is_kept_without() -> None:
    module = Wide()
    weight = module.model[2].weight.detach()
    share = float((weight.abs() * nm_mask(weight, 2, 4)).sum() / weight.abs().sum())
    assert f"channels to be permuted: {share:.1%} of the magnitude kept without" in str(plan(module, [permuted()]))


def test_a_network_that_cannot_be_followed_is_masked_as_it_is() -> None:
    class Choosy(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            if len(inputs) == 1:  # what it is called with beside the training
                raise ValueError("one sample")
            return super().forward(inputs)

    class Batches(Wide):
        def build(self) -> None:
            super().build()
            self.model = Choosy(*self.model)

    with pytest.warns(UserWarning, match=r"leaves all channels in their order\. .*ValueError: one sample"):
        module = fit([permuted()], style=Batches, max_epochs=1).module
    assert is_nm(module.model[2].weight, 2, 4)


def test_a_layer_that_takes_no_part_is_named_with_a_cure_that_works() -> None:
    class Idle(nn.Sequential):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.idle = nn.Linear(8, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            for layer in [*self][:-1]:
                inputs = layer(inputs)
            return inputs

    class Beside(Wide):
        def build(self) -> None:
            super().build()
            self.model = Idle(*self.model)

    with pytest.warns(UserWarning, match=r"idle did not contribute .* exclude=\['idle'\]"):
        fit([permuted()], style=Beside, max_epochs=1)
    method = permuted(exclude=["model.idle", "first", "head"])
    fit([method], style=Beside, max_epochs=1)
    assert method.permutation.kept[1] > method.permutation.kept[0]


def test_a_fit_that_ends_before_it_says_so() -> None:
    with pytest.warns(UserWarning, match="ended after .* before the batch after step 1, with which channels are permuted"):
        fit([permuted()], style=Wide, max_steps=1, expected=())


def test_a_network_that_was_not_called_is_named() -> None:
    class Beside(Wide):
        def build(self) -> None:
            super().build()
            self.other = nn.Linear(16, 3)

    with pytest.raises(MisconfigurationException, match=r"'other' was not called .* network="):
        fit([permuted(network="other")], style=Beside, max_epochs=1)
    fit([permuted(network="model")], style=Beside, max_epochs=1)


@pytest.mark.filterwarnings("ignore:.*leaves (all channels|the channels of some layers) in their order")
class TestPermuted(MethodTester):
    methods = [lambda: NMSparsity("2:4", recipe="sr-ste", permute=True, permute_escapes=2, exclude=())]
