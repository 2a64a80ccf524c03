"""Time N:M masks against the usual ways to make them, all in one interleaved run.

Rounds go A B C ... A B C ..., so that a neighbour on the machine slows every way alike. For each cell the median and the
fastest round are kept; ratios compare like with like (median to median, fastest to fastest). Every mask is first compared
with a stable argsort. Example::

    python benchmarks/nm_mask.py --threads 2 --rounds 15 --output docs/evidence/nm_mask.md
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.weights.nm import nm_mask, parse_pattern

Way = Callable[[Tensor, int, int], Tensor]


def argsort_scatter(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().view(-1, m)
    pruned = groups.argsort(dim=1, stable=True)[:, : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, pruned, False).view_as(weight)


def official_style(weight: Tensor, n: int, m: int) -> Tensor:
    """The steps of the published SR-STE and MDGF code: unstable argsort, float ones, zeros scattered at the smallest."""
    groups = weight.detach().abs().reshape(weight.numel() // m, m)
    pruned = torch.argsort(groups, dim=1)[:, : int(m - n)]
    return torch.ones(groups.shape, device=groups.device).scatter_(dim=1, index=pruned, value=0).reshape(weight.shape)


def topk_scatter(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().view(-1, m)
    kept = groups.topk(n, dim=1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).view_as(weight)


def kthvalue_threshold(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.abs().view(-1, m)
    return (groups >= groups.kthvalue(m - n + 1, dim=1, keepdim=True).values).view_as(weight)


WAYS: dict[str, Way] = {
    "ours, eager": lambda weight, n, m: nm_mask(weight, n, m, compiled=False),
    "ours, compiled": lambda weight, n, m: nm_mask(weight, n, m, compiled=True),
    "argsort, scatter": argsort_scatter,
    "official style": official_style,
    "topk, scatter": topk_scatter,
    "kthvalue": kthvalue_threshold,
    "floor: abs() > 0": lambda weight, n, m: weight.abs() > 0,
}


def measure(weight: Tensor, n: int, m: int, rounds: int, ways: Mapping[str, Way], cpu_time: bool) -> dict[str, list[float]]:
    """Milliseconds per round and way; raises if a way (other than the floor) gives another mask than a stable argsort."""
    reference = argsort_scatter(weight, n, m)
    for name, way in ways.items():
        mask = way(weight, n, m)
        if not name.startswith("floor") and not torch.equal(mask.bool(), reference):
            raise AssertionError(f"{name} gives another {n}:{m} mask than a stable argsort.")
    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            _synchronize(weight)
            begin = clock()
            way(weight, n, m)
            _synchronize(weight)
            times[name].append(1e3 * (clock() - begin))
    return times


def _synchronize(weight: Tensor) -> None:
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


def summarise(shape: tuple[int, int], pattern: str, times: Mapping[str, list[float]]) -> dict[str, object]:
    """One row of the table; a ratio ``other / ours`` is how many times longer the other way takes."""
    median = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    ratios = {
        f"{other} / {ours}": (median[other] / median[ours], fastest[other] / fastest[ours])
        for ours in ("ours, eager", "ours, compiled")
        if ours in median
        for other in median
        if not other.startswith(("ours", "floor"))
    }
    floors = {
        f"{ours} / floor": (
            median[ours] / median["floor: abs() > 0"],
            fastest[ours] / fastest["floor: abs() > 0"],
        )
        for ours in ("ours, eager", "ours, compiled")
        if ours in median
    }
    return {"shape": shape, "pattern": pattern, "median_ms": median, "fastest_ms": fastest, "ratios": ratios | floors}


def table(rows: list[dict[str, object]], key: str) -> str:
    names = list(rows[0][key])
    lines = ["| weight | N:M | " + " | ".join(names) + " |", "|-|-|" + "-|" * len(names)]
    for row in rows:
        cells = [f"{value:.2f}" for value in row[key].values()]
        lines.append(f"| {'x'.join(map(str, row['shape']))} | {row['pattern']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_table(rows: list[dict[str, object]]) -> str:
    """Argsort and the official way against ours, and ours against the floor: median (fastest)."""
    wanted = [
        f"{other} / {ours}"
        for ours in ("ours, eager", "ours, compiled")
        for other in ("argsort, scatter", "official style", "topk, scatter", "kthvalue")
    ]
    wanted += ["ours, eager / floor", "ours, compiled / floor"]
    wanted = [name for name in wanted if name in rows[0]["ratios"]]
    lines = ["| weight | N:M | " + " | ".join(wanted) + " |", "|-|-|" + "-|" * len(wanted)]
    for row in rows:
        cells = ["{:.1f} ({:.1f})".format(*row["ratios"][name]) for name in wanted]
        lines.append(f"| {'x'.join(map(str, row['shape']))} | {row['pattern']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "4:8", "1:8", "1:16", "2:16", "1:32", "3:7"])
    parser.add_argument("--sizes", nargs="+", default=["3072x768", "768x768", "192x768"], help="rows x columns")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="process CPU time instead of wall time (busy machines)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled kernel out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write a .md or .json file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ways = {name: way for name, way in WAYS.items() if not (args.no_compile and name == "ours, compiled")}

    rows = []
    for size in args.sizes:
        height, width = map(int, size.split("x"))
        for pattern in args.patterns:
            n, m = parse_pattern(pattern)
            weight = torch.randn(height, width - width % m, device=args.device)
            rows.append(summarise(tuple(weight.shape), pattern, measure(weight, n, m, args.rounds, ways, args.cpu_time)))
            print(json.dumps(rows[-1]["median_ms"]), size, pattern, flush=True)

    clock = "process CPU time" if args.cpu_time else "wall time"
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    setting = (
        f"{where}, {args.threads} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"float32, {clock}, {args.rounds} interleaved rounds"
    )
    report = "\n\n".join(
        (
            f"Setting: {setting}.",
            "Median milliseconds:",
            table(rows, "median_ms"),
            "Fastest round, milliseconds:",
            table(rows, "fastest_ms"),
            "Ratios, median to median (fastest to fastest):",
            ratio_table(rows),
        )
    )
    print(report)
    if args.output:
        is_json = args.output.suffix == ".json"
        args.output.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) if is_json else report + "\n")


if __name__ == "__main__":
    main()
