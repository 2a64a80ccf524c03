"""R-AMT: which of a frozen network's weights a task is better off without."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run, Step
from lightning_peft.arguments import not_negative, one_of, positive
from lightning_peft.contract import SHARDED
from lightning_peft.deltas.sides import matrices
from lightning_peft.network.seeds import name_hash
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.network.tunable import kinds_of, tunable
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.strategies.gradients import gradients_beside
from lightning_peft.strategies.ranks import mean_over_ranks
from lightning_peft.weights.frozen_answers import frozen_answers
from lightning_peft.weights.maps import MappedTensor, maps_of
from lightning_peft.weights.shards import spread_as, whole
from lightning_peft_plugins.selective._ramt.binary_mask import BinaryMask
from lightning_peft_plugins.selective.functional.ramt import distance_from_answers, kept_share


class RAMT(Method):
    """Trains a mask for every entry of the target weights, which stay frozen; what the network knew holds the gradient back.

    A mask is a real number, and the entry stays where that is above ``threshold``; the gradient passes as if it were the bit
    itself. In every step the distance of the logits from those without masks has a gradient too, and an entry of the user's
    gradient is kept with a probability that falls the more this one points against it (gradient dropout).

    Args:
        dropout: Share of an entry's gradient that goes where it is not kept: 1 drops it, 0 keeps every gradient.
        start: What masks begin as; above ``threshold``, so that the network begins as it was.
        threshold: Above it an entry stays.
        norm: Factor of the length of each weight's masks, which the loss gains.
        temperature: What logits are divided by in the distance.
        seed: What gradients are dropped with.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        targets: Layers whose weights are masked, frozen ones too; an ``nn.MultiheadAttention`` for its input projections.
        exclude: Layers whose weights are not.
        checkpoint: ``"trained"`` leaves what did not change out of checkpoints, which then need the same base to be loaded.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A share outside of 0 to 1, a start that is not above the threshold, a negative factor, or a
            temperature that is not above 0.

    Example:
        >>> RAMT(dropout=0.3)
        RAMT(dropout=0.3, start=0.01, threshold=0.005, norm=0.0001, temperature=1.0, seed=0, tune=(), targets='auto', ...)
    """

    lane = Lane.MASK
    strategies = SHARDED
    reads = frozenset({Resource.LOGITS, Resource.STRUCTURE})
    writes = frozenset({Resource.MASK, Resource.GRADIENT})
    weight_maps = (BinaryMask,)
    paper = (
        "Zheng et al., Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models, ICCV 2023, "
        "arXiv 2307.15049"
    )

    def __init__(
        self,
        dropout: float = 1.0,
        start: float = 1e-2,
        threshold: float = 5e-3,
        norm: float = 1e-4,
        temperature: float = 1.0,
        seed: int = 0,
        tune: Collection[str] = (),
        targets: TargetSpec = "auto",
        exclude: TargetSpec | None = ("head",),
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, network=network, name=name)
        if not 0 <= dropout <= 1:
            raise MisconfigurationException(f"dropout={dropout} must be a share, from 0 to 1.")
        if start <= threshold:
            raise MisconfigurationException(
                f"start={start} must be above threshold={threshold}, or every target weight begins as zero."
            )
        not_negative("norm", norm, "Zero leaves it out.")
        positive("temperature", temperature)
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.dropout, self.start_value, self.threshold = dropout, start, threshold
        self.norm, self.temperature, self.seed = norm, temperature, seed
        self.tune = kinds_of(tune)
        self.checkpoint = checkpoint
        self._pulls: dict[str, Tensor] = {}

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """The layers whose weights are masked. All weights are frozen, so frozen ones are not left alone."""
        return select(module, self.targets or "auto", self.exclude)

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The weights that are masked."""
        return list(self._matrices(module))

    def _matrices(self, module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """Layer and attribute of every weight that is masked."""
        return {
            f"{path}.{key}".removeprefix("."): (layer, key)
            for path, layer in self.select(module).items()
            for key in matrices(path, layer)
        }

    def attach(self, module: LightningModule) -> None:
        """Put masks on the weights that hold nothing back."""
        present = {mapped.name for mapped, _ in self.maps(module)}
        for name, (layer, key) in self._matrices(module).items():
            if name in present:
                continue
            weight: Tensor = getattr(layer, key)
            mask = BinaryMask(weight.shape, self.start_value, self.threshold)
            if weight.dtype == torch.float64:
                mask.to(weight.dtype)
            self.map_weight(module, name, mask.to(weight.device))

    def maps(self, module: nn.Module) -> Iterator[tuple[MappedTensor, BinaryMask]]:
        """The masks on a module, each with its tensor."""
        found = maps_of(module, BinaryMask, type(self).__name__)
        return ((mapped, mask) for mapped, mask in found if mask.method == self.name)

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """What :attr:`tune` names; masks are trained whatever they stand on."""
        return tunable(module, self.tune, {tensor.rpartition(".")[0] for tensor in self.claims(module)})

    def _masks(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {mapped.name: mask.real for mapped, mask in self.maps(module)}

    def loss(self, step: Step) -> Tensor | None:
        if self.dropout and not step.repeated:
            self._see(step)
        lengths = [whole(real.norm()) for real in self._masks(step.run.module).values()]
        return self.norm * torch.stack(lengths).sum() if self.norm else None

    def _see(self, step: Step) -> None:
        """Add to the gradients of the distance from what the network answers without masks."""
        logits = step.logits.float() if step.logits.dtype in (torch.float16, torch.bfloat16) else step.logits
        distance = distance_from_answers(logits, frozen_answers(step, self.name), self.temperature)
        scaler = step.run.gradient_scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())  # half precision would lose small gradients
        found = gradients_beside(step.run, scale * distance, lambda: self._masks(step.run.module))
        for name, gradient in found.items():
            gradient = gradient / scale / step.run.trainer.accumulate_grad_batches
            self._pulls[name] = self._pulls[name] + gradient if name in self._pulls else gradient

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Drop what is not kept of the gradients of masks."""
        moved = trained_by(optimizer)
        for mapped, mask in self.maps(run.module):
            gradient = mask.real.grad
            if not self.dropout or gradient is None or mask.real not in moved:
                continue
            pull = self._pulls.pop(mapped.name, torch.zeros_like(gradient))
            pull = mean_over_ranks(run.trainer.strategy, pull)
            draw = torch.Generator().manual_seed(name_hash(f"{self.seed}/{run.step}/{mapped.name}"))
            drawn = spread_as(gradient, torch.rand(gradient.shape, generator=draw).to(gradient.device))
            gradient.mul_(torch.where(kept_share(gradient, pull) > drawn, 1.0, 1 - self.dropout))

    def after_step(self, run: Run) -> None:
        """Forget the gradients of the step."""
        self._pulls = {}

    def finish(self, run: Run) -> None:
        """Forget the gradients of a step that never came."""
        self._pulls = {}

    def describe(self, module: nn.Module) -> str:
        """Count the masks."""
        found = self._matrices(module).values()
        count = sum(getattr(layer, key).numel() for layer, key in found)
        return ", ".join(
            [f"masks of {count:,} weights in {len(found)} tensors", *(f"{part} as they are" for part in self.tune)]
        )

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the entries that are masked."""
        bits = [mask.bits() for _, mask in self.maps(run.module)]
        return {"masked": 1 - sum(int(whole(each.sum())) for each in bits) / max(1, sum(each.numel() for each in bits))}
