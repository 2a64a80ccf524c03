from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft import Lane, Method
from lightning_peft.arguments import as_plain
from lightning_peft.contract import methods_of, snake_case
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale


@dataclass
class Options:
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)


class Configurable(Method):
    lane = Lane.REPORT

    def __init__(self, first, second=2, *, options=None, **rest):
        super().__init__(**rest)


def test_constructor_arguments_are_recorded_with_their_defaults():
    method = Configurable(1, options=Options(), targets=[nn.Linear, "x"], name="mine")
    assert method.config() == {
        "first": 1,
        "second": 2,
        "options": {"rate": 0.5, "names": ["a"]},
        "targets": ["torch.nn.modules.linear.Linear", "x"],
        "exclude": None,
        "network": None,
        "name": "mine",
    }


def test_what_init_hands_on_is_part_of_the_signature_and_a_typo_is_an_error():
    assert [*inspect.signature(Configurable).parameters] == [
        "first",
        "second",
        "options",
        "targets",
        "exclude",
        "network",
        "name",
    ]
    with pytest.raises(TypeError, match="tragets"):
        Configurable(1, tragets="all-linear")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (1.5, 1.5),
        (None, None),
        ((1, "a", True), [1, "a", True]),
        ({1: {"b": (2,)}}, {"1": {"b": [2]}}),
        (nn.Linear, "torch.nn.modules.linear.Linear"),
        (Options, f"{__name__}.Options"),
        (1j, "1j"),
    ],
)
def test_as_plain(value, plain):
    assert as_plain(value) == plain


def test_names_and_keys():
    assert [snake_case(name) for name in ("NMSparsity", "PSKD", "LoRA2D", "EATA")] == [
        "nm_sparsity",
        "pskd",
        "lora2_d",
        "eata",
    ]
    assert ToyScale().state_key == "lightning_peft/toy_scale"
    assert ToyScale(name="b").state_key == "lightning_peft/b"
    assert repr(ToyScale(3.0)) == "ToyScale(scale=3.0, targets='all-linear')"


def test_a_method_alone_needs_nothing_but_a_lane():
    class Nothing(Method):
        lane = Lane.REPORT

    plain, run = fit([]), fit([Nothing()])
    assert all((p == q).all() for p, q in zip(plain.module.parameters(), run.module.parameters(), strict=True))


def test_methods_can_be_copied_and_pickled_in_training():
    twins = []

    class Copied(ToyEntropy):
        def after_step(self, run):
            super().after_step(run)
            twins.append(copy.deepcopy(self))

    fit([Copied()])
    assert twins[1].seen["optimizer_steps"] == 2
    assert "_hub" not in vars(twins[1])
    method = ToyEntropy()
    fit([method])
    assert pickle.loads(pickle.dumps(method)).seen["optimizer_steps"] == 4


def test_state_goes_round():
    method = ToyEntropy()
    fit([method])
    again = ToyEntropy()
    again.load_state_dict(method.state_dict())
    assert (again.steps, again.restored, again.seen["epochs"]) == (4, True, 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"version": 2, "steps": 0, "epochs": 0, "state": {}}, "in format 2; this version reads format 1"),
        ({}, "in format None"),
        ("x", "in format 'str'"),
        ({"version": 1}, "malformed"),
        ({"version": 1, "steps": True, "epochs": 0, "state": {}}, "malformed"),
        ({"version": 1, "steps": 1, "epochs": 0, "state": []}, "malformed"),
    ],
)
def test_states_that_cannot_be_read(state, message):
    method = ToyEntropy()
    with pytest.raises(MisconfigurationException, match=message):
        method.load_state_dict(state)
    assert not method.restored


def test_claims_follow_the_selection():
    assert list(ToyScale(exclude="head").claims(Plain())) == ["model.0.weight", "model.2.weight"]
    assert list(ToyEntropy().claims(Plain())) == []
    assert ToyScale(targets="model.0").describe(Plain()) == "1 tensor"


def test_methods_among_other_callbacks():
    scale = ToyScale()
    assert list(methods_of([object(), scale, None])) == [scale]
