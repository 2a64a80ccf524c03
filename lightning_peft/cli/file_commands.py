"""`bake`, `report` and `assets`: commands about files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lightning_peft import registry
from lightning_peft.cli.console import Outcome, facts, grid
from lightning_peft.cli.recipes import GROUP, UsageError
from lightning_peft.report.contents import Table

if TYPE_CHECKING:
    from lightning_peft.assets.asset import Asset


def bake(path: Path, out: Path | None, *, trusted: bool = False) -> Outcome:
    """Bake a checkpoint file and say what was applied.

    Raises:
        CheckpointError: The file is no checkpoint, or its weight maps do not fit.
        UsageError: There is no such file, or the result would replace it.
    """
    from lightning_peft.baking.bake import bake_checkpoint, read_checkpoint
    from lightning_peft.cli.folders import check_writable
    from lightning_peft.cli.loading import stored_lines
    from lightning_peft.report.proof import proof_data, proof_fact, proof_table, prove
    from lightning_peft.report.weights import weigh
    from lightning_peft.structure import checkpoint as sections
    from lightning_peft.structure import journal

    target = out or path.with_name(f"{path.stem}.baked{path.suffix}")
    check_writable(target.parent, "-o")
    checkpoint = read_checkpoint(existing(path), trusted=trusted)
    if target.exists() and target.samefile(path):
        raise UsageError(f"The baked file would replace {path}, which could not be resumed any more. Choose another with -o.")
    weights = weigh(checkpoint)
    proofs = prove(checkpoint, weights.state)
    target.parent.mkdir(parents=True, exist_ok=True)
    bake_checkpoint(path, target, trusted=trusted)
    edits = journal.read(sections.read(checkpoint))
    lines, note = stored_lines(target, checkpoint.get("hyper_parameters"), len(edits), trusted=trusted)
    applied = [{"name": row.name, "maps": list(row.maps), "nonzero": row.nonzero, "total": row.total} for row in weights.mapped]

    def show(console: Console) -> None:
        if applied:
            rows = tuple((row.name, ", ".join(row.maps), row.total, row.nonzero) for row in weights.mapped)
            console.print(grid(Table(("tensor", "maps applied", "stored", "non-zero"), rows)))
        else:
            console.print("No weight map to apply: the weights are ordinary already.")
        if proofs:
            console.print()
            console.print(grid(proof_table(proofs)))
            console.print(facts((proof_fact(proofs),)))
        console.print(f"\nWrote [bold]{target}[/]. {note}\n", soft_wrap=True)
        console.print("\n".join(f"    {line}" for line in lines), highlight=False, markup=False, soft_wrap=True)

    data = {
        "source": str(path),
        "target": str(target),
        "applied": applied,
        "structural_changes": len(edits),
        "loading": lines,
        "nm_proof": proof_data(proofs),
    }
    return Outcome(data, show)


def report(path: Path, out: Path | None, *, trusted: bool = False) -> Outcome:
    """Write the report of a checkpoint.

    Raises:
        CheckpointError: The file is no checkpoint, or its weight maps do not fit.
        UsageError: There is no such file.
    """
    from lightning_peft.cli.folders import check_writable
    from lightning_peft.report.checkpoint import checkpoint_report

    folder = out or path.with_name(f"{path.stem}-report")
    check_writable(folder, "-o")
    command = shlex.join(["lightning-peft", "report", str(path), *(["--trusted"] if trusted else [])])
    made = checkpoint_report(existing(path), command, trusted=trusted)
    files = made.save(folder)

    def show(console: Console) -> None:
        console.print(facts(made.facts))
        for section in made.sections[:1]:
            for table in section.tables:
                console.print()
                console.print(grid(table))
        console.print(f"\nReport [bold]{folder / 'report.html'}[/]", soft_wrap=True)

    named = {"out": str(folder), "files": [str(file) for file in files], "facts": [asdict(fact) for fact in made.facts]}
    return Outcome({**made.data, **named}, show)


def existing(path: Path) -> Path:
    """Return the path of a file that is there.

    Raises:
        UsageError: It is not; the nearest checkpoints are named.
    """
    if path.is_file():
        return path
    near = [str(other) for other in sorted(path.parent.glob("*.ckpt"))] if path.parent.is_dir() else []
    hint = registry.suggest(str(path), near) if near else ""
    raise UsageError(f"There is no file {path}.{hint}")


def catalogue() -> dict[str, Asset]:
    """Return the assets that installed recipe packages name in their ``assets`` module, by name."""
    found: dict[str, Asset] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if find_spec(point.value) is not None and find_spec(f"{point.value}.assets") is not None:
            found |= {asset.name: asset for asset in import_module(f"{point.value}.assets").ASSETS}
    return found


def list_assets() -> Outcome:
    """List assets and their state in the cache."""
    from lightning_peft.assets.archives import cache_dir, cached

    found = cached(catalogue().values())
    folder = cache_dir()

    def show(console: Console) -> None:
        rows = tuple(
            (item.asset.name, item.state, f"{item.asset.size / 1e6:.1f} MB", item.asset.licence, item.asset.contents)
            for item in found
        )
        console.print(grid(Table(("asset", "state", "size", "licence", "contents"), rows)))
        console.print(f"\nCache [bold]{folder}[/]", soft_wrap=True)
        console.print("[dim]lightning-peft assets fetch NAME    lightning-peft assets fetch --all[/]")

    data = [{**asdict(item.asset), "state": item.state, "path": str(item.path)} for item in found]
    return Outcome({"cache": str(folder), "assets": data}, show)


def fetch_assets(names: Sequence[str], *, everything: bool = False) -> Outcome:
    """Fetch assets by name, or all of them.

    Raises:
        AssetError: One could not be fetched.
        UsageError: Unknown name, or none given.
    """
    from lightning_peft.assets.archives import fetch

    known = catalogue()
    if not names and not everything:
        raise UsageError(f"Name the assets to fetch, or use --all. Known names: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise UsageError(f"There is no asset {name!r}.{registry.suggest(name, list(known))}")
    paths = {name: fetch(known[name]) for name in (known if everything else names)}

    def show(console: Console) -> None:
        for name, path in paths.items():
            console.print(f"[bold]{name}[/]  {path}", soft_wrap=True)

    return Outcome({"assets": {name: str(path) for name, path in paths.items()}}, show)
