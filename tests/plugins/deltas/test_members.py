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


class TestPiSSA(MethodTester):
    methods = [lambda: PiSSA(2, targets="all-weights", tune=("head",), **WHOLE)]


class TestOLoRA(MethodTester):
    methods = [lambda: OLoRA(2, **WHOLE)]


class TestSORSA(MethodTester):
    methods = [lambda: SORSA(2, **WHOLE)]


class TestKaSA(MethodTester):
    methods = [lambda: KaSA(1, 2, **WHOLE)]


class TestSVFit(MethodTester):
    methods = [lambda: SVFit(2, tune=("bias",), **WHOLE)]


class TestLoLDU(MethodTester):
    methods = [lambda: LoLDU(2, **WHOLE)]


class TestLoRAXS(MethodTester):
    methods = [lambda: LoRAXS(2, tune=("bias",), **WHOLE)]


class TestMiSS(MethodTester):
    methods = [lambda: MiSS(2, **WHOLE)]


class TestBone(MethodTester):
    methods = [lambda: Bone(1, **WHOLE)]

    def test_keeps_its_values_on_another_map(self, factory: Any) -> None:
        """Bone comes before the companion by its name, acts on the weight, and leads nothing back through itself."""
        with pytest.raises(MisconfigurationException, match="cannot be inverted"):
            super().test_keeps_its_values_on_another_map(factory)


class TestFLoRA(MethodTester):
    methods = [lambda: FLoRA(2, targets="all-weights", tune=("bias",), **WHOLE)]


class TestSALT(MethodTester):
    methods = [lambda: SALT(1, 0.5, **WHOLE)]


class TestPHM(MethodTester):
    methods = [lambda: PHM(1, 1, **WHOLE)]


class TestNOLA(MethodTester):
    methods = [lambda: NOLA(2, bases=4, tune=("bias",), **WHOLE)]


class TestRandLoRA(MethodTester):
    methods = [lambda: RandLoRA(2, 4, **WHOLE)]


class TestSoKA(MethodTester):
    methods = [lambda: SoKA(1, **WHOLE)]


class TestEVA(MethodTester):
    methods = [lambda: EVA(2, looks=2, targets="all-linear", **WHOLE)]


class TestCorDA(MethodTester):
    methods = [lambda: CorDA(2, looks=2, tune=("head",), checkpoint="full")]


class TestLoRASB(MethodTester):
    methods = [lambda: LoRASB(2, looks=2, **WHOLE)]
