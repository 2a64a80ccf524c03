"""Two networks measured side by side, and the report on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.baking.plain_network import Inputs
from lightning_peft.measure.deployment import compare
from lightning_peft.measure.figures import Comparison
from lightning_peft.report.deployment import deployment_report
from lightning_peft.report.report import Report


@dataclass(frozen=True)
class DeploymentReport(Comparison):
    """A comparison that can be written.

    Attributes:
        made_by: Command to name in the report.
    """

    made_by: str = ""

    def report(self) -> Report:
        """Return the report; ``save`` it."""
        return deployment_report(self, self.made_by)

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``report.html``, ``report.md``, ``report.json`` and the plots; return the files."""
        return self.report().save(folder)


def compare_deployments(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs | list[Inputs],
    batches: Iterable[Any] | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    runs: int = 30,
    warm_up: int = 5,
    names: tuple[str, str] = ("before", "after"),
    made_by: str = "",
) -> DeploymentReport:
    """Measure two networks in one run, calls in turn, and say what FLOPs promised and what the clock gave.

    Args:
        before: The one to compare with, such as the dense network.
        after: The other.
        inputs: As for :func:`~lightning_peft.measure.deployment.measure`.
        batches: Labelled batches for accuracy and calibration: pairs of inputs and class indices, or mappings with
            ``labels``.
        batch_sizes: As for :func:`~lightning_peft.measure.deployment.measure`.
        runs: As for :func:`~lightning_peft.measure.deployment.measure`.
        warm_up: As for :func:`~lightning_peft.measure.deployment.measure`.
        names: What to call them.
        made_by: Command to name in the report.

    Returns:
        The comparison; ``write`` it.

    Raises:
        MisconfigurationException: As :func:`~lightning_peft.measure.deployment.measure`; or they are on different devices, or
            batches have no labels.
    """
    if names[0] == names[1]:
        raise MisconfigurationException(f"names={names!r} are the same. Give the two networks different names.")
    networks = {names[0]: before, names[1]: after}
    found = compare(networks, inputs, batches, batch_sizes=batch_sizes, runs=runs, warm_up=warm_up)
    return DeploymentReport(**vars(found), made_by=made_by)
