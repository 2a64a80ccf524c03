"""N:M along both sides, through every recipe, baking, files, and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft import NMSparsity, bake_checkpoint, plan
from lightning_peft.functional import is_nm, transposable_nm_mask
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft_plugins.sparsity._nm_sparsity.nm_schedule import RECIPES


class Wide(Plain):
    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_ends_along_both_sides(recipe: str) -> None:
    weight = fit([NMSparsity("2:4", recipe, fine_tune=2, transposable=True)], style=Wide, max_epochs=2).module.model[2].weight
    assert is_nm(weight, 2, 4, 0)
    assert is_nm(weight, 2, 4, 1)
    assert int(weight.count_nonzero()) == 16 * 12 // 2


def test_the_mask_in_training_is_that_of_the_stored_weight() -> None:
    module = Wide()
    fit([NMSparsity("2:4", "sr-ste", transposable=True)], style=Wide, module=module, max_epochs=1)
    before = Wide()
    before.load_state_dict(module.state_dict())
    weight = before.model[2].weight.detach()
    assert torch.equal(weight != 0, transposable_nm_mask(weight, 2, 4))


@pytest.mark.parametrize(("recipe", "refresh"), [("one-shot", 1), ("sr-ste", 3)])
def test_it_resumes_bit_for_bit_and_files_are_baked(recipe: str, refresh: int, tmp_path: Path) -> None:
    def method() -> NMSparsity:
        return NMSparsity("2:4", recipe, refresh=refresh, transposable=True)

    whole = fit([method()], style=Wide, max_epochs=2, after=[every_epoch(tmp_path)])
    again = fit([method()], style=Wide, max_epochs=2, seed=9, resume=tmp_path / "epoch=0.ckpt")
    assert_same(again, whole, "resumed")
    bake_checkpoint(tmp_path / "epoch=0.ckpt", tmp_path / "plain.ckpt")
    weight = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]["model.2.weight"]
    assert is_nm(weight, 2, 4, 0)
    assert is_nm(weight, 2, 4, 1)


def test_the_plan_names_layers_whose_outputs_fill_no_block() -> None:
    class Odd(Wide):
        def build(self) -> None:
            super().build()
            self.model[2], self.model[4] = nn.Linear(16, 10), nn.Linear(10, 3)

    method = NMSparsity("2:4", transposable=True)
    assert "along both sides (not all outputs of model.2)" in str(plan(Odd(), [method]))
    assert "along both sides (" not in str(plan(Wide(), [method]))
    assert "along both sides" in str(plan(Wide(), [method]))


def test_a_permutation_beside_it_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Leave out permute= or transposable="):
        NMSparsity(transposable=True, permute=True)
    NMSparsity(transposable=True), NMSparsity(permute=True)
