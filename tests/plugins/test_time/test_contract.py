"""What every method of the family owes its user, in as few configurations as there are ways to go about it."""

from __future__ import annotations

from functools import partial

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_peft
from lightning_peft import EATA, LAME, MEMO, ROID, SAR, BatchNormAdapt, CoTTA, DeYO, Lane, RDumb, RoTTA, Tent, registry
from lightning_peft.testing import AdaptationTester
from lightning_peft.testing.pictures import picture_loader

EAGER = {"lr": 0.05, "e_margin": 0.9}  # chooses many predictions, and moves far


class TestDescent(AdaptationTester):
    methods = [
        partial(Tent, lr=0.05),
        partial(EATA, d_margin=1.1, fisher=picture_loader(8, seed=9), fisher_alpha=1.0, **EAGER),
        partial(RDumb, d_margin=1.1, reset=3, **EAGER),
        partial(SAR, rho=0.1, reset_threshold=0.0, **EAGER),
        partial(DeYO, drop=-0.5, **EAGER),
        partial(CoTTA, lr=0.05, views=2),
        partial(RoTTA, lr=0.05, capacity=12, every=6, teacher_momentum=0.5),
        partial(MEMO, lr=0.05, views=2, episodic=False),
        partial(ROID, lr=0.05),
    ]


class TestStatistics(AdaptationTester):
    methods = [partial(BatchNormAdapt, momentum=0.3)]
    no_styles = {"LayerNormPictures": "no BatchNorm layer"}


class TestAnswersAlone(AdaptationTester):
    methods = [LAME]
    no_keep = "nothing of the module moves"


CONFIGURATIONS = [factory for tester in (TestDescent, TestStatistics, TestAnswersAlone) for factory in tester.methods]


def test_every_method_of_the_lane_is_here() -> None:
    known = [getattr(lightning_peft, name) for name in registry.installed()]
    tested = [type(factory()) for factory in CONFIGURATIONS]
    missing = [each for each in known if each.lane == Lane.ADAPT and not any(issubclass(one, each) for one in tested)]
    assert not missing


@pytest.mark.parametrize("factory", CONFIGURATIONS, ids=lambda factory: factory().name)
def test_a_reset_that_is_none_is_refused(factory) -> None:
    with pytest.raises(MisconfigurationException, match="reset='sometimes'"):
        factory(reset="sometimes")
