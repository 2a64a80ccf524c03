"""Whether networks that grew or were pruned in training did so alike: only then do their units correspond."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.model import Model
from lightning_peft.structure import checkpoint, journal


def check_structures(models: Sequence[Model]) -> None:
    """Refuse models whose records of structural changes differ; a state dict alone has none, and is not looked at.

    Args:
        models: All of them, the base too.

    Raises:
        MergeError: Two went through different changes.
    """
    recorded = [model for model in models if model.rest]
    for one, two in itertools.pairwise(recorded):
        edits, others = (journal.read(checkpoint.read(model.rest)) for model in (one, two))
        if edits != others:
            raise MergeError(
                f"{one.label} went through {_count(edits)} in training and {two.label} through {_count(others, edits)}, so "
                "that their units do not correspond. Merge models of one structure: begin the trainings at one checkpoint from "
                "after the last change, and give that as the base too."
            )


def _count(edits: Sequence[object], than: Sequence[object] = ()) -> str:
    if not edits:
        return "no structural change"
    words = f"{len(edits)} structural change{'s' if len(edits) > 1 else ''}"
    return f"{words} of another kind" if len(edits) == len(than) else words
