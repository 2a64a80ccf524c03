"""Two networks of half the width, fused into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Resource, Run, WeightMap
from lightning_peft.arguments import one_of
from lightning_peft.capture.shim import Shim
from lightning_peft.contract import methods_of
from lightning_peft.network.resolve import resolve_network
from lightning_peft.network.targets import TargetSpec
from lightning_peft.weights.functions import in_backward
from lightning_peft.weights.maps import MappedTensor, mapped_tensors
from lightning_peft_plugins.growth._mixture_growth.halves import head_layers, inner_layers
from lightning_peft_plugins.growth._mixture_growth.leak import check_apart
from lightning_peft_plugins.growth._shared.timed import TimedMethod
from lightning_peft_plugins.growth.functional.mixture import (
    CROSS_RULES,
    cross_coefficients,
    mix_templates,
    of_its_member,
    own_shares,
)


class MixtureMap(WeightMap):
    """The weight of a layer, combined from the four templates it stores by :func:`mix_templates`.

    A plain weight that comes in is stored as it is, with coefficients that give it back bit for bit.

    Attributes:
        fused: Whether the coefficients of blocks off the diagonal are trained too; before, they are zero and stay so.
    """

    kind = "mixture"
    lane = Lane.REPARAM
    optimizer_overrides = {"weight_decay": 0.0}
    coefficients: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(_plain())
        self.fused = False

    @property
    def plain(self) -> bool:
        """Whether the stored tensor is the weight itself: nothing was split into members yet."""
        return torch.equal(self.coefficients, _plain().to(self.coefficients))

    def forward(self, weight: Tensor) -> Tensor:
        shares = self.coefficients
        if not self.fused:
            shares = torch.where(own_shares(shares), shares, shares.detach())
        return mix_templates(weight, shares.to(weight.dtype))

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a plain weight."""
        self.coefficients.data = _plain().to(weight.device, self.coefficients.dtype)
        return weight


def _plain() -> Tensor:
    return torch.eye(2).repeat(2, 1, 1)


class MixtureGrowth(TimedMethod):
    """Trains two members of half the width in one network, then fuses them by combining their weights anew.

    Before the fusion the weight of every layer between the first and the last is block-diagonal, a block a member, so that the
    network is two networks side by side. In training each sample of a batch is answered by one member alone, in turns, which
    makes the module's own loss the mean of the two members' own losses. At the fusion the blocks off the diagonal become new
    linear combinations of the members' templates, and all is trained as one network. Its weights end as ordinary ones.

    Args:
        at: When to fuse: ``"step:5000"``, ``"epoch:2"``, ``"30%"``, ``"tokens:1e9"`` or ``"plateau"``.
        coefficients: Of the new blocks: ``"orthogonal"`` to those the member was trained with, ``"copy"`` of them with noise,
            ``"zero"`` (the network computes what it did) or ``"random"``.
        noise: Length of the orthogonal vector or of the noise; largest random coefficient.
        lr: ``"continue"`` or ``"rewarm:<length>@<peak>"``, from the fusion on; see ``LayerGrowth``.
        stem: Layers that read the network's input; the first one when not given.
        head: Layers that write the network's output; found when not given.
        monitor: Metric that ``"plateau"`` watches, by default the first logged one with "val" and "loss" in its name.
        patience: Looks at it without progress that make a plateau.
        min_delta: Relative fall that counts as progress.
        seed: Seed of the coefficients.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A layer computes its two halves from one another, or cannot be halved; or, at the first step,
            the members turn out to meet.

    Example:
        >>> MixtureGrowth(at="epoch:400")
        MixtureGrowth(at='epoch:400', coefficients='orthogonal', noise=1.0, ...)
    """

    lane = Lane.REPARAM
    writes = frozenset({Resource.WEIGHT_MAP})
    weight_maps = (MixtureMap,)
    paper = "Pham et al., MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters, WACV 2024, arXiv 2311.04251"

    def __init__(
        self,
        at: str | float = "90%",
        coefficients: str = "orthogonal",
        noise: float = 1.0,
        *,
        lr: str = "continue",
        stem: TargetSpec | None = None,
        head: TargetSpec | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(at=at, lr=lr, **kwargs)
        one_of("coefficients", coefficients, CROSS_RULES)
        self.rule, self.noise, self.seed = coefficients, float(noise), seed
        if self.lr_rule.restart:
            raise MisconfigurationException('lr="restart" is not offered here; write "rewarm:<length>@<peak>" or "continue".')
        self.stem, self.head = stem, head
        self._turns: dict[str, Any] = {"on": False, "offset": torch.tensor(0, device="cpu")}  # a number would be compiled in
        self._shims: list[Shim] = []
        self._apart = False

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers between stem and head."""
        name, network = resolve_network(module, self.network)
        inner = inner_layers(network, self.stem, self.head)
        return {f"{name}.{layer}" if name else layer: found for layer, found in inner.items()}

    def attach(self, module: LightningModule) -> None:
        """Put a map on every layer between stem and head; the network computes what it did until training starts."""
        for tensor in self.claims(module):
            self.map_weight(module, tensor, MixtureMap())

    def _maps(self, module: nn.Module) -> list[tuple[MappedTensor, MixtureMap]]:
        return [(mapped, entry) for mapped in mapped_tensors(module) for entry in mapped.maps if isinstance(entry, MixtureMap)]

    def start(self, run: Run) -> None:
        """Split the network into members, unless it is two members or one network already.

        Raises:
            MisconfigurationException: A method that changes structure trains with it.
        """
        for other in methods_of(run.trainer.callbacks):  # type: ignore[attr-defined]
            if other.lane == Lane.STRUCTURE:
                raise MisconfigurationException(
                    f"{self.name} cannot tell which member the new layers of {other.name} would be. Remove one of them."
                )
        maps = self._maps(run.module)
        if all(weight_map.plain for _, weight_map in maps):
            self._split(maps)
        elif not self.done and any((m.coefficients * ~own_shares(m.coefficients)).any() for _, m in maps):
            self.mark_done()  # by an earlier fit
        super().start(run)
        self._take_turns(run.module)
        _, network = resolve_network(run.module, self.network)
        for layer in head_layers(network, self.head).values():
            self._shims.append(Shim(layer, "forward", partial(self._answer, layer)).install())

    def _answer(self, layer: nn.Module, inner: Callable[..., Tensor], features: Tensor) -> Tensor:
        """In training, let the head see of each sample what its member made of it."""
        # A network can be trained in evaluation mode; activation checkpointing repeats its calls in the backward pass.
        trains = layer.training or (self.run is not None and self.run.in_step) or in_backward()
        dim = -1 if isinstance(layer, nn.Linear) else 1
        if self._turns["on"] and trains:
            if not self._apart and self.run is not None and self.run.in_step and not torch.compiler.is_compiling():
                self._apart = True
                check_apart(features, dim, {mapped.name: mapped.stored for mapped, _ in self._maps(self.run.module)})
            features = of_its_member(features, dim, self._turns["offset"])
        return inner(features)

    @torch.no_grad()
    def _split(self, maps: list[tuple[MappedTensor, MixtureMap]]) -> None:
        """Store templates whose combinations are the blocks on the diagonal, and cut the members apart."""
        generator = torch.Generator().manual_seed(self.seed)
        for mapped, weight_map in maps:
            turned = torch.linalg.qr(torch.randn(2, 2, 2, generator=generator)).Q.to(weight_map.coefficients)
            # Half the inputs need weights that are larger by the root of two. `.data`, because a failure before the first step
            # must find the version of the tensor as it was, and bring the plain weight back.
            mapped.stored.data.copy_(mix_templates(mapped.stored.data * 2**0.5, turned.transpose(1, 2).to(mapped.stored.dtype)))
            weight_map.coefficients.copy_(turned * own_shares(turned))

    def _take_turns(self, module: nn.Module) -> None:
        for _, weight_map in self._maps(module):
            weight_map.fused = bool(self.done)
        self._turns["on"] = not self.done
        self._turns["offset"].fill_(self.steps % 2)  # else a batch of one sample would always be the first member's

    def after_step(self, run: Run) -> None:
        """Fuse the members when the moment has come."""
        if self.due(run, stepped=True):
            self.mark_done()
            self._fuse(run.module)
        self._take_turns(run.module)

    @torch.no_grad()
    def _fuse(self, module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        for _, weight_map in self._maps(module):
            shares = weight_map.coefficients.cpu()
            for member in (0, 1):
                new = cross_coefficients(shares[member, member], self.rule, self.noise, generator)
                weight_map.coefficients[member, 1 - member] = new.to(weight_map.coefficients)

    def finish(self, run: Run) -> None:
        """Let every sample have all features again."""
        for shim in self._shims:
            shim.remove()
        self._shims = []

    def describe(self, module: nn.Module) -> str:
        """Say what is mixed and when."""
        return f"2 members in {len(self.select(module))} layers, fused at {self._arguments['at']}"

    @torch.no_grad()
    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Whether the members are fused, and the mean size of coefficients off the diagonal."""
        shares = [weight_map.coefficients for _, weight_map in self._maps(run.module)]
        cross = torch.stack([(entry * ~own_shares(entry)).abs().sum() / 4 for entry in shares]).mean()
        return {"fused": float(self.done), "cross": cross, "lr_factor": self.lr_factor()}
