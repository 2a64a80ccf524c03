"""A block that is calibrated: what it was called with behind the blocks already done, and ways to run it on that again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.capture.recorded_calls import BlockCall, RecordedCalls


@dataclass(frozen=True)
class CalibrationBlock:
    """One block of a network in evaluation mode, at its turn.

    Attributes:
        name: Its qualified name.
        module: The block.
        root: The LightningModule, so that a method can select its layers by their full names.
        position: Its place in the order of calibration, from 0.
        count: Number of blocks.
        calls: What its calls were given, in order, over all batches; a block that is called several times has several calls a
            batch.
        generator: Random numbers of this block on the CPU, the same after a crash.
        context: Makes what the user's step runs under (mixed precision).
    """

    name: str
    module: nn.Module
    root: LightningModule
    position: int
    count: int
    calls: RecordedCalls
    generator: torch.Generator
    context: Callable[[], AbstractContextManager[Any]]

    def inside(self, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Return those of some layers, by qualified name, that are parts of the block, or the block itself."""
        return {name: layer for name, layer in layers.items() if f"{name}.".startswith(f"{self.name}.")}

    def run(self, call: BlockCall) -> Any:
        """Call the block as the user's step did; gradients are off, and can be enabled round it."""
        with self.context():
            return self.module(*call.args, **call.kwargs)

    def outputs(self) -> Iterator[Any]:
        """Run the block on all its calls, as it is now."""
        return (self.run(call) for call in self.calls)

    def watch(self, layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> None:
        """Run the block on all its calls, and see the input of every call of some layers in it.

        Args:
            layers: Layers by name.
            see: Called with a layer's name and the first tensor it was given, ``(..., inputs)``. A layer that is never called,
                because other code reads its weight, is warned of.
        """
        called: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                called.add(name)
                see(name, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach())

            return before

        handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
        try:
            for call in self.calls:
                self.run(call)
        finally:
            for handle in handles:
                handle.remove()
        if missed := [name for name in layers if name not in called]:
            warnings.warn(f"The inputs of {', '.join(missed)} are unknown: never called.", stacklevel=2)
