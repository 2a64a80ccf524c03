"""CoTTA, RoTTA, MEMO and ROID against the published loops written out by hand, with a view that is easy to write down."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from tta_toys import (
    CLASSES,
    NETS,
    batch_norm_net,
    close,
    configured,
    entropy,
    layer_norm_net,
    norm_parameters,
    one,
    run,
    stream,
)

from lightning_peft import MEMO, ROID, CoTTA, RoTTA
from lightning_peft.functional import marginal_entropy
from lightning_peft_plugins.test_time._rotta.sample_memory import SampleMemory
from lightning_peft_plugins.test_time._shared.batch_statistics import BlendStatistics
from lightning_peft_plugins.test_time._shared.views import RandomViews


def mirror(x):
    return x.flip(-1) * 1.1


def cross(z, target):
    return -(target.softmax(1) * z.log_softmax(1)).sum(1)


def official_cotta(net, batches, lr, threshold, views, momentum, symmetric):
    student = configured(net).requires_grad_(True)
    teacher, anchor = copy.deepcopy(student), copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr, 0.9)
    outputs = []
    for x, _ in batches:
        z = student(x)
        with torch.no_grad():
            sure = anchor(x).softmax(1).amax(1).mean() >= threshold
            target = teacher(x) if sure else torch.stack([teacher(mirror(x)) for _ in range(views)]).mean(0)
        loss = cross(z, target)
        if symmetric:
            loss = 0.5 * loss - 0.5 * (z.softmax(1) * target.log_softmax(1)).sum(1)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(momentum * t + (1 - momentum) * s)
        outputs.append(target)
    return outputs


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(("threshold", "symmetric"), [(0.0, True), (1.0, False)])
def test_cotta_is_the_published_loop(kind, threshold, symmetric):
    net = NETS[kind]()
    expected = official_cotta(net, stream(), 0.05, threshold, 3, 0.7, symmetric)
    options = {"teacher_momentum": 0.7, "threshold": threshold, "symmetric": symmetric, "views": 3, "augment": mirror}
    close(run(net, CoTTA(lr=0.05, restore=0.0, **options)), expected, 1e-4)


class Student(Callback):
    """Looks at the parameters after the last update; what a module keeps in the end is the teacher's."""

    def on_test_batch_end(self, trainer, module, *args):
        self.state = copy.deepcopy(module.net.state_dict())


def test_cotta_restores_everything_or_nothing():
    for restore, moved in ((1.0, False), (0.0, True)):
        net, student = layer_norm_net(), Student()
        before = copy.deepcopy(net.state_dict())
        run(net, CoTTA(restore=restore, views=2), student)
        assert any(not torch.equal(v, before[n]) for n, v in student.state.items()) == moved
    net = layer_norm_net()
    source = [net(x).detach() for x, _ in stream()]
    close(run(net, CoTTA(teacher_momentum=1.0, threshold=0.0)), source)


def test_rotta_is_the_published_loop():
    net = layer_norm_net()
    student, teacher = configured(net), configured(net)
    optimizer = torch.optim.SGD(norm_parameters(student), 0.05, 0.9)
    memory, count, expected = SampleMemory(8, CLASSES), 0, []
    for x, _ in stream():
        with torch.no_grad():
            z = teacher(x)
        p = z.softmax(1)
        for image, label, h in zip(x, p.argmax(1), -(p * (p + 1e-6).log()).sum(1), strict=True):
            memory.add(int(label), image, float(h))
            count += 1
            if count % 10:
                continue
            images = torch.stack([kept.sample for kept in memory.kept()])
            age = torch.tensor([kept.age / 8 for kept in memory.kept()])
            weight = torch.exp(-age) / (1 + torch.exp(-age))
            with torch.no_grad():
                target = teacher(images)
            (cross(student(mirror(images)), target) * weight).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.copy_(0.7 * t + 0.3 * s)
        expected.append(z)
    method = RoTTA(lr=0.05, optimizer="SGD", capacity=8, every=10, teacher_momentum=0.3, augment=mirror)
    close(run(net, method), expected, 1e-5)


def test_the_statistics_of_rotta_move_in_updates_only_and_come_back():
    net = batch_norm_net()
    before = copy.deepcopy(net.state_dict())
    source = run(net)
    predictions = run(net, RoTTA(capacity=12, every=24, teacher_momentum=0.5))
    close(predictions[:2], source[:2], 0)
    assert not torch.equal(predictions[-1], source[-1])
    close(net.state_dict().values(), before.values(), 0)
    assert all("forward" not in vars(module) for module in net.modules())
    run(net, RoTTA(capacity=12, every=24, keep=True))
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def official_memo(net, batches, lr, views):
    outputs = []
    for x, _ in batches:
        rows = []
        for image in x:
            one = copy.deepcopy(net).requires_grad_(True)
            optimizer = torch.optim.SGD(one.parameters(), lr)
            marginal_entropy(one(mirror(image[None].repeat(views, 1, 1, 1)))).backward()
            optimizer.step()
            rows.append(one(image[None]).detach())
        outputs.append(torch.cat(rows))
    return outputs


def test_memo_is_the_published_loop():
    net = layer_norm_net()
    close(run(net, MEMO(lr=0.05, views=3, augment=mirror)), official_memo(net, stream(), 0.05, 3), 1e-5)


def test_memo_blends_the_statistics_of_views_and_gives_them_back():
    net = batch_norm_net()
    before = copy.deepcopy(net.state_dict())
    alone = run(net, MEMO(lr=0.0, views=3, prior=None), loaders=stream(1))[0]
    close([alone], run(net, loaders=stream(1)), 1e-5)
    blended = run(net, MEMO(lr=0.0, views=3), loaders=stream(1))[0]
    assert not torch.allclose(blended, alone, atol=1e-4)
    close(net.state_dict().values(), before.values(), 0)


def official_roid(net, batches, lr, consistency, momentum=0.9):
    net, source = configured(net), configured(net)
    optimizer = torch.optim.SGD(norm_parameters(net), lr, momentum)
    average, outputs = torch.full((CLASSES,), 1 / CLASSES), []
    for x, _ in batches:
        z = net(x)
        with torch.no_grad():
            diverse = 1 - F.cosine_similarity(average[None], z.softmax(1), dim=1)
            diverse = (diverse - diverse.min()) / (diverse.max() - diverse.min())
            mask = diverse < diverse.mean()
            certain = -entropy(z)
            certain = (certain - certain.min()) / (certain.max() - certain.min())
            weights = torch.exp(diverse * certain * 3)
            weights[mask] = 0.0
            average = 0.9 * average + 0.1 * z.softmax(1).mean(0)
        p = z.softmax(1).clamp(0.0, 0.99)
        loss = (-(p * torch.log(p / (1 - p) + 1e-5)).sum(1) * weights)[~mask].sum() / len(x)
        if consistency:
            view, own = net(mirror(x[~mask])), z[~mask]
            both = 0.5 * cross(view, own) + 0.5 * cross(own, view)
            loss = loss + (both * weights[~mask]).sum() / len(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(norm_parameters(net), norm_parameters(source), strict=True):
                a.copy_(0.99 * a + 0.01 * b)
            prior = z.softmax(1).mean(0)
            smooth = max(1 / len(x), 1 / CLASSES) / prior.max()
            outputs.append(z.detach() * (prior + smooth) / (1 + smooth * CLASSES))
    return outputs


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("consistency", [True, False])
def test_roid_is_the_published_loop(kind, consistency):
    net = NETS[kind]()
    ours = run(net, ROID(lr=0.01, consistency=consistency, augment=mirror))
    close(ours, official_roid(net, stream(), 0.01, consistency), 2e-4)


def test_views_are_seeded_and_stay_close_to_the_image():
    x = torch.rand(4, 3, 16, 16)
    views = RandomViews(seed=3)
    first, second = views(x), views(x)
    assert not torch.equal(first, second)
    views.restart()
    assert torch.equal(views(x), first)
    close([RandomViews(turn=0, shift=0, scale=0, contrast=0, noise=0)(x).sort().values], [x.sort().values], 1e-4)
    assert first.isfinite().all()
    with pytest.raises(MisconfigurationException, match="augment="):
        views(torch.rand(4, 3))


@pytest.mark.parametrize("capacity", [1, 5, 64])
def test_memory_never_holds_more_than_it_may(capacity):
    memory = SampleMemory(capacity, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        label = int(torch.randint(3, (), generator=generator))
        memory.add(label, label, float(torch.rand((), generator=generator)))
        assert len(memory.kept()) <= capacity


def test_memo_has_a_new_optimizer_for_every_sample():
    net, adam = layer_norm_net(), {"optimizer": "Adam", "lr": 0.05, "views": 2, "augment": mirror}
    x, y = next(iter(stream(1, 3)))
    together = run(net, MEMO(**adam), loaders=one((x, y)))[0]
    alone = [run(net, MEMO(**adam), loaders=one((x[i : i + 1], y[i : i + 1])))[0] for i in range(3)]
    close([together], [torch.cat(alone)], 1e-6)


def test_blended_statistics_by_hand():
    layer = nn.BatchNorm1d(1).eval()
    blend = BlendStatistics([layer], 0.25)
    found = layer(torch.tensor([[1.0], [3.0]]))  # mean 2, unbiased variance 2, biased variance 1
    mean, variance = 0.75 * 0 + 0.25 * 2, 0.75 * 1 + 0.25 * 2
    close([found], [(torch.tensor([[1.0], [3.0]]) - mean) / variance**0.5], 1e-4)
    assert layer.running_mean.item() == 0.0, "for this batch only"
    blend.restore()
