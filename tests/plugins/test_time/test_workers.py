"""Parts of a batch on threads of their own: the same update, whoever comes first, and no trace afterwards."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch
from torch import nn
from tta_toys import NETS, Classifier, close, layer_norm_net, norm_parameters, run, stream

from lightning_peft import EATA, ETA, SAR, DeYO, Tent
from lightning_peft.capture.evaluation import Call, Passes
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.test_time._shared.costs import Way
from lightning_peft_plugins.test_time._shared.entropy import EntropyMethod
from lightning_peft_plugins.test_time._shared.workers import Workers, fits, replica

MARGINS = {"lr": 0.05, "e_margin": 0.6, "d_margin": 0.7}
FISHER = {f"net.net.{i}.{kind}": torch.ones(16) for i in (2, 5) for kind in ("weight", "bias")}
MAKES = {
    "Tent": lambda **o: Tent(lr=0.05, **o),
    "ETA": lambda **o: ETA(**MARGINS, **o),
    "EATA": lambda **o: EATA(fisher=FISHER, fisher_alpha=1.0, **MARGINS, **o),
    "SAR": lambda **o: SAR(lr=0.05, e_margin=0.6, **o),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "the caller's threads are not as they were"
    assert not [t for t in threading.enumerate() if t.name.startswith("lightning-peft")], "a worker is left"
    torch.set_num_threads(before)


class Forgetful(nn.Module):
    """Writes to itself in its forward pass, as few modules should, and looks away before it reads."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.seen = []

    def forward(self, x):
        self.hidden = self.net(x)
        self.seen.clear()
        self.seen.append(self.hidden)
        time.sleep(0.001)
        return self.hidden + 0.5 * self.seen[0]


class Dictionary(Forgetful):
    def forward(self, x):
        return {"logits": super().forward(x), "attentions": None}


class Failing(Forgetful):
    def forward(self, x):
        if torch.is_grad_enabled() and self.ready:
            raise ValueError("planned")
        return super().forward(x)


def call_of(net, size=6):
    return Call(partial(Passes().count, net.forward), (torch.randn(size, 3, 8, 8),), {})


def pair(make, wrap=lambda net: net, data=None, **options):
    """The same on the whole batch and with workers: predictions and norm parameters of both."""
    results = []
    for backward in ("whole", "chunks"):
        net = wrap(layer_norm_net())
        method = make(backward=backward, keep=True)
        predictions = run(net, method, loaders=data or stream(4, size=7), **options)
        results.append((predictions, [p.detach() for p in norm_parameters(net)]))
        assert method.way.name == {"whole": "whole", "chunks": "workers"}[backward]
    return results


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_workers_give_the_same_predictions_and_updates(make, size):
    whole, parts = pair(lambda **o: make(chunk_size=size, **o), lambda net: Forgetful(net.double()), precision="64-true")
    for ours, theirs in zip(parts, whole, strict=True):
        close(ours, theirs, 1e-12)


@pytest.mark.parametrize("make", [*MAKES.values(), lambda **o: DeYO(lr=0.05, drop=-0.5, **o)], ids=[*MAKES, "DeYO"])
def test_a_second_pass_comes_to_the_same(make, monkeypatch):
    monkeypatch.setattr(EntropyMethod, "_find_choices", lambda self, call: [self._forced])
    results = []
    for way in (Way("whole"), Way("second-pass")):
        net, method = Forgetful(layer_norm_net().double()), make(keep=True)
        method._forced = way
        predictions = run(net, method, loaders=stream(4, size=7), precision="64-true")
        assert method.way == way
        results.append(predictions + norm_parameters(net))
    close(*results, 1e-12)


def test_two_runs_are_equal_bit_for_bit():
    runs = [pair(MAKES["EATA"], Forgetful)[1] for _ in range(2)]
    for ours, theirs in zip(*runs, strict=True):
        close(ours, theirs, 0)


def test_outputs_may_be_dicts():
    class Reads(Classifier):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.predictions.append(self.net(batch[0])["logits"])

    predictions = []
    for backward in ("whole", "chunks"):
        module = Reads(Dictionary(layer_norm_net()))
        trainer(callbacks=[ETA(backward=backward, **MARGINS)]).test(module, stream(), verbose=False)
        predictions.append(module.predictions)
    close(*predictions, 1e-5)


def test_autocast_holds_in_the_workers():
    whole, parts = pair(MAKES["ETA"], precision="bf16-mixed")
    plain = pair(MAKES["ETA"])[1]
    close(parts[0], whole[0], 0.1)
    assert parts[0][0].dtype == torch.bfloat16
    assert not torch.equal(parts[0][0].float(), plain[0][0])


def test_samples_with_nan_teach_nothing():
    data = stream(2, size=6)
    data.dataset.tensors[0][2] = float("nan")
    whole, parts = pair(MAKES["Tent"], data=data)
    assert parts[0][0][2].isnan().all()
    assert all(p.isfinite().all() for p in parts[1])
    close(parts[1], whole[1], 1e-5)


def test_an_error_in_a_worker_is_raised_and_leaves_nothing():
    net = Failing(layer_norm_net())
    net.ready = False
    before = [p.detach().clone() for p in net.parameters()]
    method = Tent(lr=0.05, backward="chunks")
    run(net, method)
    net.ready = True
    with pytest.raises(ValueError, match="planned"):
        run(net, method)
    close(net.parameters(), before, 0)
    assert "forward" not in vars(net)
    assert all(p.grad is None for p in net.parameters())
    net.ready = False
    run(net, method)


def test_passes_are_counted_in_all_threads():
    passes = Passes()
    net = layer_norm_net()
    call = Call(partial(passes.count, net.forward), (torch.randn(40, 3, 8, 8),), {})
    workers = Workers()

    def walk(part):
        with torch.enable_grad():
            loss = part().sum()
        return torch.autograd.grad(loss, [net[2].weight])

    try:
        assert len(list(workers.run(walk, [call.take(slice(i, i + 1)) for i in range(40)]))) == 40
    finally:
        workers.close()
    assert (passes.forward, passes.backward) == (40, 40)


def test_results_come_in_order_and_leaving_early_is_allowed():
    call = call_of(layer_norm_net(), 8)
    workers = Workers()
    first = float(call.args[0][0, 0, 0, 0])

    def work(part):
        value = float(part.args[0][0, 0, 0, 0])
        time.sleep(0.02 if value == first else 0.001)  # the first ends last
        return torch.get_num_threads(), value

    try:
        results = workers.run(work, [call.take(slice(i, i + 1)) for i in range(8)])
        assert next(results) == (1, first)
        results.close()
        assert torch.get_num_threads() == 2
    finally:
        workers.close()


def test_a_window_and_resets_work_with_workers():
    data = stream(6, size=3)
    for options in ({"window": 6}, {"reset": 2}, {"reset": "batch"}, {"steps": 2}):
        whole, parts = pair(lambda options=options, **o: Tent(lr=0.05, **options, **o), data=data)
        for ours, theirs in zip(parts, whole, strict=True):
            close(ours, theirs, 1e-4)


def hooked(net):
    net[1].register_forward_hook(lambda *_: None)


def parametrised(net):
    nn.utils.parametrizations.weight_norm(net[1])


def replaced(net):
    net[1].forward = lambda x, inner=net[1].forward: inner(x)


def hidden(net):
    net[1].others = [net[2]]


@pytest.mark.parametrize("change", [hooked, parametrised, replaced, hidden, nn.Module.train, nn.Module.compile])
def test_networks_that_cannot_be_replicated_are_refused(change):
    net = layer_norm_net()
    assert fits(call_of(net))
    change(net)
    assert not fits(call_of(net))


def test_one_thread_and_methods_that_draw_numbers_take_chunks():
    method = DeYO(lr=0.05, drop=-0.5, backward="chunks")
    run(layer_norm_net(), method, loaders=stream(1))
    assert method.way == Way("chunks", 1)
    torch.set_num_threads(1)
    method = Tent(lr=0.05, backward="chunks", chunk_size=2)
    run(layer_norm_net(), method, loaders=stream(1))
    torch.set_num_threads(2)
    assert method.way == Way("chunks", 2)


def test_a_replica_shares_tensors_and_nothing_that_is_written():
    net = Forgetful(NETS["batch norm"]())
    twin = replica(net)
    x = torch.randn(2, 3, 8, 8)
    close([twin(x)], [net(x)], 0)
    assert twin.hidden is not net.hidden
    assert twin.seen is not net.seen
    close([id(t) for t in twin.state_dict(keep_vars=True).values()], [id(t) for t in net.state_dict(keep_vars=True).values()])


def test_the_threads_of_the_process_are_as_before():
    workers = Workers()
    inside = []
    list(workers.run(lambda call: inside.append(torch.get_num_threads()), [call_of(layer_norm_net())] * 4))
    workers.close()
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == [1] * 4
    assert fresh == [2]


def test_auto_tries_all_ways_and_remembers_them():
    method = ETA(**MARGINS)
    run(layer_norm_net(), method, loaders=stream(10, size=6))
    tried = {Way("whole"), Way("workers", 1), Way("workers", 2), Way("workers", 3), Way("second-pass")}
    assert set(method._costs.trials) == tried
    assert set(method._costs.trials.values()) == {2}
    run(layer_norm_net(), method, loaders=stream(1, size=6))
    assert sum(method._costs.trials.values()) == 11, "a network of the same shape is not measured anew"
    wider = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.LayerNorm(24), nn.Linear(24, 4)).eval()
    run(wider, method, loaders=stream(1))
    assert sum(method._costs.trials.values()) == 1
