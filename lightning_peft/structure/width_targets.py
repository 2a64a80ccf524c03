"""Sizes an architecture can grow to, and those it leaves to be worked out from the ones that were asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.structure.width_map import WidthMap


def grown_axes(width_map: WidthMap, to: Mapping[str, int]) -> dict[str, list[int]]:
    """Sizes of every axis before and after growth.

    Args:
        width_map: Declaration of the network.
        to: See :func:`lightning_peft.structure.width_edit.width_edit`.

    Returns:
        ``edit["axes"]``.

    Raises:
        MisconfigurationException: A target is unknown, shrinks, or is none the architecture can have.

    Example:
        >>> grown_axes(WidthMap({"width": 4, "ffn": 8}, {}), {"width": 6})
        {'width': [4, 6], 'ffn': [8, 12]}
    """
    sizes = dict(width_map.sizes)
    grouped = {"kv_heads", "groups"} <= set(sizes)
    now = sizes | ({"heads": sizes["kv_heads"] * sizes["groups"]} if grouped else {})
    _check_targets(now, to)
    target = now | dict(to)
    for label in ("heads", "ffn"):
        if label in now and label not in to and "width" in to:
            target[label] = _in_proportion(label, now, target["width"])
    if grouped:
        target |= _grouped(now, to, target["heads"])
    _check_demand(width_map.demand, target)
    if target == now:
        raise MisconfigurationException(f"Nothing grows to {dict(to)}: the sizes are {now} already. Give a larger one.")
    return {label: [sizes[label], target[label]] for label in sizes}


def _check_demand(demand: str, target: Mapping[str, int]) -> None:
    if demand == "span" and target["heads"] * target["head_dim"] != target["width"]:
        raise MisconfigurationException(
            f"width={target['width']} with {target['heads']} heads of {target['head_dim']} does not fit: this network's class "
            f"makes heads that span its width. Give width={target['heads'] * target['head_dim']}, or leave out heads."
        )
    if demand == "divide" and target["width"] % target["heads"]:
        below = target["width"] // target["heads"] * target["heads"]
        raise MisconfigurationException(
            f"width={target['width']} does not divide by {target['heads']} heads, which this network's configuration demands. "
            f"Give width={below + target['heads']}, or a number of heads that divides it."
        )


def _check_targets(now: Mapping[str, int], to: Mapping[str, int]) -> None:
    allowed = [label for label in now if label not in ("head_dim", "groups")]
    for label, target in to.items():
        if label not in allowed:
            raise MisconfigurationException(f"{label!r} cannot grow here; what can is {', '.join(allowed)}.")
        if type(target) is not int or target < now[label]:
            raise MisconfigurationException(
                f"{label}={target!r} is no growth from {now[label]}. Give a whole number of at least {now[label]}."
            )


def _in_proportion(label: str, now: Mapping[str, int], width: int) -> int:
    grown, left = divmod(now[label] * width, now["width"])
    if left:
        step = now["width"] // math.gcd(now["width"], now[label])
        below = width - width % step
        near = " or ".join(f"width={n}" for n in (below, below + step) if n > now["width"])
        head = f"; a head has {now['head_dim']}" if label == "heads" and "head_dim" in now else ""
        raise MisconfigurationException(
            f"width={width} leaves no whole number of {label} in the proportion of {now[label]} to {now['width']}{head}. Give "
            f"{near}, or {label} beside width."
        )
    return grown


def _grouped(now: Mapping[str, int], to: Mapping[str, int], heads: int) -> dict[str, int]:
    """Key-value heads, and query heads a key-value head; groups stay as large as they are where that divides."""
    if "kv_heads" in to:
        kv_heads = to["kv_heads"]
    elif now["kv_heads"] > 1 and heads % now["groups"] == 0:
        kv_heads = heads // now["groups"]
    else:
        kv_heads = now["kv_heads"]
    groups, left = divmod(heads, kv_heads)
    if left or groups < now["groups"]:
        raise MisconfigurationException(
            f"{heads} heads on {kv_heads} key-value heads do not extend {now['heads']} on {now['kv_heads']}. Give heads as a "
            f"multiple of {now['groups']} (more key-value heads) or of {now['kv_heads']} (larger groups), or both heads and "
            f"kv_heads with at least {now['groups']} heads each."
        )
    return {"kv_heads": kv_heads, "groups": groups}
