"""Every command line in the documentation, in cards and in recipes exists, with these flags and these names."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import markdown
import pytest
import yaml

from lightning_peft import registry
from lightning_peft.cli import launch
from lightning_peft.cli.main import TAKES_OVERRIDES, build_parser
from lightning_peft.cli.recipes import EXTRAS, Recipe, UsageError, check_extras, packaged

# LightningCLI's own use of jsonargparse; the command line leaves these remarks out too.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4\."),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning"),
]

PLACEHOLDERS = {"METHOD", "RECIPE", "CKPT", "<recipe>", "NAME"}
SHOWN = [
    pytest.param(arguments, id=f"{markdown.name(path)} {' '.join(arguments)}")
    for path in [*markdown.PAGES, *markdown.RECIPES]
    for arguments in markdown.commands(path, "lightning-peft")
]
BENCHMARKS = [
    pytest.param(arguments, id=f"{markdown.name(path)} {' '.join(arguments)}")
    for path in markdown.PAGES
    for arguments in markdown.commands(path, "python")
    if arguments[0].startswith("benchmarks/")
]


@pytest.mark.parametrize("arguments", SHOWN)
def test_the_command_line_knows_it(arguments: list[str]) -> None:
    if len(arguments) == 1:  # a command's name in a sentence
        arguments = [*arguments, "--help"]
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args(arguments)
        return
    options, overrides = build_parser().parse_known_args(arguments)
    assert not overrides or (options.command in TAKES_OVERRIDES and options.recipe), f"unknown: {overrides}"
    known = packaged()
    if (recipe := getattr(options, "recipe", None)) and not recipe.endswith(".yaml") and recipe not in PLACEHOLDERS:
        assert recipe in known
        assert options.command in {known[recipe].command, "compare", "export", "report"}
        assert_override(known[recipe], tuple(overrides))
    if options.command == "show" and options.name not in PLACEHOLDERS:
        assert options.name in registry.installed()


@cache
def assert_override(recipe: Recipe, overrides: tuple[str, ...]) -> None:
    """Let LightningCLI parse the recipe with these arguments, without building anything."""
    if not overrides:
        return
    try:
        check_extras(recipe)
    except UsageError as missing:
        pytest.skip(str(missing))
    launch.parse(recipe, overrides)


@pytest.mark.parametrize("path", markdown.RECIPES, ids=markdown.name)
def test_overrides_in_a_recipes_comments_exist(path) -> None:
    recipe = next(known for known in packaged().values() if known.path.name == path.name)
    comments = " ".join(line for line in path.read_text().splitlines() if line.startswith("#") and "lightning-peft" not in line)
    shown = re.findall(r"--(?:model|data|trainer)[.\w]* (?!my_package)[\w./-]+", comments)
    assert_override(recipe, tuple(word for override in shown for word in override.split(" ", 1)))


@cache
def constants(script: Path) -> set[object]:
    """The constants of a script and of the scripts beside it that it imports: one of them may read the command line."""
    nodes = list(ast.walk(ast.parse(script.read_text())))
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    beside = [script.with_name(f"{name}.py") for name in imported]
    own = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return own.union(*(constants(path) for path in beside if path.exists()))


@pytest.mark.parametrize("arguments", BENCHMARKS)
def test_a_benchmark_has_these_flags(arguments: list[str]) -> None:
    written = constants(markdown.ROOT / arguments[0])
    flags = [word for word in arguments[1:] if word.startswith("--")]
    assert [flag for flag in flags if not {flag, flag[2:]} & written] == []  # a loop may put the dashes before the names


@pytest.mark.parametrize("path", markdown.PAGES, ids=markdown.name)
def test_make_targets_and_extras_exist(path) -> None:
    targets = set(re.findall(r"^(\w+):", (markdown.ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {arguments[0] for arguments in markdown.commands(path, "make")} <= targets
    extras = re.findall(r'pip install [^\n`]*"(?:lightning-peft|\.)\[([\w,]+)\]"', path.read_text())
    assert {extra for group in extras for extra in group.split(",")} <= {*EXTRAS, "all", "test", "docs", "dev"}


@pytest.mark.parametrize("path", markdown.PAGES, ids=markdown.name)
def test_yaml_is_yaml(path) -> None:
    for block in markdown.blocks(path):
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
