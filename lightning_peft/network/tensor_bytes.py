"""What a tensor holds, as bytes."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> Tensor:
    """Return what a tensor holds as bytes, in the order of its indices, where it lies."""
    if hasattr(tensor, "to_local"):  # a shard, of which every rank keeps its own
        tensor = tensor.to_local()
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.contiguous().reshape(-1).view(torch.uint8)


def checksum(tensor: Tensor, start: int = 0) -> int:
    """Return the CRC-32 of what a tensor holds, on whatever device it lies, continued from ``start``.

    Example:
        >>> checksum(torch.zeros(2)) == zlib.crc32(bytes(8))
        True
    """
    return zlib.crc32(tensor_bytes(tensor).cpu().numpy().data, start)
