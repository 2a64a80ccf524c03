"""Methods beside the official codes, run on the same tiny networks and streams; what those answered is in tests/fixtures."""

from __future__ import annotations

import pytest
from official_runs import NETS, RECORDED, filled, first_prompts, loader, mirror, recorded, vit_net
from torch import nn
from tta_toys import close, run

from lightning_peft import CMF, FOA, RMT, T3A


def ours(net, method):
    return run(net, method, loaders=loader(), precision="64-true")


@pytest.mark.parametrize("per_class", [1, 3, 100])
@pytest.mark.parametrize("kind", NETS)
def test_t3a(kind, per_class):
    close(ours(NETS[kind](), T3A(per_class=per_class)), recorded("T3A", f"{kind}, {per_class}"), 1e-9)


@pytest.mark.parametrize("noise", [16.0, 30.0])
@pytest.mark.parametrize("kind", NETS)
def test_cmf(kind, noise):
    method = CMF(lr=0.05, decay=0.9, target_momentum=0.8, noise=noise, augment=mirror)
    close(ours(NETS[kind](), method), recorded("CMF", f"{kind}, {noise:g}"), 1e-9)


@pytest.mark.parametrize(("setting", "warm_up", "replay"), [("replay and warm-up", 18, 1.0), ("source-free", 0, 0.0)])
@pytest.mark.parametrize("kind", NETS)
def test_rmt(kind, setting, warm_up, replay, monkeypatch):
    monkeypatch.setattr(RMT, "_new_projector", lambda self, means: filled(projector(means.shape[1], 5), 0.5))
    options = {"teacher_momentum": 0.9, "contrast": 0.7, "projection": 5, "augment": mirror, "lr": 0.05}
    method = RMT(source=loader(24, phase=1.0), warm_up=warm_up, replay=replay, **options)
    close(ours(NETS[kind](), method), recorded("RMT", f"{kind}, {setting}"), 1e-9)


def projector(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden)).double()


def test_foa(monkeypatch):
    cma, _ = pytest.importorskip("cma"), pytest.importorskip("timm")
    assert RECORDED["FOA"]["cma"] == cma.__version__, "run the official code with this version of cma, and record it anew"
    method = FOA(source=loader(12, side=8, phase=1.0))
    start = FOA.to_source

    def begin(self):
        start(self)
        self._best = first_prompts()

    monkeypatch.setattr(FOA, "to_source", begin)
    net = vit_net()
    close(run(net, method, loaders=loader(24, side=8), precision="64-true"), recorded("FOA", "vit"), 1e-9)
