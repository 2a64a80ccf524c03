from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from tta_toys import NETS, close, layer_norm_net, run, stream

from lightning_peft import LAME
from lightning_peft.functional import affinity_matrix, laplacian_adjust


def official(logits, features, neighbours=5, steps=100):
    """The published fixed point, written out."""
    unary = -torch.log(logits.softmax(1) + 1e-10)
    x = nn.functional.normalize(features, dim=-1)
    distance = torch.norm(x[None] - x[:, None], dim=-1)
    nearest = distance.topk(neighbours + 1, -1, largest=False).indices[:, 1:]
    kernel = torch.zeros(len(x), len(x)).scatter_(-1, nearest, 1.0)
    y, old = (-unary).softmax(-1), float("inf")
    for i in range(steps):
        pairwise = kernel @ y
        y = (-unary + pairwise).softmax(-1)
        energy = float((unary * y - pairwise * y + y * torch.log(y.clip(1e-20))).sum())
        if i > 1 and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return y


@pytest.mark.parametrize("kind", NETS)
def test_it_is_the_published_fixed_point(kind):
    net = NETS[kind]()
    before = copy.deepcopy(net.state_dict())
    ours = run(net, LAME())
    for got, (x, _) in zip(ours, stream(), strict=True):
        with torch.no_grad():
            features = net[:-1](x)
            expected = official(net[-1](features), features)
        torch.testing.assert_close(got.exp(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.softmax(1), got.exp())
    close(net.state_dict().values(), before.values(), 0)


def test_features_can_be_named():
    net = layer_norm_net()
    close(run(net, LAME(features="net.6")), run(net, LAME()), 0)
    assert not torch.equal(run(net, LAME(features="net.4"))[0], run(net, LAME())[0])
    assert not torch.equal(run(net, LAME(affinity="rbf", symmetric=True))[0], run(net, LAME())[0])


@given(st.integers(2, 12), st.sampled_from(["knn", "rbf", "linear"]), st.integers(1, 6))
def test_adjusted_predictions_are_distributions(samples, kind, neighbours):
    features, logits = torch.randn(samples, 3), torch.randn(samples, 4)
    adjusted = laplacian_adjust(logits.log_softmax(-1), affinity_matrix(features, kind, neighbours))
    torch.testing.assert_close(adjusted.exp().sum(-1), torch.ones(samples))


def test_without_neighbours_nothing_changes():
    log_p = torch.randn(5, 3).log_softmax(-1)
    torch.testing.assert_close(laplacian_adjust(log_p, torch.zeros(5, 5)), log_p)


def test_features_that_are_none_are_named():
    with pytest.raises(MisconfigurationException, match='features="<name>"'):
        run(layer_norm_net(), LAME(features="accuracy"))


def test_a_symmetric_affinity_is_the_mean_of_both_directions():
    net = layer_norm_net()
    found = run(net, LAME(affinity="knn", symmetric=True), loaders=stream(1))[0]
    x, _ = next(iter(stream(1)))
    with torch.no_grad():
        features = net[:-1](x)
        weights = affinity_matrix(features, "knn", 5)
        log_p = (net[-1](features).softmax(1) + 1e-10).log()
        expected = laplacian_adjust(log_p, (weights + weights.T) / 2, 100)
    assert not torch.equal(weights, weights.T)
    torch.testing.assert_close(found, expected)
