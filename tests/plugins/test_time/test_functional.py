from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_peft import ETA, BatchNormAdapt, DeYO
from lightning_peft.functional import (
    entropy_margin,
    entropy_weight,
    marginal_entropy,
    prediction_drop,
    redundancy,
    shuffle_patches,
    softmax_entropy,
    symmetric_cross_entropy,
)
from lightning_peft_plugins.test_time._shared.batch_statistics import BlendStatistics, UseBatchStatistics
from lightning_peft_plugins.test_time._shared.costs import TRIALS, Costs, Way

logits = st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=8).map(torch.tensor)


@given(logits)
def test_entropy_lies_between_0_and_the_logarithm_of_the_classes(z):
    h = softmax_entropy(z)
    assert bool((h >= -1e-6).all())
    assert bool((h <= math.log(4) + 1e-5).all())


@given(logits)
def test_the_entropy_of_the_mean_is_at_least_the_mean_of_the_entropies(z):
    assert float(marginal_entropy(z)) >= float(softmax_entropy(z).mean()) - 1e-4


@given(logits)
def test_views_that_agree_give_the_plain_entropy(z):
    torch.testing.assert_close(marginal_entropy(z[:1].repeat(5, 1)), softmax_entropy(z[0]), rtol=1e-4, atol=1e-4)


@given(logits, st.floats(0, 1))
def test_cross_entropy_with_itself_is_entropy(z, alpha):
    torch.testing.assert_close(symmetric_cross_entropy(z, z, alpha), softmax_entropy(z), rtol=1e-4, atol=1e-4)


@given(st.integers(1, 3), st.integers(4, 17), st.integers(4, 17), st.integers(1, 4))
def test_shuffled_patches_have_the_shape_and_where_they_divide_the_pixels_of_the_image(n, height, width, patches):
    images = torch.rand(n, 2, height, width)
    shuffled = shuffle_patches(images, patches)
    assert shuffled.shape == images.shape
    if height % patches == 0 and width % patches == 0:
        torch.testing.assert_close(shuffled.flatten(2).sort().values, images.flatten(2).sort().values)
    if patches == 1:
        assert torch.equal(shuffled, images)


def test_an_image_too_small_for_its_patches_is_an_error():
    with pytest.raises(ValueError, match="no 4 x 4 patches"):
        shuffle_patches(torch.rand(1, 3, 3, 8), 4)


def test_vectors_of_eata():
    z = torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [0.1, 0, 0, 0], [3, 0, 0, 0]])
    margin = entropy_margin(0.4, 4)
    h = softmax_entropy(z)
    torch.testing.assert_close(h, torch.tensor([0.26183, 0.26183, 1.38533, 0.52906]), rtol=0, atol=1e-5)
    weights = torch.where(h < margin, entropy_weight(h, margin), 0.0)
    torch.testing.assert_close(weights, torch.tensor([1.34002, 1.34002, 0.0, 1.02578]), rtol=0, atol=1e-5)
    method = ETA()
    first = method.weigh(None, z[:, None], h[:, None]).squeeze(1)
    torch.testing.assert_close(first, weights)
    assert float((first * h).sum() / 3) == pytest.approx(0.414807, abs=1e-6)
    method.settle(z.softmax(1)[[0, 1, 3]])
    torch.testing.assert_close(method._average, torch.tensor([0.61178, 0.33620, 0.02601, 0.02601]), rtol=0, atol=1e-5)
    assert not method.weigh(None, z[:, None], h[:, None]).any(), "the same batch again is redundant"
    method._average = torch.tensor([1.0, 0, 0, 0])
    again = method.weigh(None, z[:, None], h[:, None]).squeeze(1) > 0
    assert again.tolist() == [False, True, False, False]
    method.settle(z.softmax(1)[again])
    torch.testing.assert_close(method._average, torch.tensor([0.90174, 0.09479, 0.00174, 0.00174]), rtol=0, atol=1e-5)
    torch.testing.assert_close(redundancy(z.softmax(1)[1:2], torch.eye(4)[0]), torch.tensor([0.0183]), rtol=0, atol=1e-4)


def test_vector_of_deyo():
    weight = entropy_weight(torch.tensor(0.5), entropy_margin(0.4, 10)) + torch.tensor(0.4).exp()
    assert float(weight) == pytest.approx(3.015361, abs=1e-5)
    assert float(prediction_drop(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))) == 0.0
    assert DeYO().e_margin == 0.4


X = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [-1.16189, -0.38730, 0.38730, 1.16189]),
        (0.5, [-0.64952, 0.21653, 1.08253, 1.94855]),
        (0.0, [0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_vectors_of_blended_statistics(alpha, expected):
    layer = nn.BatchNorm1d(1).eval()
    BlendStatistics([layer], alpha)
    torch.testing.assert_close(layer(X).flatten(), torch.tensor(expected), rtol=0, atol=5e-5)


def test_vector_of_batch_statistics():
    layer = nn.BatchNorm1d(1).eval()
    statistics = UseBatchStatistics([layer])
    torch.testing.assert_close(layer(X).flatten(), torch.tensor([-1.34164, -0.44721, 0.44721, 1.34164]), rtol=0, atol=1e-5)
    statistics.restore()
    torch.testing.assert_close(layer(X).flatten(), X.flatten(), rtol=0, atol=1e-4)


def test_an_average_of_statistics_moves_on():
    layer = nn.BatchNorm1d(1).eval()
    blend = BlendStatistics([layer], 0.5, accumulate=True)
    layer(X)
    assert float(layer.running_mean) == 0.75
    layer(X)
    assert float(layer.running_mean) == 1.125
    blend.reset()
    assert float(layer.running_mean) == 0.0
    assert BatchNormAdapt(momentum=0.5).accumulate


def test_costs_try_every_way_and_then_take_what_is_cheapest_for_the_share_chosen():
    whole, chunks, second = ways = [Way("whole"), Way("chunks", 1), Way("second-pass")]
    costs = Costs(ways)
    for way in ways * TRIALS:
        assert costs.cheapest() == way
        with costs.timed(way, 10):
            pass
    costs.trials.update(dict.fromkeys(ways, 8))
    costs.units = {whole: 1.0, chunks: 1.2, second: 1.0}
    picked = []
    for share in (0.05, 0.3, 0.95):
        costs.share = share
        picked.append(costs.cheapest())
    assert picked == [second, chunks, whole]


def test_a_way_that_was_unlucky_gets_another_turn_but_ever_more_rarely():
    lucky, unlucky, slow = ways = [Way("whole"), Way("whole", 3), Way("second-pass")]
    costs = Costs(ways, share=1.0)
    turns = []
    for turn in range(300):
        way = costs.cheapest()
        costs.trials[way] += 1
        costs.units[way] = {lucky: 1.0, unlucky: 1.1, slow: 2.0}[way]
        turns += [turn] if way == unlucky else []
    assert costs.trials[slow] == TRIALS
    assert TRIALS < costs.trials[unlucky] < 12
    assert turns[-1] - turns[-2] > turns[4] - turns[3]
