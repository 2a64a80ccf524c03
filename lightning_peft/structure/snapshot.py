"""A snapshot of a module: its parts, its tensors and the numbers it notes, to undo whatever a refused file has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.plain_tensors import overwrite
from lightning_peft.structure import journal
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts

_REGISTRIES = ("_modules", "_parameters", "_buffers")


class ModuleSnapshot:
    """Holds what loading a checkpoint can change about a module: structure, values, journal.

    Edits are not undone one by one, because what they removed or cut may be at hand no more: every part is given back what it
    held, tensors stay the objects they are.

    Args:
        module: The module; its weight maps are attached and stay so until :meth:`restore`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._journal = journal.changes_of(module)
        self._parts = {id(part): (part, type(part), _registries(part), _attributes(part)) for part in self._reach()}
        configs = {id(config): config for part in self._reach() if (config := vars(part).get("config")) is not None}
        self._configs = [(config, dict(vars(config))) for config in configs.values() if hasattr(config, "__dict__")]
        self._values = {id(tensor): (tensor, tensor.detach().clone()) for tensor in self._tensors()}
        self._untouched = [mapped for mapped in mapped_tensors(module) if mapped.untouched]

    def _reach(self) -> Iterator[nn.Module]:
        """Every part, those included that an edit took out of the module and undoing it brings back."""
        yield from self._module.modules()
        for mapped in mapped_tensors(self._module):
            for weight_map in mapped.maps:
                yield from weight_map.modules()
        for placed in placed_parts(self._module):
            yield from placed.part.modules()
        for change in self._journal:
            for block in change.removed.values():
                yield from block.modules()

    def _tensors(self) -> Iterator[Tensor]:
        for _, _, registries, attributes in self._parts.values():
            for values in (registries["_parameters"], registries["_buffers"], attributes):
                yield from (value for value in values.values() if isinstance(value, Tensor))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the module back what it was."""
        for part, cls, registries, attributes in self._parts.values():
            part.__class__ = cls  # a replaced layer lost its weight maps, and those are a class of their own
            for key, values in registries.items():
                getattr(part, key).clear()
                getattr(part, key).update(values)
            _put_back(part, _attributes(part), attributes)
        for config, noted in self._configs:
            _put_back(config, dict(vars(config)), noted)
        for tensor, value in self._values.values():
            if tensor.shape == value.shape and tensor.dtype == value.dtype:
                overwrite(tensor, value)
            else:
                tensor.data = value.to(tensor.device)
        for mapped in self._untouched:
            mapped.chain.version = mapped.stored._version
        journal.set_changes(self._module, self._journal)


def _registries(part: nn.Module) -> dict[str, dict[str, Any]]:
    return {key: dict(getattr(part, key)) for key in _REGISTRIES}


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Attributes of a part, without those that Lightning and PyTorch manage and without shadowed methods."""
    return {key: value for key, value in vars(part).items() if not key.startswith("_") and not callable(value)}


def _put_back(owner: Any, now: dict[str, Any], then: dict[str, Any]) -> None:
    for key in now.keys() - then.keys():
        del vars(owner)[key]
    vars(owner).update(then)
