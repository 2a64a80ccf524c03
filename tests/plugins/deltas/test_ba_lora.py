"""BA-LoRA: its terms beside the official code's, and the training in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from official_values import values_of

from lightning_peft import BALoRA, Lane, Method, Resource, Step
from lightning_peft.functional import ba_consistency, ba_sameness, leading_share
from lightning_peft.testing import MethodTester
from lightning_peft.testing.runs import fit

RECORDED = values_of("ba_lora_official")


@pytest.mark.parametrize("kind", ["nlu", "nlg"])
def test_terms_are_those_of_the_official_code(kind: str) -> None:
    fine, before = (torch.tensor(RECORDED[kind][key]) for key in ("fine", "pre"))
    ours = [ba_consistency(fine, before), ba_sameness(fine), -leading_share(fine, 2)]
    assert [float(term) for term in ours] == pytest.approx(RECORDED[kind]["terms"], rel=1e-4)


def test_a_batch_of_one_has_no_covariance() -> None:
    assert ba_sameness(torch.randn(1, 3)) == 0


class TestBALoRA(MethodTester):
    no_accumulation = "covariances and singular values are those of a batch"
    methods = [lambda: BALoRA(2, consistency=0.5, diversity=0.1, singular=0.2, top=2, checkpoint="full")]


def test_predictions_begin_where_the_network_was_and_the_base_is_what_they_are_held_to() -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.terms = list[float]()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.terms.append(float(trainer.callback_metrics["peft/loss/ba_lora"]))

    terms = []
    for weight in (1.0, 100.0):
        seen = Seen()
        fit([BALoRA(2, consistency=weight, diversity=0.0, singular=0.0)], after=[seen], max_epochs=4, log_every_n_steps=1)
        assert seen.terms[0] == pytest.approx(0, abs=1e-6)
        terms.append(seen.terms[-1] / weight)
    assert terms[0] > 10 * terms[1] > 0


class Later(Method):
    """Looks at the logits after the others."""

    lane, reads = Lane.LOSS, frozenset({Resource.LOGITS})

    def loss(self, step: Step) -> None:
        assert step.logits.requires_grad
        assert torch.equal(step.logits, step.tap.calls[0].output)  # type: ignore[union-attr]


def test_others_see_the_call_of_the_user() -> None:
    fit([BALoRA(2), Later()])


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="must not be negative"):
        BALoRA(singular=-1.0)
