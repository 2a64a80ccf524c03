"""What the network is given of source data during an evaluation, through the user's own step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.capture.step_calls import StepName, own_steps, step_calls

_STEPS: dict[Any, StepName] = {
    TrainerFn.TESTING: "test_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.PREDICTING: "predict_step",
}


def source_calls(run: Run, batches: Iterable[Any]) -> Iterator[Call]:
    """Yield what the network would be called with for batches of a loader.

    Args:
        run: The run, with its network.
        batches: Batches as the user's step takes them: that of the evaluation, or another that takes them.

    Raises:
        MisconfigurationException: No step takes the batches, or the one that does calls no network.
    """
    first = _STEPS[run.trainer.state.fn]
    others: list[StepName] = [step for step in ("validation_step", "test_step") if step != first]
    chosen = [first, *own_steps(run.module, others)]
    return step_calls(run.trainer, run.module, run.network, run.network_name, batches, chosen)
