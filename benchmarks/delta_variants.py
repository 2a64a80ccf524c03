"""What the studies of deltas compare: members at one budget of trained parameters, and their learning rates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback

from lightning_peft import (
    DSEE,
    EVA,
    NOLA,
    PEGO,
    PERP,
    PHM,
    SALT,
    SORSA,
    AdaLoRA,
    ALLoRA,
    BALoRA,
    Bone,
    CorDA,
    DoRA,
    DyLoRA,
    FLoRA,
    IncreLoRA,
    KaSA,
    LoLDU,
    LoRA,
    LoRAGGPO,
    LoRASB,
    LoRAXS,
    MiSS,
    OLoRA,
    PiSSA,
    RandLoRA,
    SoKA,
    SVFit,
    TLoRA,
    TriAdaptLoRA,
)
from lightning_peft_plugins.deltas._shared.delta_method import DeltaMethod

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence"

Variants = dict[str, Callable[[], list[Callback]]]


def deltas(head: Sequence[str] = ()) -> Variants:
    """Members of the deltas' family, none with more trained parameters than LoRA of rank 8, and their ends.

    Args:
        head: What each trains beside its deltas.
    """

    def tuned(*parts: str) -> Callable[[], list[Callback]]:
        return lambda: [PERP(tune=(*parts, *head), lora=None, checkpoint="trained")]

    return {
        "full": list,
        "LoRA r=8": lambda: [LoRA(rank=8, tune=head)],
        "LoRA r=8, root": lambda: [LoRA(rank=8, scaling="root", tune=head)],
        "DoRA r=7": lambda: [DoRA(rank=7, tune=head)],
        "LoRA r=4": lambda: [LoRA(rank=4, tune=head)],
        "PiSSA r=8": lambda: [PiSSA(rank=8, tune=head)],
        "EVA r=8": lambda: [EVA(rank=8, looks=2, tune=head)],
        "AdaLoRA r=7 to 5": lambda: [AdaLoRA(rank=7, target=5, tinit="10%", tfinal="30%", tune=head)],
        "MiSS r=16": lambda: [MiSS(rank=16, tune=head)],
        "LoRA-XS r=16": lambda: [LoRAXS(rank=16, tune=head)],
        "norm": tuned("norm"),
        **({"bias": tuned("bias"), "head": tuned()} if head else {}),
    }


class Ranks(NamedTuple):
    """Sizes at which members have as many trained parameters as LoRA of rank 8 on one network, or the most they can have.

    Attributes:
        product: Of a product with something beside it: SORSA, KaSA, DSEE, FLoRA.
        core: Of LoRA-XS and LoRA-SB, whose cores are square.
        diagonal: Of SVFit, the smallest side of a weight.
        pivots: Of LoLDU, as many as no weight has a pivot of zero among them.
        salt: Of SALT.
        transform: Of TLoRA.
        block: Side of Bone's blocks.
        phm: Of PHM.
        kronecker: Of SoKA.
        bases: Of RandLoRA, which has more numbers the smaller the rank.
        nola: Number of NOLA's bases.
        target, most: Mean and largest rank that IncreLoRA ends with.
        exclude: Layers without Bone and PHM, as blocks do not divide them, and without LoRA-SB, as their padding is their own.
    """

    product: int = 7
    core: int = 79
    diagonal: int = 288
    pivots: int = 288
    salt: int = 11
    transform: int = 11
    block: int = 12
    phm: int = 7
    kronecker: int = 8
    bases: int = 16
    nola: int = 256
    target: int = 4
    most: int = 6
    exclude: tuple[str, ...] | None = None


STORY = Ranks()
MINILM = Ranks(core=95, diagonal=384, pivots=384, salt=13, transform=12, block=16, bases=18)
LITE0 = Ranks(
    core=16,
    diagonal=16,
    pivots=4,
    salt=16,
    block=8,
    kronecker=10,
    bases=4,
    nola=1024,
    target=3,
    exclude=("first", "head", "depthwise"),
)


def rest(ranks: Ranks, head: Sequence[str] = ()) -> Variants:
    """The family's other members.

    Args:
        ranks: Their sizes on the network.
        head: What each trains beside its deltas.
    """
    product, core, diagonal, target = ranks.product, ranks.core, ranks.diagonal, ranks.target
    where = {} if ranks.exclude is None else {"exclude": ranks.exclude}
    members: dict[str, tuple[type[DeltaMethod], dict[str, Any]]] = {
        "LoRA+ r=8": (LoRA, {"lr_ratio": 16}),
        "OLoRA r=8": (OLoRA, {}),
        "CorDA r=8": (CorDA, {"looks": 2}),
        "BA-LoRA r=8": (BALoRA, {}),
        "LoRA-GGPO r=8": (LoRAGGPO, {}),
        "ALLoRA r=8": (ALLoRA, {}),
        "DyLoRA r=8": (DyLoRA, {}),
        "PEGO 4 of r=2": (PEGO, {"rank": 2, "members": 4}),
        f"SORSA r={product}": (SORSA, {"rank": product}),
        f"KaSA r={product}": (KaSA, {"rank": product}),
        f"IncreLoRA r=1 to {target}": (IncreLoRA, {"rank": 1, "target": target, "most": ranks.most}),
        "TriAdaptLoRA r=1 to 4": (TriAdaptLoRA, {"rank": 1, "target": 4, "most": 8}),
        f"DSEE r={product}": (DSEE, {"rank": product}),
        f"SALT r={ranks.salt}": (SALT, {"rank": ranks.salt}),
        f"TLoRA r={ranks.transform}": (TLoRA, {"rank": ranks.transform}),
        f"FLoRA r={product}": (FLoRA, {"rank": product}),
        f"LoRA-XS r={core}": (LoRAXS, {"rank": core}),
        f"LoRA-SB r={core}": (LoRASB, {"rank": core, "looks": 2, **where}),
        f"SVFit r={diagonal}": (SVFit, {"rank": diagonal}),
        f"LoLDU r={ranks.pivots}": (LoLDU, {"rank": ranks.pivots}),
        f"Bone r={ranks.block}": (Bone, {"rank": ranks.block, **where}),
        f"PHM r={ranks.phm}": (PHM, {"rank": ranks.phm, "terms": 4, **where}),
        f"SoKA r={ranks.kronecker}": (SoKA, {"rank": ranks.kronecker}),
        f"RandLoRA r={ranks.bases}": (RandLoRA, {"rank": ranks.bases}),
        f"NOLA {ranks.nola} bases": (NOLA, {"bases": ranks.nola}),
    }
    return {name: partial(made, method, {"rank": 8} | given, head) for name, (method, given) in members.items()}


def made(method: type[DeltaMethod], arguments: dict[str, Any], head: Sequence[str]) -> list[Callback]:
    """Make a member."""
    return [method(**arguments, tune=head)]


def rates(study: str) -> dict[str, float]:
    """Learning rates of a study's variants: of those that ``rates.py`` tried, the best on validation data.

    Args:
        study: Name of the study; ``docs/evidence/STUDY_rates.json`` has what was tried.
    """
    path = EVIDENCE / f"{study}_rates.json"
    tried = json.loads(path.read_text()) if path.exists() else {}
    return {variant: float(min(values, key=values.get)) for variant, values in tried.items()}
