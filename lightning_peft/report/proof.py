"""The part of a report that proves N:M sparsity, layer by layer, from the baked numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_peft.baking.nm_proof import NMProof, prove_nm_state_dict
from lightning_peft.report.contents import Fact, Section, Table, number
from lightning_peft.structure import checkpoint as files


def prove(checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[NMProof]:
    """Count the groups of every weight a checkpoint records an N:M map on.

    Args:
        checkpoint: A checkpoint of training, maps recorded.
        state: Its baked tensors.
    """
    section = files.read(checkpoint)
    patterns: dict[str, tuple[int, int]] = {}
    dims: dict[str, int] = {}
    for name, records in (section["weights"] if section else {}).items():
        for item in records:
            config = item["config"]
            if {"n", "m", "dim"} <= set(config):
                patterns[name], dims[name] = (int(config["n"]), int(config["m"])), int(config["dim"])
    return prove_nm_state_dict(state, patterns, dims) if patterns else []


def proof_fact(proofs: list[NMProof]) -> Fact:
    """Return the proof in one line."""
    patterns = ", ".join(sorted({f"{proof.n}:{proof.m}" for proof in proofs}))
    broken = sum(proof.violations for proof in proofs)
    groups = sum(proof.groups for proof in proofs)
    return Fact(
        f"{patterns} proof",
        "holds" if all(proof.holds for proof in proofs) else "broken",
        f"{number(groups)} groups in {len(proofs)} layers counted, {number(broken)} violations",
        all(proof.holds for proof in proofs),
    )


def proof_table(proofs: list[NMProof]) -> Table:
    """Return the proof layer by layer."""
    rows = tuple(
        (
            proof.name.removesuffix(".weight"),
            " x ".join(map(str, proof.shape)),
            f"{proof.n}:{proof.m}",
            proof.groups,
            proof.exact_groups,
            proof.violations,
            proof.remainder,
            f"{100 * proof.density:.1f} %",
            proof.mask_sha256[:12],
        )
        for proof in proofs
    )
    heads = ("layer", "shape", "pattern", "groups", "exactly N", "violations", "remainder", "non-zero", "mask sha256")
    return Table(heads, rows, f"All {len(proofs)} layers", folded=len(proofs) > 12)


def proof_section(proofs: list[NMProof]) -> Section:
    """Return the proof with what was done to get it."""
    fact = proof_fact(proofs)
    verdict = (
        f"In none of the {sum(proof.groups for proof in proofs):,} groups are there more than N non-zero weights."
        if fact.good
        else "Some groups have more than N non-zero weights: see `violations`."
    )
    return Section(
        "N:M proof",
        (
            f"Counted from the baked numbers themselves, not from the masks a method kept. {verdict} A remainder is the end of "
            "a row that fills no group; it stays dense.",
        ),
        (proof_table(proofs),),
    )


def proof_data(proofs: list[NMProof]) -> list[dict[str, Any]]:
    """Return the proof as plain data."""
    return [{**asdict(proof), "holds": proof.holds} for proof in proofs]
