"""What `keep=True` leaves in the module is what predicted."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_stream import METHODS
from torch import nn
from torch.utils.data import DataLoader
from tta_toys import CLASSES, NETS, batch_norm_net, close, one, run, stream

from lightning_peft import EATA, ETA, LAME, MEMO, ROID, SAR, BatchNormAdapt, CoTTA, DeYO, RoTTA, Tent
from lightning_peft_plugins.test_time._shared.kept_statistics import KeptStatistics

STILL = {
    "Tent": lambda **o: Tent(lr=0.0, **o),
    "Tent, two steps": lambda **o: Tent(lr=0.0, steps=2, **o),
    "ETA": lambda **o: ETA(lr=0.0, e_margin=1.1, d_margin=1.1, **o),
    "EATA": lambda **o: EATA(lr=0.0, fisher=stream(1, seed=9), **o),
    "SAR": lambda **o: SAR(lr=0.0, e_margin=1.1, rho=0.5, **o),
    "DeYO": lambda **o: DeYO(lr=0.0, e_threshold=1.1, drop=-1.0, **o),
    "CoTTA": lambda **o: CoTTA(lr=0.0, restore=0.0, views=2, threshold=1.1, augment=lambda x: x, **o),
    "ROID": lambda **o: ROID(lr=0.0, prior_correction=False, **o),
    "RoTTA": lambda **o: RoTTA(lr=0.0, every=24, **o),  # the last batch comes after the only update
    "BatchNormAdapt": lambda **o: BatchNormAdapt(**o),
    "blended": lambda **o: BatchNormAdapt(prior=2, **o),
    "averaged": lambda **o: BatchNormAdapt(momentum=0.3, **o),
}


@pytest.mark.parametrize("make", STILL.values(), ids=STILL)
def test_the_module_predicts_the_last_batch_as_the_method_did(make):
    net = batch_norm_net()
    found = run(net, make(keep=True), loaders=stream(3))
    last = list(stream(3))[-1]
    assert not torch.allclose(run(batch_norm_net(), loaders=one(last))[0], found[-1], atol=1e-3), "the toy shows nothing"
    close(run(net, loaders=one(last)), found[-1:], 1e-4)


def test_the_teacher_is_kept_where_the_teacher_predicts():
    for make in (METHODS["CoTTA"], METHODS["RoTTA"]):
        net = NETS["layer norm"]()
        method = make(keep=True)
        teachers = []
        leave = method.leave
        method.leave = lambda method=method, leave=leave, teachers=teachers: (
            teachers.append(copy.deepcopy(method.teacher)),
            leave(),
        )
        run(net, method)
        moved = dict(net.named_parameters())
        assert teachers[0]
        for name, value in teachers[0].items():
            close([moved[name.removeprefix("net.")].detach()], [value], 0)


def test_a_short_last_batch_counts_as_its_share():
    kept, layer = KeptStatistics(), nn.BatchNorm1d(1)
    first, second = torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([[7.0], [9.0]])
    for batch in (first, second):
        with kept.predicting():
            kept.see_batch(layer, batch)
    kept.leave()
    # Half of the first (mean 3, variance 5) and half of the second (mean 8, variance 1), taken together.
    assert float(layer.running_mean) == pytest.approx(5.5)
    assert float(layer.running_var) == pytest.approx((5 + 1) / 2 + 2.5**2)
    with kept.predicting():
        kept.see_batch(layer, first)
    kept.leave()
    assert (float(layer.running_mean), float(layer.running_var)) == (3.0, 5.0)


def test_a_layer_that_is_used_twice_keeps_what_all_its_values_have_in_common():
    kept, layer = KeptStatistics(), nn.BatchNorm1d(2)
    with kept.predicting():
        kept.see_batch(layer, torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        kept.see_batch(layer, torch.tensor([[4.0, 1.0], [6.0, 1.0]]))
    kept.see_batch(layer, torch.full((2, 2), 100.0))  # no prediction
    kept.leave()
    close([layer.running_mean, layer.running_var], [torch.tensor([3.0, 0.5]), torch.tensor([5.0, 0.25])])


def test_a_last_batch_of_one_sample_leaves_the_statistics_of_those_before():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).eval()
    twin = copy.deepcopy(net)
    data = stream(1, size=9).dataset
    run(net, Tent(lr=0.0, keep=True), loaders=DataLoader(data, batch_size=8))
    run(twin, Tent(lr=0.0, keep=True), loaders=DataLoader(torch.utils.data.Subset(data, range(8)), batch_size=8))
    close(net.state_dict().values(), twin.state_dict().values(), 0)


def test_without_keep_nothing_is_looked_at():
    net = batch_norm_net()
    before = copy.deepcopy(net.state_dict())
    method = Tent(lr=0.05)
    run(net, method)
    assert not method.kept._kept
    close(net.state_dict().values(), before.values(), 0)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(MisconfigurationException, match="episodic=False"):
        MEMO(keep=True)
    with pytest.raises(MisconfigurationException, match="nothing to keep"):
        LAME(keep=True)
