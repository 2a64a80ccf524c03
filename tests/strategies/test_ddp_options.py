"""Options of DDP as users set them: methods end with the weights that they end with under plain DDP, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy

from lightning_peft import PSKD, LayerGrowth, LoRA, NMSparsity
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import Plain, deepened, loader, trainer
from lightning_peft.testing.trace import difference

TARGETS = {"targets": "all-linear", "exclude": ("head",)}
METHODS: dict[str, Callable[[], list[Any]]] = {
    "together": lambda: [LoRA(2, alpha=8, **TARGETS), NMSparsity("2:4", **TARGETS), PSKD(alpha=0.3)],
    "growth": lambda: [LayerGrowth(at=["step:2", "step:4"], start=1, to=[2, 4], optimizer_state="copy"), LoRA(2, **TARGETS)],
}
OPTIONS = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view")
CASES = [
    (methods, option, accumulate)
    for methods in METHODS
    for option in OPTIONS
    for accumulate in (1, 2)
    if not (option == "static_graph" and accumulate > 1)  # torch fails an assertion of its own there, without methods too
]


def trained(methods: list[Any], options: dict[str, Any], accumulate: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module: LightningModule = deepened(Plain)("adam")
    strategy = DDPStrategy(**options)
    runner = trainer(callbacks=methods, devices=2, strategy=strategy, max_epochs=3, accumulate_grad_batches=accumulate)
    runner.fit(module, loader(32, 4), loader(8))
    return {name: value.clone() for name, value in module.state_dict().items()}


def on_rank() -> dict[str, Any]:
    found = {f"{methods}-{count}": trained(METHODS[methods](), {}, count) for methods in METHODS for count in (1, 2)}
    for methods, option, count in CASES:
        found[f"{methods}-{option}-{count}"] = trained(METHODS[methods](), {option: True}, count)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ddp(f"{Path(__file__)}:on_rank")


@pytest.mark.parametrize(("methods", "option", "accumulate"), CASES)
def test_an_option_changes_nothing(ranks: list[dict[str, Any]], methods: str, option: str, accumulate: int) -> None:
    one, other = (rank[f"{methods}-{option}-{accumulate}"] for rank in ranks)
    assert difference(one, other) is None
    assert difference(one, ranks[0][f"{methods}-{accumulate}"]) is None
