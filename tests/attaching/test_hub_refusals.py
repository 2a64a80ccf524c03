"""What the hub refuses, and that the module is clean afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from hub_toys import methods
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_peft import BitFit, Lane, LoRA, Loss, Method, Resource
from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.testing.callbacks import PlannedError
from lightning_peft.testing.modules import Manual, Plain, Root, loader, trainer
from lightning_peft.testing.runs import assert_clean, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference, trace


def refused(error, match, callbacks, module, **overrides):
    before, weights = trace(module), {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(callbacks, module=module, **overrides)
    after = trace(module)
    for part in ("classes", "hooks", "parameters", "parameter order", "state"):
        assert difference(before[part], after[part]) is None
    assert not {"forward", "training_step", "setup", "configure_model"} & set(after["attributes"][""])
    assert difference(weights, dict(module.state_dict())) is None


class NeverAsks(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.base_loss(batch))


def test_manual_optimization_without_apply_terms():
    message = r"NeverAsks uses manual optimization, so toy_entropy .*lightning_peft.apply_terms\(self, loss\)"
    refused(MisconfigurationException, message, [ToyEntropy(), ToyScale()], NeverAsks())


def test_manual_optimization_needs_no_call_without_loss_terms():
    run = fit([ToyScale(), ToyThreshold()], style=NeverAsks)
    assert_clean(run.module, "manual optimization without terms")


class Replacing(Precision):
    """Does as Lightning's plugins for 8 and 4 bits do."""

    def convert_module(self, module):
        for name, layer in [(name, layer) for name, layer in module.named_modules() if type(layer) is not type(module)]:
            if isinstance(layer, nn.Linear):
                module.set_submodule(name, nn.Linear(layer.in_features, layer.out_features))
        return module


@pytest.mark.parametrize(
    ("method", "what"),
    [(lambda: LoRA(2, targets="all-linear"), "those that lora acts on"), (BitFit, "that of model.0.weight, which is frozen")],
    ids=["attached", "frozen"],
)
def test_a_plugin_that_replaces_layers(method, what):
    with pytest.raises(MisconfigurationException, match=f"Replacing puts layers of its own.*{what}.*bf16-mixed"):
        fit([method()], plugins=[Replacing()])
    assert_clean(fit([ToyEntropy()], plugins=[Replacing()]).module, "a plugin that replaces what nobody acts on")


class TwoNets(Plain):
    def build(self):
        self.student, self.critic = nn.Linear(16, 3), nn.Linear(16, 16)

    forward = Plain.__mro__[1].forward

    def logits(self, inputs):
        return self.student(inputs)


def test_ambiguous_network():
    refused(MisconfigurationException, r"no single network: 'student' .*'critic'.*network=", [ToyEntropy()], TwoNets())
    run = fit([ToyEntropy(network="student"), ToyScale()], style=TwoNets)
    assert run.methods[0].steps == 4


def test_methods_that_name_different_networks():
    pair = [ToyEntropy(network="student"), ToyEntropy(network="critic", name="other")]
    refused(MisconfigurationException, r"different networks: \['critic', 'student'\]", pair, TwoNets())


def test_network_that_is_not_called():
    class Unused(TwoNets):
        def logits(self, inputs):
            return self.student(inputs)

    refused(MisconfigurationException, "was not called during this training step", [ToyEntropy(network="critic")], Unused())


class Scaling(Method):
    lane = Lane.LOSS
    writes = frozenset({Resource.LOSS_SCALE})

    def loss(self, step):
        return Loss(scale=0.5)


def test_two_writers_of_the_loss_scale():
    both = [Scaling(), Scaling(name="again")]
    refused(MisconfigurationException, "again and scaling both write the scale of the base loss", both, Plain())


def test_two_masks_on_one_tensor():
    both = [ToyThreshold(), ToyThreshold(name="again")]
    refused(MisconfigurationException, r"both put a mask on model.0.weight.*exclude=\['model.0'\]", both, Plain())
    fit([ToyThreshold(exclude="model.0"), ToyThreshold(name="again", targets="model.0")])


class NaNLoss(Plain):
    def base_loss(self, batch):
        return super().base_loss(batch) * (math.nan if self.trainer.training else 1.0)


def test_nan_in_the_users_loss():
    refused(NonFiniteLossError, "loss your training_step returned is nan", methods(), NaNLoss())


class InfiniteTerm(Method):
    lane = Lane.LOSS

    def loss(self, step):
        return torch.tensor(math.inf)


def test_infinite_term_names_its_method():
    refused(
        NonFiniteLossError,
        "loss term of infinite_term is not finite while your own loss is",
        [InfiniteTerm(), ToyScale()],
        Plain(),
    )


def test_nan_after_some_steps_leaves_the_live_weights():
    class Late(ToyEntropy):
        def loss(self, step):
            return super().loss(step) * (math.nan if step.run.step == 2 else 1.0)

    torch.manual_seed(0)
    module = Plain()
    with pytest.raises(NonFiniteLossError, match="late"):
        fit([Late(), ToyScale()], module=module)
    assert_clean(module, "a NaN")
    two_steps = fit([ToyEntropy(name="late"), ToyScale()], max_steps=2).module
    assert difference(dict(two_steps.state_dict()), dict(module.state_dict())) is None


class SingleOnly(ToyScale):
    strategies = frozenset({"exotic"})


def test_unsupported_strategy_is_refused_every_time():
    torch.manual_seed(0)
    module = Plain()
    runner = trainer(callbacks=[SingleOnly()])
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match="single_only does not work under the single strategy"):
            runner.fit(module, loader(), loader(8))
    assert "setup" not in vars(module)


def test_attach_that_fails_half_way():
    class Half(ToyScale):
        def attach(self, module):
            super().attach(module)
            raise PlannedError("half way")

    refused(PlannedError, "half way", [Half(), ToyThreshold()], Plain())
    refused(PlannedError, "half way", [Half(), ToyThreshold()], Root())


def test_finish_that_fails_still_leaves_the_module_clean():
    class Bad(ToyEntropy):
        def finish(self, run):
            raise PlannedError("in finish")

    torch.manual_seed(0)
    module = Plain()
    with pytest.raises(PlannedError):
        fit([Bad(), ToyScale()], module=module)
    assert "parametrizations" not in str(list(module.state_dict()))
    assert not {"training_step", "setup", "on_save_checkpoint"} & set(vars(module))
