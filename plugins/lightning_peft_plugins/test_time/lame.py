"""LAME: no parameter moves, the predictions of a batch are made to agree."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.contract import SHARDED
from lightning_peft.network.layers import heads
from lightning_peft.network.logits import with_logits
from lightning_peft.network.resolve import named_submodule
from lightning_peft_plugins.test_time._shared.classifier import with_input
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.stream import StreamMethod
from lightning_peft_plugins.test_time.functional.lame import Affinity, affinity_matrix, laplacian_adjust


class LAME(StreamMethod):
    """Adjusts the predictions of each batch so that samples close in feature space are predicted alike.

    Made for streams whose labels come in runs (video, one place after the other); on shuffled streams it hurts. Nothing in the
    network changes. What comes back as logits is the log of the adjusted probabilities.

    Args:
        affinity: ``"knn"``, ``"rbf"`` or ``"linear"``.
        neighbours: Number of neighbours.
        steps: Most iterations of the adjustment.
        symmetric: Average the affinity with its transpose.
        features: Qualified name of the submodule whose input is the features; the head that writes the logits by default.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.stream.StreamMethod`.

    Example:
        >>> LAME(affinity="rbf").neighbours
        5
    """

    strategies = SHARDED
    paper = "Boudiaf et al.: Parameter-free Online Test-time Adaptation, CVPR 2022, https://arxiv.org/abs/2201.05718"

    def __init__(
        self,
        *,
        affinity: Affinity = "knn",
        neighbours: int = 5,
        steps: int = 100,
        symmetric: bool = False,
        features: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if affinity not in ("knn", "rbf", "linear"):
            raise MisconfigurationException(f'affinity={affinity!r} is not "knn", "rbf" or "linear".')
        if self.keep:
            raise MisconfigurationException(
                f"{self.name} adjusts predictions and leaves the network as it is: there is nothing to keep. Leave keep out."
            )
        self.no_layers_to_choose("features= names the submodule whose input is compared")
        self.affinity, self.neighbours, self.steps_per_batch, self.symmetric = affinity, neighbours, steps, symmetric
        self.features_of = features

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        if self.features_of is not None:
            self._head = named_submodule(run.module, self.features_of, "features")
            return
        found = heads(list(run.network.modules()))
        if not found:
            raise MisconfigurationException(
                f"{self.name} found no head in {type(run.network).__name__}. Name the submodule that takes the features: "
                'features="<name>".'
            )
        self._head = found[0]

    def update(self, call: Call) -> Any:
        output, features = with_input(self._head, call)
        logits = self.logits(output)
        if logits.ndim != 2 or features is None or len(features) != len(logits):
            raise MisconfigurationException(
                f"{self.name} needs one prediction and one feature vector a sample, got logits {tuple(logits.shape)} and "
                f"features {'of no call' if features is None else tuple(features.shape)}. Name the submodule whose input they "
                'are: features="<name>".'
            )
        self.updates += 1
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = finite_rows(logits) & finite_rows(features)
        if not bool(rows.any()):
            return output
        weights = affinity_matrix(features[rows].to(dtype), self.affinity, self.neighbours)
        if self.symmetric:
            weights = (weights + weights.T) / 2
        log_p = (logits[rows].softmax(-1, dtype=dtype) + 1e-10).log()
        adjusted = logits.clone()
        adjusted[rows] = laplacian_adjust(log_p, weights, self.steps_per_batch).to(logits.dtype)
        return with_logits(output, adjusted)

    def to_source(self) -> None:
        """There is nothing to return from."""
