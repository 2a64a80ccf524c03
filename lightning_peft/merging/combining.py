"""Combining models tensor by tensor into one state dict."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.merging.depth import depths
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.matching import Entry, matched, working_type
from lightning_peft.merging.merge_function import MergeFunction, Stacks
from lightning_peft.merging.model import Model
from lightning_peft.merging.nm_kept import Pattern, keep_, shared_pattern
from lightning_peft.merging.stacks import Stacker, generators

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What the user chose beside models and method.

    Attributes:
        weights: One a model.
        scale: What a merged difference is multiplied by; two numbers are for the first block and the last.
        per_tensor: Whether surveys look at one tensor at a time.
        dtype: Type of the result; by default that of the base, or of the first model.
        seed: What chance starts from.
    """

    weights: Sequence[float]
    scale: tuple[float, float]
    per_tensor: bool
    dtype: torch.dtype | None
    seed: int


class Combining:
    """One merge.

    Args:
        models: The models.
        function: How they are merged.
        settings: What else was chosen.
        base: The model they were trained from.
        fisher: The Fisher information of each model.

    Attributes:
        entries: The tensors, and what becomes of them.
        first: The model that gives the order of tensors, and what is not merged.
        rechosen: Tensors whose N:M pattern all models share, with masks that differ, so that :meth:`run` chose one anew: the
            pattern, and the share of the sum of squares that went with it.
    """

    def __init__(
        self,
        models: Sequence[Model],
        function: MergeFunction,
        settings: Settings,
        base: Model | None = None,
        fisher: Sequence[Model] | None = None,
    ) -> None:
        everything = [*([] if base is None else [base]), *models]
        self.entries = matched(everything, mixed=settings.dtype is not None)
        self._merged = [entry.name for entry in self.entries if entry.fate == "merged"]
        self.first = everything[0]
        self._models, self._function, self._settings = models, function, settings
        working = working_type(everything)
        self._stacker = Stacker(models, base, working)
        self._fisher = None if fisher is None else Stacker(self._checked(fisher), None, working)
        self._depths = depths({name: tensor.shape for name, tensor in self.first.tensors.items()})
        last = max(len(self._merged) - 1, 1)
        self._places = {name: place / last for place, name in enumerate(self._merged)}
        self._weights = torch.tensor(settings.weights, dtype=working)
        self.rechosen: dict[str, tuple[Pattern, float]] = {}
        self._norms = torch.zeros(len(models), dtype=torch.float64)
        if not function.traits.elementwise:
            self._check_memory()

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Merge.

        Args:
            progress: Called with the number of entries that are done, and of all.

        Returns:
            Tensors by name, in the order of the first model, and what else its state dict holds.

        Raises:
            MergeError: A model holds numbers that are not finite.
        """
        found: dict[str, Any] = {}
        surveyed = {} if self._settings.per_tensor else self._survey(self._merged)
        done, total = 0, sum(tensor.numel() for tensor in self.first.tensors.values())
        for entry in self.entries:
            found[entry.name] = self._entry(entry, found, surveyed)
            done += self.first.tensors[entry.name].numel()
            if progress is not None:
                progress(done, total)
        if self._function.traits.rescale is not None:
            self._rescale(found)
        return found | dict(self.first.others)

    def _keep_pattern(self, name: str, value: Tensor) -> Tensor:
        """Give a merged tensor the N:M pattern that all models have it in."""
        if (pattern := shared_pattern([model.value(name) for model in self._models])) is not None:
            lost = keep_(value, pattern)
            if lost:
                self.rechosen[name] = (pattern, lost)
        return value

    def _entry(self, entry: Entry, found: Mapping[str, Tensor], surveyed: Mapping[str, Any]) -> Tensor:
        own = self.first.tensors[entry.name]
        if entry.fate == "tied":
            return found[entry.source]
        if entry.fate == "kept":
            return own.detach().cpu().clone()
        dtype = self._settings.dtype or own.dtype
        if entry.fate == "averaged":
            return self._stacker.values(entry.name).mean(0).to(dtype)
        if self._settings.per_tensor:
            surveyed = self._survey([entry.name])
        # A difference that is still to be rescaled is kept as precise as it was computed.
        kept = self._stacker.dtype if self._function.traits.rescale is not None else dtype
        result = torch.empty(own.shape, dtype=kept)
        asked = "generators" in self._function.supplied
        chance = generators(self._settings.seed, entry.name, len(self._models)) if asked else []
        flat = result.view(-1)
        for piece in self._stacker.pieces(entry.name) if self._function.traits.elementwise else [None]:
            merged = self._function(**self._supplied(entry.name, piece, chance, surveyed))
            target = result if piece is None else flat[piece]
            if self._function.of_deltas and self._function.traits.rescale is None:
                merged = merged.mul(self._scale(entry.name)).add_(self._stacker.of_base(entry.name, piece))
            target.copy_(merged.view_as(target))
        return result if self._function.traits.rescale is not None else self._keep_pattern(entry.name, result)

    def _supplied(
        self, name: str, piece: slice | None, chance: list[torch.Generator], surveyed: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What a merge function asks for by position."""
        found: dict[str, Any] = {"weights": self._weights, "generators": chance, **surveyed}
        found |= {"depth": self._depths.get(name, 0.0), "place": self._places[name]}
        for wanted in self._function.supplied:
            if wanted == "models":
                found[wanted] = self._stacker.values(name, piece)
            elif wanted == "deltas":
                found[wanted] = self._stacker.deltas(name, piece)
                if self._function.traits.rescale is not None:
                    self._norms += found[wanted].flatten(1).double().square().sum(1)
            elif wanted == "base":
                found[wanted] = self._stacker.of_base(name, piece)
            elif wanted == "fisher":
                assert self._fisher is not None
                found[wanted] = self._fisher.values(name, piece)
        return found

    def _rescale(self, found: dict[str, Any]) -> None:
        """Turn merged differences into values, multiplied by what their norms say."""
        assert self._function.traits.rescale is not None
        own = torch.stack([found[name].double().square().sum() for name in self._merged]).sum().sqrt()
        factor = float(self._function.traits.rescale(self._norms.sqrt(), own))
        for name in self._merged:
            values = found[name].mul_(factor * self._scale(name)).add_(self._stacker.of_base(name))
            values = values.to(self._settings.dtype or self.first.tensors[name].dtype)
            found[name] = self._keep_pattern(name, values)
        for entry in self.entries:
            if entry.fate == "tied":
                found[entry.name] = found[entry.source]

    def _scale(self, name: str) -> float:
        first, last = self._settings.scale
        return first + (last - first) * self._depths.get(name, 0.0)

    def _survey(self, names: Sequence[str]) -> dict[str, Any]:
        """Let the method look at tensors, in pieces."""
        own = self._stacker.deltas if self._function.of_deltas else self._stacker.values
        of_fisher = own if self._fisher is None else self._fisher.values

        def through(read: Callable[[str, slice], Tensor]) -> Stacks:
            return lambda: (read(name, piece) for name in names for piece in self._stacker.pieces(name))

        return self._function.survey(through(own), through(of_fisher))

    def _checked(self, fisher: Sequence[Model]) -> Sequence[Model]:
        """Refuse Fisher information that is not of these models."""
        for own, model in zip(fisher, self._models, strict=True):
            for name in self._merged:
                tensor = own.tensors.get(name)
                if tensor is None or tensor.shape != model.tensors[name].shape:
                    has = "has none" if tensor is None else f"has one of {tuple(tensor.shape)}"
                    raise MergeError(
                        f"The Fisher information {own.label} {has} for {name}, which is {tuple(model.tensors[name].shape)}. "
                        "Estimate it for all parameters: lightning_peft.functional.diagonal_fisher(network, batches, "
                        'convention="expected").'
                    )
        return fisher

    def _check_memory(self) -> None:
        """Refuse a number of models whose largest tensor, stacked, no memory holds."""
        if not self._merged:
            return
        largest = max(self._merged, key=lambda name: self.first.tensors[name].numel())
        needed = 2 * len(self._models) * self.first.tensors[largest].numel() * self._stacker.dtype.itemsize
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
        if needed > there:
            raise MergeError(
                f"The method {self._function.name!r} needs {largest} of all {len(self._models)} models at once, "
                f"{needed / 1e9:.0f} GB with what it computes, and this machine has {there / 1e9:.0f} GB. Merge fewer, or with "
                "a method that goes entry by entry, such as task_arithmetic."
            )
