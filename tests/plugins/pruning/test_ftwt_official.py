"""FTWT beside runs of the official code; what those computed is in tests/fixtures.

Predictors compute in single precision, here as everywhere, so the tolerance is that of single precision.
"""

from __future__ import annotations

import pytest
from ftwt_official_network import EPOCHS, LR, PREDICTOR_LR, SCALE, WEIGHT_DECAY, first_predictors, loader, network
from lightning.pytorch import Callback
from official_training import Learner
from official_values import filled, values_of

from lightning_peft import FTWT
from lightning_peft.testing.modules import trainer

RUNS = values_of("ftwt_official")["runs"]
SETTINGS = {
    "mass, decoupled": {"mass": 0.7},
    "mass, joint": {"mass": 0.7, "decoupled": False},
    "all of the mass": {"mass": 1.0},
    "uniform": {"mass": 0.75, "criterion": "uniform"},
    "cool-down": {"mass": 0.7, "cooldown": "50%"},
}


class Predictors(Callback):
    """Starts predictors as those of the recorded runs, and keeps what the method says of each step."""

    def __init__(self, method):
        self.method, self.seen = method, {"active": [], "agreement": []}

    def weights(self, module):
        return [(gate.predictor.weight, gate.predictor.bias) for _, gate in self.method.gates(module)]

    def on_train_start(self, trainer, pl_module):
        first_predictors(self.weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        metrics = self.method.metrics(self.method.run)
        for key, values in self.seen.items():
            values.append(float(metrics[key]))

    def on_train_end(self, trainer, pl_module):
        self.trained = [weight.flatten().tolist() for weight, _ in self.weights(pl_module)]


@pytest.mark.parametrize("run", RUNS)
def test_equals_the_official_run(run):
    method = FTWT(**{"cooldown": None} | SETTINGS[run], lr_scale=PREDICTOR_LR / LR)
    watch = Predictors(method)
    module = Learner(filled(network(), SCALE), LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    trainer(callbacks=[watch, method], max_epochs=EPOCHS, precision="64-true").fit(module, loader())
    expected = RUNS[run]
    assert module.losses == pytest.approx(expected["losses"], rel=1e-6)
    for key, values in watch.seen.items():
        assert values == pytest.approx(expected[key], abs=1e-6), key
    for weight, recorded in zip(watch.trained, expected["predictors"], strict=True):
        assert weight == pytest.approx(recorded, abs=1e-6)
    assert module.net[-1].weight.flatten().tolist() == pytest.approx(expected["classifier"], abs=1e-6)
