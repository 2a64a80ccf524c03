"""Writes ``docs/compatibility/projects.md``: what every method does in every kind of project (``make compatibility``)."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import torch
from page_parts import counted, paragraph, table
from project_outcomes import METHODS, outcome
from project_styles import STYLES
from verdicts import REJECTED, SIGNS, Verdict, shortened

PAGE = Path(__file__).parents[2] / "docs" / "compatibility" / "projects.md"


def page(found: dict[tuple[str, str], Verdict]) -> str:
    """Return the page for the outcome of every style and method."""
    said = Counter((method, shortened(each.words)) for (_, method), each in found.items() if each.what == REJECTED)
    return "\n".join(
        [
            "# What works in which kind of project",
            "",
            *paragraph(
                f"Miniatures of {len(STYLES)} kinds of LightningModule (`tests/pairs/project_styles.py`), each trained for two "
                "epochs with every method, at its defaults as far as a training that short allows, a validation loader and "
                f"the sanity check; what adapts is tested afterwards. {counted(found.values())}; a test repeats it. Rejected "
                "are mostly methods that do not fit: test-time methods without class logits, growth without a list of blocks, "
                "modules of which no part is the network (name it with `network=`)."
            ),
            "",
            *table(
                ["style", "what it is", *METHODS],
                (
                    [
                        f"`{style}`",
                        (STYLES[style].__doc__ or "").split("\n")[0],
                        *(SIGNS[found[style, method].what] for method in METHODS),
                    ]
                    for style in STYLES
                ),
            ),
            "",
            "## What is said",
            "",
            *table(
                ["method", "projects", "message, shortened"],
                ([method, count, words] for (method, words), count in sorted(said.items())),
            ),
            "",
            "Written by `make compatibility`.",
            "",
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({(style, method): outcome(style, method) for style in STYLES for method in METHODS}))
