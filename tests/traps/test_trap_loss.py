"""Lightning traps T3, T4, T5, T6, T14, T29: where a loss term is added, what captures logits, what counts steps."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from lightning_peft import Lane, Method
from lightning_peft.testing import run_ddp
from lightning_peft.testing.modules import STYLES, Manual, Plain, Root, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy


class Gradients(Callback):
    """Keeps the gradient of the head before the first optimizer step."""

    first = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.first is None:
            self.first = pl_module.model[-1].weight.grad.clone()


class Penalty(Method):
    lane = Lane.LOSS

    def loss(self, step):
        self.base = step.base_loss.item()
        return sum(p.square().sum() for p in step.run.module.parameters())


class BeforeBackward(Callback):
    """What a callback without an engine would do."""

    def on_before_backward(self, trainer, pl_module, loss):
        self.loss = loss.item()
        loss.add_(sum(p.square().sum() for p in pl_module.parameters()))


def expected_gradient(accumulate):
    torch.manual_seed(0)
    module = Plain()
    batches = [batch for batch, _ in zip(loader(), range(accumulate), strict=False)]
    loss = sum(F.cross_entropy(module(x), y) for x, y in batches) / accumulate
    (loss + sum(p.square().sum() for p in module.parameters())).backward()
    return module.model[-1].weight.grad


@pytest.mark.parametrize("accumulate", [1, 2])
def test_t03_t05_accumulation_divides_a_term_once(accumulate):
    """T3, T5: a penalty added in `on_before_backward` counts once per batch; ours counts once per step."""
    ours, theirs = Gradients(), Gradients()
    fit([Penalty()], after=[ours], optimizer="sgd", accumulate_grad_batches=accumulate)
    fit([], after=[BeforeBackward(), theirs], optimizer="sgd", accumulate_grad_batches=accumulate)
    wanted = expected_gradient(accumulate)
    assert (ours.first - wanted).abs().max() < 1e-6
    assert ((theirs.first - wanted).abs().max() > 1e-2) == (accumulate == 2)  # the trap itself


def test_t04_amp_scales_after_the_term():
    """T4: under 16-mixed `on_before_backward` sees the loss times 65536; a term sees the loss."""
    method, late = Penalty(), BeforeBackward()
    fit([method], after=[late], optimizer="sgd", max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert method.base < 10
    assert late.loss > 10_000


def calls_under_ddp():
    """Run by each rank of T6."""
    hooked: list[str] = []

    class Watch(ToyEntropy):
        def loss(self, step):
            self.calls = [type(call.args[0]).__name__ for call in step.tap.calls]
            return super().loss(step)

    class Hook(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.register_forward_hook(lambda module, args, output: hooked.append(type(args[0]).__name__))

    method = Watch()
    fit([method], style=Root, after=[Hook()], devices=2, strategy="ddp", max_steps=1, limit_val_batches=0)
    return {"hook": hooked, "tap": method.calls}


def test_t06_root_forward_under_ddp():
    """T6: a hook on the root module also fires for DDP's own call, with the batch as input; the tap does not."""
    for rank in run_ddp(f"{__file__}:calls_under_ddp"):
        assert rank == {"hook": ["Tensor", "list"], "tap": ["Tensor"]}


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (3, 2)])
def test_t14_after_step_follows_real_optimizer_steps(accumulate, steps):
    """T14: with accumulate_grad_batches=3 over 4 batches there are two steps, the last on a part."""
    method = ToyEntropy()
    fit([method], accumulate_grad_batches=accumulate)
    assert method.seen["optimizer_steps"] == method.steps == steps


def test_t14_after_step_in_manual_optimization_and_after_resume(tmp_path):
    method = ToyEntropy()
    run = fit([method], style=Manual)
    run.trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ToyEntropy()
    fit([again], style=Manual, resume=tmp_path / "m.ckpt", max_epochs=2)
    assert method.steps == 4
    assert again.steps == again.seen["optimizer_steps"] == 8


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_t14_clock_counts_the_first_optimizer_only(style):
    """`trainer.global_step` counts every optimizer under manual optimization; the clock of schedules does not."""
    method = ToyEntropy()
    run = fit([method], style=style)
    assert method.steps == 4
    assert run.trainer.global_step == (8 if style.__name__ == "TwoOptimizers" else 4)


@pytest.mark.parametrize("what", ["submodule", "network replaced", "whole module"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_t29_logits_under_compile(what):
    """T29: logits captured outside the compiled region give the gradients of eager training."""
    eager = fit([ToyEntropy()], optimizer="sgd")
    torch.manual_seed(0)
    module = Plain("sgd")
    if what == "submodule":
        module.model.compile(backend="eager")
    elif what == "network replaced":
        module.model = torch.compile(module.model, backend="eager")
    else:
        module.log = lambda *args, **kwargs: None  # logging inside a compiled step is a graph break of its own
        module = torch.compile(module, backend="eager")
    method = ToyEntropy()
    if what == "whole module":
        torch.manual_seed(0)
        from lightning_peft.testing import trainer

        trainer(callbacks=[method]).fit(module, loader(), loader(8))
    else:
        fit([method], module=module)
    torch._dynamo.reset()
    pairs = zip(eager.module.parameters(), module.parameters(), strict=True)
    assert max((p - q).abs().max().item() for p, q in pairs) < 1e-6
    assert method.seen["optimizer_steps"] == 4
