"""What a recorded edit of sizes may write beside tensors: numbers that go with the tensors it resizes, and nothing else.

A file can come from elsewhere. A number on a layer is written only if tensors below that layer change their size, and only to a
value that their sizes explain, so that no record reaches a learning rate or the size of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.structure.axes import NEW, OLD
from lightning_peft.structure.edit_types import Recorded
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.noted_numbers import is_root

EPSILONS = ("eps", "variance_epsilon")
"""What norms call the small number that LEMON scales; beside it, of numbers that are not whole, roots of sizes are written."""


def check_bounds(module: nn.Module, edit: Recorded) -> None:
    """Refuse an edit whose form is right and which writes numbers that have nothing to do with the tensors it resizes.

    Raises:
        CheckpointError: See above; names the number.
    """
    for path, changes in edit["attributes"].items():
        for key, (old, new) in changes.items():
            if not _may_write(module, edit, path, key, old, new):
                raise _refusal(f"{path or type(module).__name__}.{key}", old, new)
    for key, (old, new) in edit.get("config", {}).items():
        fits = _is_small(old, new) and "eps" in key if isinstance(new, float) else _explained(edit, old, new)
        if not fits:
            raise _refusal(f"config.{key}", old, new)


def may_scale(module: nn.Module, path: str, key: str, new: object) -> bool:
    """Whether a record may give a layer another number that is not whole."""
    return key in EPSILONS and _is_small(new, new) and not isinstance(module.get_submodule(path), LightningModule)


def _refusal(name: str, old: object, new: object) -> CheckpointError:
    return CheckpointError(
        f"A recorded change of sizes would set {name} from {old} to {new}, which the tensors it resizes do not explain. "
        "The file was edited; use another checkpoint."
    )


def _may_write(module: nn.Module, edit: Recorded, path: str, key: str, old: Any, new: Any) -> bool:
    network = edit["path"]
    if network and path != network and not path.startswith(f"{network}."):
        return False
    start = f"{path}." if path else ""
    sized = any(other.startswith(start) for name, entry in edit["tensors"].items() for other in (name, *entry.get("tied", ())))
    if isinstance(new, float):
        root = edit["op"] == "resize" and sized and _are_roots(edit, old, new)
        return may_scale(module, path, key, new) or (root and not isinstance(module.get_submodule(path), LightningModule))
    if not sized and path not in edit.get("norms", {}):  # a norm without weights notes a size too
        return edit["op"] == "slice" and not isinstance(module.get_submodule(path), LightningModule) and _is_cut(edit, old, new)
    exact = isinstance(module.get_submodule(path), LightningModule)  # where a number can mean anything
    if edit["op"] == "slice":
        pairs = zip(*(value if isinstance(value, list) else [value] for value in (old, new)), strict=True)
        return not exact and all(0 < b <= a for a, b in pairs)
    return _explained(edit, old, new, exact=exact)


def _are_roots(edit: Recorded, old: object, new: object) -> bool:
    """Whether numbers are the roots of a product of axes, before and after."""
    return any(is_root(old, product[OLD]) and is_root(new, product[NEW]) for product in _products(edit) if product[OLD] > 1)


def _is_cut(edit: Recorded, old: Any, new: Any) -> bool:
    """Whether numbers go from and to the sizes of dimensions that are cut, as those of a norm without weights do."""
    cuts = {size for entry in edit["tensors"].values() for size in zip(entry["from"], entry["to"], strict=True)}
    pairs = zip(*(value if isinstance(value, list) else [value] for value in (old, new)), strict=True)
    return all(pair in cuts for pair in pairs)


def _is_small(old: object, new: object) -> bool:
    return all(isinstance(value, float) and 0 < value < 1 for value in (old, new))


def _explained(edit: Recorded, old: Any, new: Any, *, exact: bool = False) -> bool:
    """Whether the axes that grow make ``new`` of ``old``: both are the same product of sizes, but for a constant factor."""
    if isinstance(new, list):
        return len(old) == len(new) and all(_explained(edit, a, b, exact=exact) for a, b in zip(old, new, strict=True))
    if type(new) is not int or (old is not None and type(old) is not int):
        return False
    products = list(_products(edit))
    if old is None:  # stood for a multiple of the width
        return any(new % product[NEW] == 0 for product in products if product[NEW] > 1)
    if exact:
        return [old, new] in products
    return any(old * product[NEW] == new * product[OLD] for product in products)


def _products(edit: Recorded) -> Iterator[list[int]]:
    """Old and new size of every product of axes."""
    grown = [pair for pair in edit["axes"].values() if pair[OLD] != pair[NEW] or pair[OLD] > 1]
    for count in range(min(len(grown), 4) + 1):
        for chosen in itertools.combinations(grown, count):
            yield [math.prod(pair[when] for pair in chosen) for when in (OLD, NEW)]
