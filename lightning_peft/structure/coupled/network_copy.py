"""A copy of a network without its data, to follow its channels on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.coupled.example import call
from lightning_peft.structure.depth import copied
from lightning_peft.weights.maps import parameters_with_maps
from lightning_peft.weights.parts import part_stacks, take_parts


class NetworkCopy:
    """A network without weight maps and data, on the ``meta`` device where its forward runs there, else on the CPU.

    Args:
        network: The network; it is not touched.
        name: Its name, for messages.
        example: What it is called with (:func:`~lightning_peft.structure.coupled.example.record`).

    Raises:
        MisconfigurationException: It cannot be called with the example on its own.
    """

    def __init__(self, network: nn.Module, name: str, example: Mapping[str, Any]) -> None:
        self.example, self.name = example, name or type(network).__name__
        plain = copied(network, masked=True).eval().requires_grad_(True)
        for _, layer, stack in list(part_stacks(plain)):  # what goes into a weight has that weight's inputs and outputs
            take_parts(layer, stack, stack.merging)
        self.device, self.module = torch.device("meta"), _on_meta(plain)
        try:
            self.call()
        except Exception:  # an operator without a shape rule, or a forward that looks at values
            self.device, self.module = torch.device("cpu"), plain.to("cpu")
            self._call_on_cpu()

    def _call_on_cpu(self) -> None:
        try:
            self.call()
        except Exception as error:
            raise MisconfigurationException(
                f"{self.name} cannot be traced: called with ones of the shapes of a batch it fails with "
                f"{type(error).__name__}: {error}. Coupled channels are found in a forward that depends on shapes only; name "
                'the part of the module that has one with network="<name>".'
            ) from error

    def call(self) -> Any:
        """Run the network as recorded."""
        return call(self.module, self.example, self.device)


def _on_meta(network: nn.Module) -> nn.Module:
    """Copy a network without its data; ``Module.to`` would untie its tensors."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in network.buffers()}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters_with_maps(network)}
    twin: nn.Module = copy.deepcopy(network, memo)
    return twin
