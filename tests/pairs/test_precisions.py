"""Methods in lower precision, one of each mechanism and those that were at fault; all: python tests/pairs/precisions.py."""

from __future__ import annotations

import pytest
import torch
from precisions import PRECISIONS, outcome
from verdicts import WORKS

EVERYWHERE = ("NMSparsity sr-ste", "LoRA", "LayerGrowth")
TRIED = [
    *((name, precision) for name in EVERYWHERE for precision in PRECISIONS),
    ("SAP", "bf16-true"),
    ("IncreLoRA", "16-mixed"),
    ("TriAdaptLoRA", "16-mixed"),
    ("TrainedRankPruning", "16-mixed"),
]
ON_A_GPU = (*EVERYWHERE, "NMSparsity one-shot", "PSKD", "MaskedPruning", "WeightCompander", "DoRA", "LoRAGGPO", "SpIEL")


@pytest.mark.parametrize(("name", "precision"), TRIED)
def test_trains_goes_on_and_lets_skipped_steps_pass(name: str, precision: str) -> None:
    found = outcome(name, precision)
    assert found.what == WORKS, found.words


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", *PRECISIONS])
@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_same_on_a_gpu(name: str, precision: str) -> None:
    found = outcome(name, precision, "cuda")
    assert found.what == WORKS, found.words
