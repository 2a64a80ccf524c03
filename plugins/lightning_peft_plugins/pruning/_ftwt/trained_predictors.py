"""Predictors as their training left them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_peft.baking.bake import read_checkpoint
from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.structure.found_parts import parts_of_checkpoint, parts_of_module
from lightning_peft_plugins.pruning._ftwt.channel_gate import ChannelGate
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor


def trained_predictors(
    module: nn.Module, checkpoint: str | Path | None = None, *, trusted: bool = False
) -> dict[str, ChannelPredictor]:
    """Build the trained predictor of every gate, by the qualified name of the layer the gate stands beside.

    Args:
        module: The module that was trained; asked when there is no checkpoint.
        checkpoint: A file of the training.
        trusted: Whether Python objects in it may be rebuilt, which can run code.

    Returns:
        Predictors on the CPU; none when nothing was trained.

    Raises:
        CheckpointError: The checkpoint is damaged, or its predictors do not fit their own description.
    """
    if checkpoint is None:
        states = parts_of_module(module, ChannelGate.kind)
    else:
        states = parts_of_checkpoint(read_checkpoint(checkpoint, trusted=trusted), ChannelGate.kind)
    predictors = {}
    for name, (config, state) in states.items():
        try:
            gate = ChannelGate(**config)
            gate.load_state_dict(state)
        except Exception as error:  # whatever stands in a damaged file
            raise CheckpointError(f"The predictor on {name} does not fit its description: {error}") from error
        predictors[name] = gate.predictor
    return predictors
