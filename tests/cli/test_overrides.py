"""Overrides of callbacks by name, and what is said of a recipe that cannot be used."""

from __future__ import annotations

import pytest

from lightning_peft.cli.launch import launch, parse
from lightning_peft.cli.recipes import UsageError, read

SEVERAL = """\
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_peft.NMSparsity
      init_args: {pattern: "2:4", exclude: [head]}
    - class_path: WeightCompander
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/loss}
    - class_path: lightning_peft.PSKD
    - class_path: cli_toys.ToyTerm
model:
  class_path: cli_toys.ToyModule
data:
  class_path: cli_toys.ToyData
"""

pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecated in v4|only one Jsonargparse):DeprecationWarning")


@pytest.fixture
def several(tmp_path):
    path = tmp_path / "several.yaml"
    path.write_text(SEVERAL)
    return read(path)


def test_any_argument_of_any_callback_is_set_by_name_and_the_others_stay(several) -> None:
    given = ["--NMSparsity.pattern", "1:4", "--NMSparsity.fine_tune=20%", "--EarlyStopping.patience", "7", "--model.lr", "0.5"]
    nm, compander, stopping, pskd, term = launch(several, [*given, "--PSKD.alpha", "0.3"]).trainer.callbacks[:5]
    assert (nm.config()["pattern"], nm.config()["fine_tune"], nm.config()["exclude"]) == ("1:4", "20%", ["head"])
    assert (stopping.patience, stopping.monitor) == (7, "val/loss")
    assert pskd.config()["alpha"] == 0.3
    assert (type(compander).__name__, term.weight) == ("WeightCompander", 0.1)


def test_what_is_set_by_name_stands_in_the_configuration_and_may_be_left_out(several) -> None:
    config = parse(several, ["--NMSparsity.pattern", "1:4"]).parser.dump
    assert "pattern: '1:4'" in config(parse(several, ["--NMSparsity.pattern", "1:4"]).config).replace('"', "'")
    left = parse(several, ["--NMSparsity.pattern", "1:4"], without=["NMSparsity"]).config.trainer.callbacks
    assert [entry.class_path.rsplit(".", 1)[-1] for entry in left][:2] == ["WeightCompander", "EarlyStopping"]


def test_callbacks_of_one_class_are_told_apart_by_their_names(several) -> None:
    more = ["--trainer.callbacks+", "lightning_peft.PSKD", "--trainer.callbacks.init_args.name", "second"]
    with pytest.raises(UsageError, match="2 callbacks of this class"):
        parse(several, [*more, "--PSKD.alpha", "0.3"])
    found = parse(several, [*more, "--second.alpha", "0.3"]).config.trainer.callbacks
    assert [entry.init_args.alpha for entry in found if entry.class_path.endswith("PSKD")] == [0.8, 0.3]


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (["--NMSparsty.pattern", "1:4"], "no callback 'NMSparsty'. Did you mean NMSparsity?"),
        (["--NMSparsity.patern", "1:4"], "NMSparsity has no argument 'patern'. Did you mean pattern"),
        (["--PSKD.alpha", "much"], "PSKD.alpha: expected float, got much"),
        (["--trainer.callbacks.init_args.wait", "3"], "ToyTerm has no argument 'wait'."),
        (["--trainer.callbacks+", "lightning_peft.Tnet"], "Did you mean Tent"),
        (["--trainer.callbacks", "WeightCompandr"], "there is no class WeightCompandr. Did you mean WeightCompander?"),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected int"),
        (["--model.widht", "3"], "ToyModule has no argument 'widht'. Did you mean width?"),
        (["--model", "cli_toys.ToyModel"], "no attribute 'ToyModel'"),
    ],
)
def test_what_cannot_be_parsed_is_answered_in_one_line(several, given, answer) -> None:
    with pytest.raises(UsageError) as refused:
        parse(several, given)
    assert answer in str(refused.value)
    assert "Union" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (["--NMSparsity.pattern", "4:2"], "so N <= M, got 4:2. Did you mean '2:4'?"),
        (["--PSKD.alpha", "40"], "alpha is a share and must lie between 0 and 1."),
        (["--model.width", "-3"], "RuntimeError: Trying to create tensor with negative dimension"),
    ],
)
def test_what_a_constructor_refuses_is_its_own_message(several, given, answer) -> None:
    with pytest.raises(UsageError) as refused:
        launch(several, given)
    assert answer in str(refused.value)
    assert "cannot be built" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
