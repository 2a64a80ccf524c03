"""The evolution strategy that proposes prompts: CMA-ES of the package that the official code takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


class Evolution:
    """Covariance matrix adaptation around a mean that starts at zero, with a standard deviation of one (Hansen, 2016).

    Args:
        size: Numbers in a solution.
        population: Solutions asked at once.
        seed: Seed. Its random numbers are its own, not NumPy's.

    Raises:
        MisconfigurationException: The optional package is missing.
    """

    def __init__(self, size: int, population: int, seed: int) -> None:
        try:
            from cma import CMAEvolutionStrategy
        except ImportError as error:
            raise MisconfigurationException(
                f'FOA needs the package cma: pip install "lightning-peft[evolution]" ({error})'
            ) from error
        options = {"popsize": population, "maxiter": np.inf, "verbose": -9}
        # NaN: no seed, which would be that of NumPy's global generator.
        own: dict[str, Any] = {"seed": np.nan, "randn": np.random.RandomState(seed).randn}
        self._strategy = CMAEvolutionStrategy(size * [0.0], 1.0, options | own)

    def ask(self) -> list[np.ndarray]:
        """Propose solutions."""
        found: list[np.ndarray] = self._strategy.ask()
        return found

    def tell(self, solutions: Sequence[np.ndarray | Tensor], fitness: Sequence[float]) -> None:
        """Learn how fit solutions are, others beside those asked for too; less is fitter."""
        self._strategy.tell(list(solutions), list(fitness))
