"""Measurements of one network, and of two side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_peft.measure.clock import Latency
from lightning_peft.measure.layers import LayerCost
from lightning_peft.measure.quality import Quality
from lightning_peft.measure.spread import Spread


@dataclass(frozen=True)
class Figures:
    """Measurements of one network.

    Attributes:
        parameters: Values of all parameters, tied ones once.
        nonzero: How many of them are not zero.
        weight_bytes: Bytes of parameters and buffers in memory.
        file_bytes: Bytes of the state dict as ``torch.save`` writes it.
        batch_size: Samples in each counted call.
        flops: FLOPs a sample of each counted call; they differ where work depends on the input.
        activation_bytes: Most bytes of one counted call beside weights and inputs.
        latencies: Durations, by batch size.
        layers: Cost of each layer.
        unknown: Operators whose FLOPs could not be counted.
        device: Where it ran, in words.
    """

    parameters: int
    nonzero: int
    weight_bytes: int
    file_bytes: int
    batch_size: int
    flops: tuple[float, ...]
    activation_bytes: int
    latencies: tuple[Latency, ...]
    layers: tuple[LayerCost, ...]
    unknown: tuple[str, ...]
    device: str

    @property
    def flops_spread(self) -> Spread:
        """Mean and spread of the FLOPs a sample over the counted calls."""
        return Spread.of(self.flops)


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side.

    Attributes:
        before: Figures of the first.
        after: Figures of the second.
        runs: Timed calls of each.
        warm_up: Calls of each before that.
        quality: Quality of both on labelled batches, if there were any.
        names: What to call them.
    """

    before: Figures
    after: Figures
    runs: int
    warm_up: int
    quality: tuple[Quality, Quality] | None = None
    names: tuple[str, str] = ("before", "after")

    @property
    def predicted(self) -> float:
        """How many times fewer FLOPs the second network needs."""
        return self.before.flops_spread.mean / max(self.after.flops_spread.mean, 1e-12)

    def achieved(self) -> dict[int, float]:
        """How many times faster it is by the clock, medians compared, by batch size."""
        pairs = zip(self.before.latencies, self.after.latencies, strict=True)
        return {one.batch_size: one.median / other.median for one, other in pairs}

    def as_data(self) -> dict[str, Any]:
        """Return everything as plain data."""
        quality = self.quality and dict(zip(self.names, map(asdict, self.quality), strict=True))
        return {
            **dict(zip(self.names, (asdict(self.before), asdict(self.after)), strict=True)),
            "predicted_speedup": self.predicted,
            "achieved_speedup": {str(size): ratio for size, ratio in self.achieved().items()},
            "runs": self.runs,
            "warm_up": self.warm_up,
            "quality": quality,
        }
