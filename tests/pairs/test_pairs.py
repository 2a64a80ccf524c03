"""Every method alone and every two of them: they train and leave a clean module, or are rejected in words."""

from __future__ import annotations

import dataclasses

import pytest
from composition import PAGE, Record, page, reason_of
from pairs import CONFIGURATIONS, ELSEWHERE, PAIRS, STEPS, assert_clean, outcome, plain, run

from lightning_peft import Lane, MagnitudePruning, Wanda, registry
from lightning_peft.testing.ordinary import Elsewhere, left_behind
from lightning_peft.testing.trace import difference

RECORD = Record.read()
# They adapt by the steps of a sibling that is tried (Tent, EATA, LAME), so what they meet in a trained module is the same;
# `make generate` trains these pairs too.
SIBLINGS = {"CMF", "DeYO", "ETA", "RDumb", "ROID", "SAR", "T3A"}
TRIED = [pair for pair in PAIRS if not SIBLINGS & {*pair}]


def test_every_registered_method_is_here() -> None:
    assert set(CONFIGURATIONS) == set(registry.installed())


def test_every_method_is_on_record() -> None:
    lacking = set(CONFIGURATIONS) - RECORD.methods
    assert not lacking, f"train {', '.join(lacking)} with every other method: make generate"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_alone(name: str) -> None:
    """It has an effect in these few steps, and follows a strategy that moves the module before callbacks are torn down."""
    if name in ELSEWHERE:
        assert ELSEWHERE[name] in outcome(name)
        return
    runner, module = run(CONFIGURATIONS[name](), strategy=Elsewhere())
    assert runner.global_step == STEPS
    stayed = left_behind(module)
    assert not stayed, f"these did not follow the module: {stayed}"
    assert_clean(module)
    lane = CONFIGURATIONS[name]().lane
    if lane == Lane.ADAPT:
        assert difference(plain()[1].answers, module.answers) is not None, "it answered as the network does: no effect"
    elif lane != Lane.REPORT:
        state = plain()[1].state_dict()
        trained = {key: value.to(state[key].dtype) for key, value in module.state_dict().items() if key in state}
        assert list(trained) != list(state) or difference(dict(state), trained) is not None, (
            "it trained the weights of a plain training"
        )


@pytest.mark.parametrize("names", TRIED, ids="+".join)
def test_pair(names: tuple[str, str]) -> None:
    again = f"if it should do so, run python tests/pairs/composition.py {names[0]}"
    assert reason_of(names) == RECORD.rejected.get(names, ""), f"the pair does something else than on record; {again}"


def test_two_masks_are_rejected_until_their_targets_are_apart() -> None:
    assert "exclude=" in outcome("MagnitudePruning", "Wanda")
    stem = ["network.stem"]
    _, module = run(MagnitudePruning(0.5, targets=stem, exclude=()), Wanda(0.5, exclude=stem))
    assert_clean(module)
    assert all((layer.weight == 0).float().mean() == 0.5 for layer in (module.network.stem, module.network.head))


def test_the_page_tells_what_is_on_record() -> None:
    assert page(RECORD) == PAGE.read_text(), "write the page anew: make generate"


def test_only_the_pairs_of_a_method_that_is_not_on_record_are_trained(monkeypatch) -> None:
    trained = []
    monkeypatch.setattr("composition.reason_of", lambda pair: trained.append(pair) or "A stops B.")
    known = {pair: reason for pair, reason in RECORD.rejected.items() if "Tent" not in pair}
    renewed = dataclasses.replace(RECORD, methods=RECORD.methods - {"Tent"}, rejected=known).renewed()
    assert trained == [pair for pair in PAIRS if "Tent" in pair]
    assert renewed == Record(RECORD.methods, {**known, **dict.fromkeys(trained, "A stops B.")})
    assert RECORD.renewed() == RECORD
    assert len(trained) == len(CONFIGURATIONS) - 1
