"""What every method of the family owes its user, in as few configurations as there are ways to go about it."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_peft
from lightning_peft import (
    CMF,
    EATA,
    FOA,
    LAME,
    MEMO,
    RMT,
    SAR,
    T3A,
    BatchNormAdapt,
    CoTTA,
    DeYO,
    Lane,
    RDumb,
    RoTTA,
    SelfSupervisedAdapt,
    Tent,
    registry,
)
from lightning_peft.testing import AdaptationTester
from lightning_peft.testing.pictures import BatchNormPictures, Pictures, picture_loader

EAGER = {"lr": 0.05, "e_margin": 0.9}  # chooses many predictions, and moves far


def consistency(module, batch):
    """How far predictions are from those of mirrored pictures: a loss that needs no label."""
    pictures = batch[0].view(-1, 1, 4, 4)
    return (module.model(pictures).softmax(-1) - module.model(pictures.flip(-1)).softmax(-1)).square().mean()


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
        partial(CMF, lr=0.05),  # is a ROID
        partial(RMT, lr=0.05, source=picture_loader(8, seed=9), warm_up=8, teacher_momentum=0.5),
        partial(SelfSupervisedAdapt, consistency, lr=0.5),
    ]


class TestStatistics(AdaptationTester):
    methods = [partial(BatchNormAdapt, momentum=0.3)]
    no_styles = {"LayerNormPictures": "no BatchNorm layer"}


class TestAnswersAlone(AdaptationTester):
    methods = [LAME]
    no_keep = "nothing of the module moves"


class TestClassifier(AdaptationTester):
    methods = [partial(T3A, per_class=4)]


class TokenPictures(Pictures):
    """Classifies by the class token of a tiny vision transformer."""

    certainty = 3.0

    def body(self):
        return [nn.Conv2d(1, 16, 2, 2), Tokens()]


class Tokens(nn.Module):
    """Blocks over patches, ``(batch, 16, height, width)``, and a class token, which comes out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, 16))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(16)

    def forward(self, patches):
        tokens = torch.cat([self.first.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        return self.norm(self.blocks(tokens))[:, 0]


class Block(nn.Module):
    """Attention without weights, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.norm(tokens)
        return tokens + self.linear(nn.functional.scaled_dot_product_attention(x, x, x))


@pytest.mark.skipif(find_spec("cma") is None, reason="the extra `evolution` is not installed")
class TestTokens(AdaptationTester):
    methods = [partial(FOA, source=picture_loader(8, seed=9), population=4)]
    styles = (TokenPictures, BatchNormPictures)
    no_styles = {"BatchNormPictures": "shows no such way"}
    no_keep = "nothing of the module moves"


TESTERS = (TestDescent, TestStatistics, TestAnswersAlone, TestClassifier, TestTokens)
CONFIGURATIONS = [factory for tester in TESTERS for factory in tester.methods]


def test_every_method_of_the_lane_is_here() -> None:
    known = [getattr(lightning_peft, name) for name in registry.installed()]
    tested = [type(factory()) for factory in CONFIGURATIONS]
    missing = [each for each in known if each.lane == Lane.ADAPT and not any(issubclass(one, each) for one in tested)]
    assert not missing


@pytest.mark.parametrize("factory", CONFIGURATIONS, ids=lambda factory: factory().name)
def test_a_reset_that_is_none_is_refused(factory) -> None:
    with pytest.raises(MisconfigurationException, match="reset='sometimes'"):
        factory(reset="sometimes")
