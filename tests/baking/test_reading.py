"""Files with Python objects among the hyperparameters: refused by name, read with an explicit ``trusted=True``."""

from __future__ import annotations

import argparse
import enum
import functools
import pathlib
import pickle
import re
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_peft import (
    BlockPruning,
    LayerGrowth,
    MagnitudePruning,
    NMSparsity,
    StructuredPruning,
    WeightCompander,
    bake_checkpoint,
    load_baked,
    load_from_checkpoint,
    save_baked,
)
from lightning_peft.baking import reading
from lightning_peft.baking.reading import read_checkpoint
from lightning_peft.cli.main import main
from lightning_peft.report.checkpoint import checkpoint_report
from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import CLASSES, FEATURES, Plain, ResidualBlock, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale
from lightning_peft.testing.trace import difference

pytestmark = pytest.mark.filterwarnings("ignore:Attribute '(net|thing)' is an instance of `nn.Module`")


class Colour(enum.Enum):
    RED = "red"


class Holding(Plain):
    """Keeps whatever it is given as a hyperparameter."""

    def __init__(self, thing=None):
        super().__init__()
        self.save_hyperparameters()


HARMLESS = [
    argparse.Namespace(lr=0.1, inner=argparse.Namespace(path=pathlib.Path("data"))),
    pathlib.Path("data/train"),
    pathlib.PureWindowsPath("data"),
    torch.float16,
    torch.device("cpu"),
]
OBJECTS = [
    (Colour.RED, "Colour"),
    (np.float64(0.5), "numpy"),
    (np.arange(3), "numpy"),
    (functools.partial(torch.optim.SGD, lr=0.1), "functools.partial"),
    (nn.Linear, "torch.nn.modules.linear.Linear"),
    (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training-time checkpoint under a weight map, and the module as the fit left it."""
    folder = tmp_path_factory.mktemp("trained")
    run = fit([ToyScale(), ToyEntropy()], module=Holding(), after=[every_epoch(folder)])
    return torch.load(folder / "epoch=0.ckpt", weights_only=True), run.module


@pytest.fixture
def holding(trained, tmp_path):
    """Write the checkpoint with an object among its hyperparameters."""

    def write(thing):
        torch.save({**trained[0], "hyper_parameters": {"thing": thing}}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return write


def same(one, other):
    if isinstance(one, nn.Module):
        return type(one) is type(other) and difference(dict(one.state_dict()), dict(other.state_dict())) is None
    if isinstance(one, functools.partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return type(one) is type(other) and np.array_equal(one, other)


@pytest.mark.parametrize("thing", HARMLESS, ids=repr)
def test_harmless_objects_need_no_trust(thing, trained, holding, tmp_path):
    path = holding(thing)
    loaded = load_from_checkpoint(Holding, path)
    assert loaded.hparams["thing"] == thing
    assert difference(dict(trained[1].state_dict()), dict(loaded.state_dict())) is None
    bake_checkpoint(path, tmp_path / "baked.ckpt")
    assert read_checkpoint(tmp_path / "baked.ckpt")["hyper_parameters"] == {"thing": thing}


@pytest.mark.parametrize(("thing", "name"), OBJECTS, ids=lambda value: str(value)[:20])
def test_other_objects_are_refused_by_name_and_read_with_trust(thing, name, trained, holding, tmp_path):
    path, target = holding(thing), tmp_path / "baked.ckpt"
    for refused in (
        lambda: load_from_checkpoint(Holding, path),
        lambda: bake_checkpoint(path, target),
        lambda: save_baked(path, tmp_path / "net"),
        lambda: checkpoint_report(path),
    ):
        with pytest.raises(
            CheckpointError, match=rf"was not opened.*{name}.*pass trusted=True \(on the command line: --trusted\)"
        ):
            refused()
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]
    bake_checkpoint(path, target, trusted=True)
    loaded, ordinary = (
        load_from_checkpoint(Holding, path, trusted=True),
        Holding.load_from_checkpoint(target, weights_only=False),
    )
    for module in (loaded, ordinary):
        assert same(module.hparams["thing"], thing)
        assert difference(dict(trained[1].state_dict()), dict(module.state_dict())) is None
    load_baked(fresh := Holding(), save_baked(path, tmp_path / "net", trusted=True))
    assert difference(dict(trained[1].state_dict()), dict(fresh.state_dict())) is None
    assert checkpoint_report(path, trusted=True).data["weights"]["parameters"] == sum(p.numel() for p in fresh.parameters())


def test_an_omegaconf_configuration_is_read_with_trust(trained, tmp_path):
    omegaconf = pytest.importorskip("omegaconf")

    class Configured(Plain):
        def __init__(self, config):
            super().__init__()
            self.save_hyperparameters(config)

    config = omegaconf.OmegaConf.create({"model": {"lr": 0.1}})
    run = fit([ToyScale()], module=Configured(config), after=[every_epoch(tmp_path)])
    with pytest.raises(CheckpointError, match=r"omegaconf.*trusted=True"):
        load_from_checkpoint(Configured, tmp_path / "epoch=0.ckpt")
    loaded = load_from_checkpoint(Configured, tmp_path / "epoch=0.ckpt", trusted=True)
    assert loaded.hparams == config
    assert difference(dict(run.module.state_dict()), dict(loaded.state_dict())) is None


def test_the_command_line_reads_objects_with_its_flag_only(holding, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # commands add the working folder
    path = str(holding(nn.Linear(2, 2)))
    made = {"bake": tmp_path / "model.baked.ckpt", "report": tmp_path / "model-report", "export": tmp_path / "model-baked"}
    for command, target in made.items():
        arguments = [command, path, *(["--to", "safetensors"] if command == "export" else [])]
        assert main(arguments) == 2
        assert "--trusted" in capsys.readouterr().err
        assert not target.exists()
        assert main([*arguments, "--trusted"]) == 0
        assert target.exists()
    for command in ("run", "compare", "adapt"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--trusted" in capsys.readouterr().out


class Payload:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return pathlib.Path.touch, (self.sentinel,)


def test_what_an_untrusted_file_asks_for_is_not_done(holding, tmp_path):
    path, sentinel = holding(Payload(tmp_path / "executed")), tmp_path / "executed"
    with pytest.raises(CheckpointError, match=r"pathlib\.Path\.touch|pathlib"):
        read_checkpoint(path)
    assert not sentinel.exists()
    read_checkpoint(path, trusted=True)  # what trust means
    assert sentinel.exists()


class Reduced:
    """Pickles as a call of an allowed class with arguments of somebody's choice."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (pathlib.PosixPath, (3,)),
        (pathlib.PosixPath, ("a",), {"_str": "b"}),
        (argparse.Namespace, (1, 2)),
        (argparse.Namespace, (), {"__setstate__": torch.Size}),
    ],
    ids=["path of a number", "path with a state", "namespace with arguments", "namespace with a function"],
)
def test_nonsense_in_harmless_classes_is_data_or_an_error(call, holding):
    path = holding(Reduced(*call))
    try:
        thing = read_checkpoint(path)["hyper_parameters"]["thing"]
    except CheckpointError:
        return
    assert isinstance(thing, (pathlib.PurePath, argparse.Namespace))


def test_what_the_user_allowed_stays_allowed_and_nothing_else(holding, tmp_path):
    path = holding(pathlib.Path("data"))
    torch.save(argparse.Namespace(), tmp_path / "other.pt")
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "other.pt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace, (pathlib.PosixPath, "pathlib.PosixPath")]):
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before


def test_an_object_nobody_defines_here_is_named(holding, monkeypatch):
    path = holding(Colour.RED)
    monkeypatch.delattr(sys.modules[__name__], "Colour")
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt here:.*Colour.*move the class into a module"):
        load_from_checkpoint(Holding, path, trusted=True)


def test_weights_only_is_answered_with_the_word_to_use(holding):
    path = holding(Colour.RED)
    with pytest.raises(Exception, match=re.escape("pass trusted=True instead of weights_only=False")):
        load_from_checkpoint(Holding, path, weights_only=False)
    assert load_from_checkpoint(Holding, path, trusted=True).hparams["thing"] is Colour.RED


# The network itself as a hyperparameter, as projects that configure with Hydra have it.


def net():
    body = [nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, FEATURES), nn.ReLU()]
    return nn.Sequential(*body, nn.Sequential(*(ResidualBlock() for _ in range(4))), nn.Linear(FEATURES, CLASSES))


def convolutions():
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten(), nn.Linear(128, CLASSES))


class Hydra(Plain):
    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.model = net

    def build(self):
        """The network comes from outside."""


NETWORKS = {
    "terms": (lambda: ToyEntropy(), net),
    "growth": (lambda: LayerGrowth(at="step:5", start=2), net),
    "blocks": (lambda: BlockPruning(2), net),
    "channels": (lambda: StructuredPruning(0.3), convolutions),
    "masks": (lambda: NMSparsity("2:4"), net),
    "companded": (lambda: WeightCompander(), net),
    "pruned": (lambda: MagnitudePruning(0.5), net),
}


def predictions(module):
    return module.eval()(next(iter(loader(8)))[0])


def trained_twice(make, build, folder):
    """Train in one go, and again from the file of the second epoch; return the first module."""
    whole = fit([make()], module=Hydra(build()), after=[every_epoch(folder)], max_epochs=3)
    resumed = Hydra(build())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        again = trainer(callbacks=[make()], max_epochs=3)
        again.fit(resumed, loader(), loader(8), ckpt_path=folder / "epoch=1.ckpt", weights_only=False)
    assert difference(dict(whole.module.state_dict()), dict(resumed.state_dict())) is None
    whole.trainer.save_checkpoint(folder / "after.ckpt")
    return whole.module


@pytest.mark.parametrize(("make", "build"), NETWORKS.values(), ids=NETWORKS)
def test_a_network_among_the_hyperparameters_is_saved_resumed_loaded_and_baked(make, build, tmp_path):
    module = trained_twice(make, build, tmp_path)
    for path in (tmp_path / "after.ckpt", tmp_path / "epoch=2.ckpt"):
        loaded = load_from_checkpoint(Hydra, path, trusted=True)
        replayed = load_from_checkpoint(Hydra, path, trusted=True, net=build())
        baked = bake_checkpoint(path, tmp_path / "baked.ckpt", trusted=True)
        ordinary = Hydra.load_from_checkpoint(baked, weights_only=False)
        for other in (loaded, replayed, ordinary):
            assert torch.equal(predictions(other), predictions(module))
            assert type(other) is Hydra
    early = load_from_checkpoint(Hydra, tmp_path / "epoch=0.ckpt", trusted=True)
    baked = bake_checkpoint(tmp_path / "epoch=0.ckpt", tmp_path / "baked.ckpt", trusted=True)
    assert torch.equal(predictions(early), predictions(Hydra.load_from_checkpoint(baked, weights_only=False)))


def test_a_pruned_network_among_the_hyperparameters_is_loaded_from_a_file_saved_after_the_fit(tmp_path):
    run = fit([MagnitudePruning(0.5)], module=Hydra(net()), max_epochs=2)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    loaded = load_from_checkpoint(Hydra, tmp_path / "after.ckpt", trusted=True)
    assert torch.equal(predictions(loaded), predictions(run.module))
    assert (loaded.model[2].weight == 0).any()


def test_one_thread_at_a_time_reads_harmless_objects() -> None:
    def read() -> None:
        with reading.harmless_objects():
            pass

    other = threading.Thread(target=read)
    with reading.harmless_objects():
        other.start()
        other.join(0.2)
        assert other.is_alive(), "its end would take away what this one reads with"
    other.join(10)
    assert not other.is_alive()


def test_an_error_in_a_file_that_is_not_trusted_is_no_missing_class() -> None:
    for error in (AttributeError("x"), ImportError("x")):
        assert "not a readable checkpoint" in reading._reason("a.ckpt", error, trusted=False)
        assert "cannot be rebuilt here" in reading._reason("a.ckpt", error, trusted=True)
