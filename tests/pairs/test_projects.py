"""No method breaks in any kind of project: it works, or is rejected in words."""

from __future__ import annotations

import pytest
from project_outcomes import outcome
from project_styles import STYLES
from verdicts import BREAKS, WORKS

# One or two of each mechanism; `make compatibility` tries all methods.
TRIED = [
    *("CoTTA", "FTWT", "FisherEstimator", "GBLM", "LayerGrowth", "NMSparsity", "PERP", "PSKD", "RoTTA"),
    *("SelfSupervisedAdapt", "StructuredPruning", "TrainedRankPruning", "WeightCompander"),
]


@pytest.mark.parametrize("style", STYLES)
def test_methods_work_or_are_rejected_in_words(style: str) -> None:
    found = {method: outcome(style, method) for method in TRIED}
    broken = {method: each.words for method, each in found.items() if each.what == BREAKS}
    assert not broken
    assert any(each.what == WORKS for each in found.values()), "a miniature that nothing works on shows nothing"
