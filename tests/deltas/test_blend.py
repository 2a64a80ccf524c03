"""Several adapters on one module: their weighted sum, and what is not merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_peft
from lightning_peft.deltas.delta_part import DeltaPart
from lightning_peft.weights.parts import placed_parts

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def wrapped(folder: Path | None = None, **settings: Any) -> Any:
    """Two adapters of PEFT on one network, saved to folders of their names."""
    made = None
    for seed, name in enumerate(("one", "other")):
        config = peft.LoraConfig(r=2 + seed, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False, **settings)
        torch.manual_seed(seed)
        if made is None:
            made = peft.get_peft_model(network(), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    if folder is not None:
        made.save_pretrained(folder)  # type: ignore[union-attr]
    return made


def loaded(folder: Path) -> nn.Sequential:
    module = network()
    for name in ("one", "other"):
        lightning_peft.load_peft(module, folder / name, name=name)
    return module


def test_a_blend_is_that_of_peft_live_and_baked(tmp_path: Path) -> None:
    theirs, module = wrapped(tmp_path), loaded(tmp_path)
    theirs.add_weighted_adapter(["one", "other"], [0.7, 0.4], adapter_name="sum", combination_type="cat")
    theirs.set_adapter("sum")
    expected = theirs(INPUTS)
    lightning_peft.blend(module, {"one": 0.7, "other": 0.4})
    torch.testing.assert_close(module(INPUTS), expected, atol=1e-5, rtol=1e-5)
    lightning_peft.bake(module)
    torch.testing.assert_close(module(INPUTS), expected, atol=1e-5, rtol=1e-5)


def test_a_share_of_minus_one_takes_an_adapter_back(tmp_path: Path) -> None:
    wrapped(tmp_path)
    module = network()
    for name in ("here", "there"):
        lightning_peft.load_peft(module, tmp_path / "one", name=name)
    lightning_peft.blend(module, {"there": -1.0})
    torch.testing.assert_close(module(INPUTS), network()(INPUTS), atol=1e-5, rtol=1e-5)


def test_a_blended_adapter_is_saved_as_it_is(tmp_path: Path) -> None:
    wrapped(tmp_path)
    module = loaded(tmp_path)
    lightning_peft.blend(module, {"one": 0.5, "other": 0.0})
    lightning_peft.save_peft(module, tmp_path / "half", name="one")
    again = network()
    lightning_peft.load_peft(again, tmp_path / "half")
    torch.testing.assert_close(again(INPUTS), module(INPUTS))


@pytest.mark.parametrize(("shares", "words"), [({"none": 1.0}, "there is one, other"), ({"one": float("nan")}, "is nan")])
def test_a_wrong_share_is_refused_and_changes_nothing(shares: dict[str, float], words: str, tmp_path: Path) -> None:
    wrapped(tmp_path)
    module = loaded(tmp_path)
    before = module(INPUTS)
    with pytest.raises(MisconfigurationException, match=words):
        lightning_peft.blend(module, {"other": 0.1} | shares)
    assert torch.equal(module(INPUTS), before)


def test_lengths_do_not_add_up_and_the_advice_works(tmp_path: Path) -> None:
    wrapped(tmp_path, use_dora=True)
    module = network()
    lightning_peft.load_peft(module, tmp_path / "one", name="one")
    with pytest.raises(MisconfigurationException, match=r"lightning_peft\.bake\(module\)"):
        lightning_peft.blend(module, {"one": 0.5})
    lightning_peft.bake(module)
    wrapped(tmp_path / "plain")
    lightning_peft.load_peft(module, tmp_path / "plain" / "other", name="other")
    lightning_peft.blend(module, {"other": 0.5})


def broken(folder: Path) -> tuple[nn.Sequential, dict[str, Tensor]]:
    wrapped(folder)
    module = loaded(folder)
    part = next(each.part for each in placed_parts(module) if each.part.method == "one")
    assert isinstance(part, DeltaPart)
    with torch.no_grad():
        part.form.up[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    return module, {key: value.clone() for key, value in module.state_dict().items()}


def test_a_delta_that_is_not_finite_is_not_merged_and_can_be_left_out(tmp_path: Path) -> None:
    module, before = broken(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"switch\(module, 'one', on=False\)"):
        lightning_peft.bake(module)
    after = module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if not value.isnan().any())
    lightning_peft.switch(module, "one", on=False)
    lightning_peft.bake(module)
    assert module(INPUTS).isfinite().all()
    assert not any(True for _ in placed_parts(module))
