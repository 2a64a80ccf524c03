"""Seeds of what is drawn for one tensor."""

from __future__ import annotations

import zlib

import torch


def name_hash(name: str) -> int:
    """Return a number for a name, without what ``torch.compile(network)`` puts into it: compiling changes no draw.

    Example:
        >>> name_hash("model._orig_mod.fc.weight") == name_hash("model.fc.weight") != name_hash("model.head.weight")
        True
    """
    return zlib.crc32(name.replace("_orig_mod.", "").encode())


def named_seed(name: str) -> int:
    """Return the seed of what is drawn under a name: it follows ``seed_everything``, and no other draw moves it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> named_seed("lora/fc.weight") == named_seed("lora/fc.weight") != named_seed("lora/head.weight")
        True
    """
    return torch.initial_seed() ^ name_hash(name)
