"""Every method alone and every two of them: they train and leave a clean module, or are refused in words."""

from __future__ import annotations

import pytest
from pairs import CONFIGURATIONS, PAGE, PAIRS, STEPS, assert_clean, outcome, page, plain, run

from lightning_peft import Lane, MagnitudePruning, Wanda, registry
from lightning_peft.testing.ordinary import Elsewhere, left_behind
from lightning_peft.testing.trace import difference


def test_every_registered_method_is_here() -> None:
    assert set(CONFIGURATIONS) == set(registry.installed())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_alone(name: str) -> None:
    """It has an effect in these few steps, and follows a strategy that moves the module before callbacks are torn down."""
    runner, module = run(CONFIGURATIONS[name](), strategy=Elsewhere())
    assert runner.global_step == STEPS
    stayed = left_behind(module)
    assert not stayed, f"these did not follow the module: {stayed}"
    assert_clean(module)
    lane = CONFIGURATIONS[name]().lane
    if lane == Lane.ADAPT:
        assert difference(plain()[1].answers, module.answers) is not None, "it answered as the network does: no effect"
    elif lane != Lane.REPORT:
        trained = {key: value.float() for key, value in module.state_dict().items()}
        assert difference(dict(plain()[1].state_dict()), trained) is not None, "it trained the weights of a plain training"


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_pair(names: tuple[str, str]) -> None:
    outcome(*names)


def test_two_masks_are_refused_until_their_targets_are_apart() -> None:
    assert "exclude=" in outcome("MagnitudePruning", "Wanda")
    stem = ["network.stem"]
    _, module = run(MagnitudePruning(0.5, targets=stem, exclude=()), Wanda(0.5, exclude=stem))
    assert_clean(module)
    assert all((layer.weight == 0).float().mean() == 0.5 for layer in (module.network.stem, module.network.head))


def test_the_page_tells_what_happened() -> None:
    assert page() == PAGE.read_text(), "write the page anew: python tests/pairs/pairs.py"
