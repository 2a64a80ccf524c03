"""`pytorch_lightning` beside `lightning.pytorch`: the same training, bit for bit, and the same refusals."""

from __future__ import annotations

import importlib

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

import lightning_peft
from lightning_peft import PSKD, LayerGrowth, NMSparsity, Tent, WeightCompander
from lightning_peft.network.resolve import resolve_network
from lightning_peft.testing.modules import ResidualBlock, loader, mlp
from lightning_peft.testing.toys import ToyLookahead, ToyNoise, ToySAM
from lightning_peft.testing.trace import difference

NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]
METHODS = {
    "weights and loss": lambda: [NMSparsity("2:4"), WeightCompander(), PSKD()],
    "structure": lambda: [LayerGrowth(at="step:3", start=2)],
    "step and optimizer": lambda: [ToySAM(), ToyNoise(), ToyLookahead()],
}


def imported(name):
    return (
        importlib.import_module(name) if name == NAMESPACES[0] else pytest.importorskip(name, reason=f"{name} is not installed")
    )


def module_class(pl):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Sequential(*(ResidualBlock() for _ in range(4)))
            self.norm = torch.nn.BatchNorm1d(16)
            self.model = mlp()

        def forward(self, inputs):
            return self.model(self.norm(self.blocks(inputs)))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def test_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Module


def train(pl, methods, module, epochs=2, extra=(), **resume):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callbacks = [*methods, *extra]
    runner = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    runner.fit(module, loader(), loader(8), **resume)
    return runner


def trained(pl, make, folder):
    """Train two epochs, save, resume for a third in a new module; return what is left of both, and of an average."""
    torch.manual_seed(0)
    module = module_class(pl)()
    train(pl, make(), module).save_checkpoint(folder / "model.ckpt")
    torch.manual_seed(0)
    resumed, average = module_class(pl)(), pl.callbacks.EMAWeightAveraging()
    train(pl, make(), resumed, epochs=3, ckpt_path=folder / "model.ckpt")
    torch.manual_seed(0)
    averaged = module_class(pl)()
    train(pl, make(), averaged, extra=[average])
    loaded = lightning_peft.load_from_checkpoint(module_class(pl), folder / "model.ckpt")
    parts = {"fit": module, "resumed": resumed, "averaged": averaged, "loaded": loaded}
    return {name: dict(part.state_dict()) for name, part in parts.items()}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_both_train_resume_average_and_load_alike(make, tmp_path):
    found = []
    for name in NAMESPACES:
        folder = tmp_path / name
        folder.mkdir()
        found.append(trained(imported(name), make, folder))
    assert difference(*found) is None
    assert difference(found[0]["fit"], found[0]["loaded"]) is None


def test_both_adapt_alike():
    scores = []
    for name in NAMESPACES:
        pl = imported(name)
        torch.manual_seed(0)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        runner = pl.Trainer(accelerator="cpu", callbacks=[Tent(lr=0.1)], **quiet)
        scores.append(runner.test(module_class(pl)(), loader(), verbose=False)[0]["loss"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_method_alone_is_a_callback_of_both(name):
    pl = imported(name)
    method = NMSparsity("2:4")
    assert isinstance(method, pl.Callback)
    runner = pl.Trainer(callbacks=method, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert method in runner.callbacks


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_module_without_a_network_is_refused_for_its_own_reason(name):
    pl = imported(name)

    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    with pytest.raises(MisconfigurationException, match="Two has no single network"):
        resolve_network(Two())
