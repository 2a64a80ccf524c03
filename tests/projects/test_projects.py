"""No method breaks in any kind of project: it works, or is rejected in words that say what to do."""

from __future__ import annotations

import pytest
from cells import BREAKS, METHODS, outcome
from styles import STYLES

import lightning_peft
from lightning_peft import registry


@pytest.mark.parametrize("style", STYLES)
def test_every_method_works_or_is_rejected_in_words(style: str) -> None:
    found = {method: outcome(style, method) for method in METHODS}
    broken = {method: words for method, (what, words) in found.items() if what == BREAKS}
    assert not broken
    assert any(what == "works" for what, _ in found.values()), "a miniature that nothing works on shows nothing"


def test_every_registered_method_is_here() -> None:
    shipped = {
        name for name in registry.installed() if getattr(lightning_peft, name).__module__.startswith("lightning_peft_plugins")
    }
    assert set(METHODS) == shipped
