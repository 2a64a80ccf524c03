"""No method breaks beside the features of a Trainer: one of each kind with methods in turn, as they are on record."""

from __future__ import annotations

import itertools

import pytest
from covering import covering, pairs_of
from feature_outcomes import outcome
from features_page import ALONE, PAGE, TOGETHER, page
from pairs import CONFIGURATIONS
from sweep import Record
from verdicts import BREAKS, Verdict

SINGLE, PAIRS = Record.read(ALONE), Record.read(TOGETHER)
# Of each factor one that intrudes, and a method of each mechanism, in turn.
TRIED = [
    (("stream without length",), "NMSparsity"),
    (("GradientAccumulationScheduler",), "LayerGrowth"),
    (("16-mixed with a scaler",), "WeightCompander"),
    (("clip by value",), "PERP"),
    (("two optimizers",), "MaskedPruning"),
    (("L-BFGS",), "Tent"),
    (("PyTorch profiler",), "LayerGrowth"),
    (("barebones",), "FTWT"),
    (("BatchSizeFinder",), "PSKD"),
    (("BackboneFinetuning",), "StructuredPruning"),
    (("ModelPruning",), "BlockPruning"),
    (("WeightAveraging", "resume", "bf16-mixed"), "StageSharing"),
    (("pytorch_lightning", "load_from_checkpoint"), "MixtureGrowth"),
]


@pytest.mark.parametrize(("features", "method"), TRIED, ids=lambda part: part if isinstance(part, str) else "+".join(part))
def test_works_or_is_rejected_in_words(features: tuple[str, ...], method: str) -> None:
    found = outcome(features, method)
    assert found.what not in ("", BREAKS), found.words
    if len(features) == 1 and features[0] in SINGLE.found:
        assert found.what == SINGLE.found[features[0]][method].what


def test_every_method_was_tried() -> None:
    lacking = {method for cells in SINGLE.found.values() for method in CONFIGURATIONS if method not in cells}
    assert not lacking, f"python tests/pairs/features_page.py {' '.join(sorted(lacking))}"


def test_the_page_tells_what_is_on_record() -> None:
    assert page(SINGLE, PAIRS) == PAGE.read_text(), "write the page anew: python tests/pairs/features_page.py --page"


@pytest.mark.parametrize("impossible", [set(), {frozenset(("a1", "b1")), frozenset(("b1", "c2"))}], ids=["all", "some"])
def test_combinations_cover_every_pair_that_is_possible(impossible: set[frozenset[str]]) -> None:
    table = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"], "c": ["c0", "c1", "c2"], "d": ["d0", "d1"]}
    rows = covering(table, impossible)
    met = set().union(*map(pairs_of, rows))
    every = {
        frozenset(pair) for one, other in itertools.combinations(table.values(), 2) for pair in itertools.product(one, other)
    }
    assert met == every - impossible
    assert 9 <= len(rows) < 16


def test_a_method_that_leaves_something_behind_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tent = CONFIGURATIONS["Tent"]

    def leaving() -> object:
        method = tent()
        method.finish = lambda run: run.module.__dict__.update(left=1)  # type: ignore[method-assign]
        return method

    monkeypatch.setitem(CONFIGURATIONS, "Tent", leaving)
    assert outcome(("max_epochs",), "Tent") == Verdict(
        BREAKS, "plain Lightning against this: ['attributes']['']: only one side has 'left'"
    )
