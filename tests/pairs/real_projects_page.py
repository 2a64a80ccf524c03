"""Writes ``docs/compatibility/real_projects.md``: what methods do in modules of real projects.

    python tests/pairs/real_projects_page.py FOLDER [METHOD ...]

FOLDER holds the checkouts that ``real_projects.py`` names. What is on record is not tried again, so the run can be interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from page_parts import counted, paragraph, table
from project_outcomes import METHODS, evaluated, trained
from real_projects import PROJECTS
from rich.console import Console
from rich.progress import track
from verdicts import REJECTED, SIGNS, WORKS, Verdict, general, verdict

PAGE = Path(__file__).parents[2] / "docs" / "compatibility" / "real_projects.md"
RECORD = Path(__file__).with_suffix(".json").with_stem("real_projects")
Found = dict[tuple[str, str], Verdict]


def outcome(folder: Path, name: str, method: str) -> Verdict:
    """Train a module of a project with a method."""
    seed_everything(0, verbose=False)
    project, tests = PROJECTS[name](folder), can_be_tested(folder, name)
    return verdict(lambda: trained(project.module, project.data, METHODS[method](project), project.callbacks, tests))


@cache
def can_be_tested(folder: Path, name: str) -> bool:
    """Whether Lightning tests the module, or validates it on its own, without any method."""
    project = PROJECTS[name](folder)
    return verdict(lambda: evaluated(project.module, project.data)).what == WORKS


def load() -> Found:
    """Read what is on record."""
    if not RECORD.exists():
        return {}
    return {tuple(key.split(" / ")): Verdict(*value) for key, value in json.loads(RECORD.read_text()).items()}


def save(found: Found) -> None:
    """Write the record, a line a cell."""
    cells = {" / ".join(key): [each.what, each.words[:200]] for key, each in sorted(found.items())}
    RECORD.write_text(json.dumps(cells, indent=0) + "\n")


def complete(found: Found) -> Found:
    """Leave out methods that were not tried on every module yet."""
    names = {name for name, _ in found}
    tried = Counter(method for _, method in found)
    return {key: each for key, each in found.items() if tried[key[1]] == len(names)}


def page(found: Found) -> str:
    """Return the page for what is on record."""
    said = Counter((method, general(each.words)) for (_, method), each in found.items() if each.what == REJECTED)
    names, methods = sorted({name for name, _ in found}), sorted({method for _, method in found})
    return "\n".join(
        [
            "# What works in modules of real projects",
            "",
            *paragraph(
                f"{len(names)} LightningModules that others wrote, taken as they are from Lightning's examples and tutorials, "
                "lightning-hydra-template, lightly, torchgeo, pytorch-forecasting, neuralforecast, torch-uncertainty, chemprop "
                "and scvi-tools (`tests/pairs/real_projects.py`), with random data of the form that each takes. Each trains "
                f"for two epochs of at most four batches with each of {len(methods)} methods, a validation loader and the "
                "sanity check; what adapts is tested afterwards, or validated where a project has no test, if that works "
                f"without a method. {counted(found.values())}. Made by "
                "`python tests/pairs/real_projects_page.py FOLDER`, which needs "
                "checkouts and packages of these projects; [miniatures](projects.md) of such modules are in the tests."
            ),
            "",
            *table(
                ["module", *methods],
                (
                    [name, *(SIGNS[found[name, each].what] if (name, each) in found else "" for each in methods)]
                    for name in names
                ),
            ),
            "",
            "## What is said",
            "",
            *table(
                ["method", "projects", "message, its first clause"], ([m, n, words] for (m, words), n in sorted(said.items()))
            ),
            "",
        ]
    )


def main(folder: str, *methods: str) -> None:
    """Try what is not on record, then write the page."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = load()
    todo = [(name, method) for method in methods or METHODS for name in PROJECTS if (name, method) not in found]
    for name, method in track(todo, description="real projects", console=Console(stderr=True)):
        try:
            found[name, method] = outcome(Path(folder), name, method)
        except Exception as error:  # the project is not there, or does not run here without a method either
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        save(found)
    PAGE.write_text(page(complete(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
