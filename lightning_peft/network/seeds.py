"""Seeds of what is drawn for one tensor."""

from __future__ import annotations

import zlib

import torch


def named_seed(name: str) -> int:
    """Return the seed of what is drawn under a name: it follows ``seed_everything``, and no other draw moves it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> named_seed("lora/fc.weight") == named_seed("lora/fc.weight") != named_seed("lora/head.weight")
        True
    """
    return torch.initial_seed() ^ zlib.crc32(name.encode())
