"""The Python code of the documentation runs as it is printed, page by page, on a small network."""

from __future__ import annotations

import markdown
import pytest
import reader
import torch
from quick_plots import draw_quickly

# Blocks with a title are files; tests/test_contributing.py writes and runs them.
WITH_CODE = {
    markdown.name(path): code
    for path in markdown.PAGES
    if (code := [block for block in markdown.blocks(path) if block.language == "python" and not block.title])
}
README, HOME = "README.md", "docs/index.md"


def run(page: str, block: markdown.Block, names: dict[str, object]) -> None:
    """Execute one block; a traceback shows the page and the line there."""
    exec(compile("\n" * (block.line - 1) + block.text, markdown.ROOT / page, "exec"), names)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_quickly(monkeypatch)
    return reader.names(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of Lightning on loaders and folders, of exporters on themselves
@pytest.mark.parametrize("page", sorted(set(WITH_CODE) - {README, HOME}))
def test_the_code_of_a_page_runs(page: str, names) -> None:
    if page == "docs/shifts.md":
        pytest.importorskip("imagecorruptions", reason="the extra `corruptions` is not installed")
        names["data"] = reader.Changing()
        names["images"] = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for block in WITH_CODE[page]:
        run(page, block, names)


@pytest.mark.filterwarnings("ignore")
def test_the_readme_runs_and_continues_from_the_last_checkpoint(names) -> None:
    first, second = WITH_CODE[README]
    module = names["my_module"]
    before = module.steps
    run(README, first, names)
    assert module.steps == before + 30, "30 epochs of one batch"
    run(README, second, names)
    assert module.steps == before + 60
    run(README, second, names)
    assert module.steps == before + 60, "all was done already, and the last checkpoint says so"


def test_the_home_page_begins_with_the_readmes_code() -> None:
    assert WITH_CODE[HOME][0].text == WITH_CODE[README][0].text
    assert len(WITH_CODE[HOME]) == 1


def test_pages_of_text_have_no_code_in_another_guise() -> None:
    for path in markdown.PAGES:
        assert {block.language for block in markdown.blocks(path)} <= {"python", "sh", "toml", "yaml", "text", ""}
        for block in markdown.blocks(path):
            assert block.language == "python" or "import " not in block.text, f"{markdown.name(path)}:{block.line}"
