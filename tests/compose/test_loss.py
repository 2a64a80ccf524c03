from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import Lane, Loss, Method, Resource
from lightning_peft.compose.loss import NonFiniteLossError, check_finite, combine, join_output, split_output
from lightning_peft.testing.modules import STYLES, DictOutput
from lightning_peft.testing.runs import fit

numbers = st.floats(-100, 100)


@given(numbers, st.lists(st.tuples(numbers, numbers), max_size=4))
def test_scales_act_on_the_base_loss_alone(base, pairs):
    terms = {str(i): Loss(value=value, scale=scale) for i, (value, scale) in enumerate(pairs)}
    wanted = base
    for _, scale in pairs:
        wanted = scale * wanted
    for value, _ in pairs:
        wanted = wanted + value
    assert combine(torch.tensor(base, dtype=torch.float64), terms).item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_combine_keeps_every_graph():
    base, term, scale = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 0.5))
    combine(base, {"a": Loss(term, scale), "b": Loss(1.0)}).backward()
    assert (base.grad, term.grad, scale.grad) == (0.5, 1.0, 2.0)


def test_no_terms_is_the_same_tensor():
    loss = torch.tensor(1.0)
    assert combine(loss, {}) is loss


def test_outputs_are_split_and_joined_without_touching_the_users_object():
    loss, total = torch.tensor(1.0), torch.tensor(2.0)
    output = {"loss": loss, "preds": [1]}
    assert split_output(output) is loss
    joined = join_output(output, total)
    assert joined == {"loss": total, "preds": [1]}
    assert output["loss"] is loss
    assert split_output(loss) is loss
    assert join_output(loss, total) is total


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_who_is_not_finite(bad):
    fine, broken = torch.tensor(1.0), torch.tensor(bad)
    check_finite(fine, {"a": Loss(fine, 0.5)})
    with pytest.raises(NonFiniteLossError, match="your training_step returned"):
        check_finite(broken, {})
    for term in (Loss(broken), Loss(bad), Loss(fine, broken), Loss(fine, bad)):
        with pytest.raises(NonFiniteLossError, match=r"term of second is not finite while your own loss is 1\b"):
            check_finite(fine, {"first": Loss(fine), "second": term})


class Constant(Method):
    """Scales the loss and adds a number; used twice it would be a conflict."""

    lane = Lane.LOSS
    writes = frozenset({Resource.LOSS_SCALE})

    def loss(self, step):
        return Loss(value=1.0, scale=0.5)


class Reported(DictOutput):
    def on_before_backward(self, loss):
        self.optimised = loss.item()


def test_the_optimised_loss_is_scale_times_loss_plus_value():
    run = fit([Constant()], style=Reported, limit_val_batches=0)
    base = run.trainer.callback_metrics["loss"].item()
    assert run.module.optimised == pytest.approx(0.5 * base + 1.0)
    assert run.losses[-1] == base, "the loss the user logs must stay the user's"


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_a_scale_of_one_half_is_half_the_learning_rate(style):
    """With plain SGD; holds in every style only if the term reaches the very loss that is differentiated."""

    class Half(Constant):
        def loss(self, step):
            return Loss(scale=0.5)

    class Slow(style):
        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            first = optimizers[0] if isinstance(optimizers, list) else optimizers
            first.param_groups[0]["lr"] *= 0.5
            return optimizers

    scaled, slow = fit([Half()], style=style, optimizer="sgd"), fit([], style=Slow, optimizer="sgd")
    pairs = zip(scaled.module.parameters(), slow.module.parameters(), strict=True)
    assert max((p - q).abs().max().item() for p, q in pairs) < 1e-6


def test_a_method_may_return_nothing_a_tensor_or_a_loss():
    class Changing(Method):
        lane = Lane.LOSS

        def loss(self, step):
            return [None, torch.tensor(1.0), Loss(2.0), 3.0][step.batch_idx]

    run = fit([Changing()], limit_val_batches=0)
    metrics = run.trainer.callback_metrics
    assert metrics["peft/loss/changing"] == 3.0
    assert metrics["peft/loss/total"] == metrics["peft/loss/base"] + 3.0
