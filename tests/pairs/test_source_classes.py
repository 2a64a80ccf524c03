"""Classes come out of a script without what the script does when it is run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule
from source_classes import Source

SCRIPT = """
import a_package_that_nobody_has
import pytorch_lightning as pl
from torch import nn

WIDTH = 3
TABLE = {"linear": nn.Linear}
data = Images("somewhere", download=True)

class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = TABLE["linear"](WIDTH, OTHER)

model = Network()
trainer = pl.Trainer(max_epochs=10)
trainer.fit(model, data)
raise SystemExit("trained")
"""


def test_a_script_is_defined_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    source = Source(tmp_path / "script.py", OTHER=2)
    module = source.Network()
    assert isinstance(module, LightningModule)
    assert module.layer.weight.shape == (2, 3)
    assert not hasattr(source, "trainer")
    assert not hasattr(source, "data")


def test_what_is_given_wins_over_what_the_script_defines(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert Source(tmp_path / "script.py", OTHER=2, WIDTH=7).Network().layer.weight.shape == (2, 7)
