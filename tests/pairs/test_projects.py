"""No method breaks in any kind of project: it works, or is rejected in words that say what to do."""

from __future__ import annotations

import pytest
from project_outcomes import BREAKS, METHODS, outcome
from project_styles import STYLES


@pytest.mark.parametrize("style", STYLES)
def test_every_method_works_or_is_rejected_in_words(style: str) -> None:
    found = {method: outcome(style, method) for method in METHODS}
    broken = {method: words for method, (what, words) in found.items() if what == BREAKS}
    assert not broken
    assert any(what == "works" for what, _ in found.values()), "a miniature that nothing works on shows nothing"
