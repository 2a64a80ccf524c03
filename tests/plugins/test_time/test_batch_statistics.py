"""Which statistics BatchNorm layers normalise with: layers with one value a channel, and layers that are used twice."""

from __future__ import annotations

import copy

import pytest
import torch
from test_stream import METHODS, every_method
from torch import nn
from torch.utils.data import DataLoader
from tta_toys import CLASSES, Trained, close, one, run, stream

from lightning_peft import ETA, BatchNormAdapt, FisherEstimator, RoTTA, Tent
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.test_time._shared.batch_statistics import BlendStatistics, RobustStatistics, UseBatchStatistics


def flat_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
    net(torch.randn(32, 3, 8, 8) + 1)
    return net.eval()


def pooled_net():
    """Two layers with BatchNorm, the second on maps of one pixel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1))
    net.extend([nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, CLASSES)])
    net(torch.randn(32, 3, 8, 8) + 1)
    return net.eval()


def uneven(size=4):
    """Batches of some size and a last one of a single sample."""
    return DataLoader(stream(1, size=2 * size + 1).dataset, batch_size=size)


@every_method
@pytest.mark.parametrize("net", [flat_net, pooled_net])
def test_a_last_batch_of_one_sample_is_a_batch_like_any_other(make, net):
    network = net()
    before = copy.deepcopy(network.state_dict())
    found = run(network, make(), loaders=uneven())
    assert [len(batch) for batch in found] == [4, 4, 1]
    assert all(batch.isfinite().all() for batch in found)
    close(network.state_dict().values(), before.values(), 0)


@pytest.mark.parametrize("method", [lambda: Tent(lr=0.0), lambda: BatchNormAdapt(), lambda: BatchNormAdapt(prior=1)])
def test_a_layer_with_one_value_a_channel_normalises_with_the_source(method):
    found = run(flat_net(), method(), loaders=uneven())
    plain = run(flat_net(), loaders=uneven())
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    close(found[-1:], plain[-1:], 1e-6)


def test_only_the_layers_with_one_value_a_channel_do():
    net = pooled_net()
    x = stream(1).dataset.tensors[0][:1]
    first = net[0](x)
    deviation, mean = torch.std_mean(first, (0, 2, 3), correction=0, keepdim=True)
    by_hand = (first - mean) / (deviation**2 + 1e-5).sqrt()
    with torch.no_grad():
        expected = net[2:](by_hand)  # scale and shift are 1 and 0; what follows is in evaluation mode
    close(run(net, Tent(lr=0.0), loaders=one((x, torch.zeros(1)[:].long()))), [expected], 1e-4)


def test_a_window_that_holds_one_sample():
    loader = DataLoader(stream(1, size=7).dataset, batch_size=1)
    found = run(flat_net(), ETA(window=3, lr=0.05, e_margin=1.1, d_margin=1.1), loaders=loader)
    assert torch.cat(found).isfinite().all()
    close(found[:1], run(flat_net(), loaders=loader)[:1], 1e-6)


def test_an_average_of_statistics_passes_by_what_has_no_variance():
    layer = nn.BatchNorm1d(2).eval()
    BlendStatistics([layer], 0.5, accumulate=True)
    layer(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    close([layer.running_mean, layer.running_var], [torch.tensor([0.5, 1.0]), torch.tensor([1.5, 4.5])])
    found = layer(torch.tensor([[9.0, 9.0]]))
    close([found], [torch.tensor([[8.5 / 1.5**0.5, 8.0 / 4.5**0.5]])], 1e-4)
    close([layer.running_mean, layer.running_var], [torch.tensor([0.5, 1.0]), torch.tensor([1.5, 4.5])])


def test_robust_statistics_do_not_move_towards_a_single_value():
    layer = nn.BatchNorm1d(2).eval()
    robust = RobustStatistics([layer], 0.5)
    with robust.moving():
        found = layer(torch.tensor([[3.0, 4.0]]))
    close([found], [torch.tensor([[3.0, 4.0]])], 1e-4)
    close([layer.running_mean, layer.running_var], [torch.zeros(2), torch.ones(2)], 0)
    found = run(flat_net(), RoTTA(capacity=1, every=1, lr=0.05), loaders=uneven())
    assert torch.cat(found).isfinite().all()


def test_training_mode_does_not_count_single_values_either():
    layer = nn.BatchNorm1d(2)
    UseBatchStatistics([layer])
    close([layer(torch.tensor([[3.0, 4.0]]))], [torch.tensor([[3.0, 4.0]])], 1e-4)
    assert int(layer.num_batches_tracked) == 0


class Twice(nn.Module):
    """Uses one layer twice, as recurrent and weight-sharing networks do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)
        self.between = nn.Linear(16, 16)
        self(torch.randn(32, 3, 8, 8))
        self.eval()

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1))).relu()
        return self.last(self.norm(self.between(x)).relu())


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_may_be_used_twice(name):
    options = {"prior": 1.0} if name == "MEMO" else {}
    found = run(Twice(), METHODS[name](**options), loaders=stream(2, size=6))
    plain = run(Twice(), loaders=stream(2, size=6))
    assert not torch.equal(found[-1], plain[-1])


class TwoNames(Twice):
    """Holds the layer it uses twice under two names."""

    def __init__(self):
        super().__init__()
        self.again = self.norm


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_may_have_two_names(name):
    net = TwoNames()
    held = dict(net.named_parameters())
    found = run(net, METHODS[name](), loaders=stream(2, size=6))
    assert all(held[key] is value for key, value in net.named_parameters()), "a tensor of the module was replaced"
    assert net.again.weight is net.norm.weight
    close(found, run(Twice(), METHODS[name](), loaders=stream(2, size=6)), 1e-6)


def test_scores_of_a_last_batch_of_one_sample():
    estimator = FisherEstimator(samples=9)
    trainer(callbacks=[estimator]).validate(Trained(flat_net()), uneven(), verbose=False)
    assert all(score.isfinite().all() for score in estimator.scores.values())
