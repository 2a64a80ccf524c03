"""StageSharing beside a run of the official code; what that computed is in tests/fixtures."""

from __future__ import annotations

import pytest
from official_training import Learner
from official_values import marks, values_of
from stages_official_network import DESCENDANT, LR, MOMENTUM, STAGES, fill, loader, network

from lightning_peft import StageSharing
from lightning_peft.testing.modules import trainer

RECORDED = values_of("stages_official")


class Filled(Learner):
    """Starts from waves once the blocks of a stage are one."""

    def on_fit_start(self):
        fill([(name, p) for name, p in self.net.named_parameters() if not name.startswith("blocks.")], 9)
        for stage in range(len(STAGES)):
            fill(self.net.blocks[sum(STAGES[:stage])].named_parameters(), stage)


def test_shares_and_expands_as_the_official_code():
    pytest.importorskip("timm")
    module = Filled(network(sum(STAGES)), LR, momentum=MOMENTUM)
    method = StageSharing(STAGES, at="epoch:3", to=len(DESCENDANT))
    trainer(callbacks=[method], max_epochs=6, precision="64-true").fit(module, loader())
    assert module.losses == pytest.approx(RECORDED["losses"], abs=1e-9)
    for name, values in RECORDED["marks"].items():
        assert marks(module.net.get_parameter(name).detach()) == pytest.approx(values, abs=1e-9), name
