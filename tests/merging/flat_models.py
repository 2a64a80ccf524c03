"""Models of a few tensors, given and compared as flat vectors, and what official codes made of them."""

from __future__ import annotations

import torch
from official_values import values_of

from lightning_peft import merge

OFFICIAL = values_of("merging_official")


def sines(models, size=60):
    """Differences, in double precision, that no generator of random numbers has a say in."""
    factors = torch.tensor([1.0, 0.7, 1.3, 0.4], dtype=torch.float64)[:models, None]
    return torch.sin(torch.arange(models * size, dtype=torch.float64) * 1.7 + 0.3).view(models, size) * factors


def parted(flat):
    """A flat model as one of three tensors."""
    return {"a": flat[:24].view(4, 6), "b": flat[24:31], "c": flat[31:].view(29, 1)}


def flat(state):
    return torch.cat([value.reshape(-1) for value in state.values()])


def merged(deltas, method, **more):
    """The merged difference to a base of zeros."""
    start = parted(torch.zeros(deltas.shape[1], dtype=deltas.dtype))
    return flat(merge([parted(row) for row in deltas], method, base=start, **more))


def chirps(models, *shape, start=0.0):
    """Differences of full rank: sines of the square of a place, where those of a place alone are of rank two."""
    size = torch.Size(shape).numel() * models
    places = torch.arange(size, dtype=torch.float64)
    return torch.sin(places * places * 0.37 + places * 0.11 + start).view(models, *shape)


def same(found, expected, atol=1e-14):
    """Whether a merged vector is the recorded one."""
    return torch.allclose(found, torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)
