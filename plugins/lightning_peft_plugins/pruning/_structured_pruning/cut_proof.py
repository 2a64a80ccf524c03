"""The proof that groups are what the graph says: the cut network computes what the whole one does with the units silenced."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_peft.network.layers import is_linear
from lightning_peft.structure import edits
from lightning_peft.structure.depth import copied
from lightning_peft.weights.detach import detach_maps
from lightning_peft.weights.maps import plain_tensors, split_name
from lightning_peft_plugins.pruning._structured_pruning.coupled import Coupled, cut_edit
from lightning_peft_plugins.pruning._structured_pruning.dependency import RETURNED
from lightning_peft_plugins.pruning._structured_pruning.example import call, leaves

_TRIALS = 3
_MOST = 4096  # numbers of one tensor that are compared
_TOLERANCE = 1e-4  # of the largest number in an output; a wrong column moves it by more than 1e-3 of that


class CutProof:
    """Compares cuts on copies of a network.

    Half of each group's units, drawn at random, are removed from one copy. In the other they stay and are set to zero: in
    every tensor of the group, writers and readers alike, so that it does not matter what an activation makes of zero. Norms
    between them, which would count the zeros in their means, run on the units that stay. What the two copies return must agree
    to rounding, and so must what layers with weights compute where nothing was removed, because a saturated probability at the
    end would hide a difference. If a group claims other columns than its channels reach, those that stay meet other values.

    The weights are drawn too. Which column hears which channel does not depend on their values, and with random ones nothing
    is hidden: layers that a user's network starts at zero, channels that say nothing, equal channels. So one comparison is
    exact for almost all draws, and a draw in double precision leaves a wide gap between rounding and a wrong column.

    Args:
        network: The network; it is not touched.
        name: Its name, for messages.
        example: What it is called with (:func:`~lightning_peft_plugins.pruning._structured_pruning.example.record`).

    Raises:
        MisconfigurationException: It cannot be called with numbers from the range of its batch.
    """

    def __init__(self, network: nn.Module, name: str, example: Mapping[str, Any]) -> None:
        self.example, self.trial = example, 0
        # A forward may make numbers of its own, which do not mix with doubles; and random weights may be too much for it.
        for self.dtype, drawn in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
            self.whole = _twin(network, self.dtype, drawn)
            self.device = next((tensor.device for tensor in plain_tensors(self.whole).values()), torch.device("cpu"))
            try:
                if any(bool(value.isfinite().any()) for value in self._output(self.whole, self.whole).returned):
                    return
                failure = "it returns no finite real number"
            except Exception as error:
                failure = f"it fails with {type(error).__name__}: {error}"
        raise MisconfigurationException(
            f"Cuts of {name} cannot be proven: called with random numbers from the range of a batch, {failure}. "
            "StructuredPruning needs a forward that depends on shapes only; name the part of the module that has one with "
            'network="<name>".'
        )

    def failing(self, groups: Sequence[Coupled]) -> dict[str, str]:
        """Find the groups that cannot be cut.

        Returns:
            Why not, by name of the group. All others were cut together, and what was left agreed.
        """
        reasons: dict[str, str] = {}
        good: list[Coupled] = []
        rest = list(groups)
        while rest and (reason := self._fault(good + rest)) is not None:
            # The first group without which all before it can be cut, by bisection.
            low, high = 0, len(rest)
            while high - low > 1:
                middle = (low + high) // 2
                found = self._fault(good + rest[:middle])
                low, high, reason = (middle, high, reason) if found is None else (low, middle, found)
            good += rest[:low]
            reasons[rest[low].name] = reason
            rest = rest[low + 1 :]
        return reasons

    def _fault(self, groups: Sequence[Coupled]) -> str | None:
        """Say why groups cannot be cut; with several draws, because in one sample a channel that would tell may be dead."""
        return next(filter(None, (self._fault_in(groups, trial) for trial in range(_TRIALS))), None)

    def _fault_in(self, groups: Sequence[Coupled], trial: int) -> str | None:
        self.trial = trial
        cuts = [(group, _half(group, place + trial * len(groups))) for place, group in enumerate(groups)]
        try:
            cut = copy.deepcopy(self.whole)
            edits.apply(cut, cut_edit(cut, "", cuts))
            left = self._output(cut, cut)
        except Exception as error:
            message = str(error).partition("\n")[0]
            return f"the network fails once some of them are removed, with {type(error).__name__}: {message}"
        silenced = self._silenced(cut, cuts)
        if [value.shape for value in left.returned] != [value.shape for value in silenced.returned]:
            return RETURNED
        if left.agrees(silenced):
            return None
        return (
            "the network without some of them does not compute what the whole one does with them set to zero, because the "
            "forward moves or mixes them on their way to the next layer"
        )

    def _silenced(self, cut: nn.Module, cuts: Sequence[tuple[Coupled, Tensor]]) -> _Seen:
        tensors = plain_tensors(self.whole)
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}  # tied tensors go by one name
        parts = dict(self.whole.named_modules(remove_duplicate=False))
        values: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for group, units in cuts:
            for place in group.places:
                stays = ~torch.isin(place.units, units)
                path, name = split_name(place.tensor)[0], first[id(tensors[place.tensor])]
                shape = [-1 if dim == place.dim else 1 for dim in range(tensors[name].ndim)]
                values[name] = values.get(name, tensors[name]) * stays.to(tensors[name]).view(shape)
                if _is_vector(parts[path]):
                    kept[path] = kept.get(path, stays) & stays  # what groups concatenate, a norm may read as a whole
            for number in group.numbers:
                if _is_vector(parts[number.path]):
                    stays = ~torch.isin(number.units, units)
                    kept[number.path] = kept.get(number.path, stays) & stays
        hooks = [parts[path].register_forward_hook(_narrowed(cut.get_submodule(path), stays)) for path, stays in kept.items()]
        own = {name: tensors[name].data for name in values if isinstance(tensors[name], nn.Parameter)}
        try:
            for name in own:  # in place, because a layer in two places has one tensor
                tensors[name].data = values[name].data
            return self._output(self.whole, self.whole)
        finally:
            for name, value in own.items():
                tensors[name].data = value
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _output(self, run: Callable[..., Any], network: nn.Module) -> _Seen:
        seen = _Seen()
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


@dataclass
class _Seen:
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

    def agrees(self, other: _Seen) -> bool:
        """Whether all that has the same shape in both agrees to rounding."""
        pairs = list(zip(self.returned, other.returned, strict=True))
        for name in self.computed.keys() & other.computed.keys():
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


def _half(group: Coupled, place: int) -> Tensor:
    """Units that go, so that an odd number stays: sizes written into a forward divide an even one too easily."""
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(place))
    return order[min(group.units - 1, group.units // 2 | 1) :]


def _is_vector(part: nn.Module) -> bool:
    """Whether a module holds nothing but numbers of single channels: a norm, a scale."""
    own = part._parameters.values()
    return all(any(p is q for q in own) and p.numel() == max(p.shape, default=1) for p in part.parameters())


def _narrowed(cut: nn.Module, stays: Tensor) -> Callable[..., Any]:
    """A hook that runs a norm on the channels that stay, and leaves zeros where the others were."""

    def run(part: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(output, Tensor) or not isinstance(args[0], Tensor):
            return output
        inputs, keep = args[0], stays.to(args[0].device)
        dims = [dim for dim in range(inputs.ndim) if inputs.shape[dim] == len(keep)]
        if inputs.shape != output.shape or not dims:
            return output
        # Channels come last, or second; where both are of that size, the zeros say which it is.
        silent = [dim for dim in dims if not inputs.movedim(dim, 0)[~keep].any()]
        dim = (silent or dims)[-1]
        result = cut(inputs.movedim(dim, 0)[keep].movedim(0, dim), *args[1:])
        whole = torch.zeros_like(output).movedim(dim, 0)
        whole[keep] = result.movedim(dim, 0)
        return whole.movedim(0, dim)

    return run
