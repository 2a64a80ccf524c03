"""Every member of the family trains, resumes, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import (
    EVA,
    NOLA,
    PHM,
    SALT,
    SORSA,
    Bone,
    CorDA,
    FLoRA,
    KaSA,
    LoLDU,
    LoRASB,
    LoRAXS,
    MiSS,
    OLoRA,
    PiSSA,
    RandLoRA,
    SoKA,
    SVFit,
)
from lightning_peft.testing import MethodTester

WHOLE = {"exclude": None, "checkpoint": "full"}


class SamePart(MethodTester):
    """A delta that stands beside its layer as LoRA's does, with other factors: compiled in the tests of LoRA and FLoRA."""

    def test_compiled(self, lead: Any) -> None:
        pytest.skip("the part is LoRA's")


class TestPiSSA(SamePart):
    methods = [lambda: PiSSA(2, targets="all-weights", tune=("head",), **WHOLE)]


class TestOLoRA(SamePart):
    methods = [lambda: OLoRA(2, **WHOLE)]


class TestSORSA(SamePart):
    methods = [lambda: SORSA(2, **WHOLE)]


class TestKaSA(SamePart):
    methods = [lambda: KaSA(1, 2, **WHOLE)]


class TestSVFit(SamePart):
    methods = [lambda: SVFit(2, tune=("bias",), **WHOLE)]


class TestLoLDU(SamePart):
    methods = [lambda: LoLDU(2, **WHOLE)]


class TestLoRAXS(SamePart):
    methods = [lambda: LoRAXS(2, tune=("bias",), **WHOLE)]


class TestMiSS(SamePart):
    methods = [lambda: MiSS(2, **WHOLE)]


class TestBone(MethodTester):
    methods = [lambda: Bone(1, **WHOLE)]

    def test_keeps_its_values_on_another_map(self, factory: Any) -> None:
        """Bone comes before the companion by its name, acts on the weight, and leads nothing back through itself."""
        with pytest.raises(MisconfigurationException, match="cannot be inverted"):
            super().test_keeps_its_values_on_another_map(factory)


class TestFLoRA(MethodTester):
    methods = [lambda: FLoRA(2, targets="all-weights", tune=("bias",), **WHOLE)]


class TestSALT(SamePart):
    methods = [lambda: SALT(1, 0.5, **WHOLE)]


class TestPHM(SamePart):
    methods = [lambda: PHM(1, 1, **WHOLE)]


class TestNOLA(SamePart):
    methods = [lambda: NOLA(2, bases=4, tune=("bias",), **WHOLE)]


class TestRandLoRA(SamePart):
    methods = [lambda: RandLoRA(2, 4, **WHOLE)]


class TestSoKA(MethodTester):
    methods = [lambda: SoKA(1, **WHOLE)]


class TestEVA(SamePart):
    methods = [lambda: EVA(2, looks=2, targets="all-linear", **WHOLE)]


class TestCorDA(SamePart):
    methods = [lambda: CorDA(2, looks=2, tune=("head",), checkpoint="full")]


class TestLoRASB(SamePart):
    methods = [lambda: LoRASB(2, looks=2, **WHOLE)]
