"""Masks along both sides: how long they take to make and how much magnitude they keep, beside two greedy ways.

Rounds are interleaved; the median is kept. "Largest first" keeps entries from the largest on while their row and column have
room, as the published code of Hubara et al. does (on blocks of the matrix here). Example::

    python benchmarks/nm_transposable.py --output docs/evidence/nm_transposable.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.weights.nm import nm_mask
from lightning_peft.weights.nm_transposable import transposable_nm_mask

SHAPES = ((192, 768), (768, 768), (768, 3072))


def largest_first(weight: Tensor) -> Tensor:
    """The greedy mask at 2:4."""
    rows, columns = weight.shape[0] // 4, weight.shape[1] // 4
    blocks = weight.abs().view(rows, 4, columns, 4).transpose(1, 2).reshape(-1, 16)
    kept, every = torch.zeros_like(blocks, dtype=torch.bool), torch.arange(len(blocks))
    room = torch.full((2, len(blocks), 4), 2)
    for place in blocks.argsort(dim=1, descending=True).unbind(1):
        row, column = place // 4, place % 4
        fits = (room[0, every, row] > 0) & (room[1, every, column] > 0)
        kept[every, place] = fits
        room[0, every, row] -= fits.long()
        room[1, every, column] -= fits.long()
    return kept.view(rows, columns, 4, 4).transpose(1, 2).reshape(weight.shape)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "along the inputs alone (`nm_mask`)": lambda weight: nm_mask(weight, 2, 4),
    "both sides, best of 90 patterns": lambda weight: transposable_nm_mask(weight, 2, 4),
    "both sides, largest first": largest_first,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        kept = {}
        for _ in range(given.rounds):
            for name, way in WAYS.items():
                begin = time.process_time()
                mask = way(weight)
                seconds[name].append(time.process_time() - begin)
                kept[name] = float((weight.abs() * mask).sum() / weight.abs().sum())
        for name in WAYS:
            milliseconds = 1000 * statistics.median(seconds[name])
            lines.append(f"| {shape[0]} x {shape[1]} | {name} | {milliseconds:.1f} | {100 * kept[name]:.2f} |")
            print(lines[-1], flush=True)
    if given.output is not None:
        given.output.write_text("\n".join([*HEAD, *lines, ""]))


HEAD = (
    "# 2:4 along both sides",
    "",
    "Normal random weights, one thread, median of the processor's time, written by `benchmarks/nm_transposable.py`. A mask",
    "that holds along inputs and outputs keeps less than one along the inputs alone; the best of all 90 patterns of a block",
    "keeps more than keeping from the largest on. PyTorch's own operator for such tiles runs on CUDA only: not measured.",
    "",
    "| weight | mask | ms | % of the magnitude kept |",
    "|-|-|-|-|",
)

if __name__ == "__main__":
    main()
