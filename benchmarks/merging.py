"""Merging beside mergekit: time and memory of the same configurations on the same models, in turns.

    python benchmarks/merging.py --mergekit FOLDER --output docs/evidence/merging

Two random Llamas of SmolLM2-135M's shape and their base, in float32; configurations of mergekit, read by both. Every merge is
a process of its own, with one thread. Counted are seconds from open files to written ones without imports, the largest resident
size, in which mapped files count, and the largest anonymous one, in which they do not. Then ten models are merged, which are
the two again and again: files are mapped, so that anonymous memory is not spared by it.

mergekit is not installed for this; --mergekit names a folder that has it: pip install --target FOLDER --no-deps mergekit, with
what it imports. Without it only this library is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPE |= {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
METHODS: dict[str, dict[str, float]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.2},
}


def make(folder: Path) -> None:
    """Write a base and two models."""
    import torch
    import transformers

    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    net.save_pretrained(folder / "base")
    start = {name: value.clone() for name, value in net.named_parameters()}
    for place in (1, 2):
        with torch.no_grad():
            for name, value in net.named_parameters():
                value.copy_(start[name] + torch.randn_like(value) * 1e-3)
        net.save_pretrained(folder / f"m{place}")


def configuration(folder: Path, method: str, models: int = 2) -> Path:
    """Write a configuration for so many models."""
    names = [f"m{place}" for place in range(1, models + 1)]
    for place, name in enumerate(names):
        if not (folder / name).exists():
            (folder / name).symlink_to(folder / f"m{1 + place % 2}")
    config = {
        "merge_method": method,
        "models": [{"model": str(folder / name), "parameters": METHODS[method]} for name in names],
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(folder / "base")
    path = folder / f"{method}-{models}.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def ours(config: str, out: str) -> float:
    """Merge, and return the seconds."""
    from lightning_peft import merge
    from lightning_peft.merging.mergekit_file import read

    began = time.perf_counter()
    merge(**read(config), out=out)
    return time.perf_counter() - began


def theirs(config: str, out: str) -> float:
    """Merge by mergekit, and return the seconds."""
    modules = [importlib.import_module(f"mergekit.{name}") for name in ("config", "merge", "options")]
    _complete_types()
    settings, merge, options = modules
    began = time.perf_counter()
    merge.run_merge(
        settings.MergeConfiguration.model_validate(yaml.safe_load(Path(config).read_text())),
        out,
        options.MergeOptions(cuda=False, copy_tokenizer=False, lazy_unpickle=True, quiet=True),
    )
    return time.perf_counter() - began


def _complete_types() -> None:
    """Let pydantic find the names in mergekit's annotations, which newer versions of the two do not."""
    import pydantic
    import torch

    names: dict[str, Any] = {}
    for module in [each for name, each in sys.modules.items() if name.startswith("mergekit")]:
        names |= {key: value for key, value in vars(module).items() if not key.startswith("__")}
    names["torch"] = torch
    waiting = [pydantic.BaseModel]
    while waiting:
        for model in waiting.pop().__subclasses__():
            waiting.append(model)
            if model.__module__.startswith("mergekit") and not model.__pydantic_complete__:
                model.model_config["arbitrary_types_allowed"] = True
                model.model_rebuild(force=True, _types_namespace=names)


def work(who: str, config: str, out: str) -> None:
    """Merge in this process and print what it took."""
    seconds = {"ours": ours, "theirs": theirs}[who](config, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "resident": peak}))


def measured(who: str, config: Path, mergekit: Path | None) -> dict[str, float]:
    """Merge in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if who == "theirs":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(mergekit), environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(dir=config.parent) as folder:
        command = [sys.executable, __file__, "--work", who, str(config), f"{folder}/out"]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        anonymous = 0
        while child.poll() is None:
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(0.01)
        printed, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"{who} failed on {config.name}:\n{errors[-2000:]}")
    return {**json.loads(printed.splitlines()[-1]), "anonymous": anonymous}


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def show(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a row a merge."""
    table = Table("merge", "whose", "seconds", "resident, MB", "anonymous, MB")
    for name, by in rows.items():
        for who, row in by.items():
            sizes = (f"{row[key] / 1e6:,.0f}" for key in ("resident", "anonymous"))
            table.add_row(name, who, f"{row['seconds']:.2f}", *sizes)
    Console().print(table)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mergekit", type=Path, help="folder that has mergekit")
    parser.add_argument("--models", type=Path, help="folder with base, m1 and m2, made when missing (default: for this run)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to write, without ending")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    both = ["ours", "theirs"]
    if options.mergekit is None or not (options.mergekit / "mergekit").is_dir():
        print("mergekit is not measured: --mergekit names no folder that has it.", file=sys.stderr)
        both = ["ours"]
    with tempfile.TemporaryDirectory() as made:
        folder = (options.models or Path(made)).resolve()
        folder.mkdir(exist_ok=True)
        if not (folder / "base").is_dir():
            make(folder)
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for method in METHODS:
            config = configuration(folder, method)
            runs: dict[str, list[dict[str, float]]] = {who: [] for who in both}
            for _ in range(options.repeats):
                for who in both:
                    runs[who].append(measured(who, config, options.mergekit))
            rows[method] = {who: medians(each) for who, each in runs.items()}
            rows[f"{method}, ten models"] = {"ours": measured("ours", configuration(folder, method, 10), None)}
            show(rows)
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
