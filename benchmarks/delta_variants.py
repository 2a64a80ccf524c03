"""What the studies of deltas compare: members at one budget of trained parameters, and their learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def rest() -> Variants:
    """The family's other members, at the ranks that fill the same budget on the story Llama, or the largest there are."""
    return {
        "LoRA+ r=8": lambda: [LoRA(rank=8, lr_ratio=16)],
        "OLoRA r=8": lambda: [OLoRA(rank=8)],
        "CorDA r=8": lambda: [CorDA(rank=8, looks=2)],
        "BA-LoRA r=8": lambda: [BALoRA(rank=8)],
        "LoRA-GGPO r=8": lambda: [LoRAGGPO(rank=8)],
        "ALLoRA r=8": lambda: [ALLoRA(rank=8)],
        "DyLoRA r=8": lambda: [DyLoRA(rank=8)],
        "PEGO 4 of r=2": lambda: [PEGO(rank=2, members=4)],
        "SORSA r=7": lambda: [SORSA(rank=7)],
        "KaSA r=7": lambda: [KaSA(rank=7)],
        "IncreLoRA r=1 to 4": lambda: [IncreLoRA(rank=1, target=4, most=6)],
        "TriAdaptLoRA r=1 to 4": lambda: [TriAdaptLoRA(rank=1, target=4, most=8)],
        "DSEE r=7": lambda: [DSEE(rank=7)],
        "SALT r=11": lambda: [SALT(rank=11)],
        "TLoRA r=11": lambda: [TLoRA(rank=11)],
        "FLoRA r=7": lambda: [FLoRA(rank=7)],
        "LoRA-XS r=79": lambda: [LoRAXS(rank=79)],
        "LoRA-SB r=79": lambda: [LoRASB(rank=79, looks=2)],
        "SVFit r=288": lambda: [SVFit(rank=288)],
        "LoLDU r=288": lambda: [LoLDU(rank=288)],
        "Bone r=12": lambda: [Bone(rank=12)],
        "PHM r=7": lambda: [PHM(rank=7, terms=4)],
        "SoKA": lambda: [SoKA()],
        "RandLoRA r=16": lambda: [RandLoRA(rank=16)],
        "NOLA 256 bases": lambda: [NOLA(rank=8, bases=256)],
    }


def rated(full: float, matrices: float, numbers: float, others: Sequence[float]) -> dict[str, float]:
    """Learning rates of the variants of :func:`deltas`: of all weights, of matrices beside them, of single numbers and heads.

    A scale that is larger by the root of the rank stands for a rate that is smaller. PiSSA moves what the weight has most
    of, at the rate of all weights. EVA, AdaLoRA, MiSS and LoRA-XS have ``others``, in this order.
    """
    rates = dict.fromkeys(deltas(("head",)), matrices)
    return (
        rates
        | dict.fromkeys(("norm", "bias", "head"), numbers)
        | dict(zip(("EVA r=8", "AdaLoRA r=7 to 5", "MiSS r=16", "LoRA-XS r=16"), others, strict=True))
        | {
            "full": full,
            "PiSSA r=8": full,
            "LoRA r=8, root": matrices / 8**0.5,
        }
    )


STORY_RATES = {
    "full": 1e-4,
    "LoRA r=8": 3e-3,
    "LoRA r=8, root": 1e-3,
    "DoRA r=7": 3e-3,
    "LoRA r=4": 3e-3,
    "PiSSA r=8": 1e-3,
    "EVA r=8": 1e-3,
    "AdaLoRA r=7 to 5": 3e-2,
    "MiSS r=16": 3e-4,
    "LoRA-XS r=16": 1e-2,
    "norm": 1e-1,
    "LoRA+ r=8": 3e-4,
    "OLoRA r=8": 1e-3,
    "CorDA r=8": 1e-3,
    "BA-LoRA r=8": 1e-3,
    "LoRA-GGPO r=8": 3e-3,
    "ALLoRA r=8": 3e-3,
    "DyLoRA r=8": 3e-3,
    "PEGO 4 of r=2": 1e-2,
    "SORSA r=7": 1e-3,
    "KaSA r=7": 3e-3,
    "IncreLoRA r=1 to 4": 3e-2,
    "DSEE r=7": 3e-3,
    "SALT r=11": 3e-3,
    "TLoRA r=11": 3e-3,
    "FLoRA r=7": 1e-2,
    "LoRA-XS r=79": 1e-3,
    "LoRA-SB r=79": 3e-4,
    "SVFit r=288": 1e-2,
    "LoLDU r=288": 3e-4,
    "Bone r=12": 3e-4,
    "PHM r=7": 1e-2,
    "SoKA": 1e-3,
    "RandLoRA r=16": 3e-4,
    "TriAdaptLoRA r=1 to 4": 3e-2,
    "NOLA 256 bases": 1e-2,
}
"""Those that ``rates.py`` found on the story Llama."""
