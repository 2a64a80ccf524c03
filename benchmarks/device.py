"""Everything that wants a GPU, in one run of less than twelve minutes on a machine with one CUDA device.

    python benchmarks/device.py --output docs/evidence/gpu
    python benchmarks/device.py --cpu

Every section runs in a process of its own within a time of its own; what it found until it failed or its time was over is kept,
and the next one goes on. The second command rehearses all sections at tiny sizes, for machines without a GPU; its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deltas
import growth
import nm_mask
import overhead
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_peft import LoRA, NMSparsity, WeightCompander
from lightning_peft.baking.semi_structured import semi_structured
from lightning_peft.measure.clock import time_calls, waiter

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = 1800.0  # seconds of a section
CALLS = 20  # of a layer between two looks at the clock
Row = dict[str, Any]

# Rows of a batch, and weights as outputs x inputs: of ViT-B at batch 64, and of a Llama of 1B at 2,048 tokens.
SHAPES: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "ViT-B": (64 * 197, {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}),
    "Llama-1B": (2048, {"q": (2048, 2048), "k": (512, 2048), "up": (8192, 2048), "down": (2048, 8192)}),
}
METHODS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "LoRA": lambda: [LoRA(8)],
    "NMSparsity": lambda: [NMSparsity("2:4", recipe="sr-ste", targets="all-linear")],
    "WeightCompander": lambda: [WeightCompander(targets="all-linear")],
}


def tests(tiny: bool) -> Iterator[Row]:
    """What the tests say that are marked ``gpu``."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        return
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "--tb=line", *map(str, files)]
    run = subprocess.run([*command, *(["--collect-only"] if tiny else [])], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said += (run.stdout.splitlines() or run.stderr.splitlines())[-1:]
    yield from ({"pytest": line} for line in said)


def steps(tiny: bool) -> Iterator[Row]:
    """A training step with a method beside a plain one, as in ``overhead.py``."""
    args = Namespace(set="methods", rounds=2 if tiny else 40, warmup=1 if tiny else 5, threads=2, cpu_time=False)
    args.batch_size, args.image_size, args.precision = (2, 32, "32-true") if tiny else (64, 224, "bf16-mixed")
    for name in ["efficientnet_lite0"] if tiny else overhead.MODELS:
        for variant, row in overhead.measure(name, args, device(tiny)).items():
            low, high = row["interval"]
            yield {
                "network": name,
                "variant": variant,
                "step, ms": row["ms"],
                "of plain": row["ratio"],
                "from": low,
                "to": high,
            }


def masks(tiny: bool) -> Iterator[Row]:
    """Milliseconds in which an N:M mask is made, as in ``nm_mask.py``."""
    ways = {name: way for name, way in nm_mask.WAYS.items() if not (tiny and "compiled" in name)}
    for height, width in [(64, 64)] if tiny else [(3072, 768), (8192, 2048)]:
        for n, m in [(2, 4)] if tiny else [(2, 4), (1, 4), (4, 8), (1, 16)]:
            weight = torch.randn(height, width, device=device(tiny))
            times = nm_mask.measure(weight, n, m, 3 if tiny else 31, ways, cpu_time=False)
            found: Any = nm_mask.summarise((height, width), f"{n}:{m}", times)["median_ms"]
            yield {"weight": f"{height} x {width}", "N:M": f"{n}:{m}", **found}


class Repeated(nn.Module):
    """Calls a layer some times: a single call takes less than it takes to look at the clock."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(CALLS):
            output: Tensor = self.layer(inputs)
        return output


def sparse_layers(tiny: bool) -> Iterator[Row]:
    """Milliseconds of a dense linear layer, and of its 2:4 packed self, in half precision."""
    place = torch.device(device(tiny))
    for network, (rows, shapes) in SHAPES.items():
        for name, (outputs, inputs) in ((name, (64, 64) if tiny else shape) for name, shape in shapes.items()):
            layer = nn.Linear(inputs, outputs, bias=False, device=place, dtype=torch.float16).requires_grad_(False)
            layer.weight *= nm_mask.nm_mask(layer.weight, 2, 4)
            packed = nn.Sequential(copy.deepcopy(layer))
            (found,) = semi_structured(packed, torch.float16).layers
            batch = torch.randn(16 if tiny else rows, inputs, device=place, dtype=torch.float16)
            networks = {"dense": Repeated(layer), "packed": Repeated(packed)}
            seconds = time_calls(networks, [batch], runs=3 if tiny else 31, warm_up=3, wait=waiter(place))
            dense, sparse = (1000 * statistics.median(times) / CALLS for times in seconds.values())
            row = {"network": network, "layer": name, "weight": f"{outputs} x {inputs}", "dense, ms": dense}
            yield row | {"2:4, ms": sparse, "times as fast": dense / sparse, "packed by": found.backend or found.reason}


class Allocated(Callback):
    """The most bytes that CUDA's allocator had given out in the last step."""

    peak = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()


def adapters(tiny: bool) -> Iterator[Row]:
    """A training step with LoRA, ours against PEFT's, as in ``deltas.py``; memory is that of CUDA's allocator in a step."""
    args = Namespace(starts=1 if tiny else 2, rounds=1 if tiny else 8, warmup=0 if tiny else 2, threads=2, device=device(tiny))
    for name in ["minilm"] if tiny else deltas.NETWORKS:
        rows = deltas.timed(name, deltas.VARIANTS, "peft", args, deltas.fit)
        peaks = {variant: _allocated(name, variant, args.device) for variant in rows}
        for variant, row in rows.items():
            memory = {"peak, MB": peaks[variant] / 1e6, "peak of PEFT's": peaks[variant] / max(peaks["peft"], 1)}
            yield {"network": name, "variant": variant, "step, ms": row["ms"], "of PEFT's": row["ratio"], **memory}


def _allocated(name: str, variant: str, place: str) -> int:
    allocated = Allocated()
    module, callbacks = deltas.built(name, variant)
    deltas.lean(callbacks=[*callbacks, allocated], max_steps=3, accelerator=place).fit(module, deltas.batches(name, 3))
    return allocated.peak


def compiled(tiny: bool) -> Iterator[Row]:
    """A step of a small ViT whose network is compiled, beside the eager one of the same method."""
    args = Namespace(rounds=2 if tiny else 40, warmup=2 if tiny else 10, device=device(tiny))
    ways = {"traced": {"backend": "eager"}} if tiny else {"compiled": {}, "CUDA graphs": {"mode": "reduce-overhead"}}
    for way, settings in ways.items():
        for method in ["none", "LoRA"] if tiny else METHODS:
            yield {"method": method, "way": way} | _attempt(partial(_beside_eager, method, args, settings))


def _attempt(measure: Callable[[], Row]) -> Row:
    try:
        return measure()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def _beside_eager(method: str, args: Namespace, settings: dict[str, Any]) -> Row:
    seconds = overhead.interleave(method, ["eager", "compiled"], args, compiled_fit, settings)
    ratio, (low, high) = overhead.compared(seconds["compiled"], seconds["eager"])
    times = {f"{way}, ms": 1000 * statistics.median(seconds[way]) for way in ("eager", "compiled")}
    return {**times, "of eager": ratio, "from": low, "to": high, "failed": ""}


def compiled_fit(method: str, way: str, pipe: Connection, args: Namespace, settings: dict[str, Any]) -> None:
    """Train in this process, a step at a time."""
    overhead.quiet()
    module, data = growth.task("vit")
    if way == "compiled":
        module.model.compile(**settings)
    baton = overhead.Baton(pipe, time.perf_counter)
    growth.trainer([baton, *METHODS[method]()], args.warmup + args.rounds + 2, args.device).fit(module, data)


def grown(tiny: bool) -> Iterator[Row]:
    """What growth costs, as in ``growth.py``."""
    for name in ["llama"] if tiny else ["llama", "vit"]:
        repeats = 1 if tiny else 3
        plain, average = (
            growth.edit_cost(name, average=average, repeats=repeats, device=device(tiny)) for average in (False, True)
        )
        step = growth.step_ratio(name, 8 if tiny else 50, 2, device(tiny))
        low, high = step["interval"]
        row = {"network": name, "edit, ms": 1000 * plain["seconds"], "in steps": plain["steps"], "with EMA": average["steps"]}
        yield row | {"step after / built": step["ratio"], "from": low, "to": high}


SECTIONS: dict[str, tuple[Callable[[bool], Iterator[Row]], int]] = {  # with the seconds that each may take
    "tests": (tests, 120),
    "steps": (steps, 120),
    "masks": (masks, 60),
    "sparse_layers": (sparse_layers, 60),
    "adapters": (adapters, 160),
    "compiled": (compiled, 110),
    "grown": (grown, 60),
}


def device(tiny: bool) -> str:
    """Where a section computes."""
    return "cpu" if tiny else "cuda"


@dataclass
class Outcome:
    """What a section found, how long it took, and why it ended early if it did."""

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""


def work(name: str, tiny: bool, pipe: Connection) -> None:
    """Run a section in this process and send every row, then nothing, or why there are no more."""
    os.setsid()  # whatever it starts can then be ended with it
    overhead.quiet()
    failed = ""
    try:
        for row in SECTIONS[name][0](tiny):
            pipe.send(row)
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    pipe.send(failed)


def section(name: str, tiny: bool, limit: float) -> Outcome:
    """Run a section in another process, no longer than so many seconds."""
    outcome, start = Outcome(), time.monotonic()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(name, tiny, there))
    process.start()
    there.close()
    try:
        while here.poll(max(0.0, start + limit - time.monotonic())):
            found = here.recv()
            if isinstance(found, str):
                outcome.failed = found
                break
            outcome.rows.append(found)
        else:
            outcome.failed = f"its {limit:.0f} seconds were over"
    except EOFError:
        outcome.failed = "its process ended"
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # it ended before it became a group of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    outcome.seconds = time.monotonic() - start
    return outcome


def cell(value: Any) -> str:
    """A value in a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", r"\|")


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "-|" * len(names)] if rows else []
    return lines + [f"| {' | '.join(cell(row.get(name, '')) for name in names)} |" for row in rows]


def markdown(about: dict[str, Any], found: dict[str, Outcome]) -> str:
    """The page."""
    lines = ["# On a GPU", "", f"`python benchmarks/device.py`: {', '.join(f'{key} {value}' for key, value in about.items())}."]
    for name, outcome in found.items():
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", str(SECTIONS[name][0].__doc__), "", *table(outcome.rows)]
        if outcome.failed:
            lines += ["", f"**Not finished: {outcome.failed}**"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="rehearse at tiny sizes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=11.5, help="of all sections together")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md after every section")
    args = parser.parse_args()
    if not (args.cpu or torch.cuda.is_available()):
        sys.exit("There is no CUDA device here, so nothing was measured. --cpu rehearses every section at tiny sizes.")
    card = "a rehearsal on a CPU, whose figures mean nothing" if args.cpu else torch.cuda.get_device_name()
    about = {"card": card, "torch": torch.__version__, "python": platform.python_version()}
    end, found = time.monotonic() + 60 * args.minutes, {}
    for name in args.sections:
        limit = REHEARSAL if args.cpu else min(SECTIONS[name][1], max(0.0, end - time.monotonic()))
        found[name] = section(name, args.cpu, limit)
        print(f"{name}: {len(found[name].rows)} rows, {found[name].seconds:.0f} s {found[name].failed}", flush=True)
        if args.output is not None:
            content = {"about": about, "sections": {key: vars(outcome) for key, outcome in found.items()}}
            args.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(markdown(about, found))
    print(markdown(about, found))
    if any(outcome.failed for outcome in found.values()):
        sys.exit("Some sections were not finished.")


if __name__ == "__main__":
    main()
