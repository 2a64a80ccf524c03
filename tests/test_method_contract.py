"""The toys and the methods of the first page through the tests every method must pass, and the ranks that those start."""

from __future__ import annotations

import os
import time
from multiprocessing import get_start_method

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_peft import NMSparsity, WeightCompander
from lightning_peft.testing import MethodTester, run_ddp
from lightning_peft.testing.toys import ToyEntropy, ToyLookahead, ToyNoise, ToySAM, ToyScale, ToyThreshold


class TestToyScale(MethodTester):
    methods = [ToyScale, lambda: ToyScale(0.5, exclude="head")]


class TestToyThreshold(MethodTester):
    methods = [ToyThreshold]


class TestToyEntropy(MethodTester):
    methods = [ToyEntropy]
    no_stream = "The training dataset is iterable, so its samples have no index"


class TestToyNoise(MethodTester):
    methods = [ToyNoise]


class TestToySAM(MethodTester):
    methods = [lambda: ToySAM(0.1)]
    no_styles = dict.fromkeys(("Manual", "TwoOptimizers"), "by hand it needs a closure, which these do not give")


class TestToyLookahead(MethodTester):
    methods = [ToyLookahead]


class TestNMSparsity(MethodTester):
    methods = [
        lambda: NMSparsity("2:4", exclude=()),
        lambda: NMSparsity("1:4", recipe="one-shot", targets="all-weights", exclude=(), dense="25%"),
        lambda: NMSparsity("2:4", recipe="sdgf-stepwise", targets="all-weights", exclude=(), refresh=2),
    ]
    no_exact_bake = "a soft or wider mask is in force until the last step; baking applies the target pattern"


class TestWeightCompander(MethodTester):
    methods = [WeightCompander, lambda: WeightCompander(headroom=1.2, slope=4.0, learnable=False)]


def failing():
    raise ValueError("on purpose")


def hanging():
    time.sleep(600)


def told() -> list[object]:
    return [rank_zero_only.rank, os.environ["RANK"], os.getpgrp() == os.getpid(), get_start_method(), hash("a word")]


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
def test_a_rank_knows_that_it_is_one(fresh, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    ranks = run_ddp(f"{__file__}:told", fresh=fresh)
    usual = get_start_method()
    assert [rank[:-1] for rank in ranks] == [[0, "0", True, usual], [1, "1", True, usual]]
    assert (ranks[0][-1] != ranks[1][-1]) == fresh, "whether sets are ordered by each rank in its own way"


def test_a_failing_rank_is_reported_with_its_output():
    with pytest.raises(RuntimeError, match=r"(?s)failing failed in 2 processes.*ValueError: on purpose"):
        run_ddp(f"{__file__}:failing")


def test_hanging_ranks_are_ended():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"time limit 3 s"):
        run_ddp(f"{__file__}:hanging", timeout=3)
    assert time.monotonic() - start < 60
