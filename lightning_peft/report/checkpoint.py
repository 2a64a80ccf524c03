"""The report of a checkpoint alone: no model class, no data, no Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.baking.bake import read_checkpoint
from lightning_peft.report.contents import Fact, Section, Table, number
from lightning_peft.report.proof import proof_data, proof_fact, proof_section, prove
from lightning_peft.report.report import Report
from lightning_peft.report.weights import size_estimate, weigh
from lightning_peft.report.weights_section import weights_section
from lightning_peft.structure import checkpoint as files


def checkpoint_report(path: str | Path, command: str = "", *, trusted: bool = False) -> Report:
    """Describe a checkpoint from what is in it.

    Args:
        path: Checkpoint written during or after training, or a baked one.
        command: Command to name as the maker.
        trusted: Whether Python objects in the file may be rebuilt; see
            :func:`~lightning_peft.baking.reading.read_checkpoint`. The report leaves them out.

    Returns:
        The report; ``save`` it.

    Raises:
        CheckpointError: The file is no checkpoint, damaged, or holds Python objects and is not trusted.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, trusted=trusted)
    section = files.read(checkpoint)
    weights = weigh(checkpoint)
    proofs = prove(checkpoint, weights.state)
    methods: list[dict[str, Any]] = section["methods"] if section else []
    facts = [
        Fact("parameters", number(weights.parameters), f"{number(weights.nonzero)} not zero"),
        Fact("non-zero", f"{100 * weights.nonzero / max(weights.parameters, 1):.1f} %", "of all parameters, baked"),
    ]
    if proofs:
        facts.append(proof_fact(proofs))
    if "global_step" in checkpoint:
        facts.append(
            Fact("trained", f"{number(int(checkpoint['global_step']))} steps", f"epoch {checkpoint.get('epoch', '?')}")
        )
    sections = [_methods(methods, bool(section and section["weights"]))]
    if proofs:
        sections.append(proof_section(proofs))
    sections.append(weights_section(weights))
    data = {
        "checkpoint": path.name,
        "epoch": checkpoint.get("epoch"),
        "global_step": checkpoint.get("global_step"),
        "hyper_parameters": _plain(checkpoint.get("hyper_parameters", {})),
        "methods": methods,
        "weights": weights.as_data(),
        "size": size_estimate(weights),
        "nm_proof": proof_data(proofs),
    }
    return Report(path.name, _subtitle(checkpoint, path), tuple(facts), tuple(sections), data, command)


def _methods(methods: list[dict[str, Any]], mapped: bool) -> Section:
    if not methods:
        return Section("Methods", ("The checkpoint records no method of lightning_peft: it is an ordinary one.",))
    rows = tuple(
        (
            item.get("method", ""),
            int(item.get("steps", 0)),
            ", ".join(f"{key}={value!r}" for key, value in item.get("config", {}).items() if value is not None),
        )
        for item in methods
    )
    state = (
        "Its weights are those that the layers saw. It also holds the state of the training, which `bake` leaves out."
        if mapped
        else "It is baked: plain weights, nothing to resume."
    )
    return Section("Methods", (state,), (Table(("method", "steps", "arguments"), rows),))


def _subtitle(checkpoint: Mapping[str, Any], path: Path) -> str:
    size = f"{path.stat().st_size / 1e6:.1f} MB on disk"
    version = checkpoint.get("pytorch-lightning_version")
    return f"{size}, written by Lightning {version}." if version else f"{size}."


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): item for key, item in value.items() if isinstance(item, (str, int, float, bool, type(None)))}
