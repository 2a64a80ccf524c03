"""When a weight is dense, softly masked or N:M sparse: the phases of every N:M recipe, as a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.weights.nm_pattern import geometric_frames, stepwise_frames
from lightning_peft.weights.nm_prune import decay_exponential, decay_linear

Recipe = Literal["one-shot", "ste", "sr-ste", "mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric"]
RECIPES: tuple[str, ...] = get_args(Recipe)

# The official ViT-B run takes about 350 epochs x 312 updates. Its exponential decay, 1e-4 an update, ends at exp(-10.9); its
# linear one, 2e-4, is through after 5,000. `decay="auto"` keeps that in proportion, whatever the length of the training.
OFFICIAL_EXPONENT = 10.9
OFFICIAL_SLOPE = 350 * 312 / 5_000

NEVER = 2**63 - 1
"""Stands for a step that no training reaches, in a timeline without an end."""


@dataclass(frozen=True)
class PhaseTimeline:
    """Boundaries of the three phases, in optimizer steps.

    Attributes:
        dense_end: First step of the sparse phase.
        sparse_end: First step of the fine-tune phase, in which the mask is binary; :data:`NEVER` without one.
        total: Steps of the whole training; :data:`NEVER` when nobody knows.
    """

    dense_end: int
    sparse_end: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.dense_end <= self.sparse_end <= self.total:
            raise MisconfigurationException(
                f"The phases do not fit into {self.total} steps: dense until {self.dense_end}, sparse until {self.sparse_end}. "
                "Shorten dense= or fine_tune=."
            )


def needs_end(recipe: str, coefficient: float | None) -> bool:
    """Whether the sparse phase of a recipe depends on how long it is.

    Example:
        >>> needs_end("sr-ste", None), needs_end("mdgf-linear", None), needs_end("mdgf-linear", 1e-3)
        (False, True, False)
    """
    return recipe.startswith("sdgf") or (recipe.startswith("mdgf") and coefficient is None)


@dataclass(frozen=True)
class Phase:
    """The masks of one step: N and M in force, and the factor ``decay`` of pruned weights (1 is dense, 0 is binary)."""

    n: int
    m: int
    decay: float


def phase_at(step: int, timeline: PhaseTimeline, recipe: str, n: int, m: int, coefficient: float | None = None) -> Phase:
    """Return the phase of a recipe at a step.

    Args:
        step: Optimizer steps done.
        timeline: Boundaries of the phases.
        recipe: One of :data:`RECIPES`.
        n: Target N.
        m: Target M.
        coefficient: Decay per step of the MDGF recipes; ``None`` scales it to the length of the sparse phase: the
            exponential one ends at ``exp(-10.9)`` as the official ViT-B run does, the linear one is at zero after 4.6 % of it.

    Returns:
        The phase.

    Example:
        >>> timeline = PhaseTimeline(dense_end=10, sparse_end=90, total=100)
        >>> [phase_at(step, timeline, "sdgf-stepwise", 1, 8).n for step in (10, 30, 50, 70, 95)]
        [7, 4, 2, 1, 1]
    """
    if step < timeline.dense_end:
        return Phase(n, m, 1.0)
    if step >= timeline.sparse_end or not recipe.startswith(("mdgf", "sdgf")):
        return Phase(n, m, 0.0)
    if recipe.startswith("mdgf"):
        done, length = step - timeline.dense_end, max(1, timeline.sparse_end - timeline.dense_end)
        if recipe == "mdgf-linear":
            return Phase(n, m, decay_linear(done, OFFICIAL_SLOPE / length if coefficient is None else coefficient))
        return Phase(n, m, decay_exponential(done, OFFICIAL_EXPONENT / length if coefficient is None else coefficient))
    frames = (stepwise_frames if recipe == "sdgf-stepwise" else geometric_frames)(n, m, timeline.dense_end, timeline.sparse_end)
    current = [frame for frame in frames if frame[0] <= step][-1]
    return Phase(current[1], current[2], 0.0)
