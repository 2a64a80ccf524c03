"""MDGF and SDGF beside runs of the official code; what those computed is in tests/fixtures.

The factor of MDGF is held in single precision, so the tolerance is that of single precision.
"""

from __future__ import annotations

import pytest
from nm_official_network import SCALE, WEIGHT_DECAY, loader, wide_network
from official_training import trained
from official_values import filled, marks, values_of

from lightning_peft import NMSparsity

RUNS = values_of("nm_decay_official")["runs"]


@pytest.mark.parametrize("run", RUNS)
def test_equals_the_official_run(run):
    (pattern, recipe), expected = run.split(), RUNS[run]
    method = NMSparsity(pattern, recipe, targets=["3", "5"], decay=expected.get("decay", "auto"))
    net, options = filled(wide_network(), SCALE), {"momentum": 0.9, "weight_decay": WEIGHT_DECAY}
    module = trained(net, method, loader(), expected["epochs"], expected["lr"], **options)
    assert module.losses == pytest.approx(expected["losses"], abs=1e-6)
    for name, values in expected["marks"].items():
        assert marks(module.stored[f"{name}.weight"]) == pytest.approx(values, abs=1e-6)
