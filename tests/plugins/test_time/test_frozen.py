"""A second pass of the chosen samples with the statistics of their batch as constants."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from tta_toys import CLASSES, batch_norm_net, close, configured, entropy, layer_norm_net, norm_parameters, run, stream

from lightning_peft import ETA, Tent
from lightning_peft_plugins.test_time._shared.batch_statistics import FrozenStatistics

MARGIN = 0.6


class Twice(nn.Module):
    """Calls one BatchNorm layer twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x.square() + self.norm(x))


def timm_layer():
    return pytest.importorskip("timm.layers").BatchNormAct2d(3)


@pytest.mark.parametrize("make", [batch_norm_net, Twice, timm_layer])
def test_chosen_samples_have_the_outputs_of_the_first_pass(make):
    net = configured(make().eval())
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(12, 3, 8, 8) * 3 + 1
    expected = net(x)
    frozen = FrozenStatistics(layers)
    with frozen.recording():
        close([net(x)], [expected], 1e-6)
    with frozen.frozen():
        close([net(x[[1, 5, 7]])], [expected[[1, 5, 7]]], 1e-5)
    frozen.restore()
    close([net(x)], [expected], 0)
    assert not any("forward" in vars(layer) for layer in layers)


def test_gradients_are_those_with_the_statistics_detached():
    net = batch_norm_net().double()
    data = stream(1)
    x = data.dataset.tensors[0].double()
    twin = configured(net)
    with torch.no_grad():
        chosen = entropy(twin(x)) < MARGIN * math.log(CLASSES)
    assert 0 < chosen.sum() < len(x)
    for layer in (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):

        def normalise(y, layer=layer):
            variance, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0, keepdim=True)
            y = (y - mean) / (variance + layer.eps).sqrt()
            return y * layer.weight[:, None, None] + layer.bias[:, None, None]

        layer.forward = normalise
    logits = twin(x)
    h = entropy(logits)[chosen]
    (h * torch.exp(MARGIN * math.log(CLASSES) - h.detach())).mean().backward()
    expected = [p.detach() - 0.1 * p.grad for p in norm_parameters(twin)]

    before = copy.deepcopy(net.state_dict())
    method = ETA(lr=0.1, momentum=0.0, e_margin=MARGIN, d_margin=2.0, backward="frozen", keep=True)
    predictions = run(net, method, loaders=data, precision="64-true")
    close(predictions, [logits.detach()], 1e-10)
    close(norm_parameters(net), expected, 1e-10)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (name.split(".")[0] not in ("1", "4") or "running" in name or "num" in name)


def test_it_is_an_approximation_and_exact_without_batch_statistics():
    results = {}
    for backward in ("whole", "frozen"):
        results[backward] = [run(make(), Tent(lr=0.05, backward=backward)) for make in (batch_norm_net, layer_norm_net)]
    assert not torch.allclose(results["whole"][0][-1], results["frozen"][0][-1], atol=1e-3)
    close(results["frozen"][1], results["whole"][1], 1e-4)
    close([torch.cat(results["frozen"][0])[:12]], [torch.cat(results["whole"][0])[:12]], 1e-5)


def test_an_error_in_the_second_pass_leaves_no_trace():
    net = batch_norm_net()
    method = Tent(lr=0.05, backward="frozen")
    method.settle = lambda chosen: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(net, method)
    assert not any("forward" in vars(m) for m in net.modules())
    assert net[1].running_mean is not None
