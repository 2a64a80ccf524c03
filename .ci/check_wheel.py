"""Check that a wheel holds every module and data file of the source tree, and every entry point of pyproject.toml."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOTS = (Path(), Path("plugins"), Path("recipes"))
PACKAGES = ("lightning_peft", "lightning_peft_plugins", "lightning_peft_recipes")


def main(wheel: str) -> None:
    """Raise ``SystemExit`` with what is missing."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    sources = {
        str(path.relative_to(root))
        for root, package in zip(ROOTS, PACKAGES, strict=True)
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = sorted(sources - names)
    missing += [name for name in ("NMSparsity", "WeightCompander", "PSKD", "lightning-peft") if f"{name} = " not in points]
    recipes = sorted(name for name in names if name.endswith(".yaml"))
    if missing or not recipes:
        raise SystemExit(f"{wheel} lacks: {', '.join(missing) or 'recipes'}")
    print(f"{Path(wheel).name}: {len(names)} files, {len(recipes)} recipes")


if __name__ == "__main__":
    main(sys.argv[1])
