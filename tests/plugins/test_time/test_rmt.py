"""RMT: what it needs of the source, and where resets lead back to."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from official_runs import images, layer_norm_net, loader, mirror
from torch.utils.data import DataLoader, TensorDataset
from tta_toys import close, run

from lightning_peft import RMT
from lightning_peft.functional import contrast_of_groups, nearest_prototypes

STEPS = {"lr": 0.05, "teacher_momentum": 0.9, "projection": 5, "augment": mirror}


def ours(method, data=None):
    return run(layer_norm_net(), method, loaders=data or loader(12), precision="64-true")


def test_contrast_by_hand():
    groups = torch.randn(3, 3, 4, dtype=torch.float64)
    x = torch.nn.functional.normalize(groups.transpose(0, 1).reshape(9, 4), dim=1)  # prototypes, features, views
    total = 0.0
    for i in range(9):
        others = [j for j in range(9) if j != i]
        scale = torch.stack([x[i] @ x[j] / 0.2 for j in others]).exp().sum().log()
        total += -sum(x[i] @ x[j] / 0.2 - scale for j in others if j % 3 == i % 3) / 2
    close([contrast_of_groups(groups, 0.2)], [total / 9], 1e-12)
    assert nearest_prototypes(torch.tensor([[0.0, -3.0]]), torch.tensor([[1.0, 1.0], [0.1, -0.1]])).tolist() == [1]


def test_it_says_what_it_needs_of_the_source():
    with pytest.raises(MisconfigurationException, match=r"contrast=0\.0"):
        RMT()
    assert len(ours(RMT(contrast=0.0, **STEPS))) == 2
    x, _ = images(4)
    few = DataLoader(TensorDataset(x, torch.zeros(4, dtype=torch.long)), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"none of class 1, 2, 3.*prototypes="):
        ours(RMT(source=few, warm_up=0, **STEPS))
    unlabelled = DataLoader(TensorDataset(x, torch.zeros(4, 2)), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"labels of its source.*prototypes="):
        ours(RMT(source=unlabelled, warm_up=0, **STEPS))
    assert len(ours(RMT(prototypes=torch.eye(4, 8, dtype=torch.float64), **STEPS))) == 2
    with pytest.raises(MisconfigurationException, match=r"prototypes are 7 wide.*8"):
        ours(RMT(prototypes=torch.eye(4, 7, dtype=torch.float64), **STEPS))


def test_prototypes_are_mean_features():
    net, source = layer_norm_net(), loader(12, phase=1.0)
    x, y = source.dataset.tensors
    means = torch.stack([net[:-1](x[y == label]).mean(0) for label in range(4)]).detach()
    close(ours(RMT(prototypes=means, **STEPS)), ours(RMT(source=source, warm_up=0, replay=0.0, **STEPS)), 1e-9)


def test_a_reset_leads_back_to_after_the_warm_up():
    x, y = loader(12).dataset.tensors
    twice = DataLoader(TensorDataset(torch.cat([x[:6]] * 2), torch.cat([y[:6]] * 2)), batch_size=6)
    source = loader(12, phase=1.0)
    first, second = ours(RMT(source=source, warm_up=24, replay=0.0, reset="batch", **STEPS), twice)
    close([second], [first], 0)
    cold = ours(RMT(source=source, warm_up=0, replay=0.0, **STEPS), twice)
    assert not torch.allclose(cold[0], first)
    assert not torch.allclose(cold[0], cold[1])
