"""Who may import whom: recipes -> plugins -> engine, and nobody an optional dependency before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft import functional, registry

ROOT = Path(__file__).parents[1]
ENGINE, PLUGINS, RECIPES = (
    ROOT / "lightning_peft",
    ROOT / "plugins/lightning_peft_plugins",
    ROOT / "recipes/lightning_peft_recipes",
)
OPTIONAL = {
    "timm",
    "transformers",
    "peft",
    "matplotlib",
    "pandas",
    "pyarrow",
    "PIL",
    "safetensors",
    "torch_pruning",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pytorch_lightning",
}
TEST_ONLY = {"pytest", "hypothesis"}


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run on import: not those in functions, not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from module_level(node)


def imported(nodes: Iterator[ast.AST], module: str) -> Iterator[str]:
    """Names of modules that nodes import, `import_module("...")` with a constant included."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def imports(path: Path, root: Path, *, on_import_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = module_level(tree) if on_import_only else ast.walk(tree)
    return set(imported(nodes, name_of(path, root) + (".x" if path.name == "__init__.py" else "")))


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", files(ENGINE), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_imports_no_plugin_and_no_recipe(path):
    assert not tops(imports(path, ENGINE)) & {"lightning_peft_plugins", "lightning_peft_recipes"}


@pytest.mark.parametrize(
    ("path", "root"),
    [(path, root) for root in (ENGINE, PLUGINS) for path in files(root)],
    ids=lambda value: str(value.relative_to(ROOT)),
)
def test_optional_dependencies_are_imported_inside_functions(path, root):
    found = tops(imports(path, root, on_import_only=True))
    assert not found & OPTIONAL
    assert not found & TEST_ONLY or path.is_relative_to(ENGINE / "testing")


@pytest.mark.parametrize("path", files(ENGINE), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_does_not_need_its_testing_folder(path):
    if not path.is_relative_to(ENGINE / "testing"):
        assert not [name for name in imports(path, ENGINE) if name.startswith("lightning_peft.testing")]


def arrows(tree: ast.AST, module: str) -> set[str]:
    """Files of the engine that a file imports, lazily and for type checkers too."""
    return {name for name in imported(ast.walk(tree), module) if name in ENGINE_FILES and name != module}


ENGINE_FILES = {name_of(path, ENGINE) for path in files(ENGINE) if path.name != "__init__.py"}


def room_of(module: str) -> str:
    """The folder of the engine a file stands in; a file of the top level is a room of its own."""
    return module.split(".")[1]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is in a circle or leads into one: names left when those that lead nowhere are taken away again and again."""
    left = {name: set(targets) for name, targets in graph.items()}
    while ends := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ends:
            del left[name]
    return [[name, *sorted(targets & left.keys())] for name, targets in sorted(left.items())]


def engine_graph() -> dict[str, set[str]]:
    paths = [path for path in files(ENGINE) if path.name != "__init__.py"]
    trees = {name_of(path, ENGINE): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    return {name: arrows(tree, name) for name, tree in trees.items()}


def test_no_files_of_the_engine_import_each_other_in_a_circle():
    assert not circles(engine_graph())


def test_the_rooms_of_the_engine_are_layers():
    rooms: dict[str, set[str]] = {}
    for name, targets in engine_graph().items():
        rooms.setdefault(room_of(name), set()).update(room_of(target) for target in targets)
    assert not circles({room: targets - {room} for room, targets in rooms.items()})


def test_a_circle_is_seen_through_lazy_imports_and_those_for_type_checkers():
    lazy = ast.parse("def f():\n    from lightning_peft.attaching import hub")
    typed = ast.parse("if TYPE_CHECKING:\n    from lightning_peft.weights.maps import WeightMap")
    graph = {"lightning_peft.weights.maps": arrows(lazy, "x"), "lightning_peft.attaching.hub": arrows(typed, "x")}
    assert circles(graph) == [
        ["lightning_peft.attaching.hub", "lightning_peft.weights.maps"],
        ["lightning_peft.weights.maps", "lightning_peft.attaching.hub"],
    ]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("path", files(PLUGINS), ids=lambda path: str(path.relative_to(ROOT)))
def test_families_do_not_import_each_other_or_recipes(path):
    found = imports(path, PLUGINS)
    assert "lightning_peft_recipes" not in tops(found)
    parts = path.relative_to(PLUGINS).parts
    family = parts[0] if len(parts) > 1 else None
    others = {
        name.split(".")[1]
        for name in found
        if name.startswith("lightning_peft_plugins.") and (PLUGINS / name.split(".")[1]).is_dir()
    }
    assert others <= {family}


@pytest.mark.parametrize("path", [*files(PLUGINS), *files(RECIPES)], ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_come_from_the_package_as_contributing_teaches(path):
    deep = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    public = {f"lightning_peft.{module}.{name}" for name, module in lightning_peft._HOMES.items()}
    assert not deep & public, "import it as `from lightning_peft import ...`"


@pytest.mark.parametrize("family", sorted(path.name for path in PLUGINS.iterdir() if (path / "__init__.py").exists()))
def test_a_family_lists_its_methods_and_nothing_beside(family):
    """Helpers stand in a folder named after their method, or in one that says it is shared; pure functions in functional."""
    entries = (*registry.installed().values(), *registry.merge_functions().values())
    methods = {entry.value.partition(":")[0] for entry in entries}
    folder = PLUGINS / family
    listed = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert listed == {module.rpartition(".")[2] for module in methods if f".{family}." in module}
    folders = {path.parent.relative_to(folder).parts[0] for path in files(folder) if path.parent != folder}
    named = {f"_{name}" for name in listed}
    assert folders <= named | {"_shared", "functional"}


def test_functions_that_plugins_offer_stand_in_a_folder_functional():
    points = [point for point in entry_points(group=functional.GROUP) if point.dist.name == "lightning-peft"]
    assert points
    assert not [point.value for point in points if point.value.split(".")[2] != "functional"]


@pytest.mark.parametrize(
    "path",
    [path for root in (ENGINE, PLUGINS, RECIPES) for path in files(root) if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_folder_says_what_lives_there(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} needs a docstring"


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for root in (ENGINE, PLUGINS, RECIPES) for path in files(root)}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_importing_the_whole_engine_loads_nothing_optional():
    modules = [name_of(path, ENGINE) for path in files(ENGINE) if not path.is_relative_to(ENGINE / "testing")]
    script = f"""
import sys
import torch, lightning.pytorch, torchmetrics.classification, jsonargparse
before = set(sys.modules)
for name in {modules!r}:
    if not name.endswith("__main__"):
        __import__(name)
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & {OPTIONAL | TEST_ONLY | {"lightning_peft_plugins", "lightning_peft_recipes"}!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "[]"


def test_this_file_can_see_a_forbidden_import():
    source = "def f():\n    from lightning_peft_plugins import x\nif TYPE_CHECKING:\n    import timm\nif True:\n    import peft"
    tree = ast.parse(source)
    assert tops(set(imported(ast.walk(tree), "lightning_peft.a"))) == {"lightning_peft_plugins", "timm", "peft"}
    assert tops(set(imported(module_level(tree), "lightning_peft.a"))) == {"peft"}
    relative = ast.parse("from ..regularizers import pskd")
    assert "lightning_peft_plugins.regularizers.pskd" in set(imported(ast.walk(relative), "lightning_peft_plugins.sparsity.nm"))
