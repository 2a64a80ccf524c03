"""What adapts a module of which others have made something: an average, compiled code."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from test_stream import METHODS, same, state
from tta_toys import Trained, batch_norm_net, close, layer_norm_net, run, stream

from lightning_peft.capture.shim import Shim
from lightning_peft.testing.modules import trainer

# One for each way to call the network and to normalise.
ONE_OF_EACH = {name: METHODS[name] for name in ("Tent", "CoTTA", "RoTTA", "MEMO")}
every_way = pytest.mark.parametrize("make", ONE_OF_EACH.values(), ids=ONE_OF_EACH)


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


# torch's compiler looks at this attribute of every input, and hides its warning in a way that "error" defeats.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_way
def test_a_compiled_module_is_adapted(make):
    wanted = run(batch_norm_net(), make(), loaders=stream(3))
    torch._dynamo.reset()
    module = Bare(batch_norm_net())
    module.__dict__["predictions"] = found = Found()
    trainer(callbacks=[make(), found]).test(torch.compile(module, backend="eager"), stream(3), verbose=False)
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
    pytest.param(METHODS[name], net, first, id=f"{name}, {net.__name__}, average {'first' if first else 'last'}")
    for name in ONE_OF_EACH
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
    method = METHODS["Tent"](keep=True)
    runner = trainer(callbacks=[average, method], max_epochs=1)
    runner.fit(module, stream(2), stream(1))
    own = state(module)
    with pytest.raises(MisconfigurationException, match=r"EMAWeightAveraging has put its average .*trainer\.test"):
        runner.validate(module, stream(2), verbose=False)
    assert same(module, own)
    runner.test(module, stream(2), verbose=False)
    assert not same(module, own)
