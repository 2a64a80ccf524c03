"""What the study of deltas compares: counts of trained parameters by hand, and what it measures of a fit."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from lightning_peft.contract import methods_of
from lightning_peft.testing.modules import Plain, loader, trainer

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

# Two hidden layers of 16 x 16 with biases, whose weights get deltas, and a head of 3 x 16 with its biases.
HEAD = 3 * 16 + 3
COUNTS = {
    "full": 2 * (16 * 16 + 16) + HEAD,
    "LoRA r=8": 2 * 8 * (16 + 16) + HEAD,
    "LoRA r=8, root": 2 * 8 * (16 + 16) + HEAD,
    "DoRA r=7": 2 * (7 * (16 + 16) + 16) + HEAD,
    "LoRA r=4": 2 * 4 * (16 + 16) + HEAD,
    "PiSSA r=8": 2 * 8 * (16 + 16) + HEAD,
    "EVA r=8": 2 * 8 * (16 + 16) + HEAD,
    "AdaLoRA r=7 to 5": 2 * 7 * (16 + 1 + 16) + HEAD,
    "MiSS r=16": 2 * 16 * 16 + HEAD,
    "LoRA-XS r=16": 2 * 16 * 16 + HEAD,
    "norm": HEAD,  # there are none
    "bias": 2 * 16 + HEAD,
    "head": HEAD,
}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for needed in ("timm", "transformers", "peft"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import methods

    return methods


def test_the_counts_by_hand_are_of_every_member_and_within_the_budget(study: ModuleType) -> None:
    assert COUNTS.keys() == study.deltas(("head",)).keys()
    assert all(count <= COUNTS["LoRA r=8"] for name, count in COUNTS.items() if name != "full")


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_trained_is_what_the_closed_formulas_say(study: ModuleType, name: str) -> None:
    callbacks, costs, module = study.deltas(("head",))[name](), study.AdapterCosts(), Plain()
    assert study.closed_count(module, methods_of(callbacks)) == COUNTS[name]
    runner = trainer(callbacks=[costs, *callbacks], max_epochs=3)
    runner.fit(module, loader(), loader(8))
    found = costs.found()
    assert found["trainables"] == COUNTS[name]
    assert found["step_ms"] > 0
    numbers = 4 * COUNTS[name]  # bytes of as many numbers: gradients, and two moments of Adam
    kept = 1e6 * found["memory_mb"] - 3 * numbers
    assert 0 < kept < 20_000
    assert 1e3 * found["file_kb"] > numbers
