"""The proof that groups are what the graph says: the cut network computes what the whole one does with the units silenced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure import edits
from lightning_peft.structure.coupled.dependency import RETURNED
from lightning_peft.structure.coupled.drawn_network import TRIALS, DrawnNetwork, Seen, failing
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.weights.maps import plain_tensors, split_name
from lightning_peft_plugins.pruning._structured_pruning.coupled import cut_edit


class CutProof:
    """Compares cuts on copies of a network.

    Half of each group's units, drawn at random, are removed from one copy. In the other they stay and are set to zero: in
    every tensor of the group, writers and readers alike, so that it does not matter what an activation makes of zero. Norms
    between them, which would count the zeros in their means, run on the units that stay. What the two copies return must agree
    to rounding, and so must what layers with weights compute where nothing was removed, because a saturated probability at the
    end would hide a difference. If a group claims other columns than its channels reach, those that stay meet other values.

    Args:
        network: The network; it is not touched.
        name: Its name, for messages.
        example: What it is called with (:func:`~lightning_peft.structure.coupled.example.record`).

    Raises:
        MisconfigurationException: It cannot be called with numbers from the range of its batch.
    """

    def __init__(self, network: nn.Module, name: str, example: Mapping[str, Any]) -> None:
        self.drawn = DrawnNetwork(network, name, example, "Cuts")
        self.whole = self.drawn.whole

    def failing(self, groups: Sequence[Coupled]) -> dict[str, str]:
        """Find the groups that cannot be cut.

        Returns:
            Why not, by name of the group. All others were cut together, and what was left agreed.
        """
        return failing(groups, self._fault)

    def _fault(self, groups: Sequence[Coupled]) -> str | None:
        """Say why groups cannot be cut; with several draws, because in one sample a channel that would tell may be dead."""
        return next(filter(None, (self._fault_in(groups, trial) for trial in range(TRIALS))), None)

    def _fault_in(self, groups: Sequence[Coupled], trial: int) -> str | None:
        self.drawn.trial = trial
        cuts = [(group, _half(group, place + trial * len(groups))) for place, group in enumerate(groups)]
        try:
            cut = copy.deepcopy(self.whole)
            edits.apply(cut, cut_edit(cut, "", cuts))
            left = self.drawn.output(cut, cut)
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

    def _silenced(self, cut: nn.Module, cuts: Sequence[tuple[Coupled, Tensor]]) -> Seen:
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
            return self.drawn.output(self.whole, self.whole)
        finally:
            for name, value in own.items():
                tensors[name].data = value
            for hook in hooks:
                hook.remove()


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
