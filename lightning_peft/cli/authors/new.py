"""`new`: the files of a method, registered and green, in this repository or as a package of the author's own."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from rich.console import Console

import lightning_peft
from lightning_peft import functional
from lightning_peft.cli.authors import generate, templates
from lightning_peft.cli.authors.checkout import PLUGINS, Checkout
from lightning_peft.cli.authors.kinds.kind import Kind
from lightning_peft.cli.authors.kinds.table import KINDS
from lightning_peft.cli.console import Outcome
from lightning_peft.cli.recipes import UsageError
from lightning_peft.contract import snake_case

LONGEST_NAME = 18  # `lightning-peft list` has one line of 80 columns for a method
PAIRS = Path("tests", "pairs", "pairs.py")


def new(name: str, family: str | None, place: Path, kind: str = "loss-term") -> Outcome:
    """Write the files of a method that works and passes its tests, for its author to change.

    Args:
        name: Name of the class, such as ``ConfidencePenalty``.
        family: Folder of the method among the plugins of this repository; a new one is made. Of no use elsewhere.
        place: Folder the command is given in. In a checkout of this repository the files go into the tree, elsewhere into a
            new package below this folder.
        kind: How the method acts, one of :data:`~lightning_peft.cli.authors.kinds.table.KINDS`.

    Raises:
        UsageError: The name cannot be used, the kind is unknown, the family is missing, or a file is there already.
    """
    snake = _check_name(name)
    if kind not in KINDS:
        raise UsageError(f"There is no kind {kind!r} of methods. Choose --kind from {', '.join(KINDS)}.")
    checkout = Checkout.around(place)
    if checkout is None:
        return _package(name, snake, place, KINDS[kind])
    if family is None or not (family.isidentifier() and family.islower()):
        known = ", ".join(checkout.families())
        raise UsageError(f"Say which family the method belongs to: --family, one of {known}, or a new folder's name.")
    return _in_tree(name, snake, family, checkout, KINDS[kind])


def _check_name(name: str) -> str:
    """Return the name of the files and of the first function."""
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name) or keyword.iskeyword(name):
        raise UsageError(f"{name!r} cannot be the name of a class. Write it like ConfidencePenalty.")
    if name.startswith("Test"):
        raise UsageError(f"pytest would take {name} for a class of tests. Choose another name.")
    if len(name) > LONGEST_NAME:
        raise UsageError(f"{name} has {len(name)} letters; the list of methods has room for {LONGEST_NAME}. Shorten it.")
    snake = snake_case(name)
    taken = [known for known in (*dir(lightning_peft), *dir(functional)) if known.lower() in (name.lower(), snake)]
    if taken:
        raise UsageError(f"There is a {taken[0]} already. Choose another name.")
    return snake


def _in_tree(name: str, snake: str, family: str, checkout: Checkout, kind: Kind) -> Outcome:
    module, functions = f"{PLUGINS}.{family}.{snake}", f"{PLUGINS}.{family}.functional.{snake}"
    folder, test = Path("plugins", PLUGINS, family), Path("tests", "plugins", f"test_{snake}.py")
    fill = {"name": name, "snake": snake, "module": module, "functions": functions, "test": test.as_posix()}
    files = {
        folder / f"{snake}.py": kind.method,
        folder / "functional" / f"{snake}.py": kind.functions,
        folder / "cards" / f"{name}.md": templates.CARD,
        test: kind.test,
    }
    written = _write(checkout.root, files, fill, kind)
    words = family.replace("_", " ")
    for package, says in ((folder, f"Methods of the family {words}."), (folder / "functional", f"Pure functions of {words}.")):
        if not (checkout.root / package / "__init__.py").exists():
            (checkout.root / package / "__init__.py").write_text(f'"""{says}"""\n', encoding="utf-8")
            written.append(package / "__init__.py")
    project = checkout.with_points(name, f"{module}:{name}", {snake: f"{functions}:{snake}"})
    checkout.project.write_text(project, encoding="utf-8")
    pairs = (checkout.root / PAIRS).read_text(encoding="utf-8")
    (checkout.root / PAIRS).write_text(_with_configuration(pairs, name), encoding="utf-8")
    written += [Path("pyproject.toml"), PAIRS, *generate.write(checkout)]
    steps = [
        f"make test ARGS={test}    # installs the name and runs what every method must pass",
        "write the formula, the class, the card, a line in CHANGELOG.md",
        "make generate    # tables and pages; trains it with every other method for docs/composition.md, in half a minute",
        "make test and make lint",
    ]
    return _outcome(written, steps)


def _package(name: str, snake: str, place: Path, kind: Kind) -> Outcome:
    """Write a package of the author's own: `peft_<name>` with its `pyproject.toml`."""
    package = f"peft_{snake}"
    test = Path("tests", f"test_{snake}.py")
    fill = {"name": name, "snake": snake, "package": package, "test": test.as_posix()}
    fill |= {"module": f"{package}.{snake}", "functions": f"{package}.functional"}
    files = {
        Path("pyproject.toml"): templates.PROJECT,
        Path(package, f"{snake}.py"): kind.method,
        Path(package, "functional.py"): kind.functions,
        Path(package, "cards", f"{name}.md"): templates.CARD,
        Path(package, "__init__.py"): '"""$name for lightning_peft."""\n',
        test: kind.test,
    }
    written = [Path(package) / path for path in _write(place / package, files, fill, kind)]
    steps = [f"pip install -e {package}", f"pytest {package}", f"lightning-peft show {name}"]
    return _outcome(written, steps)


def _write(root: Path, files: dict[Path, str], fill: dict[str, str], kind: Kind) -> list[Path]:
    """Write all files or, when one is there already, none."""
    classes = ", ".join(Template(text).substitute(fill) for text in kind.classes)
    imports = [("lightning_peft.testing", kind.tools), (fill["functions"], fill["snake"]), (fill["module"], classes)]
    fill = {**fill, "imports": "\n".join(f"from {module} import {name}" for module, name in sorted(imports))}
    fill |= {"goal": kind.goal, "needs": kind.needs, "arguments": kind.arguments, "composes": kind.composes}
    present = [str(root / path) for path in files if (root / path).exists()]
    if present:
        raise UsageError(f"{', '.join(present)} exists already. Choose another name, or move it away.")
    for path, template in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(Template(template).substitute(fill), encoding="utf-8")
    return list(files)


def _with_configuration(pairs: str, name: str) -> str:
    """Put a method into the table of configurations that train in pairs, which is in alphabetical order."""
    head, begin, rest = pairs.partition("CONFIGURATIONS: dict[str, Callable[[], Method]] = {\n")
    table, end, tail = rest.partition("\n}\n")
    lines = sorted([*table.splitlines(), f'    "{name}": peft.{name},'])
    return head + begin + "\n".join(lines) + end + tail


def _outcome(written: list[Path], steps: list[str]) -> Outcome:
    def show(console: Console) -> None:
        for path in written:
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
        console.print("\nNext:")
        for step in steps:
            console.print(f"  {step}", highlight=False, markup=False, soft_wrap=True)

    return Outcome({"files": [path.as_posix() for path in written], "next": steps}, show)
