"""Every field of what the library writes into a checkpoint, damaged in turn: it loads and trains on, or is refused by name.

Refused means one error of the library, and a module, a journal and methods as they were before.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import (
    PSKD,
    BlockPruning,
    FisherEstimator,
    LayerGrowth,
    MaskedPruning,
    Method,
    NMSparsity,
    StructuredPruning,
    TrainedRankPruning,
    WeightCompander,
)
from lightning_peft.structure import journal
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Conv, Plain, deepened, loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyEntropy
from lightning_peft.testing.trace import difference

Deep = deepened(Plain)
GROUPS: dict[str, tuple[type[Plain], Callable[[], list[Method]]]] = {
    "growth": (Deep, lambda: [LayerGrowth(at="step:2", start=2), NMSparsity("2:4", refresh=2), WeightCompander(), PSKD()]),
    "cuts": (Conv, lambda: [StructuredPruning(0.2, "taylor", start=6, every=6), ToyEntropy()]),
    "blocks": (Deep, lambda: [BlockPruning(1, start=6, every=6), FisherEstimator("train", samples=8)]),
    "masks": (Plain, lambda: [MaskedPruning(0.5, "gblm", start=6, every=6, rewind=2)]),
    "rank": (Plain, lambda: [TrainedRankPruning(0.9, period=4)]),
}
# What a field becomes; the ellipsis removes it.
DAMAGE: tuple[Any, ...] = (
    None,
    "x",
    -1,
    float("nan"),
    [],
    {},
    True,
    10**6,
    torch.full((3, 7), torch.nan),
    [0] * 3000,
    {"x": "x"},
    torch.tensor(0.5),
    ...,
)
MOST = 40


@cache
def saved(group: str, folder: Path) -> dict[str, Any]:
    style, methods = GROUPS[group]
    fit(methods(), style=style, after=[every_epoch(folder)])
    checkpoint: dict[str, Any] = torch.load(folder / "epoch=0.ckpt", weights_only=True)
    return checkpoint


def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Every field of a nest, of long lists and dicts the first and the last entry."""
    yield path
    if isinstance(value, dict):
        keys = list(value)
        for key in keys if len(keys) <= 8 else (keys[0], keys[-1]):
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        for key in sorted({0, len(value) - 1}):
            yield from places(value[key], (*path, key))


def damaged(checkpoint: dict[str, Any], place: tuple[Any, ...], damage: Any) -> dict[str, Any]:
    """A copy with one field replaced; ``...`` removes it."""
    bad = copy.deepcopy(checkpoint)
    owner = bad
    for key in place[:-1]:
        owner = owner[key]
    if damage is ...:
        del owner[place[-1]]
    else:
        owner[place[-1]] = damage
    return bad


def cases(checkpoint: dict[str, Any]) -> list[tuple[tuple[Any, ...], Any]]:
    """Each field replaced by one of the kinds of damage in turn, or removed; no more than :data:`MOST` of them."""
    found = []
    roots = [(KEY,), *(("callbacks", key) for key in checkpoint["callbacks"] if key.startswith(f"{KEY}/"))]
    for root in roots:
        value: Any = checkpoint
        for key in root:
            value = value[key]
        for number, place in enumerate(places(value, root)):
            if place == (KEY,):
                continue  # without the section the file is one of plain Lightning
            found.append((place, DAMAGE[number % len(DAMAGE)]))
    return random.Random(0).sample(found, min(MOST, len(found)))


def outcome(style: type[Plain], methods: list[Method], checkpoint: dict[str, Any], path: Path) -> str:
    """Resume, and say what is wrong with what came of it; nothing when all is well."""
    torch.save(checkpoint, path)
    torch.manual_seed(1)
    module = style()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = [method.state_dict() for method in methods]
    names = [name for name, _ in module.named_parameters()]
    try:
        trainer(callbacks=methods, max_epochs=2, max_steps=5, limit_val_batches=0).fit(
            module, loader(), ckpt_path=path, weights_only=True
        )
    except MisconfigurationException as error:
        found = difference(before, dict(module.state_dict())) or ("journal" if journal.journal_of(module) else None)
        found = found or difference(states, [method.state_dict() for method in methods])
        found = found or (None if names == [name for name, _ in module.named_parameters()] else "order of parameters")
        if found is None and len(str(error)) > 1500:
            return f"an error of {len(str(error))} characters"
        return "" if found is None else f"refused ({error}), but changed: {found}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "" if all(value.isfinite().all() for value in module.parameters()) else "trained to NaN"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", GROUPS)
def test_every_field(group: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    style, methods = GROUPS[group]
    checkpoint = saved(group, tmp_path_factory.mktemp("fuzz"))
    assert outcome(style, methods(), checkpoint, tmp_path_factory.mktemp("good") / "good.ckpt") == ""
    path = tmp_path_factory.mktemp("bad") / "bad.ckpt"
    wrong = {}
    for place, damage in cases(checkpoint):
        shown = "removed" if damage is ... else "a tensor" if isinstance(damage, Tensor) else repr(damage)[:20]
        if found := outcome(style, methods(), damaged(checkpoint, place, damage), path):
            wrong["".join(f"[{key!r}]" for key in place) + f" = {shown}"] = found
    assert not wrong, "\n".join(f"{place}: {what}" for place, what in wrong.items())
