"""What every merge function that is installed keeps to, whatever it computes."""

from __future__ import annotations

import pytest
import torch
from flat_models import chirps, flat

from lightning_peft import merge, registry
from lightning_peft.merging import merge_function, stacks

# Options under which a function that cuts or drops little is exact for one model.
WHOLE = {"ties": {"density": 1.0}, "dare": {"density": 1.0}, "interpolate": {"share": 1.0}, "lines": {"growth": 0.0}}
# These clip or round what they keep.
INEXACT = {"pcb", "compeft", "fedzip"}
NAMES = sorted(registry.merge_functions())


def network(row):
    """A stem, three blocks and a head, 88 entries in all."""
    sizes = {"stem.weight": (6, 2)}
    for place in range(3):
        sizes |= {f"blocks.{place}.weight": (4, 4), f"blocks.{place}.bias": (4,)}
    sizes |= {"head.weight": (2, 2, 2, 2)}
    parts = row.split([torch.Size(shape).numel() for shape in sizes.values()])
    return {name: part.view(shape).clone() for (name, shape), part in zip(sizes.items(), parts, strict=True)}


def merged(name, rows, start=None, **more):
    base = torch.zeros_like(rows[0]) if start is None else start
    if name == "fisher":
        more["fisher"] = [network(row.abs() + 0.1) for row in chirps(len(rows), 88, start=0.8).to(rows.dtype)]
    models = [network(base + row) for row in rows]
    needs_base = merge_function.find(name, {}).of_deltas
    return flat(merge(models, name, base=network(base) if needs_base else None, **more))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_what_no_model_changed_stays_and_nothing_becomes_nan(name, precision):
    rows = chirps(3, 88).to(precision)
    rows[:, 12:32] = 0  # the first block in all models
    rows[1, :12] = 0  # the stem in one
    rows[2] = 0  # one that is the base
    start = torch.linspace(-1, 1, 88).to(precision)
    found = merged(name, rows, start)
    assert torch.isfinite(found).all()
    assert torch.allclose(found[12:32], start[12:32])
    nothing = merged(name, torch.zeros_like(rows), start)
    assert torch.allclose(nothing, start, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_change_nothing_and_a_seed_gives_the_same(name, monkeypatch):
    rows = chirps(3, 88)
    whole = merged(name, rows, seed=5)
    assert torch.equal(whole, merged(name, rows, seed=5))
    monkeypatch.setattr(stacks, "PIECE", 21)
    # Norms are sums of pieces, of which the last digit may differ.
    assert torch.allclose(whole, merged(name, rows, seed=5), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", sorted(set(NAMES) - INEXACT))
def test_one_model_is_itself(name):
    rows = chirps(1, 88)
    if merge_function.find(name, {}).of_deltas:
        assert torch.allclose(merged(name, rows, **WHOLE.get(name, {})), rows[0], atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_give_a_difference_in_their_direction(name):
    row = chirps(1, 88)[0]
    found = merged(name, torch.stack([row] * 3))
    assert torch.isfinite(found).all()
    assert found @ row > 0


@pytest.mark.parametrize("name", NAMES)
def test_models_are_left_as_they_were(name):
    rows = chirps(3, 88)
    before = rows.clone()
    merged(name, rows, start=rows[0].clone())
    assert torch.equal(rows, before)
