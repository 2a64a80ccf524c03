"""Files in which the gate of FTWT is a weight map, as it was before there were layer parts."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_peft
from lightning_peft import FTWT, WeightCompander
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.structure.earlier_parts import upgraded
from lightning_peft.structure.found_parts import parts_of_checkpoint
from lightning_peft.structure.plain_state import joined
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.trace import difference


def as_before(checkpoint, first):
    """Write the gates as the second maps on weights, or the first where there is no other or ``first`` says so."""
    section = checkpoint[KEY]
    checkpoint["state_dict"] = joined(checkpoint["state_dict"], section)
    section["version"] = 2
    del section["tensors"], section["seen"]
    parts, copies = section.pop("parts"), section.pop("part_copies", None)
    section.pop("part_weights")
    for path, (record,) in parts.items():
        name, start = f"{path}.weight", f"{path}.parametrizations.weight."
        old = {"map": record["part"], "method": record["method"], "config": record["config"]}
        maps = section["weights"].setdefault(name, [])
        place = 0 if first else len(maps)
        maps.insert(place, old)
        states = {"state_dict": record["state"]}
        if copies is not None:
            states["current_model_state"] = copies[0][path][0]
        for which, tensors in states.items():
            state = checkpoint[which]
            if name in state:
                state[f"{start}original"] = state.pop(name)
            elif first:
                for key in [key for key in state if key.startswith(f"{start}0.")]:
                    state[key.replace(f"{start}0.", f"{start}1.")] = state.pop(key)
            state.update({f"{start}{place}.{key}": value for key, value in tensors.items()})
    for record in section["methods"]:
        record["maps"] = sum(m["method"] == record["method"] for maps in section["weights"].values() for m in maps)
    return checkpoint


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_with_gates_as_maps_is_resumed_and_baked(mapped, averaged, first, tmp_path):
    def run(**settings):
        methods = [FTWT(cooldown=None), *([WeightCompander()] if mapped else [])]
        before = [EMAWeightAveraging(decay=0.5)] if averaged else []
        return fit(methods, style=Conv, before=before, max_epochs=2, **settings)

    full = run(after=[every_epoch(tmp_path)])
    path = tmp_path / "epoch=0.ckpt"
    new = torch.load(path, weights_only=True)
    torch.save(as_before(torch.load(path, weights_only=True), first), old := tmp_path / "old.ckpt")
    assert_same(full, run(seed=4, resume=old), "uninterrupted against resumed from an earlier file")
    loaded = [dict(lightning_peft.load_from_checkpoint(Conv, file).state_dict()) for file in (path, old)]
    assert difference(*loaded) is None
    found = [parts_of_checkpoint(file, "channel_gate") for file in (new, torch.load(old, weights_only=True))]
    assert difference(*found) is None
    assert list(found[0]) == ["model.1", "model.3"]


def test_other_files_are_left_as_they_are():
    for checkpoint in ({}, {KEY: {"version": 2, "weights": {}, "methods": []}, "state_dict": {}}):
        assert upgraded(checkpoint) is checkpoint
