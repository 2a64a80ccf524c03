"""Watches the blocks of a training: whether each can leave, and how far it turns what passes through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_peft.capture.look import Look
from lightning_peft.capture.shim import Shim
from lightning_peft.capture.tap import forward_attribute
from lightning_peft.network.block_lists import entry_names
from lightning_peft.network.layers import own_parameters
from lightning_peft.structure.forms import fields, maybe, tensor, text, whole
from lightning_peft_plugins.pruning.functional.block_influence import block_influence


@dataclass
class BlockActivations:
    """Observations of one block.

    Attributes:
        score: Sum of what the block scored, float32; ``None`` before the first time.
        scored: How often it did.
        calls: Calls of the block.
        misfits: Those that returned another shape than they were given.
        links: How often its input was the output of another block of its list, or its output the input of another.
        shapes: The shapes of a misfit, for messages.
    """

    score: Tensor | None = None
    scored: int = 0
    calls: int = 0
    misfits: int = 0
    links: int = 0
    shapes: str = ""

    def add(self, score: Tensor) -> None:
        """Take a score into account."""
        # A state that was loaded can be on another device than the block.
        before = torch.zeros_like(score) if self.score is None else self.score.to(score.device)
        # A call that was not finite says no more than those before it; asked without waiting for the device.
        self.score = before + torch.where(score.isfinite(), score, before / max(1, self.scored))
        self.scored += 1

    def mean(self) -> float:
        """Mean score; NaN before the first."""
        return math.nan if self.score is None or not self.scored else float(self.score) / self.scored

    def why_it_stays(self) -> str:
        """Say why the block cannot be removed; nothing when it can."""
        if not self.calls:
            return "was not called"
        if self.misfits:
            return f"changes the shape ({self.shapes or 'on another rank'})"
        return "" if self.links else "passes nothing on to another block of its list"


SEEN = fields(
    {"score": maybe(tensor([])), "scored": whole(), "calls": whole(), "misfits": whole(), "links": whole(), "shapes": text}
)
"""Form of :class:`BlockActivations` in a checkpoint."""


class BlockWatch:
    """Stands around the blocks of lists while it is open.

    The forward of a block is shadowed rather than hooked: hooks registered after a first compiled call never fire
    (pytorch#117758).

    Args:
        watching: Whether calls count now.
        scoring: Whether they are scored too.
    """

    def __init__(self, watching: Callable[[], bool], scoring: Callable[[], bool]) -> None:
        self.watching, self.scoring = watching, scoring
        self.seen: dict[str, BlockActivations] = {}
        self._shims: list[Shim] = []
        self._last: dict[str, tuple[BlockActivations, Tensor]] = {}

    def of(self, block: str) -> BlockActivations:
        """Return what was seen of a block."""
        return self.seen.setdefault(block, BlockActivations())

    def open(self, module: nn.Module, lists: Mapping[str, Iterable[int]]) -> None:
        """Begin to see the calls of blocks; does nothing while it is open.

        Args:
            module: The LightningModule.
            lists: Positions of the blocks by the name of their list.
        """
        if self._shims:
            return
        for path, places in lists.items():
            for name in entry_names(module, path, places):
                block = module.get_submodule(name)
                see = self._see(path, name, _feature_dim(block))
                self._shims.append(Shim(block, forward_attribute(block), see).install())

    def _see(self, path: str, name: str, features: Callable[[Tensor], int]) -> Callable[..., Any]:
        look = Look(partial(self._note, path, name, features))

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            returned = inner(*args, **kwargs)
            outputs = returned[0] if isinstance(returned, tuple) and returned else returned
            look(args[0] if args else next(iter(kwargs.values()), None), outputs)
            return returned

        return forward

    @torch.no_grad()
    def _note(self, path: str, name: str, features: Callable[[Tensor], int], given: Any, outputs: Any) -> None:
        if not self.watching():
            return
        if not isinstance(given, Tensor) or not isinstance(outputs, Tensor):
            raise MisconfigurationException(
                f"{name} takes {type(given).__name__} and returns {type(outputs).__name__}: only blocks that take a tensor "
                "and return one of the same shape, alone or first in a tuple, can be removed. Leave its list out with "
                f"exclude=[{path!r}]."
            )
        inputs, outputs, seen = given.detach(), outputs.detach(), self.of(name)
        seen.calls += 1
        before = self._last.get(path)
        if before is not None and before[0] is not seen and _same(before[1], inputs):
            before[0].links += 1
            seen.links += 1
        self._last[path] = seen, outputs
        if inputs.shape != outputs.shape:
            seen.misfits += 1
            seen.shapes = f"{_shown(inputs)} to {_shown(outputs)}"
        elif self.scoring():
            seen.add(block_influence(inputs, outputs, features(inputs)))

    def reduced(self, blocks: Sequence[str], strategy: Strategy) -> dict[str, BlockActivations]:
        """Return what all ranks saw of blocks, each of its own samples."""
        device = strategy.root_device
        own = [self.of(name) for name in blocks]
        counts = torch.tensor([[s.scored, s.calls, s.misfits, s.links] for s in own], dtype=torch.float32, device=device)
        zero = torch.zeros((), device=device)
        scores = torch.stack([zero if seen.score is None else seen.score.to(zero) for seen in own])
        table: Any = strategy.reduce(torch.cat([scores[:, None], counts], 1), reduce_op="sum")
        return {
            name: BlockActivations(row[0], *(int(count) for count in row[1:].tolist()), seen.shapes)
            for name, row, seen in zip(blocks, table, own, strict=True)
        }

    def forget_scores(self) -> None:
        """Begin to score anew; what was seen of shapes and links stays."""
        for seen in self.seen.values():
            seen.score, seen.scored, seen.calls = None, 0, 0

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Follow an edit that moved or removed blocks."""
        moved = [(new_name(f"{name}.weight"), seen) for name, seen in self.seen.items()]
        self.seen = {name.removesuffix(".weight"): seen for name, seen in moved if name is not None}

    def let_go(self) -> None:
        """Let go of the activations of the last call."""
        self._last.clear()

    def close(self) -> None:
        """Stop looking."""
        for shim in self._shims:
            shim.remove()
        self._shims = []
        self.let_go()

    def state(self) -> dict[str, Any]:
        """The observations as plain data."""
        return {name: asdict(seen) for name, seen in self.seen.items()}

    @staticmethod
    def pooled(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Make one state of those of several ranks: the first rank takes what all saw, the others begin anew."""
        names = dict.fromkeys(name for state in states for name in state)
        together = {name: [BlockActivations(**state[name]) for state in states if name in state] for name in names}
        return {name: asdict(_sum(seen) if rank == 0 else BlockActivations()) for name, seen in together.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.seen = {name: BlockActivations(**seen) for name, seen in state.items()}


def _sum(seen: Sequence[BlockActivations]) -> BlockActivations:
    scores = [each.score for each in seen if each.score is not None]
    counts = {key: sum(getattr(each, key) for each in seen) for key in ("scored", "calls", "misfits", "links")}
    shapes = next((each.shapes for each in seen if each.shapes), "")
    return BlockActivations(torch.stack(scores).sum(0) if scores else None, **counts, shapes=shapes)


def _feature_dim(block: nn.Module) -> Callable[[Tensor], int]:
    """Where the features of what a block is given are: second for a block that begins with a convolution, else last."""
    weights = (own_parameters(layer).get("weight") for layer in block.modules())
    first = next((weight.ndim for weight in weights if weight is not None and weight.ndim > 1), 0)
    return lambda inputs: 1 if first > 2 and inputs.ndim == first else -1


def _same(outputs: Tensor, inputs: Tensor) -> bool:
    """Whether two tensors are one; checkpointed blocks are given a detached alias."""
    return outputs.shape == inputs.shape and outputs.data_ptr() == inputs.data_ptr()


def _shown(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
