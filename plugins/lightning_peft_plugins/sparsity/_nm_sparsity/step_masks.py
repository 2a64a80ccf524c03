"""Masks of many small weights, chosen together in each training step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.weights.nm import nm_masks

TOGETHER = 2**20  # weights at a time: what choosing their masks takes in memory for a moment is that of one usual layer


class StepMasks:
    """Chooses masks of several weights when the first of them is asked for.

    Where a layer is small, or a GPU fast, starting the operations that make a mask takes longer than they do, and for many
    layers not longer than for one. So weights whose masks were asked for in one step are chosen together in the next, a
    limited number at a time. Every mask is handed out once, for the value that it was chosen from: whoever asks once more, or
    after somebody has changed the weight in place, chooses for himself.

    Attributes:
        apart: Choose every mask alone. FSDP gathers the weights of a layer right before it runs: until then the memory of a
            weight that the last step saw holds older numbers, or is given back.
    """

    apart = False

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Tensor, int]] = {}
        self._chunks: dict[int, list[tuple[Tensor, int]]] = {}
        self._chosen: dict[int, tuple[Tensor, int, Tensor]] = {}

    def begin(self) -> None:
        """Forget every mask: weights may have changed since, even behind their version, as ``weight.data`` lets them."""
        self._chosen = {}
        if self._asked:
            self._chunks = _chunks(list(self._asked.values()))
            self._asked = {}

    def take(self, weight: Tensor, n: int, m: int, dim: int) -> Tensor | None:
        """Return the mask of a weight, once; ``None`` where it is to be chosen alone.

        Args:
            weight: A parameter itself, which is held until the next step but one.
            n: Entries kept per group.
            m: Group size.
            dim: Dimension along which groups run.
        """
        if self.apart or weight.numel() > TOGETHER:
            return None
        key = id(weight)
        self._asked[key] = (weight, dim)
        chunk = self._chunks.pop(key, None)
        if chunk is not None and key not in self._chosen:
            self._choose(chunk, weight, n, m)
        of, version, mask = self._chosen.pop(key, (None, 0, None))
        return mask if of is weight and version == weight._version else None

    def _choose(self, chunk: list[tuple[Tensor, int]], like: Tensor, n: int, m: int) -> None:
        alike = [entry for entry in chunk if entry[0].dtype is like.dtype and entry[0].device == like.device]
        weights, dims = zip(*alike, strict=True)
        for weight, mask in zip(weights, nm_masks(weights, n, m, dims), strict=True):
            if type(mask) is Tensor:  # not what a mode that computes nothing, such as FakeTensorMode, made
                self._chosen[id(weight)] = (weight, weight._version, mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepMasks:
        """A copy of the network asks for its own masks."""
        return StepMasks()


def _chunks(weights: list[tuple[Tensor, int]]) -> dict[int, list[tuple[Tensor, int]]]:
    """For each weight those it is chosen with, by identity; what is left alone is not among them."""
    chunks: list[list[tuple[Tensor, int]]] = []
    room = 0
    for weight, dim in weights:
        if weight.numel() > room:
            chunks.append([])
            room = TOGETHER
        chunks[-1].append((weight, dim))
        room -= weight.numel()
    return {id(weight): chunk for chunk in chunks if len(chunk) > 1 for weight, _ in chunk}
