"""Writes ``docs/compatibility/projects.md``: what every method does in every kind of project (``make compatibility``)."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from textwrap import wrap

import torch
from project_outcomes import METHODS, outcome
from project_styles import STYLES
from verdicts import BREAKS, REJECTED, SIGNS, WORKS, Verdict, shortened

PAGE = Path(__file__).parents[2] / "docs" / "compatibility" / "projects.md"


def page(found: dict[tuple[str, str], Verdict]) -> str:
    """Return the page for the outcome of every style and method."""
    counts = Counter(each.what for each in found.values())
    rows = [
        f"| `{style}` | {(STYLES[style].__doc__ or '').split(chr(10))[0]} | "
        + " | ".join(SIGNS[found[style, method].what] for method in METHODS)
        + " |"
        for style in STYLES
    ]
    said = Counter((method, shortened(each.words)) for (_, method), each in found.items() if each.what == REJECTED)
    reasons = [f"| {method} | {count} | {words} |" for (method, words), count in sorted(said.items())]
    return "\n".join(
        [
            "# What works in which kind of project",
            "",
            *wrap(
                f"Miniatures of {len(STYLES)} kinds of LightningModule (`tests/pairs/project_styles.py`), each trained for two "
                "epochs with every method, at its defaults as far as a training that short allows, a validation loader and "
                f"the sanity check; what adapts is tested afterwards. **{counts[WORKS]} of {len(found)} work (+), "
                f"{counts[REJECTED]} are rejected in words (-), {counts[BREAKS]} break (!)**; a test repeats it. Rejected are "
                "mostly methods that do not fit: test-time methods without class logits, growth without a list of blocks, "
                "modules of which no part is the network (name it with `network=`).",
                120,
            ),
            "",
            "| style | what it is | " + " | ".join(METHODS) + " |",
            "| --- | --- |" + " --- |" * len(METHODS),
            *rows,
            "",
            "## What is said",
            "",
            "| method | projects | message, shortened |",
            "| --- | --- | --- |",
            *reasons,
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
