"""Small methods, one for each way of acting: maps, masks, parts, loss terms, gradients, steps, optimizers, calibration.

They stand in for other people's methods wherever a test needs some, and are the shortest complete examples of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer

from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Step
from lightning_peft.compose.run import Run
from lightning_peft.compose.step_closure import StepClosure
from lightning_peft.method import Method
from lightning_peft.optim.wrapped import WrappedOptimizer
from lightning_peft.structure.edits import Change, EditRequest
from lightning_peft.structure.forms import Form, dict_of, fields, whole
from lightning_peft.structure.journal import journal_of
from lightning_peft.structure.replacement import Replacement
from lightning_peft.testing.trace import difference
from lightning_peft.weights.layer_part import LayerPart
from lightning_peft.weights.maps import WeightMap


class ScaleMap(WeightMap):
    """Multiplies a weight by a learned number; starts so that the layer computes what it did."""

    kind = "toy_scale"
    lane = Lane.REPARAM
    optimizer_overrides = {"weight_decay": 0.0}

    def __init__(self, start: float = 2.0) -> None:
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.tensor(start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Stored value under which the layer sees ``weight``."""
        return weight / self.scale

    def config(self) -> dict[str, Any]:
        return {"start": self.start}


class ToyScale(Method):
    """Weight map with a parameter of its own on every linear layer."""

    lane = Lane.REPARAM
    writes = frozenset({Resource.WEIGHT_MAP})
    weight_maps = (ScaleMap,)

    def __init__(
        self, scale: float = 2.0, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.scale = scale

    def attach(self, module: LightningModule) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, ScaleMap(self.scale))


class ThresholdMap(WeightMap):
    """Sets weights below a threshold to zero, and lets gradients reach all of them."""

    kind = "toy_threshold"
    lane = Lane.MASK

    def __init__(self, threshold: float = 0.05) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, weight: Tensor) -> Tensor:
        return weight - (weight * (weight.abs() < self.threshold)).detach()

    def bake(self, weight: Tensor) -> Tensor:
        return torch.where(weight.abs() < self.threshold, 0.0, weight)

    def config(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


class ToyThreshold(Method):
    """Mask without parameters on every linear layer."""

    lane = Lane.MASK
    writes = frozenset({Resource.MASK})
    weight_maps = (ThresholdMap,)

    def __init__(
        self, threshold: float = 0.05, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.threshold = threshold

    def attach(self, module: LightningModule) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, ThresholdMap(self.threshold))


class ToyNoise(Method):
    """Changes gradients: adds Gaussian noise to them before they are clipped (Neelakantan et al., 2015)."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})
    commutes = True
    paper = "Neelakantan et al., 2015, https://arxiv.org/abs/1511.06807"

    def __init__(self, deviation: float = 0.01, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.deviation = deviation

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        # From the step, not from a generator that goes on: a resumed training draws the same, and so does every rank.
        generator = torch.Generator().manual_seed(run.step)
        for parameter in with_gradient(optimizer):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad.add_(noise.to(parameter), alpha=self.deviation)  # type: ignore[union-attr]


class ToySAM(Method):
    """Takes the gradients where the loss is highest near the weights (Foret et al., ICLR 2021, equations 2 and 3)."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})
    paper = "Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412"

    def __init__(self, radius: float = 0.05, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.radius = radius

    def compute_gradients(self, run: Run, optimizer: Optimizer, closure: StepClosure) -> None:
        closure()
        parameters = with_gradient(optimizer)
        norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]).norm()
        if norm == 0 or not norm.isfinite():  # a gradient scaler will skip this step
            return
        with moved(parameters, [p.grad * (self.radius / norm) for p in parameters]):
            closure.again()


def with_gradient(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters that a step is about to move, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]


@contextmanager
@torch.no_grad()
def moved(parameters: Sequence[nn.Parameter], by: Sequence[Tensor]) -> Iterator[None]:
    """Within it parameters are elsewhere; afterwards, also if the loss was not finite there, they are what they were."""
    before = [parameter.clone() for parameter in parameters]
    try:
        for parameter, distance in zip(parameters, by, strict=True):
            parameter.add_(distance)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


class ToyTwice(Method):
    """Evaluates every step once more, which must give the same gradients and leave nothing that tells of it."""

    lane = Lane.REPORT

    def compute_gradients(self, run: Run, optimizer: Optimizer, closure: StepClosure) -> None:
        closure()
        first = {parameter: parameter.grad for parameter in with_gradient(optimizer)}
        closure.again()
        names = {id(parameter): name for name, parameter in run.module.named_parameters()}
        differing = [names[id(p)] for p, gradient in first.items() if difference(gradient, p.grad) is not None]
        assert not differing, f"evaluated once more, a step has other gradients: {', '.join(differing)}"
        for parameter, gradient in first.items():
            parameter.grad = gradient


class Lookahead(WrappedOptimizer):
    """Every few steps of an optimizer, goes back most of the way (Zhang et al., NeurIPS 2019, algorithm 1)."""

    def __init__(self, inner: Optimizer, every: int, share: float) -> None:
        super().__init__(inner)
        self.every, self.share = every, share

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        starts = {p: p.clone() for p in parameters if "slow" not in self.state.get(p, ())}
        loss = self.inner.step(closure)
        for parameter in with_gradient(self):
            state = self.state[parameter]
            if "slow" not in state:  # not before: Adam takes a state that holds something for its own
                state |= {"slow": starts[parameter], "slow_steps": 0}
            state["slow_steps"] += 1
            if state["slow_steps"] % self.every == 0:
                parameter.copy_(state["slow"].lerp_(parameter, self.share))
        return loss

    def begin_again(self) -> None:
        """Let slow weights begin at what the weights are now."""
        for state in self.state.values():
            state.pop("slow", None)
            state.pop("slow_steps", None)


class ToyLookahead(Method):
    """Wraps every optimizer."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.OPTIMIZER})
    paper = "Zhang et al., NeurIPS 2019, https://arxiv.org/abs/1907.08610"

    def __init__(self, every: int = 3, share: float = 0.5, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.every, self.share = every, share

    def wrap_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        return Lookahead(optimizer, self.every, self.share)

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        for optimizer in module.trainer.optimizers:
            if isinstance(optimizer, Lookahead):
                optimizer.begin_again()


class ShiftMap(WeightMap):
    """Adds a learned number to a weight; what is stored is the rest, as where the principal part of a weight is trained."""

    kind = "toy_shift"
    lane = Lane.DELTA

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.start = start
        self.shift = nn.Parameter(torch.tensor(start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Stored value under which the layer sees ``weight``."""
        return weight - self.shift

    def config(self) -> dict[str, Any]:
        return {"start": self.start}


class ToyShift(Method):
    """A second kind of map that can be inverted, for tensors that have one already."""

    lane = Lane.DELTA
    weight_maps = (ShiftMap,)

    def __init__(
        self, shift: float = 0.5, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.shift = shift

    def attach(self, module: LightningModule) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, ShiftMap(self.shift))


class LowRankPart(LayerPart):
    """LoRA (Hu et al., ICLR 2022) beside a linear layer: ``x`` goes through two thin matrices, the weight is not touched.

    Args:
        inputs: Inputs of the layer.
        outputs: Outputs of the layer.
        rank: Rows of ``down``, ``(rank, inputs)``, and columns of ``up``, ``(outputs, rank)``.
        seed: Seed of ``down``; ``up`` starts at zero, so that the layer computes what it did.
    """

    kind = "toy_low_rank"
    lane = Lane.DELTA
    follows = {"down": {1: ("weight", 1)}, "up": {0: ("weight", 0)}}

    def __init__(self, inputs: int, outputs: int, rank: int = 2, seed: int = 0) -> None:
        super().__init__()
        self._config = {"inputs": inputs, "outputs": outputs, "rank": rank, "seed": seed}
        down = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, output: Tensor, inputs: Tensor) -> Tensor:
        return output + linear(linear(inputs, self.down), self.up)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight of a layer that computes the same by itself."""
        return weight + self.up @ self.down

    def config(self) -> dict[str, Any]:
        return self._config


class ToyLowRank(Method):
    """Layer part that can go into the weight, on every linear layer."""

    lane = Lane.DELTA
    parts = (LowRankPart,)

    def __init__(self, rank: int = 2, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.rank = rank

    def attach(self, module: LightningModule) -> None:
        for seed, (name, layer) in enumerate(self.select(module).items()):
            outputs, inputs = layer.weight.shape  # type: ignore[misc]
            self.put_part(module, name, LowRankPart(int(inputs), int(outputs), self.rank, seed))


class ToyEntropy(Method):
    """Loss term with state: rewards confident predictions, and counts the steps and epochs it took part in."""

    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS, Resource.SAMPLE_INDEX})

    def __init__(self, weight: float = 0.1, *, network: str | None = None, name: str | None = None) -> None:
        super().__init__(network=network, name=name)
        self.weight = weight
        self.seen: dict[str, Any] = {"optimizer_steps": 0, "epochs": 0, "last_index": torch.zeros(0, dtype=torch.int64)}

    def loss(self, step: Step) -> Tensor:
        if not step.repeated:
            self.seen["last_index"] = step.sample_index
        probabilities = step.logits.softmax(-1)
        return self.weight * (1 - probabilities.square().sum(-1)).mean()

    def after_step(self, run: Run) -> None:
        self.seen["optimizer_steps"] += 1

    def epoch_end(self, run: Run) -> None:
        self.seen["epochs"] += 1

    def metrics(self, run: Run) -> dict[str, float]:
        return {"optimizer_steps": float(self.seen["optimizer_steps"])}

    def state(self) -> dict[str, Any]:
        return dict(self.seen)

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"optimizer_steps": whole(), "epochs": whole(), "last_index": _indices})

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = dict(state)


def _indices(value: Any, place: str) -> str | None:
    fits = isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1
    return None if fits else f"{place} is not a vector of sample positions"


class Adapted(nn.Module):
    """A layer with a bottleneck behind it, which begins as the layer alone."""

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.out_features, width), nn.Linear(width, layer.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.layer(inputs)
        adapted: Tensor = output + self.up(self.down(output).relu())
        return adapted


class Adapter(Replacement):
    """Puts a bottleneck behind a linear layer, which goes on inside."""

    kind, inside = "toy_adapter", "layer"

    def __init__(self, width: int = 3) -> None:
        self.width = width

    def config(self) -> dict[str, Any]:
        return {"width": self.width}

    def check(self, layer: nn.Module) -> None:
        fits = isinstance(layer, nn.Linear) and type(self.width) is int and 1 <= self.width <= layer.out_features
        if not fits:
            raise ValueError(f"width={self.width!r} is not a whole number from 1 to the outputs of a linear layer")

    def build(self, layer: nn.Module) -> nn.Module:
        return Adapted(layer, self.width)


class ToyWrap(Method):
    """Wraps the first linear layer in the middle of a training; what was done stands in the module's journal."""

    lane = Lane.STRUCTURE
    writes = frozenset({Resource.STRUCTURE})
    replacements = (Adapter,)

    def __init__(
        self, at: int = 2, width: int = 3, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.at, self.width = at, width

    def claims(self, module: nn.Module) -> list[str]:
        return []

    def next_edit(self, run: Run) -> EditRequest | None:
        if run.step < self.at or any(edit.get("by") == self.name for edit in journal_of(run.module)):
            return None
        edit = self.put(run.module, next(iter(self.select(run.module))), Adapter(self.width))
        return EditRequest(edit | {"by": self.name, "seed": 1})


class ToyWanda(Method):
    """Prunes each row of linear weights by ``|w|`` times the norm of its input (Sun et al., 2024), block after block."""

    lane = Lane.MASK

    def __init__(
        self, share: float = 0.5, *, targets: Any = "all-linear", exclude: Any = None, name: str | None = None
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        self.share = share
        self.pruned: dict[str, int] = {}

    def calibrate(self, block: CalibrationBlock) -> None:
        layers: dict[str, Any] = block.inside(self.select(block.root))
        squares = {name: torch.zeros_like(layer.weight[0]) for name, layer in layers.items()}

        def add(name: str, inputs: Tensor) -> None:
            squares[name] += inputs.flatten(0, -2).square().sum(0)

        block.watch(layers, add)
        for name, layer in layers.items():
            scores = layer.weight.abs() * squares[name].sqrt()
            lowest = scores.argsort(dim=1, stable=True)[:, : int(self.share * scores.shape[1])]
            layer.weight.scatter_(1, lowest, 0.0)
            self.pruned[name] = lowest.numel()

    def state(self) -> dict[str, Any]:
        return {"pruned": dict(self.pruned)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"pruned": dict_of(whole())})

    def load_state(self, state: dict[str, Any]) -> None:
        self.pruned = dict(state["pruned"])


class ToyTuning(Method):
    """Trains the parameters whose names end as it is told, biases for one, and nothing else of the module."""

    lane = Lane.GRADIENT

    def __init__(self, ends: str = "bias", *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.ends = ends

    def trained(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters() if name.endswith(self.ends)]
