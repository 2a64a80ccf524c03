"""The table of calibration errors, the same in every report that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_peft.report.contents import Cell, Table

WHY_SEVERAL = (
    "Estimators and numbers of bins can disagree about which model is calibrated better, and a temperature mends much. Each "
    "half of the samples is judged with the temperature that was fitted on the other half."
)

Judged = Mapping[str, Mapping[str, Sequence[float]]]


def calibration_errors_table(judged: Judged, caption: str = "Several estimators, as it is to after a temperature") -> Table:
    """Return calibration errors, an estimator a row and a network a column.

    Args:
        judged: For each network what :func:`~lightning_peft.measure.calibration.calibration_table` said of its answers.
        caption: One line about it.

    Example:
        >>> table = calibration_errors_table({"plain": {"ECE, 15 bins": (0.107, 0.068), "temperature": (1.0, 1.6)}})
        >>> table.columns, table.rows
        (('estimator', 'plain'), (('ECE, 15 bins, %', '10.7 to 6.8'), ('temperature', '1.60')))
    """
    names = dict.fromkeys(name for errors in judged.values() for name in errors)
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        label = f"{name}, %" if "ECE" in name else name
        rows.append((label, *(_before_and_after(name, errors.get(name)) for errors in judged.values())))
    return Table(("estimator", *judged), tuple(rows), caption, folded=len(judged) > 6)


def _before_and_after(name: str, pair: Sequence[float] | None) -> str:
    if pair is None:
        return ""
    before, after = pair
    if name == "temperature":  # before it is 1
        return f"{after:.2f}"
    return f"{100 * before:.1f} to {100 * after:.1f}" if "ECE" in name else f"{before:.3f} to {after:.3f}"
