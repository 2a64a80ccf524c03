"""Scaling and shifting of features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Method, Run
from lightning_peft.arguments import not_negative, one_of
from lightning_peft.contract import SPLIT
from lightning_peft.network.layers import is_norm, is_weight, loose_matrices, public_class
from lightning_peft.network.seeds import named_seed
from lightning_peft.network.targets import TargetSpec, explicitly_named, select
from lightning_peft.network.tunable import share_trained
from lightning_peft.weights.parts import placed_parts
from lightning_peft_plugins.selective._shared.untied_heads import described_heads, untied_heads
from lightning_peft_plugins.selective._ssf.channels import Channels, channels_of
from lightning_peft_plugins.selective._ssf.scale_shift_part import ScaleShiftPart


class SSF(Method):
    """Trains a scale and a shift of every channel behind every operation, and the head; the rest is frozen for the fit.

    After the fit both are in the weights and biases of ordinary layers, exactly up to rounding, unless ``keep`` leaves them
    beside. A layer without a bias gets a scale alone.

    Args:
        head: Train the layers that write the logits too. A head that is tied to an embedding stays frozen.
        noise: Standard deviation of scales about one and of shifts about zero at the start. The paper's is 0.02; 0 leaves
            what the network computes as it is.
        targets: Layers to scale; by default every linear layer, convolution and normalisation layer.
        exclude: Layers that are not scaled.
        keep: Leave scales and shifts on the module after the fit, for :func:`lightning_peft.switch` and further training.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A layer that is named computes something into which no scale can go, or there is none.

    Example:
        >>> SSF(noise=0.02)
        SSF(head=True, noise=0.02, exclude=('head',), keep=False, checkpoint='trained')
    """

    strategies = SPLIT
    lane = Lane.DELTA
    parts = (ScaleShiftPart,)
    paper = "Lian et al., Scaling & Shifting Your Features, NeurIPS 2022, arXiv 2210.08823"

    def __init__(
        self,
        head: bool = True,
        noise: float = 0.0,
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = ("head",),
        *,
        keep: bool = False,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        not_negative("noise", noise)
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.head, self.noise = head, noise
        self.stays, self.checkpoint = keep, checkpoint

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers that are scaled.

        Raises:
            MisconfigurationException: A layer is named that cannot be, or none can.
        """
        found = self._found(module)
        fit = self._channels(module, found)
        unfit = [name for name in found if name not in fit]
        named = explicitly_named(module, self.targets)
        wrong = [name for name in unfit if found[name] in named] if fit else unfit
        if wrong:
            raise MisconfigurationException(
                f"{self.name}: no scale can go into the weight of {wrong[0]}, {public_class(found[wrong[0]])}: its class "
                f"computes in its own way, or nobody calls it. Leave it out: exclude={wrong[:3]!r}"
                f"{'.' if fit else ', and name layers in targets= that compute as those of torch do.'}"
            )
        return {name: found[name] for name in fit}

    def _found(self, module: nn.Module) -> dict[str, nn.Module]:
        if self.targets is not None:
            return select(module, self.targets, self.exclude)
        kinds = {"all-weights": is_weight, "norm": is_norm}
        present = [kind for kind, fits in kinds.items() if any(map(fits, module.modules()))]
        return select(module, present or "all-weights", self.exclude)

    def _channels(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Channels]:
        """Where the channels of layers are; those are left out that nobody calls, or that no scale can go into."""
        called = {
            name: layer
            for name, layer in layers.items()
            if not isinstance(module.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        }
        return {name: found for name, layer in called.items() if (found := channels_of(layer)) is not None}

    def attach(self, module: LightningModule) -> None:
        """Put scales and shifts beside the layers."""
        layers = self.select(module)
        for name, channels in self._channels(module, layers).items():
            part = ScaleShiftPart(channels.count, channels.axis, channels.dim, channels.shifted)
            weight = layers[name]._parameters["weight"]
            assert weight is not None
            if weight.dtype == torch.float64:
                part.to(weight.dtype)
            seed = torch.Generator().manual_seed(named_seed(f"{self.name}/{name}"))
            if self.noise:
                with torch.no_grad():
                    for parameter in part.parameters():
                        parameter.add_(torch.randn(parameter.shape, generator=seed, dtype=parameter.dtype) * self.noise)
            self.put_part(module, name, part.to(weight.device))

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """Scales and shifts, and the head's parameters."""
        parts = (placed.part for placed in placed_parts(module) if placed.part.method == self.name)
        return [
            *(parameter for part in parts for parameter in part.parameters()),
            *(untied_heads(module)[0] if self.head else ()),
        ]

    def describe(self, module: nn.Module) -> str:
        """Count what is trained, and name what is left alone."""
        found = self._found(module)
        channels = self._channels(module, found)
        count = sum(each.count * (1 + each.shifted) for each in channels.values())
        parts = [f"scales of {len(channels)} layers, {count:,} parameters"]
        if bare := [name for name, each in channels.items() if not each.shifted]:
            parts.append(f"no shift of {len(bare)} without a bias ({', '.join(bare[:3])}{', ...' * (len(bare) > 3)})")
        if left := [*(name for name in found if name not in channels), *loose_matrices(module)]:
            parts.append(f"leaves {len(left)} alone ({', '.join(left[:3])}{', ...' * (len(left) > 3)})")
        return ", ".join([*parts, *(described_heads(module) if self.head else ())])

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}
