"""The choices of units over many inputs: a choice that hardly changes can be made once and for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.network.channel_units import ChannelUnit
from lightning_peft_plugins.pruning._ftwt.skipping.build import build, producer_of
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, chosen


@torch.no_grad()
def choices_of(
    dense: nn.Module,
    units: Sequence[ChannelUnit],
    predictors: Mapping[str, ChannelPredictor],
    tokens: bool,
    samples: Sequence[Tensor],
) -> dict[str, Tensor]:
    """See what each unit of the masked network chooses for some inputs.

    Args:
        dense: The network, norms folded.
        units: The gated units.
        predictors: Trained predictor by the unit's producer.
        tokens: Whether each token of a linear unit is judged on its own.
        samples: Inputs.

    Returns:
        Masks, shape ``(choices, channels)``, by producer.
    """
    network = build(dense, units, predictors, [unit.producer for unit in units], tokens)
    seen: dict[str, list[Tensor]] = {unit.producer: [] for unit in units}
    for unit in units:
        found, predictor = seen[unit.producer], producer_of(network, unit).predictor
        assert predictor is not None
        predictor.register_forward_hook(lambda module, args, logits, to=found: to.append(chosen(logits).flatten(0, -2)))
    for sample in samples:
        network(sample)
    return {name: torch.cat(found) for name, found in seen.items()}


def steadiness(choices: Tensor) -> float:
    """Share of all choices, of a channel for an input, that are as most inputs have them; from 0.5 to 1.

    Example:
        >>> steadiness(torch.tensor([[True, True], [True, False], [True, False], [True, False]]))
        0.875
    """
    often = choices.float().mean(0)
    return float(torch.maximum(often, 1.0 - often).mean())


def usual(choices: Tensor) -> Tensor:
    """Positions of the channels that most inputs choose, at least one.

    Example:
        >>> usual(torch.tensor([[True, True], [True, False], [True, False]]))
        tensor([0])
    """
    often = choices.float().mean(0)
    kept = (often > 0.5).nonzero().flatten()
    return kept if len(kept) else often.argmax(keepdim=True).flatten()
