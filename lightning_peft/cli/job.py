"""One training and test of a recipe, to be done in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_peft.cli.recipes import Recipe

RESULT, CURVES = "trial.json", "curves"


@dataclass(frozen=True)
class Job:
    """A training to be done.

    Attributes:
        recipe: The recipe.
        overrides: LightningCLI arguments that win over it.
        folder: Where its files go.
        checkpoint: Where its last checkpoint goes.
        name: Name in tables and plots.
        without: Class names of methods to leave out.
        seed: Seed of everything; ``None`` leaves it to the recipe.
        trusted: Whether Python objects in its checkpoint may be rebuilt, should it continue.
        made_from: What its result depends on besides recipe and overrides; see :func:`lightning_peft.cli.folders.settings`.
        rehearsal: Whether only to see if it works, and to leave nothing outside of its folder.
    """

    recipe: Recipe
    overrides: Sequence[str]
    folder: Path
    checkpoint: Path
    name: str
    without: Sequence[str] = ()
    seed: int | None = None
    trusted: bool = False
    made_from: Sequence[str] = ()
    rehearsal: bool = False

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    @property
    def kept(self) -> bool:
        """Whether there is anything to go on from: its result or a checkpoint."""
        return self.finished or self.checkpoint.is_file()

    def arguments(self) -> list[str]:
        """Return its LightningCLI arguments, seed included."""
        return [*self.overrides, *([] if self.seed is None else ["--seed_everything", str(self.seed)])]

    def to_json(self) -> str:
        """Return the job as text, from which :meth:`from_json` makes it again in another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Make a job again."""
        data = json.loads(text)
        header = data["recipe"]
        recipe = Recipe(**{**header, "path": Path(header["path"]), "needs": tuple(header["needs"])})
        return cls(**{**data, "recipe": recipe, "folder": Path(data["folder"]), "checkpoint": Path(data["checkpoint"])})
