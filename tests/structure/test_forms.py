from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_peft.structure import forms
from lightning_peft.structure.forms import Form

ONES, HOLED = torch.ones(2, 3), torch.tensor([1.0, math.nan])

CASES: list[tuple[Form, list[Any], list[tuple[Any, str]]]] = [
    (forms.whole(1, 3), [1, 3], [(0, "is 0, not a whole number from 1 to 3"), (4, "is 4"), (True, "is True"), (2.0, "is 2.0")]),
    (
        forms.number(0.0),
        [0, 0.5],
        [(-0.5, "from 0"), (math.nan, "is nan"), (math.inf, "is inf"), (True, "is True"), ("1", "is '1'")],
    ),
    (forms.number(infinite=True), [math.inf, -math.inf, 3], [(math.nan, "is nan, not a number")]),
    (forms.flag, [True, False], [(1, "is 1, not True or False")]),
    (forms.text, ["a"], [(b"a", "not a string"), (7, "is 7")]),
    (forms.maybe(forms.text), [None, "a"], [(3, "is 3, not a string")]),
    (
        forms.list_of(forms.whole(), 0, 2),
        [[], [1, 2]],
        [((1, 2), "not a list"), ([1], "has 1 entries, not 0 or 2"), ([1, -1], "[1] is -1")],
    ),
    (forms.entries(forms.whole(), forms.flag), [[1, True]], [([1], "has 1 entries, not 2"), ([1, 1], "[1] is 1, not True")]),
    (
        forms.dict_of(forms.whole(), {"a", "b"}, "letter"),
        [{}, {"a": 1}],
        [([], "not a dict"), ({"c": 1}, "which is not a letter"), ({1: 1}, "not a string"), ({"a": -1}, "['a']")],
    ),
    (forms.dict_of(forms.whole()), [{"c": 1}], [({1: 1}, "has the key 1, which is not a string")]),
    (
        forms.fields({"a": forms.whole()}),
        [{"a": 1}],
        [({}, "lacks 'a'"), ({"a": 1, "b": 2}, "has 'b', which"), ({"a": -1}, "['a'] is -1"), ([], "not a dict")],
    ),
    (
        forms.tensor((2, 3)),
        [ONES, ONES.double()],
        [(ONES.int(), "not a tensor of floating-point"), (ONES.t(), "has shape (3, 2), not (2, 3)"), (1.0, "not a tensor")],
    ),
    (forms.tensor(), [ONES, torch.zeros(0)], [(HOLED, "holds NaN or infinity"), (ONES * math.inf, "holds NaN or infinity")]),
    (forms.tensor(finite=False), [HOLED], []),
    (
        forms.tensors_like({"w": ONES}),
        [{}, {"w": ONES}],
        [({"v": ONES}, "not a tensor of the module"), ({"w": HOLED}, "['w'] has shape"), ({"w": ONES * math.nan}, "NaN")],
    ),
    (forms.tensors_like(None, finite=False), [{"v": HOLED}], [({"v": 1}, "['v'] is 1"), ({1: ONES}, "not a string")]),
]


@pytest.mark.parametrize(("form", "good", "bad"), CASES)
def test_what_fits_and_what_is_said_of_the_rest(form: Form, good: list[Any], bad: list[tuple[Any, str]]) -> None:
    for value in good:
        assert form(value, "it") is None
    for value, message in bad:
        found = form(value, "it")
        assert found is not None
        assert message in found
        assert found.startswith("it")


def test_what_is_long_is_not_repeated() -> None:
    assert forms.whole()("x" * 99, "it") == "it is a str of 101 characters, not a whole number from 0"
