"""One sample that is NaN costs its own prediction and nothing else, whatever the method."""

from __future__ import annotations

import copy

import pytest
import torch
from test_stream import METHODS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tta_toys import CLASSES, NETS, Classifier, batch_norm_net, close, layer_norm_net, run, stream

from lightning_peft import LAME, BatchNormAdapt, RoTTA
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.test_time._rotta.sample_memory import SampleMemory

EVERYTHING = {**METHODS, "LAME": LAME}
SPOILT = 3


def spoilt(value, batches=4, size=8):
    x, y = stream(batches, size=size).dataset.tensors
    x = x.clone()
    x[SPOILT, 0, 2, 2] = value
    return DataLoader(TensorDataset(x, y), batch_size=size)


def without(batches=4, size=8):
    """The same stream without the spoilt sample."""
    x, y = stream(batches, size=size).dataset.tensors
    sizes = [size - 1, *[size] * (batches - 1)]
    rows = [row for row in range(len(x)) if row != SPOILT]
    parts = torch.tensor(rows).split(sizes)
    return DataLoader([(x[part], y[part]) for part in parts], batch_size=None)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_stream_with_a_spoilt_sample_is_the_stream_without_it(name, value, kind):
    if name == "BatchNormAdapt" and kind == "layer norm":
        pytest.skip("no BatchNorm layer")
    options = {} if name == "LAME" else {"keep": True}
    nets = [NETS[kind]() for _ in range(2)]
    found = run(nets[0], EVERYTHING[name](**options), loaders=spoilt(value))
    expected = run(nets[1], EVERYTHING[name](**options), loaders=without())
    rows = [row for row in range(8) if row != SPOILT]
    assert not found[0][SPOILT].isfinite().all()
    close([found[0][rows], *found[1:]], expected, 1e-5)
    close(nets[0].state_dict().values(), nets[1].state_dict().values(), 1e-5)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_batch_of_spoilt_samples_is_passed_by(name):
    x, y = stream(3, size=4).dataset.tensors
    x = x.clone()
    x[:4] = float("nan")
    net = batch_norm_net()
    found = run(net, EVERYTHING[name](), loaders=DataLoader(TensorDataset(x, y), batch_size=4))
    assert found[0].isnan().all()
    assert torch.cat(found[1:]).isfinite().all()


class Explodes(nn.Module):
    """Makes nothing of images with a bright corner, though their numbers are finite."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        bright = (x[:, 0, 0, 0] > 50)[:, None]
        return torch.where(bright, torch.full((), float("nan")), self.net(x))


@pytest.mark.parametrize("name", EVERYTHING)
def test_outputs_that_are_spoilt_teach_nothing_either(name):
    if name in ("BatchNormAdapt", "EATA"):
        pytest.skip("takes nothing from outputs, or needs scores by other names")
    x, y = stream(4, size=8).dataset.tensors
    x = x.clone()
    x[SPOILT, 0, 0, 0] = 60.0
    net = Explodes(layer_norm_net())
    before = copy.deepcopy(net.state_dict())
    options = {} if name == "LAME" else {"keep": True}
    found = run(net, EVERYTHING[name](**options), loaders=DataLoader(TensorDataset(x, y), batch_size=8))
    assert found[0][SPOILT].isnan().all()
    assert torch.cat([found[0][:SPOILT], found[0][SPOILT + 1 :], *found[1:]]).isfinite().all()
    assert all(value.isfinite().all() for value in net.state_dict().values())
    if name != "LAME":
        assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_values_that_are_meant_to_be_missing_stay_in_their_batch():
    class Imputes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = batch_norm_net()

        def forward(self, x):
            return self.net(x.nan_to_num())

    found = run(Imputes(), BatchNormAdapt(), loaders=spoilt(float("nan"), 1))
    x, y = spoilt(float("nan"), 1).dataset.tensors
    close(
        found, run(batch_norm_net(), BatchNormAdapt(), loaders=DataLoader(TensorDataset(x.nan_to_num(), y), batch_size=8)), 1e-6
    )


def test_outputs_of_any_structure_are_put_together_again():
    class Mapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = batch_norm_net()

        def forward(self, x):
            return {"logits": self.net(x), "features": x.flatten(1), "name": "toy"}

    class Step(Classifier):
        def test_step(self, batch, batch_idx):
            output = self.net(batch[0])
            assert output["name"] == "toy"
            assert torch.equal(output["features"].nan_to_num(), batch[0].flatten(1).nan_to_num())
            self.predictions.append(output["logits"])

    module = Step(Mapping())
    trainer(callbacks=[METHODS["Tent"]()]).test(module, spoilt(float("nan")), verbose=False)
    close(module.predictions[1:], run(batch_norm_net(), METHODS["Tent"](), loaders=without())[1:], 1e-5)


def test_a_memory_lets_go_of_what_can_be_learnt_from_no_more():
    memory = SampleMemory(6, CLASSES)
    for label, sample in ((0, "a"), (1, "b"), (1, "c"), (2, "d")):
        memory.add(label, sample, 0.1)
    memory.keep([True, False, True, True])
    assert [kept.sample for kept in memory.kept()] == ["a", "c", "d"]
    method = RoTTA(lr=0.05, capacity=8, every=4, augment=lambda x: torch.full_like(x, float("nan")))
    net = layer_norm_net()
    assert torch.cat(run(net, method, loaders=stream(3, size=8))).isfinite().all()
