"""What an order of columns keeps at 2:4 on real weights: ours beside NVIDIA's search, run as it is on the CPU.

NVIDIA's code is not installed by any package index. Give the folder that holds ``permutation_search_kernels`` of a checkout of
apex (``apex/contrib/sparsity``). Two things are changed in it from outside: ``time``, which it uses and does not import, is
put within its reach, and its sum over Python loops is replaced by one of numpy with the same value, or it would take hours.
Example::

    python benchmarks/nm_permutation.py --apex apex/contrib/sparsity --output docs/evidence/nm_permutation.md
"""

from __future__ import annotations

import argparse
import builtins
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from lightning_peft.network.targets import SENSITIVE, select
from lightning_peft.structure.coupled.example import record
from lightning_peft.structure.reorder import reorder
from lightning_peft.weights.nm_permutation import kept_magnitude, nm_permutation
from lightning_peft_plugins.sparsity._nm_sparsity.channel_order import Sparse, channel_order
from lightning_peft_recipes.image_classifier import load_packaged

Search = Callable[[Tensor], Tensor]
LITE0 = ("blocks.1.1.conv_pw", "blocks.2.1.conv_pwl", "blocks.4.1.conv_pw")


def matrices() -> Iterator[tuple[str, Tensor]]:
    """Weights of EfficientNet-Lite0, one row for each output."""
    network = lite0()
    for name in LITE0:
        yield f"EfficientNet-Lite0 {name}", network.get_submodule(name).weight.detach().flatten(1)


def lite0() -> nn.Module:
    network = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    load_packaged(network, "tf_efficientnet_lite0")
    return network


def whole() -> str:
    """What `NMSparsity(permute=True)` does to a whole network, without random swaps."""
    network, images = lite0(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layers = {name: part for name, part in select(network, "all-conv", SENSITIVE).items() if part.weight.shape[1] >= 4}
    sparse = {f"{name}.weight": Sparse(part.weight.detach(), 2, 4, 1) for name, part in layers.items()}
    with torch.no_grad():
        before, begin = network(images), time.process_time()
        found = channel_order(network, "", network, record((images,), {}), sparse, escapes=0)
        seconds = time.process_time() - begin
        reorder(network, found.orders)
        moved = float((network(images) - before).abs().max() / before.abs().max())
    return (
        f"All {len(layers)} convolutions of EfficientNet-Lite0 that NMSparsity takes, coupled channels together, without "
        f"random swaps: {100 * found.before:.2f} % kept as it is, {100 * found.kept:.2f} % with the channels of {found.groups} "
        f"groups permuted; outputs move by {moved:.1e} of the largest; {seconds:.0f} s, the proofs included (`--whole`)."
    )


def apex(folder: Path, escapes: int) -> Search:
    """NVIDIA's search over pairs of stripes."""
    builtins.time = time  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder.resolve()))
    from permutation_search_kernels import exhaustive_search

    def kept(matrix: np.ndarray) -> float:
        groups = np.abs(matrix).reshape(len(matrix), -1, 4)
        return float(np.partition(groups, 2, axis=-1)[..., 2:].sum(dtype=np.float64))

    exhaustive_search.sum_after_2_to_4 = kept

    def search(matrix: Tensor) -> Tensor:
        np.random.seed(0)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["APEX_ASP_CACHE_DIR"] = cache
            return torch.tensor([int(column) for column in exhaustive_search.Exhaustive_Search(matrix.numpy(), 8, escapes)[2]])

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apex", type=Path, help="folder that holds permutation_search_kernels")
    parser.add_argument("--whole", action="store_true", help="permute a whole network instead, and append a paragraph")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.whole:
        print(text := whole())
        if given.output is not None:
            given.output.write_text(given.output.read_text() + "\n" + "\n".join(textwrap.wrap(text, 120)) + "\n")
        return
    ways: dict[str, Search] = {
        "apex": apex(given.apex, 0),
        "apex, 100 escapes (its default)": apex(given.apex, 100),
        "ours": lambda matrix: nm_permutation(matrix, 2, 4, escapes=0),
        "ours, 10 escapes (default)": lambda matrix: nm_permutation(matrix, 2, 4, escapes=10),
        "ours, 100 escapes": lambda matrix: nm_permutation(matrix, 2, 4, escapes=100),
    }
    lines = ["| weight | rows, columns | as it is | " + " | ".join(ways) + " |", "|-|-|-|" + "-|" * len(ways)]
    for name, matrix in matrices():
        total = float(matrix.abs().sum())
        cells = [f"{100 * kept_magnitude(matrix, 2, 4) / total:.3f}"]
        for way, search in ways.items():
            begin = time.process_time()
            order = search(matrix)
            seconds = time.process_time() - begin
            cells.append(f"{100 * kept_magnitude(matrix[:, order], 2, 4) / total:.3f} ({seconds:.1f} s)")
            print(name, way, cells[-1], flush=True)
        lines.append(f"| {name} | {matrix.shape[0]}, {matrix.shape[1]} | {' | '.join(cells)} |")
        if given.output is not None:
            given.output.write_text(_page(lines))


def _page(lines: list[str]) -> str:
    return "\n".join(
        [
            "# Channel permutations before 2:4",
            "",
            "Share of a weight's magnitude, in per cent, that 2:4 keeps with its columns in the order they have and in those",
            "that two searches find; in brackets processor seconds on one thread. NVIDIA's code runs as published on the CPU,",
            "with one sum done by numpy (`benchmarks/nm_permutation.py` says how); its CUDA kernels are not measured.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
