"""All kinds by the name that ``--kind`` takes."""

from __future__ import annotations

from lightning_peft.cli.authors.kinds.gradient import GRADIENT
from lightning_peft.cli.authors.kinds.kind import Kind
from lightning_peft.cli.authors.kinds.layer_part import LAYER_PART
from lightning_peft.cli.authors.kinds.loss_term import LOSS_TERM
from lightning_peft.cli.authors.kinds.test_time import TEST_TIME
from lightning_peft.cli.authors.kinds.weight_map import WEIGHT_MAP

KINDS: dict[str, Kind] = {kind.name: kind for kind in (LOSS_TERM, WEIGHT_MAP, LAYER_PART, GRADIENT, TEST_TIME)}
