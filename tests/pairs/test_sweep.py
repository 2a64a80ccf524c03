"""Sweeps: a hang, a crash and an error are outcomes, and what is on record is not tried again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from page_parts import counted
from sweep import Record, sweep
from verdicts import BREAKS, REJECTED, WORKS, Verdict, general, verdict

from lightning_peft import Tent


def acted(group: str, name: str) -> Verdict:
    if group == "unbuilt":
        return Verdict("", "too large")
    if name == "hangs":
        time.sleep(60)
    if name == "crashes":
        os._exit(3)
    while name == "works on and on":
        pass
    return Verdict(WORKS, name)


def test_hangs_and_crashes_are_outcomes_and_the_rest_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", {"torch": "2"})
    cells = {"first": ["well", "hangs", "crashes", "works on and on", "again"], "unbuilt": ["well"]}
    sweep(record, {"first": ["hangs"]}, acted, limit=1, patience=4.0)
    sweep(record, cells, acted, limit=1, patience=60.0)  # on a busy machine a second of a processor takes long
    expected = {
        "well": Verdict(WORKS, "well"),
        "hangs": Verdict(BREAKS, "did not end within 4 seconds"),
        "crashes": Verdict(BREAKS, "ended its process with code 3"),
        "works on and on": Verdict(BREAKS, "took more than 1 seconds of a processor"),
        "again": Verdict(WORKS, "again"),
    }
    assert record.found == {"first": expected}
    assert record.unbuilt == {"unbuilt": "too large"}
    assert Record.read(record.path) == record
    assert counted(record.outcomes).startswith("**2 of 5 work (+), 0 are rejected in words (-), 3 break")

    del record.found["first"]["hangs"]
    sweep(record, {"first": cells["first"]}, lambda group, name: Verdict(REJECTED, f"{os.getpid()}"), limit=5)
    assert record.found["first"]["hangs"].what == REJECTED
    assert {name: each for name, each in record.found["first"].items() if name != "hangs"} == {
        name: each for name, each in expected.items() if name != "hangs"
    }


@pytest.mark.parametrize(
    ("raised", "what"),
    [
        (lambda: Tent(optimizer="none"), REJECTED),
        (lambda: {}["absent"], BREAKS),
        (lambda: (_ for _ in ()).throw(MisconfigurationException("not ours")), BREAKS),
        (lambda: None, WORKS),
    ],
    ids=["a refusal", "a raw error", "somebody else's refusal", "nothing"],
)
def test_only_refusals_of_the_library_are_rejections(raised: object, what: str) -> None:
    assert verdict(raised).what == what  # type: ignore[arg-type]


def test_reasons_of_many_networks_are_one() -> None:
    one = general("LlamaForCausalLM has several lists: 'model.layers' (4 blocks). Choose one with blocks=")
    assert one == general("T5ForConditionalGeneration has several lists: 'encoder.block' (6 blocks). Choose one with blocks=")
