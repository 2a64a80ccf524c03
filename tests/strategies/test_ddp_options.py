"""DDP as users have it: its options change nothing, bit for bit, and where one rank ends the others do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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


class Dies(Callback):
    """Ends one rank before its fifth step, as a kill does: nothing is cleaned up."""

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            os._exit(0)


def left_alone(methods: str, said: str) -> None:
    """Train beside a rank that ends; the one that is left says what became of it, and ends too."""
    start = time.monotonic()
    try:
        runner = trainer(callbacks=[*METHODS[methods](), Dies()], devices=2, strategy="ddp", max_epochs=3)
        runner.fit(deepened(Plain)("adam"), loader(32, 4), loader(8))
        outcome = "the fit ended"
    except RuntimeError as error:
        outcome = str(error)
    Path(said).write_text(f"{time.monotonic() - start:.0f} {outcome}")
    os._exit(0)


@pytest.mark.parametrize("methods", METHODS)
def test_where_one_rank_dies_the_other_ends_soon_with_an_error(methods: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run_ddp(f"{__file__}:left_alone", {"methods": methods, "said": str(said)}, timeout=120) == [None, None]
    seconds, _, outcome = said.read_text().partition(" ")
    assert int(seconds) < 60
    assert "onnection" in outcome
