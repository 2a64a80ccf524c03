from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft import Lane, Method, Resource
from lightning_peft.capture.tap import MAX_CALLS, Tap
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import assert_clean, fit


@pytest.fixture
def layer():
    return nn.Linear(2, 2)


def test_remembers_calls_while_open(layer):
    tap = Tap(layer, "layer")
    tap.install()
    x = torch.ones(1, 2)
    layer(x)
    assert tap.calls == []
    tap.open()
    y = layer(x)
    layer(input=2 * x)
    assert tap.calls[0].args[0] is x
    assert tap.calls[0].output is y
    assert y.requires_grad
    assert list(tap.last().kwargs) == ["input"]
    tap.open()
    assert tap.calls == []
    tap.remove()
    assert "forward" not in vars(layer)


def test_lets_go_of_tensors_when_closed(layer):
    tap = Tap(layer, "layer")
    tap.install()
    tap.open()
    layer(torch.ones(1, 2))
    tap.close()
    assert tap.calls == []


def test_does_not_remember_without_end(layer):
    tap = Tap(layer, "layer")
    tap.install()
    tap.open()
    for _ in range(MAX_CALLS + 5):
        layer(torch.ones(1, 2))
    assert len(tap.calls) == MAX_CALLS


@pytest.mark.parametrize(("name", "shown"), [("model", "'model'"), ("", "the module itself")])
def test_a_network_that_was_not_called_is_named(layer, name, shown):
    tap = Tap(layer, name)
    tap.install()
    tap.open()
    with pytest.raises(MisconfigurationException, match=rf"{shown}.*was not called.*network="):
        tap.last()


def test_a_failing_forward_is_not_remembered(layer):
    tap = Tap(layer, "layer")
    tap.install()
    tap.open()
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3))
    assert tap.calls == []


class Centred(Method):
    """Reads the inputs and the logits of the network."""

    lane = Lane.LOSS
    reads = frozenset({Resource.INPUTS})

    def __init__(self):
        super().__init__()
        self.shapes = []

    def loss(self, step):
        assert torch.equal(step.inputs[0], step.batch[0])
        assert torch.equal(step.call.output, step.logits)
        self.shapes.append(tuple(step.logits.shape))
        return 0.01 * (step.logits.mean() - step.inputs[0].mean()).square()


def test_inputs_and_logits_of_the_network_reach_the_method():
    method = Centred()
    run = fit([method])
    assert method.shapes == [(8, 3)] * 4
    assert_clean(run.module, "inputs and logits")
    plain = fit([])
    assert not torch.equal(run.module.model[0].weight, plain.module.model[0].weight)


def test_two_views_in_one_step_are_both_remembered():
    class TwoViews(Plain):
        def base_loss(self, batch):
            return super().base_loss((batch[0] + 1, batch[1])) + super().base_loss(batch)

    class Both(Centred):
        def loss(self, step):
            self.shapes.append(len(step.tap.calls))
            assert torch.equal(step.inputs[0], step.batch[0])

    method = Both()
    fit([method], style=TwoViews)
    assert method.shapes == [2] * 4


def test_reading_what_was_not_declared_says_so():
    class Undeclared(Method):
        lane = Lane.LOSS

        def loss(self, step):
            return step.logits.sum()

    class NoIndex(Method):
        lane = Lane.LOSS

        def loss(self, step):
            return step.sample_index.sum()

    with pytest.raises(RuntimeError, match=r"must declare Resource\.LOGITS"):
        fit([Undeclared()])
    with pytest.raises(RuntimeError, match=r"must declare Resource\.SAMPLE_INDEX"):
        fit([NoIndex()])


def test_calls_within_a_call_are_not_remembered():
    class Twice(nn.Module):
        def forward(self, x, again=True):
            return self(x + 1, again=False) if again else x

    net = Twice()
    tap = Tap(net, "net")
    tap.install()
    tap.open()
    x = torch.ones(1, 2)
    y = net(x)
    assert len(tap.calls) == 1
    assert tap.calls[0].args[0] is x
    assert tap.calls[0].output is y
