"""A network with random weights in double precision, on which a claim about its channels is compared with what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_peft.network.layers import is_linear
from lightning_peft.structure.coupled.example import call, leaves
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.depth import copied
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.maps import plain_tensors

TRIALS = 3
_MOST = 4096  # numbers of one tensor that are compared
_TOLERANCE = 1e-4  # of the largest number in an output; a wrong column moves it by more than 1e-3 of that


class DrawnNetwork:
    """A copy of a network, to be called with random numbers from the range of its batch.

    The weights are drawn too. Which column hears which channel does not depend on their values, and with random ones nothing
    is hidden: layers that a user's network starts at zero, channels that say nothing, equal channels. So one comparison is
    exact for almost all draws, and a draw in double precision leaves a wide gap between rounding and a wrong column.

    Args:
        network: The network; it is not touched.
        name: Its name, for messages.
        example: What it is called with (:func:`~lightning_peft.structure.coupled.example.record`).
        claim: What is to be proven, for messages.

    Attributes:
        whole: The copy.
        trial: Which of the inputs it is called with.

    Raises:
        MisconfigurationException: It cannot be called with numbers from the range of its batch.
    """

    def __init__(self, network: nn.Module, name: str, example: Mapping[str, Any], claim: str) -> None:
        self.example, self.trial = example, 0
        # A forward may make numbers of its own, which do not mix with doubles; and random weights may be too much for it.
        for self.dtype, drawn in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
            self.whole = _twin(network, self.dtype, drawn)
            self.device = next((tensor.device for tensor in plain_tensors(self.whole).values()), torch.device("cpu"))
            try:
                if any(bool(value.isfinite().any()) for value in self.output(self.whole, self.whole).returned):
                    return
                failure = "it returns no finite real number"
            except Exception as error:
                failure = f"it fails with {type(error).__name__}: {error}"
        raise MisconfigurationException(
            f"{claim} of {name} cannot be proven: called with random numbers from the range of a batch, {failure}. "
            "The proof needs a forward that depends on shapes only; name the part of the module that has one with "
            'network="<name>".'
        )

    @torch.no_grad()
    def output(self, run: Callable[..., Any], network: nn.Module) -> Seen:
        """What a call of a network returns and computes.

        Args:
            run: What is called: the network, or something that calls it.
            network: Whose layers are watched.
        """
        seen = Seen()
        weighted = {name: part for name, part in network.named_modules() if is_linear(part) or isinstance(part, _ConvNd)}
        hooks = [part.register_forward_hook(seen.hook(name)) for name, part in weighted.items()]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.autocast(self.device.type, enabled=False):
                torch.manual_seed(0)
                found = call(run, self.example, self.device, draw=torch.Generator().manual_seed(self.trial), dtype=self.dtype)
        finally:
            for hook in hooks:
                hook.remove()
        seen.returned = [value for value in leaves(found) if isinstance(value, Tensor) and value.is_floating_point()]
        return seen


def failing(groups: Sequence[Coupled], fault: Callable[[Sequence[Coupled]], str | None]) -> dict[str, str]:
    """Find the groups about which a claim is wrong.

    Args:
        groups: The groups.
        fault: Says what is wrong with some of them together, ``None`` when nothing is.

    Returns:
        What is wrong, by name of the group. All others stood the test together.
    """
    reasons: dict[str, str] = {}
    good: list[Coupled] = []
    rest = list(groups)
    while rest and (reason := fault(good + rest)) is not None:
        # The first group without which all before it are right, by bisection.
        low, high = 0, len(rest)
        while high - low > 1:
            middle = (low + high) // 2
            found = fault(good + rest[:middle])
            low, high, reason = (middle, high, reason) if found is None else (low, middle, found)
        good += rest[:low]
        reasons[rest[low].name] = reason
        rest = rest[low + 1 :]
    return reasons


@dataclass
class Seen:
    """What a call of a network returned, and what its layers with weights computed on the way.

    Attributes:
        returned: The real tensors it returned.
        computed: By layer the results of its calls: the shape, and no more than some thousand numbers of it.
    """

    returned: list[Tensor] = field(default_factory=list)
    computed: dict[str, list[tuple[torch.Size, Tensor]]] = field(default_factory=dict)

    def hook(self, name: str) -> Callable[..., None]:
        """A hook that notes what a layer computes."""

        def note(part: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                few = output.detach().flatten()[:: -(-output.numel() // _MOST)].clone()
                self.computed.setdefault(name, []).append((output.shape, few))

        return note

    def agrees(self, other: Seen, without: Collection[str] = ()) -> bool:
        """Whether all that has the same shape in both agrees to rounding, what some layers compute left out."""
        pairs = list(zip(self.returned, other.returned, strict=True))
        for name in (self.computed.keys() & other.computed.keys()).difference(without):
            calls = zip(self.computed[name], other.computed[name], strict=False)
            pairs += [(mine, its) for (shape, mine), (its_shape, its) in calls if shape == its_shape]
        return all(
            torch.allclose(mine, its, rtol=0.0, atol=_TOLERANCE * float(its[its.isfinite()].abs().amax()), equal_nan=True)
            for mine, its in pairs
            if bool(its.isfinite().any())
        )


def _twin(network: nn.Module, dtype: torch.dtype, drawn: bool) -> nn.Module:
    """A copy, with random weights if asked; on the CPU where the device has no numbers of that size."""
    whole = copied(network, masked=True).eval().requires_grad_(False)
    detach_maps(whole, "live")  # layer parts follow their layer's cut in ways of their own
    if any(tensor.device.type == "mps" for tensor in plain_tensors(whole).values()):
        whole = whole.to("cpu")
    whole = whole.to(dtype)
    generator = torch.Generator().manual_seed(0)
    statistics = ("running_mean", "running_var")
    tensors = {id(t): t for n, t in plain_tensors(whole).items() if isinstance(t, nn.Parameter) or n.endswith(statistics)}
    for tensor in tensors.values() if drawn else ():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.ndim > 1:
            value = torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.numel() / tensor.shape[0])
        else:  # norms and variances must not be zero, and positive biases keep units alive
            value = 0.5 + torch.rand(tensor.shape, generator=generator)
        tensor.data.copy_(value)
    return whole
