"""FOA: where tokens enter vision transformers of several libraries, what is refused, and whose random numbers are drawn."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from official_runs import filled, loader, vit_net
from torch import nn
from tta_toys import batch_norm_net, close, one, run, stream

from lightning_peft import FOA, LAME
from lightning_peft.capture.evaluation import Call
from lightning_peft_plugins.test_time._foa.evolution import Evolution
from lightning_peft_plugins.test_time._foa.token_path import TokenPath
from lightning_peft_plugins.test_time._shared.classifier import Classifier

pytest.importorskip("cma")
pytest.importorskip("timm")


def hugging_face_net():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return filled(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes)
        ).double(),
        0.4,
    )


def path_of(net, x):
    run = SimpleNamespace(network=net, module=net)
    call = Call(net, (x,), {})
    return TokenPath("foa", run, Classifier("foa", run), call), call


def timm_features(net, x, prompts):
    x = net._pos_embed(net.patch_embed(x))
    x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], 1)
    middle = net.blocks[0](x)
    return torch.cat([net.blocks[1].norm1(middle[:, 0]), net.norm(net.blocks[1](middle)[:, 0])], 1)


def hugging_face_features(net, x, prompts):
    x = net.vit.embeddings(x)
    x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], 1)
    layers = getattr(net.vit, "layers", None) or net.vit.encoder.layer
    first, second = layers
    middle = first(x)
    middle = middle[0] if isinstance(middle, tuple) else middle
    last = second(middle)
    last = last[0] if isinstance(last, tuple) else last
    return torch.cat([second.layernorm_before(middle[:, 0]), net.vit.layernorm(last[:, 0])], 1)


@pytest.mark.parametrize(
    ("make", "features"), [(vit_net, timm_features), (hugging_face_net, hugging_face_features)], ids=["timm", "transformers"]
)
def test_tokens_enter_and_are_read_where_the_network_has_them(make, features):
    net, (x, _) = make(), next(iter(loader(side=8)))
    prompts = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        path, call = path_of(net, x)
        output, found = path.run(call, prompts)
        close([found], [features(net, x, prompts)], 1e-12)
        _, none = path.run(call, None)
    logits = getattr(output, "logits", output)
    head = net.head if make is vit_net else net.classifier
    close([logits], [head(found[:, 12:])], 1e-12)
    assert (path.width, path.fan_in) == (12, 3 * 4 * 4)
    assert not torch.equal(none, found)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in net.modules())


class PositionalBlock(nn.Module):
    """A block for so many tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(12), nn.Linear(5, 5)

    def forward(self, x):
        return x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)


def positional(net):
    net.blocks = nn.Sequential(PositionalBlock(), PositionalBlock()).double()
    return net


def averaged(net):
    net.pool = lambda x: x.mean(1)
    return net


def test_what_has_no_such_way_is_refused_and_lame_takes_it():
    small, data = loader(12, side=8), loader(12, side=8)
    for net, reason in (
        (positional(vit_net()), "do not take 3 more tokens"),
        (averaged(vit_net()), "not given the first token"),
    ):
        with pytest.raises(MisconfigurationException, match=f"{reason}.*Take T3A, LAME"):
            run(net, FOA(source=small), loaders=data, precision="64-true")
        assert len(run(net, LAME(neighbours=2), loaders=data, precision="64-true")) == 2
    with pytest.raises(MisconfigurationException, match="no list of equal blocks"):
        run(batch_norm_net(), FOA(source=stream()), loaders=stream())
    with pytest.raises(MisconfigurationException, match="1 samples, too few"):
        run(vit_net(), FOA(source=loader(1, 1, side=8)), loaders=data, precision="64-true")


def test_one_sample_is_predicted_without_a_deviation_of_its_own():
    found = run(vit_net(), FOA(source=loader(12, side=8), population=4), loaders=loader(13, 6, side=8), precision="64-true")
    assert [len(logits) for logits in found] == [6, 6, 1]
    assert found[-1].isfinite().all()


def test_a_reset_before_every_batch_makes_batches_independent():
    options, x = {"source": loader(12, side=8), "population": 4}, loader(12, 6, side=8)
    found = run(vit_net(), FOA(reset="batch", **options), loaders=x, precision="64-true")
    for batch, logits in zip(x, found, strict=True):
        close([logits], run(vit_net(), FOA(**options), loaders=one(batch), precision="64-true"), 0)


def test_evolution_draws_from_a_generator_of_its_own_and_descends():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    strategy, best = Evolution(6, 12, 0), []
    for _ in range(40):
        solutions = strategy.ask()
        losses = [float(((x - 2) ** 2).sum()) for x in solutions]
        strategy.tell(solutions, losses)
        best.append(min(losses))
    assert (np.random.get_state()[1] == before).all()
    assert best[-1] < 1e-2 < best[0]


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MisconfigurationException, match=r"lightning-peft\[evolution\]"):
        run(vit_net(), FOA(source=loader(12, side=8)), loaders=loader(12, side=8), precision="64-true")
