"""Weighted sums of the adapters on a module."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.on_module import deltas_on
from lightning_peft.weights.merge import check_unmerged


def blend(module: nn.Module, shares: Mapping[str, float]) -> None:
    """Multiply the adapters on a module, so that it computes with their weighted sum; saved and baked like that.

    Args:
        module: The module, with the adapters of trainings with ``keep=True``, or of :func:`lightning_peft.load_peft`.
        shares: Factor of each by its name, negative ones too; adapters that are not named stay as they are. 1 is what an
            adapter was trained with.

    Raises:
        MisconfigurationException: A name that no adapter has, a share that is no finite number, an adapter that is no sum with
            its weight, or merged ones. Nothing was changed then.

    Example:
        .. code-block:: python

            lightning_peft.load_peft(module, "reviews", name="reviews")
            lightning_peft.load_peft(module, "stories", name="stories")
            lightning_peft.blend(module, {"reviews": 0.7, "stories": 0.3})
    """
    check_unmerged(module, "a blend")
    found = [each for _, each in deltas_on(module)]
    for name, share in shares.items():
        own = [each for each in found if each.method == name]
        if not own:
            there = ", ".join(sorted({each.method for each in found})) or "none at all"
            raise MisconfigurationException(f"No adapter on the module is called {name!r}; there is {there}.")
        if not math.isfinite(share):
            raise MisconfigurationException(f"The share of {name!r} is {share}. Give a number; 1 is the whole adapter.")
        if whole := next((each.form for each in own if type(each.form).of is not Form.of), None):
            raise MisconfigurationException(
                f"{name!r} holds deltas {whole.kind!r}, which do not add up with others. Bake it first, "
                "lightning_peft.bake(module), and load the other adapters on what comes out."
            )
    for each in found:
        each.form.share = shares.get(each.method, each.form.share)
