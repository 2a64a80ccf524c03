"""What goes through the network is counted, whoever calls it."""

from __future__ import annotations

import pytest
from tta_toys import Classifier, batch_norm_net, layer_norm_net, stream

from lightning_peft import ETA, MEMO, BatchNormAdapt, CoTTA, FisherEstimator, Tent
from lightning_peft.shifts import StreamRecorder
from lightning_peft.testing.modules import trainer

SAMPLES = 24


def passes(net, method):
    """Forward and backward passes a sample over two batches."""
    recorder = StreamRecorder()
    callbacks = [recorder] if method is None else [recorder, method]
    trainer(callbacks=callbacks).test(Classifier(net), stream(batches=2), verbose=False)
    return recorder.forward / SAMPLES, recorder.backward / SAMPLES


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (lambda: None, (1, 0)),
        (lambda: Tent(backward="whole"), (1, 1)),
        (lambda: Tent(backward="second-pass"), (2, 1)),
        (lambda: ETA(e_margin=1e-9, backward="second-pass"), (1, 0)),
        (lambda: ETA(e_margin=1e-9, backward="whole"), (1, 0)),
        (lambda: CoTTA(views=3, threshold=1.1), (1 + 1 + 3, 1)),
        (lambda: CoTTA(views=3, threshold=0.0), (1 + 1 + 1, 1)),
        (lambda: MEMO(views=4, augment=lambda x: x), (1 + 4, 4)),
    ],
)
def test_passes_a_sample(method, expected) -> None:
    assert passes(layer_norm_net(), method()) == expected


def test_statistics_alone_take_one_pass() -> None:
    assert passes(batch_norm_net(), BatchNormAdapt()) == (1, 0)


def test_a_validation_scores_a_network_that_is_trained_already() -> None:
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    estimator, module = FisherEstimator(samples=SAMPLES), Validated(layer_norm_net())
    trainer(callbacks=[estimator]).validate(module, stream(batches=2), verbose=False)
    scores = {name: score.clone() for name, score in estimator.scores.items()}
    assert all(name.startswith("net.") and score.shape == module.get_parameter(name).shape for name, score in scores.items())
    assert sum(float(score.sum()) for score in scores.values()) > 0
    assert not any(score.is_inference() for score in estimator.scores.values())
    trainer(callbacks=[estimator]).validate(module, stream(batches=1, seed=5), verbose=False)
    assert all(bool((estimator.scores[name] == score).all()) for name, score in scores.items())  # what was learnt stays
