"""The faults of benchmarks/faults.py still fit the code they are planted in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
planting = importlib.util.module_from_spec(SPEC)
sys.modules["faults"] = planting  # dataclasses look their module up
SPEC.loader.exec_module(planting)


@pytest.mark.parametrize("fault", planting.faults(), ids=lambda fault: fault.name.split()[0])
def test_a_fault_can_be_planted_and_its_tests_are_there(fault) -> None:
    assert fault.planted(ROOT) != (ROOT / fault.file).read_text()
    assert all((ROOT / name).exists() for name in fault.tests.split(" -k ")[0].split())


def test_a_fault_that_fits_nowhere_is_told() -> None:
    with pytest.raises(LookupError, match="0 times, not once"):
        planting.Fault("X", "README.md", "no such code", "", "").planted(ROOT)
