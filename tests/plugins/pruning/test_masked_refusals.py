"""What pruning by masks refuses: arguments at once, networks before anything is touched."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from masked_weights import EVERYTHING
from torch import nn

from lightning_peft import SAP, MaskedPruning, NMSparsity, Wanda
from lightning_peft.testing.modules import Conv, Plain
from lightning_peft.testing.runs import fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 1.0}, "between 0 and 1"),
        ({"amount": 0.0}, "between 0 and 1"),
        ({"amount": 0.5, "pattern": "2:4"}, "leave amount= out"),
        ({"score": "magnitud"}, "Did you mean magnitude"),
        ({"scope": "all"}, "global, layer, row"),
        ({"rule": "soft"}, "zero, ste, shrink, decay"),
        ({"rule": "decay"}, "and an end="),
        ({"rule": "decay", "end": "50%", "strength": 0.0}, "a positive strength="),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"pattern": "stripes"}, '"block:RxC"'),
        ({"pattern": "5:4"}, "N <= M"),
        ({"scope": "row", "pattern": "channel"}, 'use "layer"'),
        ({"start": "soon"}, "not a point of training"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        MaskedPruning(**arguments)


def test_sap_prunes_single_weights() -> None:
    with pytest.raises(MisconfigurationException, match="defined for single weights"):
        SAP(pattern="channel")


def test_what_cannot_be_pruned_is_refused_before_anything_is_touched() -> None:
    class Grouped(Conv):
        def build(self) -> None:
            super().build()
            self.extra = nn.Conv2d(4, 4, 3, groups=2)

    with pytest.raises(MisconfigurationException, match=r"extra is a grouped convolution.*exclude=\['extra'\]"):
        fit([Wanda(0.5, exclude=EVERYTHING)], style=Grouped)
    with pytest.raises(MisconfigurationException, match="matches no module"):
        fit([MaskedPruning(0.5, targets="nowhere")])
    with pytest.raises(MisconfigurationException, match=r"model\.0 has 16 inputs, fewer than one group of 2:32"):
        fit([MaskedPruning(pattern="2:32", targets=["model.0"], exclude=EVERYTHING)])
    with pytest.raises(MisconfigurationException, match="mask"):
        fit([MaskedPruning(0.5, exclude=EVERYTHING), NMSparsity("2:4", exclude=EVERYTHING)])


def test_a_layer_nobody_calls_cannot_be_scored_by_data() -> None:
    class Idle(Plain):
        def build(self) -> None:
            super().build()
            self.idle = nn.Linear(4, 4)

    with pytest.raises(MisconfigurationException, match=r"idle\.weight cannot be scored by 'taylor'.*exclude="):
        fit([MaskedPruning(0.5, "taylor", exclude=EVERYTHING)], style=Idle)
