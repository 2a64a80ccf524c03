"""Any adapter layer of Hugging Face PEFT in the life cycle of a method."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run, Step
from lightning_peft.arguments import one_of
from lightning_peft.contract import SHARDED
from lightning_peft.network.resolve import resolve_network
from lightning_peft.network.seeds import named_seed
from lightning_peft.network.targets import TargetSpec, select
from lightning_peft.network.tunable import kinds_of, share_trained, tunable
from lightning_peft.structure.forms import Form
from lightning_peft.weights.parts import placed_parts
from lightning_peft_plugins.deltas._peft_adapter.adapter_check import check_adapter, check_unchanged
from lightning_peft_plugins.deltas._peft_adapter.injection import (
    Injection,
    check_installed,
    injection,
    plain_config,
)
from lightning_peft_plugins.deltas._peft_adapter.layer_shell import described_layers, layer_shell
from lightning_peft_plugins.deltas._peft_adapter.step_calls import StepCalls
from lightning_peft_plugins.deltas._peft_adapter.tuner_part import TunerPart


class PeftAdapter(Method):
    """Trains adapter layers of Hugging Face PEFT beside the frozen layers of a module, and whatever else is named.

    PEFT says which layers get an adapter, makes it and computes it; the layer stays where it is, under its name. After the fit
    the module is ordinary, with PEFT's own merge of the adapters in its weights, unless ``keep`` leaves them beside. Calls that
    PEFT leaves to the training loop are made: AdaLoRA's ``update_and_allocate`` after every step, its orthogonality loss.

    Args:
        config: A configuration of PEFT such as ``peft.OFTConfig(...)``, or its data as in ``adapter_config.json``.
        targets: Layers that get an adapter, in this library's grammar, instead of the configuration's ``target_modules``.
        exclude: Layers that get none, instead of its ``exclude_modules``.
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"``, ``"head"`` (the layers that write the logits).
        keep: Leave the adapters on the module after the fit, for :func:`lightning_peft.switch` and further training.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints, which tells two adapters of one module apart.

    Raises:
        MisconfigurationException: PEFT is not installed or refuses; the tuner changes the base, or its merge does not give back
            a layer that computes the same.

    Example:
        >>> PeftAdapter({"peft_type": "LOHA", "r": 4, "target_modules": ["fc1"]}, tune=("head",))
        PeftAdapter(config={'peft_type': 'LOHA', 'r': 4, 'target_modules': ['fc1']}, tune=('head',), ...)
    """

    lane = Lane.DELTA
    strategies = SHARDED
    writes = frozenset({Resource.DELTA})
    parts = (TunerPart,)
    paper = (
        "Mangrulkar et al., PEFT: State-of-the-art parameter-efficient fine-tuning methods, https://github.com/huggingface/peft"
    )

    def __init__(
        self,
        config: Any,
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = None,
        tune: Collection[str] = (),
        *,
        keep: bool = False,
        checkpoint: Literal["full", "trained"] = "trained",
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, network=network, name=name)
        check_installed()
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.tune = kinds_of(tune)
        self.data = plain_config(config)
        for argument, theirs in (("targets", "target_modules"), ("exclude", "exclude_modules")):
            if getattr(self, argument) is not None and self.data.get(theirs):
                raise MisconfigurationException(f"{argument}= and {theirs} of config say the same. Leave one of them out.")
        self.stays, self.checkpoint = keep, checkpoint
        self._calls = StepCalls(self.data)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "config": self.data}

    def injection(self, module: nn.Module) -> tuple[str, Injection]:
        """What names of layers begin with in the module, and what PEFT would put into the network, or into the whole module."""
        try:
            name, network = resolve_network(module, self.network)
        except MisconfigurationException:
            if self.network is not None:
                raise
            name, network = "", module
        prefix = f"{name}." if name else ""
        # As one pattern, for of a list PEFT also takes layers whose names end so.
        said = {}
        if self.targets is not None:
            said["target_modules"] = "|".join(re.escape(path.removeprefix(prefix)) for path in self.select(module))
        elif self.exclude is not None:
            left_out = select(module, self.exclude)
            said["exclude_modules"] = "|".join(re.escape(path.removeprefix(prefix)) for path in left_out)
        return prefix, injection({**self.data, **said}, network)

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The weights that get an adapter."""
        prefix, found = self.injection(module)
        return [f"{prefix}{path}.weight" for path in found.paths]

    def attach(self, module: LightningModule) -> None:
        """Put the adapters beside their layers."""
        prefix, found = self.injection(module)
        present = {placed.path for placed in self._placed(module)}
        layers = {prefix + path: module.get_submodule(prefix + path) for path in found.paths}
        descriptions = described_layers({name: layer for name, layer in layers.items() if name not in present})
        checked: list[dict[str, Any]] = []
        for name, description in descriptions.items():
            path, layer = name.removeprefix(prefix), layers[name]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(named_seed(f"{self.name}/{name}"))
                if description not in checked:
                    check_adapter(found.config, path, description)
                    checked.append(description)
                before = layer.weight.detach().cpu()  # where the same numbers are drawn for every device
                part = TunerPart(found.config, path, description, base := layer_shell(description, before.clone()))
            check_unchanged(name, base, before, found.config)
            self.put_part(module, name, part.to(layer.weight.device))

    def trained(self, module: nn.Module) -> Iterable[str | nn.Parameter]:
        """What PEFT trains of the adapters and beside them, and what :attr:`tune` names."""
        prefix, found = self.injection(module)
        yield from tunable(module, self.tune, {prefix + path for path in found.paths})
        yield from (prefix + name for name in found.beside)
        for placed in self._placed(module):
            yield from (placed.part.tuner.get_parameter(name) for name in placed.part.trained)

    def describe(self, module: nn.Module) -> str:
        """Say which adapters there are."""
        _, found = self.injection(module)
        beside = f", {len(found.beside)} parameters of the network as they are" if found.beside else ""
        tuned = "".join(f", {part} as they are" for part in self.tune)
        return f"PEFT's {found.config['peft_type']} on {len(found.paths)} layers{beside}{tuned}{self._calls.described}"

    def start(self, run: Run) -> None:
        """Get ready for the calls of every step."""
        self._calls.start({placed.path: placed.part.tuner for placed in self._placed(run.module)})

    def loss(self, step: Step) -> Tensor | None:
        """The term that PEFT's model would add to the loss."""
        return self._calls.loss()

    def after_step(self, run: Run) -> None:
        """Make PEFT's calls."""
        self._calls.after_step(run.step - 1)  # PEFT's loops count from zero

    def awaited(self, run: Run) -> Iterator[str]:
        """The end of the rank budget's schedule."""
        yield from self._calls.awaited(run.step)

    def finish(self, run: Run) -> None:
        """Let go of the adapters."""
        self._calls.finish()

    def state(self) -> dict[str, Any]:
        return self._calls.state()

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        return self._calls.form

    def load_state(self, state: dict[str, Any]) -> None:
        self._calls.load_state(state)

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained, and the mean rank where it changes."""
        return {"trained": share_trained(run.module), **self._calls.metrics()}

    def _placed(self, module: nn.Module) -> list[Any]:
        return [placed for placed in placed_parts(module) if placed.part.method == self.name]
