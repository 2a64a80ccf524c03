"""`merge`: several models into one, with a table of how far each went and how much of it the merged one keeps."""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lightning_peft import registry
from lightning_peft.cli.cards import missing, summary_of
from lightning_peft.cli.console import Outcome, grid
from lightning_peft.cli.recipes import UsageError
from lightning_peft.report.contents import Table

if TYPE_CHECKING:
    from lightning_peft.merging.distances import Distances
    from lightning_peft.merging.model import Model


def methods_help() -> str:
    """Return the installed merge functions, a line each, for the end of the help."""
    entries = registry.merge_functions().values()
    width = max((len(entry.name) for entry in entries), default=0)
    lines = (f"  {entry.name:<{width}}  {missing(entry) or summary_of(entry)}" for entry in entries)
    return "\n".join(["methods:", *lines, "", "lightning-peft show METHOD lists the options of one, for --option."])


def merge(options: argparse.Namespace, console: Console) -> Outcome:
    """Merge models and write the result.

    Args:
        options: What was chosen on the command line.
        console: Where progress is shown.

    Raises:
        CheckpointError: A file is damaged, or holds Python objects and is not trusted.
        FileNotFoundError: There is no such file.
        MergeError: The models, the method or its options do not fit.
        UsageError: An option cannot be read, or the result would replace one of the models.
    """
    from lightning_peft.cli.folders import check_writable
    from lightning_peft.merging.distances import distances
    from lightning_peft.merging.matching import matched
    from lightning_peft.merging.merge import merge as merged
    from lightning_peft.merging.opening import open_model, open_models

    given = _of_mergekit(options) if _is_mergekit(options) else _given(options, inspect.signature(merged).parameters)
    sources, start, method = given.pop("models"), given.pop("base"), given.pop("method")
    target = options.out or _default_target(options.models[0].parent, sources[0], start)
    check_writable(target.parent, "--out")
    _check_apart(target, [*sources, *([start] if start else []), *(options.fisher or [])])
    replaced = target.is_file()
    if replaced:
        console.print(f"[bold]{target}[/] is there already and will be replaced.", soft_wrap=True)
    base = None if start is None else open_model(start, "the base", trusted=options.trusted)
    models = open_models(sources, base, trusted=options.trusted)
    with _shown(console) as stage, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = merged(
            models,
            method,
            base=base,
            seed=options.seed,
            out=target,
            trusted=options.trusted,
            progress=stage("merging"),
            **given,
        )
        entries = matched([*([] if base is None else [base]), *models], mixed=True)
        found = distances(models, base, state, entries, stage("measuring"))
    fates = Counter(entry.fate for entry in entries)
    rows = _rows(models, base, found, state, target)
    lines, note = _loading(target, base, models, options.trusted)
    notes = list(dict.fromkeys(str(each.message) for each in caught))
    reference = "the mean of the models" if base is None else "the base"

    def show(console: Console) -> None:
        heads = ("path", "tensors", "parameters", "norm", "cosine")
        cells = tuple((row["role"], *(row[head] for head in heads)) for row in rows)
        console.print(grid(Table(("", *heads), cells), cut=("path",)))
        console.print(f"\nNorms are of differences to {reference}, cosines between those and the merged one.", highlight=False)
        console.print(_said(fates), highlight=False)
        for each in notes:
            console.print(Text(f"Note: {each}"))
        console.print(f"\nWrote [bold]{target}[/]. {note}\n", soft_wrap=True)
        console.print("\n".join(f"    {line}" for line in lines), highlight=False, markup=False, soft_wrap=True)

    data = {
        "method": method if isinstance(method, str) else f"{method.__name__} of mergekit",
        "options": {key: value for key, value in given.items() if key not in _SHARED},
        "target": str(target),
        "replaced": replaced,
        "difference_to": reference,
        "models": rows,
        "tensors": {fate: fates.get(fate, 0) for fate in ("merged", "averaged", "kept", "tied")},
        "notes": notes,
        "loading": lines,
    }
    return Outcome(data, show)


_SHARED = {"fisher": None, "weights": None, "scale": None, "per_tensor": False, "dtype": None}


def _given(options: argparse.Namespace, taken: Collection[str]) -> dict[str, Any]:
    """Return the arguments of a merge that the command line gives."""
    scale = options.scale if options.scale is None or len(options.scale) > 1 else options.scale[0]
    shared = {key: getattr(options, key) for key in _SHARED} | {"scale": scale}
    main = {"models": options.models, "method": options.method or "soup", "base": options.base}
    return main | shared | _chosen(options.option, taken)


def _is_mergekit(options: argparse.Namespace) -> bool:
    return any(path.suffix in (".yml", ".yaml") for path in options.models)


def _of_mergekit(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a merge that a configuration of mergekit gives."""
    from lightning_peft.merging.mergekit_file import read

    if len(options.models) > 1:
        raise UsageError("A configuration of mergekit names its models. Give it alone.")
    said = [key for key in ("method", "base", "option", *_SHARED) if getattr(options, key) not in (None, False, [])]
    if said:
        raise UsageError(f"--{said[0].replace('_', '-')} is chosen in {options.models[0]}. Change it there.")
    if not options.models[0].is_file():
        raise UsageError(f"There is no file {options.models[0]}.")
    return read(options.models[0])


def _chosen(given: Sequence[str], taken: Collection[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs: numbers, true, false and null as what they are, all else as text."""
    found = {}
    for pair in given:
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--option takes key=value, such as density=0.3, not {pair!r}.")
        if key in taken:
            raise UsageError(f"--option is for what the method alone knows; {key} is chosen with --{key.replace('_', '-')}.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def _default_target(folder: Path, first: Path, base: Path | None) -> Path:
    """Choose what to write into a folder: something of the first model's kind, numbered when taken."""
    kind = first if base is None or not (first / "adapter_config.json").is_file() else base
    plain = not kind.is_dir() or (kind / ".metadata").is_file()  # the latter is a checkpoint in shards
    suffix = {".pt": ".pt", ".pth": ".pth", ".bin": ".pt", ".safetensors": ".safetensors"}.get(kind.suffix, ".ckpt")
    names = (f"merged{'' if place < 2 else f'-{place}'}{suffix if plain else ''}" for place in range(1, 10_000))
    return next(folder / name for name in names if not (folder / name).exists())


def _check_apart(target: Path, sources: Sequence[Path]) -> None:
    """Refuse to write over what is read."""
    if taken := next((source for source in sources if target.exists() and source.exists() and target.samefile(source)), None):
        raise UsageError(f"The merged model would replace {taken}, which is read. Choose another place with --out.")


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show a bar for each stage, where there is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name, total=None, start=name == "merging")

            def advance(done: int, total: int) -> None:
                bars.start_task(task)
                bars.update(task, completed=done, total=total)

            return advance

        yield stage


def _rows(
    models: Sequence[Model], base: Model | None, found: Distances, state: dict[str, Any], target: Path
) -> list[dict[str, Any]]:
    rows = [] if base is None else [_row("base", base.label, base.tensors, 0.0, None)]
    for place, (model, norm, cosine) in enumerate(zip(models, found.norms, found.cosines, strict=True), 1):
        rows.append(_row(f"model {place}", model.label, model.tensors, norm, cosine))
    return [*rows, _row("merged", str(target), state, found.merged, None)]


def _row(role: str, path: str, tensors: Any, norm: float, cosine: float | None) -> dict[str, Any]:
    held = [value for value in tensors.values() if hasattr(value, "numel")]
    numbers = sum(value.numel() for value in {id(value): value for value in held}.values())
    return {"role": role, "path": path, "tensors": len(held), "parameters": numbers, "norm": norm, "cosine": cosine}


def _said(fates: Counter[Any]) -> str:
    """Say what became of the tensors."""
    words = {
        "merged": "merged",
        "averaged": "averaged, statistics of batch norms",
        "kept": "kept as the first model has them, no floating-point numbers",
        "tied": "tied to another one",
    }
    return f"Tensors: {'; '.join(f'{fates[fate]} {text}' for fate, text in words.items() if fates.get(fate))}."


def _loading(target: Path, base: Model | None, models: Sequence[Model], trusted: bool) -> tuple[list[str], str]:
    """Return the lines that load the result, and a sentence before them."""
    from lightning_peft.cli.loading import stored_lines
    from lightning_peft.merging.outputs import like
    from lightning_peft.structure import checkpoint as sections
    from lightning_peft.structure import journal

    place = repr(str(target.resolve()))
    if target.suffix == ".ckpt":
        source = like(base, models)
        return stored_lines(
            target, source.rest.get("hyper_parameters"), len(journal.read(sections.read(source.rest))), trusted=trusted
        )
    if target.suffix in (".pt", ".pth"):
        lines = ["import torch", f"net.load_state_dict(torch.load({place}, weights_only=True))"]
    elif target.suffix:
        lines = ["from safetensors.torch import load_model", f"load_model(net, {place})"]
    elif (target / "manifest.json").is_file():
        lines = ["import lightning_peft", f"lightning_peft.load_baked(net, {place})"]
    elif (name := _architecture(target / "config.json")) is not None:
        return [f"from transformers import {name}", f"net = {name}.from_pretrained({place})"], "It loads so:"
    else:
        lines = [
            "from safetensors.torch import load_model",
            f"load_model(net, {str(target.resolve() / 'model.safetensors')!r})",
        ]
    return lines, "It loads so, into a network of your class:"


def _architecture(config: Path) -> str | None:
    """The class of transformers that a configuration names."""
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) and name.isidentifier() else None
