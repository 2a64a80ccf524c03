"""Whatever a constructor is given, it works or is refused by the name of the argument."""

from __future__ import annotations

import contextlib
import inspect
import re

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_peft
from lightning_peft import PSKD, GroupEnvelope, LayerGrowth, MaskedPruning, NMSparsity, StageSharing, Tent
from lightning_peft.registry import installed

JUNK = [-1, 0, 3.5, float("nan"), "nonsense", None, [], {}, object(), ["x"], True, b"x", 10**9, print]
NEEDED = {"amount": 0.5, "mass": 0.8, "stages": [2, 2]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerGrowth(2), "LayerGrowth(operator=...) takes str, not 2, which is of type int."),
        (lambda: NMSparsity(None), "NMSparsity(pattern=...) takes str, not None"),
        (lambda: NMSparsity(targets=["fc", 3]), "NMSparsity(targets=...) takes str or type[Module] or Sequence["),
        (lambda: MaskedPruning("half"), "MaskedPruning(amount=...) takes float or None, not 'half', which is of type str."),
        (lambda: StageSharing([2, "2"]), "StageSharing(stages=...) takes int or Sequence[int], not [2, '2']"),
        (lambda: Tent(optimizer=print), "Tent(optimizer=...) takes str or type[Optimizer], not <built-in function print>"),
        (lambda: Tent(window="x" * 99), "Tent(window=...) takes int, not a str, which is of type str."),
        (lambda: PSKD(alpha=float("nan")), "PSKD(alpha=...) is NaN. Give it a number."),
        (lambda: lightning_peft.BatchNormAdapt(prior=-1), "prior=-1 must be a number of samples, 0 or more."),
    ],
)
def test_a_wrong_type_is_refused_by_the_argument_and_what_it_takes(make, message):
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        make()


@pytest.mark.parametrize("name", sorted(installed()))
def test_nothing_ends_in_a_raw_error(name):
    cls = getattr(lightning_peft, name)
    taken = inspect.signature(cls).parameters.values()
    needed = {entry.name: NEEDED.get(entry.name, 1) for entry in taken if entry.default is entry.empty}
    for entry in taken:
        for value in JUNK:
            with contextlib.suppress(MisconfigurationException):
                cls(**{**needed, entry.name: value})


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert MaskedPruning(numpy.float32(0.5)).amount == 0.5
    assert Tent(window=numpy.int64(3)) is not None
    assert NMSparsity(targets=("fc1", "fc2")).targets == ("fc1", "fc2")


def test_an_unknown_argument_is_answered_by_those_there_are():
    with pytest.raises(TypeError, match=r"GroupEnvelope: got an unexpected keyword argument 'score'\. It takes amount, "):
        GroupEnvelope(0.5, score="energy")
    with pytest.raises(TypeError, match=r"Tent: too many positional arguments\. It takes"):
        Tent(1, 2, 3)
