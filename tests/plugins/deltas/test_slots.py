"""LowRank makes the member that has the names in its slots, and says what there is where none has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_peft
from lightning_peft import CorDA, LowRank, registry
from lightning_peft.testing import MethodTester
from lightning_peft.testing.modules import Plain, loader, trainer

SLOTS: dict[str, list[dict[str, str]]] = {
    "LoRA": [{}, {"form": "lora"}, {"init": "lora"}, {"init": "pissa"}, {"init": "olora"}],
    "DoRA": [{"form": "dora"}, {"form": "dora", "init": "pissa"}, {"form": "dora", "init": "olora"}],
    "EVA": [{"init": "eva"}, {"init": "eva", "form": "dora"}],
    "CorDA": [{"init": "corda"}, {"init": "corda", "form": "dora"}],
    "BALoRA": [{"rule": "ba-lora"}, {"rule": "ba-lora", "form": "dora", "init": "pissa"}],
    "SORSA": [{"rule": "sorsa"}, {"form": "triplet", "init": "pissa"}],
    "KaSA": [{"rule": "kasa"}, {"init": "kasa"}],
    "PEGO": [{"rule": "pego"}],
    "LoRAGGPO": [{"rule": "lora-ggpo"}],
    "ALLoRA": [{"rule": "allora"}],
    "AdaLoRA": [{"control": "adalora"}],
    "DyLoRA": [{"control": "dylora"}],
    "IncreLoRA": [{"control": "increlora"}],
    "TriAdaptLoRA": [{"control": "triadaptlora"}, {"form": "triangular"}],
    "LoRAXS": [{"init": "lora-xs"}],
    "LoRASB": [{"init": "lora-sb", "form": "core"}],
    **{name: [{"form": name.lower()}] for name in ("SVFit", "LoLDU", "SALT", "MiSS", "Bone", "FLoRA", "PHM")},
    **{name: [{"form": name.lower()}] for name in ("NOLA", "RandLoRA", "SoKA", "TLoRA", "DSEE")},
}
NAMED = {"PiSSA": "pissa", "OLoRA": "olora"}  # LoRA with an init, under a name of its own


def test_the_table_has_every_member_of_the_family() -> None:
    family = {name for name, entry in registry.installed().items() if entry.family == "deltas"}
    assert family == {*SLOTS, *NAMED, "PeftAdapter"}


@pytest.mark.parametrize(("name", "asked"), [(name, asked) for name, calls in SLOTS.items() for asked in calls])
def test_slots_name_a_member(name: str, asked: dict[str, str]) -> None:
    member = getattr(lightning_peft, name)
    made: Any = LowRank(**asked)  # type: ignore[arg-type]
    assert type(made) is member
    assert made.rank == member().rank
    for slot, choice in asked.items():
        assert getattr(made, slot, choice) == choice


def test_a_member_takes_what_else_it_knows() -> None:
    made: Any = LowRank(4, 2.0, init="eva", looks=3, tune=("bias",), name="mine")
    assert (made.alpha, made.looks, made.tune, made.name) == (2.0, 3, ("bias",), "mine")
    with pytest.raises(TypeError, match="LoRA: got an unexpected keyword argument 'looks'"):
        LowRank(looks=3)


@pytest.mark.parametrize("name", NAMED)
def test_members_that_are_lora_with_an_init_train_as_it(name: str) -> None:
    methods = getattr(lightning_peft, name)(2), LowRank(2, init=NAMED[name])
    named = Plain()
    by_slots = copy.deepcopy(named)
    for method, module in zip(methods, (named, by_slots), strict=True):
        trainer(callbacks=[method], max_epochs=1).fit(module, loader(), loader(8))
    for ours, theirs in zip(named.parameters(), by_slots.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"form": "core"}, r"Several members have form='core'. Name one more slot of LoRASB .*init='lora-sb'.*LoRAXS"),
        ({"form": "dora", "control": "adalora"}, r"No member .* form='dora' and control='adalora'.*AdaLoRA \(form='triplet'"),
        ({"form": "dorra"}, "Did you mean dora"),
        ({"init": "pisa"}, "Did you mean pissa"),
    ],
)
def test_what_there_is_not_is_refused(asked: dict[str, str], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        LowRank(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{"init": "corda"}, {"init": "eva"}, {"rule": "ba-lora"}, {"init": "lora"}])
def test_rows_with_lengths_are_not_looked_up(asked: dict[str, str]) -> None:
    class Table(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

    method = LowRank(2, form="dora", targets=["table"], exclude=None, **asked)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"scales outputs, and the rows of table are none.*exclude=\['table'\]"):
        trainer(callbacks=[method], max_epochs=1).fit(Table(), loader(), loader(8))


class TestCorDAWithLengths(MethodTester):
    methods = [lambda: CorDA(2, looks=2, form="dora", exclude=None, checkpoint="full")]
