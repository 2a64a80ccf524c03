"""Temporary forgetting: layers that begin anew now and then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.compose.schedule import parse_point
from lightning_peft.contract import SHARDED
from lightning_peft.network.layers import is_norm, own_parameters, parameter_names, public_class
from lightning_peft.network.seeds import name_hash
from lightning_peft.network.targets import TargetSpec, excluded, select
from lightning_peft.structure.forms import Form, fields, whole
from lightning_peft.weights.detach import attachments
from lightning_peft.weights.maps import set_plain_values
from lightning_peft.weights.shards import gathered


class TemporaryForgetting(Method):
    """Initialises layers anew every so many steps, and has their optimizer state begin anew with them.

    The rest of the network learns to do with layers that it cannot rely on, so that these can be exchanged later: token
    embeddings for those of another language.

    Args:
        every: Optimizer steps between two times.
        until: When it ends: optimizer steps, epochs (``"3ep"``) or a share of the training (``"10%"``); ``None`` for never. It
            never happens after the last step.
        std: Standard deviation of a normal distribution that weights are drawn from; biases are zero, scales of normalisation
            layers one. ``None`` has every layer do what its ``reset_parameters`` does.
        targets: What is initialised anew: layers, with all that is in them. Frozen ones are left alone unless they are named.
        exclude: Layers that are left alone.
        seed: Seed of the draws.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A layer cannot initialise itself, or shares a parameter with a layer that is left alone.

    Example:
        >>> TemporaryForgetting(every=1000, until="50%", std=0.02)
        TemporaryForgetting(every=1000, until='50%', std=0.02, targets='type:Embedding', seed=0)
    """

    lane = Lane.GRADIENT
    spares_frozen = True
    strategies = SHARDED
    reads = frozenset({Resource.STRUCTURE})
    paper = "Chen et al., Improving Language Plasticity via Pretraining with Active Forgetting, NeurIPS 2023, arXiv 2307.01163"

    def __init__(
        self,
        every: int = 1000,
        until: float | str | None = None,
        std: float | None = None,
        targets: TargetSpec = "type:Embedding",
        exclude: TargetSpec | None = None,
        seed: int = 0,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        if every < 1:
            raise MisconfigurationException(f"every={every} must be at least 1.")
        if std is not None and std <= 0:
            raise MisconfigurationException(f"std={std} must be above 0. Leave it out for the layers' own initialisation.")
        self.every, self.std, self.seed = every, std, seed
        self.until = None if until is None else parse_point(until)
        self._times, self._forgot_at = 0, 0

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers with parameters of their own in what :attr:`targets` names.

        Raises:
            MisconfigurationException: One cannot initialise itself.
        """
        inside = {part for layer in select(module, self.targets or ()).values() for part in layer.modules()}
        inside -= excluded(module, self.exclude)
        found = {name: layer for name, layer in module.named_modules() if layer in inside and own_parameters(layer)}
        spared = self.spared(module, found)
        if len(spared) == len(found):
            raise MisconfigurationException(
                f"{self.name} finds no layer to begin anew: {', '.join(list(found)[:3]) or 'what targets= names'} "
                f"{'are frozen' if found else 'holds no parameter'}. Name trained layers in targets=."
            )
        found = {name: layer for name, layer in found.items() if name not in spared}
        own = [name for name, layer in found.items() if not callable(getattr(layer, "reset_parameters", None))]
        if own and self.std is None:
            raise MisconfigurationException(
                f"{self.name}: {own[0]}, {public_class(found[own[0]])}, has no reset_parameters(). Give std= for a normal "
                f"distribution, or leave it out: exclude={own[:3]!r}."
            )
        return found

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The parameters that begin anew."""
        return parameter_names(self.select(module))

    def start(self, run: Run) -> None:
        """Know when it was done last: a file holds the state after its step.

        Raises:
            MisconfigurationException: Other methods freeze what would begin anew.
        """
        self._forgot_at = run.step
        for name, layer in self.select(run.module).items():
            if not run.frozen.isdisjoint(own_parameters(layer).values()):
                raise MisconfigurationException(
                    f"{self.name}: other methods freeze parameters of {name} for this fit, so what begins anew would stay "
                    f"as it was drawn. Leave it out, exclude=[{name!r}], or have them train it, for instance tune=('head',)."
                )

    def after_step(self, run: Run) -> None:
        """Begin anew when it is time to."""
        ended = self.until is not None and run.step > run.place(self.until, "until=")
        if run.step % self.every or run.step == self._forgot_at or ended or run.step == run.end:
            return
        self._forgot_at = run.step
        self._times += 1
        for name, layer in self.select(run.module).items():
            self._forget(run, name, layer)

    @torch.no_grad()
    def _forget(self, run: Run, name: str, layer: nn.Module) -> None:
        seed = name_hash(f"{self.seed}/{run.step}/{name}")
        if self.std is None:
            device = next(tensor.device for tensor in own_parameters(layer).values())
            # Whole, or every process would draw for its shards.
            with gathered(layer, *attachments(layer)), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                layer.reset_parameters()  # type: ignore[operator]
        else:
            draw = torch.Generator().manual_seed(seed)
            values = {f"{name}.{key}": self._drawn(layer, key, tensor, draw) for key, tensor in own_parameters(layer).items()}
            set_plain_values(run.module, {key.lstrip("."): value for key, value in values.items()})
        for optimizer in run.trainer.optimizers:
            for parameter in own_parameters(layer).values():
                optimizer.state.pop(parameter, None)

    def _drawn(self, layer: nn.Module, key: str, tensor: Tensor, draw: torch.Generator) -> Tensor:
        if key.endswith("bias") or is_norm(layer):
            value = 0.0 if key.endswith("bias") else 1.0
            return torch.full(tensor.shape, value, dtype=tensor.dtype, device=tensor.device)
        drawn = torch.randn(tensor.shape, generator=draw) * (self.std or 0)
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            drawn[layer.padding_idx] = 0
        return drawn.to(tensor.device, tensor.dtype)

    def describe(self, module: nn.Module) -> str:
        """Name the layers."""
        names = list(self.select(module))
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{shown} begin{'s' if len(names) == 1 else ''} anew every {self.every} steps"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """How often it was done."""
        return {"times": float(self._times)}

    def state(self) -> dict[str, Any]:
        """How often it was done."""
        return {"times": self._times}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return fields({"times": whole()})

    def load_state(self, state: dict[str, Any]) -> None:
        self._times = state["times"]

    def awaited(self, run: Run) -> Iterable[str]:
        """The first time."""
        if not self._times:
            yield f"layers began anew, first after step {self.every}"
