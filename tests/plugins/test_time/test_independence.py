"""Batches are run in parts only where parts give what the whole gives, whatever couples the samples."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tta_toys import CLASSES, Classifier, close, layer_norm_net, norm_parameters, run, stream

from lightning_peft import ETA, SAR, Tent
from lightning_peft.capture.evaluation import Call
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.test_time._shared.independence import compare_parts

STILL = 1e-12  # a learning rate that moves nothing


class Coupled(nn.Module):
    """A network over flattened inputs whose samples meet somewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(192, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)
        self.eval()

    def forward(self, x):
        return self.last(self.meet(self.norm(self.first(x.flatten(1)))))


class StatisticsByHand(Coupled):
    def meet(self, h):
        return (h - h.mean(0)) / (h.std(0) + 1e-5)


class AttentionOverTheBatch(Coupled):
    def meet(self, h):
        return h + (h @ h.T / 4).softmax(-1) @ h


class Neighbours(Coupled):
    """Every sample sees the one before: halves of a batch differ in one sample alone."""

    def meet(self, h):
        return h + h.roll(1, 0)


class Capacity(Coupled):
    """Only the strongest half of a batch passes, as experts with a capacity let pass."""

    def meet(self, h):
        strength = h[:, 0]
        return h * (strength >= strength.median())[:, None]


class TracksNothing(Coupled):
    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(16, track_running_stats=False)
        self.eval()

    def meet(self, h):
        return self.batch_norm(h)


class Blocks(Coupled):
    """Takes batches of even size only."""

    def meet(self, h):
        return h + h.view(len(h) // 2, 2, -1).mean(1).repeat_interleave(2, 0)


NETWORKS = [StatisticsByHand, AttentionOverTheBatch, Neighbours, Capacity, TracksNothing, Blocks]
every_network = pytest.mark.parametrize("network", NETWORKS)


def plain(net, loader):
    with torch.no_grad():
        return [net(x) for x, _ in loader]


@every_network
@pytest.mark.parametrize("make", [lambda: Tent(lr=STILL), lambda: ETA(lr=STILL, d_margin=1.1), lambda: SAR(lr=STILL)])
def test_coupled_samples_are_predicted_as_the_network_does(network, make):
    net = network()
    close(run(net, make(), loaders=stream(10, size=6)), plain(net, stream(10, size=6)), 1e-5)


@every_network
@pytest.mark.parametrize("way", ["chunks", "second-pass"])
def test_parts_that_differ_are_refused_with_the_figure(network, way):
    pattern = "cannot be run" if network in (Blocks, TracksNothing) else r"differ from those of the whole by \d"
    with pytest.raises(MisconfigurationException, match=rf"{way}.*{pattern}.*backward=.auto"):
        run(network(), Tent(backward=way))


@every_network
def test_the_second_pass_of_sar_runs_the_whole_batch(network):
    sizes = []
    net = network()
    net.norm.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    run(net, SAR(lr=STILL, e_margin=1.1, backward="whole"), loaders=stream(1))
    assert sizes.count(12) >= 2
    assert sizes[-1] == 12


def test_independent_samples_are_run_in_parts():
    method = Tent(lr=STILL, backward="chunks", chunk_size=3)
    run(layer_norm_net(), method, loaders=stream(1))
    assert method.way.name in ("chunks", "workers")
    assert method._comparison.difference < 1e-5


def test_layouts_with_the_batch_in_second_place():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, CLASSES)
            self.eval()

        def forward(self, x):
            return self.head(self.encoder(x))

    class Step(Classifier):
        def test_step(self, batch, batch_idx):
            self.predictions.append(self.net(batch[0]))

    torch.manual_seed(1)
    batches = [(torch.randn(12, 5, 16), torch.zeros(12, 5)) for _ in range(8)]
    module, net = Step(Sequence()), Sequence()
    trainer(callbacks=[Tent(lr=STILL)]).test(module, DataLoader(batches, batch_size=None), verbose=False)
    close(module.predictions, plain(net, batches), 1e-5)


def test_rows_that_are_not_samples():
    net = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20), nn.Flatten(0, 1)).eval()
    ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(ids, ids), batch_size=4)

    class Step(Classifier):
        def test_step(self, batch, batch_idx):
            self.predictions.append(self.net(batch[0]))

    module = Step(net)
    trainer(callbacks=[Tent(lr=STILL)]).test(module, loader, verbose=False)
    close(module.predictions, plain(net, loader), 1e-5)
    with pytest.raises(MisconfigurationException, match="4 samples have logits in 24 rows"):
        trainer(callbacks=[Tent(backward="chunks")]).test(Step(net), loader, verbose=False)


def test_the_comparison_leaves_no_trace():
    class Counting(Coupled):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.dropout = nn.Dropout(0.5)

        def meet(self, h):
            self.calls += 1
            return h + 0 * self.dropout(h)

    net = Counting()
    net.dropout.train()
    found = compare_parts(Call(net.forward, (torch.randn(6, 3, 8, 8),), {}), lambda output: output[:, None], net)
    assert found.independent
    assert float(net.calls) == 0


def test_the_comparison_draws_no_random_numbers():
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Dropout(0.5), nn.Linear(192, CLASSES))
    x = torch.randn(6, 3, 8, 8)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = compare_parts(Call(net.forward, (x,), {}), lambda output: output[:, None], net)
    assert torch.equal(torch.rand(3), expected)
    assert not found.independent, "random numbers fall to other samples in parts"


def test_samples_that_are_nan_tell_nothing():
    net = layer_norm_net()
    x = torch.randn(6, 3, 8, 8)
    x[2] = float("nan")
    assert compare_parts(Call(net.forward, (x,), {}), lambda output: output[:, None], net).independent
    everything = compare_parts(Call(net.forward, (x * float("nan"),), {}), lambda output: output[:, None], net)
    assert everything.difference != everything.difference


def test_a_window_predicts_within_the_window_where_samples_meet():
    net = AttentionOverTheBatch()
    data = stream(1, size=9).dataset
    found = run(net, Tent(lr=STILL, window=4), loaders=DataLoader(data, batch_size=1))
    x = data.tensors[0]
    for last in range(3, 9):
        close([found[last]], [net(x[last - 3 : last + 1])[-1:].detach()], 1e-4)


def test_two_runs_decide_alike():
    nets = [StatisticsByHand() for _ in range(2)]
    first, second = (run(net, Tent(lr=0.05, keep=True), loaders=stream(8)) for net in nets)
    close(first, second, 0)
    close(*([p.detach() for p in norm_parameters(net)] for net in nets), 0)
