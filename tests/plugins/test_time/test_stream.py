"""Streams: resets, windows, batches that teach nothing, ranks, and errors that help."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from tta_toys import (
    CLASSES,
    NETS,
    Classifier,
    Trained,
    batch_norm_net,
    close,
    entropy,
    layer_norm_net,
    norm_parameters,
    one,
    run,
    stream,
)

from lightning_peft import (
    CMF,
    EATA,
    ETA,
    MEMO,
    RMT,
    ROID,
    SAR,
    T3A,
    BatchNormAdapt,
    CoTTA,
    DeYO,
    FisherEstimator,
    RDumb,
    RoTTA,
    Tent,
)
from lightning_peft.attaching.plan import ConflictError
from lightning_peft.capture.evaluation import Call
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.test_time._shared.window import Window

FAST = {"lr": 0.05, "e_margin": 0.7}
METHODS = {
    "Tent": lambda **o: Tent(lr=0.05, **o),
    "ETA": lambda **o: ETA(d_margin=0.9, **FAST, **o),
    "EATA": lambda **o: EATA(d_margin=0.9, fisher=stream(1, seed=9), fisher_alpha=1.0, **FAST, **o),
    "RDumb": lambda **o: RDumb(d_margin=0.9, **FAST, **o),
    "SAR": lambda **o: SAR(rho=0.1, **FAST, **o),
    "DeYO": lambda **o: DeYO(drop=-0.5, **FAST, **o),
    "CoTTA": lambda **o: CoTTA(lr=0.05, views=2, **o),
    "RoTTA": lambda **o: RoTTA(lr=0.05, capacity=12, every=6, teacher_momentum=0.5, **o),
    "MEMO": lambda **o: MEMO(lr=0.05, views=2, episodic=False, **o),
    "ROID": lambda **o: ROID(lr=0.05, **o),
    "CMF": lambda **o: CMF(lr=0.05, noise=20.0, **o),
    "RMT": lambda **o: RMT(lr=0.05, source=stream(2, seed=9), warm_up=12, teacher_momentum=0.5, **o),
    "T3A": lambda **o: T3A(per_class=4, **o),
    "BatchNormAdapt": lambda **o: BatchNormAdapt(momentum=0.3, **o),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def state(net):
    return copy.deepcopy(net.state_dict())


def same(net, before):
    after = net.state_dict()
    assert list(after) == list(before)
    return all(torch.equal(after[name], value) for name, value in before.items())


@every_method
def test_a_reset_before_every_batch_makes_batches_independent(make):
    net = batch_norm_net()
    alone = [run(net, make(), loaders=one(batch))[0] for batch in stream(3)]
    close(run(net, make(reset="batch"), loaders=stream(3)), alone, 0)


@every_method
def test_a_reset_at_every_dataloader_starts_anew(make):
    net = batch_norm_net()
    loaders = [stream(3, seed=1), stream(3, seed=2)]
    together = run(net, make(reset="dataloader"), loaders=loaders)
    close(together, [*run(net, make(), loaders=loaders[0]), *run(net, make(), loaders=loaders[1])], 0)
    assert not torch.equal(together[-1], run(net, make(), loaders=loaders)[-1])


def test_the_metrics_of_the_user_are_those_of_the_adapted_predictions():
    module = Classifier(batch_norm_net())
    result = trainer(callbacks=[METHODS["ETA"]()]).test(module, stream(), verbose=False)[0]
    labels = torch.cat([y for _, y in stream()])
    assert result["accuracy"] == pytest.approx(float((torch.cat(module.predictions).argmax(1) == labels).float().mean()))


def test_a_fit_after_a_test_is_not_affected():
    states = []
    for tested in (False, True):
        module = Trained(batch_norm_net().train())
        if tested:
            trainer(callbacks=[METHODS["EATA"]()]).test(module, stream(), verbose=False)
        trainer(max_epochs=1).fit(module, stream(), stream(2))
        states.append(state(module.net))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_several_steps_move_further():
    nets = [layer_norm_net() for _ in range(2)]
    run(nets[0], Tent(lr=0.01, keep=True), loaders=stream(1))
    run(nets[1], Tent(lr=0.01, keep=True, steps=3), loaders=stream(1))
    source = norm_parameters(layer_norm_net())
    moved = [sum(float((a - b).detach().norm()) for a, b in zip(norm_parameters(n), source, strict=True)) for n in nets]
    assert moved[1] > 2 * moved[0]


def test_autocast_serves_no_old_weights():
    net = layer_norm_net()
    nn.init.ones_(net[2].weight)
    predictions = run(net, Tent(lr=0.5, steps=2), loaders=stream(1), precision="bf16-mixed")[0]
    assert not torch.equal(predictions, run(net, Tent(lr=0.5), loaders=stream(1), precision="bf16-mixed")[0])


def test_a_batch_of_one_works():
    for name in ("Tent", "ETA", "SAR"):
        predictions = run(layer_norm_net(), METHODS[name](), loaders=stream(4, size=1))
        assert torch.cat(predictions).isfinite().all()


@pytest.mark.parametrize("kind", NETS)
def test_a_window_adapts_to_single_samples_as_to_batches(kind):
    net = NETS[kind]()
    options = {"lr": 0.05, "backward": "whole", "keep": True}
    batches = run(net, Tent(**options), loaders=stream(3, size=6))
    twin = NETS[kind]()
    singles = run(twin, Tent(window=6, **options), loaders=DataLoader(stream(3, size=6).dataset, batch_size=1))
    close(norm_parameters(twin), norm_parameters(net), 1e-5)
    assert len(singles) == 18
    close(singles[5::6], [batch[-1:] for batch in batches], 1e-4)


def test_a_window_begins_anew_with_another_shape_and_holds_no_more_than_it_may():
    window = Window(4)
    sizes = []
    for shape in ((1, 3), (1, 3), (5, 3), (1, 3), (1, 2), (6, 2)):
        crowd = window.extend(Call(None, (torch.full(shape, float(len(sizes))),), {"flag": True}))
        sizes.append(crowd.size)
        assert torch.equal(crowd.args[0][-shape[0] :], torch.full(shape, float(len(sizes) - 1)))
    assert sizes == [1, 2, 5, 4, 1, 6]


def test_a_batch_without_a_chosen_prediction_changes_nothing():
    net = layer_norm_net()
    before = state(net)
    run(net, ETA(lr=0.1, e_margin=1e-9, keep=True))
    run(net, SAR(lr=0.1, e_margin=1e-9, keep=True))
    assert same(net, before)


@pytest.mark.parametrize("name", ["Tent", "ETA", "SAR", "DeYO"])
def test_a_prediction_that_is_nan_teaches_nothing(name):
    net = layer_norm_net()
    x, y = next(iter(stream(1)))
    x = x.clone()
    x[3] = float("nan")
    options = {"backward": "whole"}
    predictions = run(net, METHODS[name](keep=True, **options), loaders=one((x, y)))[0]
    assert predictions[3].isnan().all()
    assert all(p.isfinite().all() for p in net.parameters())


class Explode(torch.autograd.Function):
    """Computes nothing, and sends an infinite gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = layer_norm_net()

    def forward(self, x):
        return Explode.apply(self.net(x))


def test_gradients_that_overflow_are_dropped_with_one_warning():
    net = Exploding()
    before = state(net)
    with pytest.warns(UserWarning, match="did not adapt to a batch") as caught:
        run(net, Tent(keep=True))
    assert sum("did not adapt" in str(w.message) for w in caught) == 1
    assert same(net, before)


def test_what_is_wrong_is_said():
    with pytest.raises(MisconfigurationException, match="matches nothing"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), Tent())
    with pytest.raises(MisconfigurationException, match="at least two classes"):
        run(nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 1)), Tent())
    with pytest.raises(MisconfigurationException, match="no BatchNorm layer"):
        run(layer_norm_net(), BatchNormAdapt())
    with pytest.raises(MisconfigurationException, match=r"not in torch\.optim: .*SGD"):
        Tent(optimizer="SDG")
    with pytest.raises(MisconfigurationException, match="optimizer_kwargs"):
        run(layer_norm_net(), Tent(optimizer_kwargs={"betas": 1}))
    with pytest.raises(ConflictError, match="both write the predictions"):
        run(layer_norm_net(), Tent(), ETA())
    with pytest.raises(MisconfigurationException, match="Give one of them"):
        BatchNormAdapt(alpha=0.1, prior=3)
    flat = one((torch.randn(4, 192), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(MisconfigurationException, match="shuffles patches of images"):
        run(layer_norm_net(), DeYO(e_threshold=1.1), loaders=flat)


def adapt_on_rank(sync, name):
    module = Classifier(layer_norm_net())
    run_trainer = trainer(callbacks=[METHODS[name](keep=True, sync=sync)], devices=2, strategy="ddp")
    run_trainer.test(module, stream(4, size=6), verbose=False)
    return {"weights": [p.detach().clone() for p in norm_parameters(module.net)]}


@pytest.mark.parametrize("name", ["ETA", "SAR"])
@pytest.mark.parametrize("sync", ["none", "mean"])
def test_two_processes_are_one_model_only_if_asked(sync, name):
    first, second = run_ddp("test_stream:adapt_on_rank", {"sync": sync, "name": name})
    equal = all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert equal == (sync == "mean")


def estimate_on_rank():
    module = Trained(layer_norm_net())
    estimator = FisherEstimator(samples=24, convention="sample")
    trainer(callbacks=[estimator], devices=2, strategy="ddp").validate(module, stream(4, size=6), verbose=False)
    return {"scores": estimator.scores}


def test_two_processes_score_as_one():
    first, second = run_ddp("test_stream:estimate_on_rank", {})
    estimator = FisherEstimator(samples=24, convention="sample")
    trainer(callbacks=[estimator]).validate(Trained(layer_norm_net()), stream(4, size=6), verbose=False)
    for name, score in estimator.scores.items():
        torch.testing.assert_close(first["scores"][name], score)
        assert torch.equal(first["scores"][name], second["scores"][name])


def test_a_second_pass_under_autocast_sees_the_weights_of_the_first_update():
    def by_hand(net, x):
        optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                logits = net(x)
                loss = entropy(logits.float()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return logits

    net, (x, y) = layer_norm_net(), next(iter(stream(1, 8)))
    tent = Tent(lr=0.5, targets="all-linear", exclude=(), steps=2, backward="whole")
    found = run(net, tent, loaders=one((x, y)), precision="bf16-mixed")[0]
    linear = copy.deepcopy(net).requires_grad_(False)
    for layer in linear:
        if isinstance(layer, nn.Linear):
            layer.requires_grad_(True)
    close([found.float()], [by_hand(linear, x).detach().float()], 2e-2)
