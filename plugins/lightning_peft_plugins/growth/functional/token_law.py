"""When to grow: the empirical law of "Stacking Your Transformers" (Du et al., NeurIPS 2024, arXiv 2405.15319, equation 5)."""

from __future__ import annotations

import math


def growth_tokens(parameters: float, flops: float) -> float:
    """Return how many tokens a small model should be trained on before it is stacked.

    ``log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74``. Fitted on models of 410 M to 3 B parameters; far below, the second
    term explodes and the law means nothing.

    Args:
        parameters: Parameters ``N`` of the grown model.
        flops: Training budget ``C``, usually ``6 N`` times the tokens it would be trained on.

    Returns:
        Tokens ``d``.

    Example:
        >>> f"{growth_tokens(7e9, 6 * 7e9 * 2e12) / 1e9:.2f} billion"
        '11.11 billion'
    """
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74))
