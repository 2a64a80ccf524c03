"""Which groups of weights stay when a share of them is to go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.arguments import one_of

Scope = Literal["global", "layer", "row"]
SCOPES = ("global", "layer", "row")


def keep_largest(
    scores: Mapping[str, Tensor],
    amount: float,
    scope: Scope = "global",
    sizes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Decide which groups stay: those of the largest scores.

    Of equal scores the last ones stay, as in a stable ascending sort. Nothing is pruned whole: a layer (with ``scope="row"`` an
    output) of which nothing would be left keeps its best group.

    Args:
        scores: By layer, one number a group, in any shape whose first dimension runs over outputs.
        amount: Share to prune, in [0, 1]: of the groups, rounded down; with ``sizes`` of the weights, as nearly as whole groups
            reach it from below.
        scope: What is ranked together: all layers, each layer, or each output.
        sizes: Weights in each group, in the shapes of ``scores``, for groups of different sizes; not with ``scope="row"``.

    Returns:
        By layer, ``True`` where a group stays.

    Raises:
        MisconfigurationException: Amount or scope out of range, or a score that is NaN.

    Example:
        >>> keep_largest({"a": torch.tensor([[3.0, 1.0], [2.0, 4.0]])}, 0.5)["a"].tolist()
        [[True, False], [False, True]]
    """
    one_of("scope", scope, SCOPES)
    if not 0.0 <= amount <= 1.0:
        raise MisconfigurationException(f"amount={amount} must be a share of the weights, from 0 to 1.")
    for name, values in scores.items():
        check_scores(name, values)
    if scope == "row":
        return {name: _rows(values, amount) for name, values in scores.items()}
    if scope == "layer":
        return {
            name: keep_largest({name: values}, amount, sizes=None if sizes is None else {name: sizes[name]})[name]
            for name, values in scores.items()
        }
    flat = torch.cat([values.flatten() for values in scores.values()]) if scores else torch.empty(0)
    if sizes is None:
        kept = _kept(flat, _share(amount, flat.numel()))
    else:
        kept = _kept_of_size(flat, torch.cat([sizes[name].flatten() for name in scores]).to(flat.device), amount)
    parts = torch.split(kept, [values.numel() for values in scores.values()])
    return {name: _connected(part, values).view_as(values) for part, (name, values) in zip(parts, scores.items(), strict=True)}


def check_scores(name: str, values: Tensor) -> None:
    """Refuse to rank what is NaN.

    Args:
        name: What is scored, for the message.
        values: Its scores.

    Raises:
        MisconfigurationException: Some are NaN.
    """
    if values.isnan().any():
        raise MisconfigurationException(
            f"Scores of {name} are NaN, so nothing can be ranked: its weights, gradients or inputs are. Look for the step "
            "where the loss became NaN, with Trainer(detect_anomaly=True)."
        )


def _share(amount: float, count: int) -> int:
    return int(amount * count + 1e-6)  # 0.29 of 100 is 29


def _kept(scores: Tensor, pruned: int) -> Tensor:
    """Mark all but the smallest ``pruned`` of a vector."""
    if pruned == 0 or pruned == scores.numel():
        return torch.full_like(scores, pruned == 0, dtype=torch.bool)
    # Selecting is linear in the number of scores; sorting them all takes many times as long.
    threshold = scores.kthvalue(pruned).values
    kept = scores > threshold
    missing = scores.numel() - pruned - int(kept.count_nonzero())
    if missing:
        kept[(scores == threshold).nonzero().flatten()[-missing:]] = True
    return kept


def _kept_of_size(scores: Tensor, sizes: Tensor, amount: float) -> Tensor:
    """Mark all but the smallest groups that together hold no more than their share of the weights."""
    order = scores.argsort(stable=True)
    pruned = sizes[order].cumsum(0) <= _share(amount, int(sizes.sum()))
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[order[pruned]] = False
    return kept


def _rows(scores: Tensor, amount: float) -> Tensor:
    rows = scores.flatten(1)
    pruned = rows.argsort(dim=1, stable=True)[:, : min(_share(amount, rows.shape[1]), rows.shape[1] - 1)]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, pruned, False).view_as(scores)


def _connected(kept: Tensor, scores: Tensor) -> Tensor:
    if kept.numel() and not kept.any():
        kept = kept.clone()
        kept[-1 - scores.flatten().flip(0).argmax()] = True
    return kept
