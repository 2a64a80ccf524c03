"""Finding recipes: plain LightningCLI YAML files, packaged or anywhere on disk, with a header that says what they need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GROUP = "lightning_peft.recipes"

# Which import tells that an extra of the distribution is there.
EXTRAS = {
    "vision": ("timm", "pyarrow", "PIL", "h5py"),
    "language": ("transformers", "pyarrow", "pandas"),
    "corruptions": ("imagecorruptions",),
    "evolution": ("cma",),
    "report": ("matplotlib",),
    "interop": ("peft", "safetensors"),
    "prune": ("torch_pruning",),
    "export": ("safetensors", "onnx", "onnxscript", "onnxruntime"),
}


class UsageError(Exception):
    """The request cannot be met; the message says what can be done instead."""


@dataclass(frozen=True)
class Recipe:
    """One recipe file and what its header says.

    The header is one comment, ``# recipe: {summary: ..., needs: [vision], ...}``, in YAML flow style, which may run on over
    the following comment lines until its brace closes. Without it everything has its default.

    Attributes:
        name: Packaged name (``"language/nm_minilm_reviews"``), or the file's stem.
        path: The YAML file.
        summary: One sentence.
        command: Command it is for: ``"run"`` (and ``compare``) or ``"adapt"``.
        needs: Extras of this distribution the recipe imports.
        minutes: Duration on two CPU cores, everything included; 0 when unknown.
        baseline: Whether ``run`` also trains without the methods.
        monitor: Logged test metric the recipe is about.
        online: How to take data and weights from their usual online source instead.
    """

    name: str
    path: Path
    summary: str = ""
    command: str = "run"
    needs: tuple[str, ...] = ()
    minutes: float = 0
    baseline: bool = True
    monitor: str = "test/accuracy"
    online: str = ""


def folders() -> Iterator[Path]:
    """Yield the folder of every installed package of recipes, without importing it."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        # A dotted name would make find_spec import the parents.
        spec = find_spec(point.value) if "." not in point.value else None
        places = spec.submodule_search_locations if spec is not None else None
        yield from (Path(place) for place in places or ())


def packaged() -> dict[str, Recipe]:
    """Return all packaged recipes by name."""
    found: dict[str, Recipe] = {}
    for folder in folders():
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(name, read(path, name))
    return found


def read(path: Path, name: str | None = None) -> Recipe:
    """Read the header of a recipe file.

    Args:
        path: YAML file.
        name: Packaged name, if it has one.

    Raises:
        UsageError: The file cannot be read, or its header is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} cannot be read: {error}") from error
    header = parse_header(text, path)
    known = set(Recipe.__dataclass_fields__) - {"name", "path"}
    unknown = sorted(set(header) - known)
    if unknown:
        raise UsageError(f"The header of {path} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    missing = sorted(set(header.get("needs", ())) - set(EXTRAS))
    if missing:
        raise UsageError(f"The header of {path} needs unknown extras {', '.join(missing)}; known are {', '.join(EXTRAS)}.")
    header["needs"] = tuple(header.get("needs", ()))
    return Recipe(name=name or path.stem, path=path, **header)


def parse_header(text: str, path: Path) -> dict[str, Any]:
    r"""Return the mapping in the ``# recipe:`` comment of a YAML text, empty when there is none.

    Raises:
        UsageError: The comment is no YAML mapping.

    Example:
        >>> parse_header("# recipe: {summary: Two lines,\n#   minutes: 4}\ntrainer:\n", Path("a.yaml"))
        {'summary': 'Two lines', 'minutes': 4}
    """
    import yaml

    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if re.match(r"#\s*recipe\s*:", line)), None)
    if start is None:
        return {}
    comment: list[str] = []
    for line in lines[start:]:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("#").strip())
        if comment[-1].endswith("}"):
            break
    try:
        parsed = yaml.safe_load("\n ".join(comment))
    except yaml.YAMLError as error:
        raise UsageError(f"The `# recipe:` header of {path} is not YAML: {str(error).splitlines()[0]}") from error
    header = parsed.get("recipe") if isinstance(parsed, dict) else None
    if not isinstance(header, dict):
        raise UsageError(f"The `# recipe:` header of {path} must be a mapping: # recipe: {{summary: ..., minutes: 4}}")
    return header


def find(name: str) -> Recipe:
    """Return the recipe called ``name``: a packaged name, or the path of a YAML file.

    Raises:
        UsageError: There is none; the nearest names are listed.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return read(path)
        found = packaged()
        name = path.with_suffix("").as_posix()
        if name not in found:
            raise UsageError(f"There is no file {path}.{_suggest(name, found)}")
        return found[name]
    found = packaged()
    if name in found:
        return found[name]
    endings = [known for known in found if known.rsplit("/", 1)[-1] == name]
    if len(endings) == 1:
        return found[endings[0]]
    raise UsageError(f"There is no recipe {name!r}.{_suggest(name, found)} A path to a YAML file works as well.")


def _suggest(name: str, found: dict[str, Recipe]) -> str:
    from lightning_peft.registry import suggest

    return suggest(name, list(found))


def find_for(command: str, name: str) -> Recipe:
    """Return the recipe called ``name``, which is for this command.

    Raises:
        UsageError: There is none, or it is for another command.
    """
    recipe = find(name)
    if recipe.command != command:
        raise UsageError(f"The recipe {recipe.name} is for another command: lightning-peft {recipe.command} {name}")
    return recipe


def check_seeds(seeds: int) -> None:
    """Refuse a number of seeds that leaves nothing to run.

    Raises:
        UsageError: It is less than one.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least one seed is needed.")


def check_extras(recipe: Recipe) -> None:
    """Refuse a recipe whose extras are not installed.

    Raises:
        UsageError: Names the pip command.
    """
    absent = [extra for extra in recipe.needs if any(find_spec(module) is None for module in EXTRAS[extra])]
    if absent:
        modules = [module for extra in absent for module in EXTRAS[extra] if find_spec(module) is None]
        raise UsageError(
            f'The recipe {recipe.name} needs {", ".join(modules)}: pip install "lightning-peft[{",".join(absent)}]"'
        )
