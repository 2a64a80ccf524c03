"""No method breaks on families of networks that people have: one cell of each mechanism, as they are on record."""

from __future__ import annotations

import dataclasses

import pytest
from network_families import family
from network_promises import growth
from networks_page import PAGE, merged, page, trial
from verdicts import BREAKS, REJECTED, WORKS, verdict

from lightning_peft_plugins.growth._layer_growth.operators import OPERATORS

RECORD = merged()

# What each shows, beside its method: a cut of heads, a class that refuses or puts right what belongs to a position, tensors
# that only one block has, transposed weights, experts that get tokens one by one, versions of classes in files.
TRIED = [
    ("transformers/llama", "deeper: stack"),
    ("transformers/llama", "wider: lemon"),
    ("transformers/llama", "StructuredPruning"),
    ("transformers/bert", "deeper: zero"),
    ("transformers/gemma2", "BlockPruning"),
    ("transformers/t5", "deeper: ligo"),
    ("transformers/gpt2", "FTWT deployed"),
    ("transformers/vit", "Tent"),
    ("torchvision/mnasnet0_5", "NMSparsity"),
    ("torchvision/mnasnet0_5", "deeper: msg"),
    ("torchvision/squeezenet1_1", "MaskedPruning"),
]


@pytest.mark.parametrize(("name", "method"), TRIED, ids=lambda part: part.replace(": ", "-"))
def test_as_on_record(name: str, method: str) -> None:
    found, known = trial(name, method), RECORD.found.get(name, {}).get(method)
    if "without a method it diverges" in found.words:
        pytest.skip(f"with the rounding of this processor {name} shows nothing: {found.words}")
    assert found.what in (WORKS, REJECTED), found.words
    again = f"python tests/pairs/networks_page.py {name}"
    assert known is None or found.what == known.what, f"it does something else than on record; if it should do so, {again}"


def test_an_operator_that_does_not_keep_the_function_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "msg", dataclasses.replace(OPERATORS["stack"], lr="continue"))
    found = verdict(lambda: growth(family("transformers/llama"), "msg", wide=False))
    assert found.what == BREAKS
    assert "keeps the function, but outputs changed by" in found.words


def test_the_page_tells_what_is_on_record() -> None:
    assert page(RECORD) == PAGE.read_text(), "write the page anew: python tests/pairs/networks_page.py --page"
