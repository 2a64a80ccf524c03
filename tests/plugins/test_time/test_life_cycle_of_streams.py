"""Every method of the family leaves a module what it is to others: compiled, averaged, moved, copied and saved meanwhile."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_stream import METHODS, Stop, same, state
from tta_toys import Trained, batch_norm_net, close, layer_norm_net, run, stream

from lightning_peft import LAME
from lightning_peft.capture.shim import Shim
from lightning_peft.testing.modules import trainer

ALL = {**METHODS, "LAME": LAME}
VARIED = ["Tent", "CoTTA", "RoTTA", "MEMO"]  # one for each way to call the network and to normalise
every_method = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


class Bare(Trained):
    """Logs nothing, so that only the module's own tensors are moved."""

    def __init__(self, net):
        super().__init__(net)
        del self.accuracy

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.predictions.append(self.net(batch[0]))

    validation_step = test_step


class Half(WeightAveraging):
    """The mean of the last average and the weights, after every step."""

    def __init__(self):
        super().__init__(avg_fn=lambda average, value, count: (average + value) / 2)


class Elsewhere(SingleDeviceStrategy):
    """Moves the module where Lightning's strategies do, before callbacks' teardown, to another device or dtype."""

    def __init__(self, to):
        super().__init__(device=torch.device("cpu"))
        self.to = to

    def teardown(self):
        self.lightning_module.to(self.to)


@every_method
def test_every_tensor_is_where_the_strategy_put_it(make):
    for to in ("meta", torch.float64):
        module = Bare(batch_norm_net())
        module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
        values = state(module.net)
        trainer(callbacks=[make()], strategy=Elsewhere(to), devices="auto").test(module, stream(2), verbose=False)
        wanted = copy.deepcopy(module).to(to)
        for name, tensor in module.state_dict(keep_vars=True).items():
            assert (tensor.device, tensor.dtype) == ((other := wanted.state_dict()[name]).device, other.dtype), name
            assert tensor.grad is None or (tensor.grad.device, tensor.grad.dtype) == (tensor.device, tensor.dtype)
        if to == torch.float64:
            found = module.net.state_dict()
            assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in values.items())


class Look(Callback):
    """Copies, saves and lists the module in the middle of a stream."""

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            self.names = list(pl_module.state_dict()), [name for name, _ in pl_module.named_parameters()]
            self.twin = copy.deepcopy(pl_module.net)
            file = io.BytesIO()
            torch.save(pl_module.net, file)
            file.seek(0)
            self.read = torch.load(file, weights_only=False)


@every_method
def test_the_module_is_an_ordinary_one_meanwhile(make):
    module, look = Bare(batch_norm_net()), Look()
    names = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    trainer(callbacks=[make(), look]).test(module, stream(2), verbose=False)
    assert look.names == names
    x = next(iter(stream(1)))[0]
    for twin in (look.twin, look.read):  # copies made in inference mode
        assert not any(isinstance(vars(part).get("forward"), Shim) or part._forward_pre_hooks for part in twin.modules())
        plain = batch_norm_net()
        plain.load_state_dict(twin.state_dict())
        with torch.inference_mode():
            assert torch.equal(twin(x), plain(x))


# torch's compiler looks at this attribute of every input, and hides its warning in a way that "error" defeats.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("name", "whole"), [*((name, True) for name in ALL), *((name, False) for name in VARIED)])
def test_compiled_modules_are_adapted(name, whole):
    make = ALL[name]
    wanted = run(batch_norm_net(), make(), loaders=stream(3))
    torch._dynamo.reset()
    module = Bare(batch_norm_net())
    module.__dict__["predictions"] = found = Found()
    if not whole:
        module.net = torch.compile(module.net, backend="eager")
    given = torch.compile(module, backend="eager") if whole else module
    trainer(callbacks=[make(), found]).test(given, stream(3), verbose=False)
    close(found.logits, wanted, 1e-5)
    assert not any(isinstance(vars(part).get("forward"), Shim) for part in module.modules())


class Found(Callback):
    """Takes predictions where no compiler looks; stands in for the list a module keeps."""

    def __init__(self):
        self.logits = []

    @torch.compiler.disable
    def append(self, logits):
        self.logits.append(logits.clone())


# Both orders of the callbacks for one method; for the others one order for each network is enough.
ORDERS = [
    pytest.param(ALL[name], net, first, id=f"{name}, {net.__name__}, average {'first' if first else 'last'}")
    for name in VARIED
    for net in (batch_norm_net, layer_norm_net)
    for first in (True, False)
    if name == "Tent" or (net is batch_norm_net) == first
]


@pytest.mark.parametrize(("make", "net", "first"), ORDERS)
def test_a_validation_adapts_the_average_and_gives_it_back(make, net, first):
    average, module = Half(), Bare(net().train())
    callbacks = [average, make()] if first else [make(), average]
    runner = trainer(callbacks=callbacks, max_epochs=1)
    runner.fit(module, stream(2), stream(1))
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.01  # the fit ended with the average in the module; from here on they are two
    kept, own = copy.deepcopy(average._average_model.state_dict()), state(module)
    module.predictions.clear()
    runner.validate(module, stream(3), verbose=False)
    assert same(module, own)
    after = average._average_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    twin = Bare(net())
    twin.load_state_dict({name[7:]: value for name, value in kept.items() if name.startswith("module.")})
    trainer(callbacks=[make()]).validate(twin, stream(3), verbose=False)
    close(module.predictions, twin.predictions, 0)


def test_keep_and_an_average_swapped_in():
    average, module = EMAWeightAveraging(decay=0.5), Bare(layer_norm_net().train())
    method = ALL["Tent"](keep=True)
    runner = trainer(callbacks=[average, method], max_epochs=1)
    runner.fit(module, stream(2), stream(1))
    own = state(module)
    with pytest.raises(MisconfigurationException, match=r"EMAWeightAveraging has put its average .*trainer\.test"):
        runner.validate(module, stream(2), verbose=False)
    assert same(module, own)
    runner.test(module, stream(2), verbose=False)
    assert not same(module, own)


@every_method
def test_tested_after_a_fit_and_twice_and_interrupted(make):
    module = Bare(batch_norm_net().train())
    runner = trainer(callbacks=[make()], max_epochs=1)
    runner.fit(module, stream(2), stream(1, seed=4))
    trained = state(module)
    seen = []
    for _ in range(2):
        module.predictions.clear()
        runner.test(module, [stream(2), stream(2, seed=3)], verbose=False)
        seen.append([p.clone() for p in module.predictions])
        assert same(module, trained)
    close(*seen, 0)
    with pytest.raises(ValueError, match="planned"):
        trainer(callbacks=[make(), Stop(ValueError("planned"), at=1)]).test(module, stream(2), verbose=False)
    assert same(module, trained)
