"""Greedy soup: models join the mean one by one where they do it no harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.arguments import one_of
from lightning_peft.merging.combining import Combining, Settings
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.merge_function import find
from lightning_peft.merging.model import Model
from lightning_peft.merging.opening import Source, open_model

Evaluate = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Soup:
    """What a greedy soup came to.

    Attributes:
        state_dict: The mean of the models that were taken.
        score: What it was found worth.
        taken: Places of those models in the list.
        scores: What each model alone was found worth, in the order of the list.
    """

    state_dict: dict[str, Any]
    score: float
    taken: tuple[int, ...]
    scores: tuple[float, ...]


def greedy_soup(
    models: Sequence[Source],
    evaluate: Evaluate,
    *,
    mode: Literal["max", "min"] = "max",
    scores: Sequence[float] | None = None,
    trusted: bool = False,
) -> Soup:
    """Average the best model with every other one that does not make the mean worse (Wortsman et al., ICML 2022, recipe 1).

    Models come in the order of what they are worth alone, best first. One joins if the mean with it is worth at least what
    the mean without it is; the official code asks for more than that. https://arxiv.org/abs/2203.05482

    Args:
        models: State dicts or paths, see :func:`lightning_peft.merge`.
        evaluate: Takes a state dict and returns what it is worth on held-out data; it may load it into one network each time.
        mode: Whether more of it is better, or less.
        scores: What each model alone is worth, where that is known already.
        trusted: Whether Python objects in a checkpoint may be rebuilt, which can run any code.

    Returns:
        The soup, never worth less than the best model on that data.

    Raises:
        CheckpointError: A file is damaged, or holds Python objects and is not trusted.
        MergeError: Models do not fit together, or there are none.

    Example:
        >>> import torch
        >>> models = [{"w": torch.tensor(value)} for value in (1.0, 4.0, 9.0)]
        >>> soup = greedy_soup(models, lambda state: -abs(float(state["w"]) - 3))
        >>> soup.taken, float(soup.state_dict["w"])
        ((1, 0), 2.5)
    """
    one_of("mode", mode, ("max", "min"))
    if not models:
        raise MergeError("There is no model to merge: the list is empty.")
    opened = [open_model(source, f"model {place}", trusted=trusted) for place, source in enumerate(models, 1)]
    sign = 1 if mode == "max" else -1
    alone = [float(evaluate(_mean([model]))) for model in opened] if scores is None else list(scores)
    if len(alone) != len(opened):
        raise MergeError(f"scores= has {len(alone)} numbers for {len(opened)} models. Give one for each, in the same order.")
    order = sorted(range(len(opened)), key=lambda place: (-sign * alone[place], place))
    taken, best = [order[0]], alone[order[0]]
    for place in order[1:]:
        score = float(evaluate(_mean([opened[each] for each in (*taken, place)])))
        if sign * score >= sign * best:
            taken, best = [*taken, place], score
    return Soup(_mean([opened[each] for each in taken]), best, tuple(taken), tuple(alone))


def _mean(models: Sequence[Model]) -> dict[str, Any]:
    settings = Settings([1.0] * len(models), (1.0, 1.0), per_tensor=False, dtype=None, seed=0)
    return Combining(models, find("soup", {}), settings).run()
