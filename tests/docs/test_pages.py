"""Every method has a page with its card and its class, and the pages and the README name everything that ships."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from lightning_peft import registry
from lightning_peft.cli.cards import summary_of
from lightning_peft.cli.recipes import packaged

ROOT = Path(__file__).parent.parent.parent
OURS = {name: entry for name, entry in registry.installed().items() if entry.distribution == "lightning-peft"}

PACKAGE = '''
class Base:
    """Base.

    Args:
        rate: How fast,
            and no faster.
        seed: Other words.
        fixed: Not handed on.
    """

    def __init__(self, rate: float = 0.5, *, seed: int | None = None, fixed: bool = False): ...

class Middle(Base):
    """Middle."""

    def __init__(self, **kwargs): super().__init__(fixed=True, **kwargs)

class Method(Middle):
    """See :class:`~their.Base`.

    Args:
        seed: Its own words.

    Example:
        >>> [(1, 8)](2)
        [(1, 8)](2)
    """

    def __init__(self, seed: int = 3, **kwargs): super().__init__(seed=seed, **kwargs)

class Closed(Base):
    """Takes nothing."""

    def __init__(self): super().__init__()
'''


@pytest.mark.parametrize("name", OURS)
def test_a_method_has_a_page_with_its_card_and_its_class(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    card = re.search(r'--8<-- "(.+):(\d+)"', page)
    assert card is not None
    shown = "\n".join((ROOT / card[1]).read_text().splitlines()[int(card[2]) - 1 :])
    assert shown.startswith(summary_of(OURS[name])[:20]), "the page shows the card from below its title"
    assert f"::: {OURS[name].value.replace(':', '.')}\n" in page


def test_there_is_no_page_without_a_method() -> None:
    assert {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} == set(OURS)


def test_readme_and_home_page_name_every_method_and_recipe() -> None:
    readme, home = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    for name in OURS:
        summary = summary_of(OURS[name])
        assert re.search(rf"\| \[`{name}`\]\(plugins/[^)]+/{name}\.md\) \| {re.escape(summary)} \|", readme), name
        assert f"| [`{name}`](methods/{name}.md) | {summary} |" in home, name
    for name in packaged():
        assert f"`{name}`" in readme, name


def test_links_of_the_readme_lead_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


def test_the_reference_explains_inherited_arguments_and_shows_examples_as_code(tmp_path, monkeypatch) -> None:
    griffe = pytest.importorskip("griffe", reason="the documentation's packages are not installed; make docs installs them")
    spec = importlib.util.spec_from_file_location("griffe_docstrings", ROOT / ".ci" / "griffe_docstrings.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    (tmp_path / "their.py").write_text(PACKAGE)
    monkeypatch.setattr(extension, "METHODS", "their")
    monkeypatch.setattr(extension, "ENGINE", "their")
    read = griffe.load(
        "their", search_paths=[tmp_path], extensions=griffe.Extensions(extension.Docstrings()), try_relative_path=False
    )
    sections = {section.kind.value: section for section in read["Method"].docstring.parse("google", warnings=False)}
    assert [(item.name, item.description) for item in sections["parameters"].value] == [("seed", "Its own words.")]
    inherited = {item.name: (str(item.annotation), item.description) for item in sections["other parameters"].value}
    assert inherited["rate"] == ("float", "How fast, and no faster. Default: `0.5`.")
    assert "seed" not in inherited
    assert "examples" in sections
    assert sections["text"].value == "See `Base`."
    assert read["Closed"].docstring.value == "Takes nothing."
    assert "their" not in sys.modules
