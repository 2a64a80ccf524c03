"""Choosing the channels and heads that go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.structure.coupled.dependency import HEADS, RETURNED, channel_groups, layers_of, tied_outside
from lightning_peft.structure.coupled.head_stacks import stacked_heads
from lightning_peft.structure.coupled.heads import attention_heads, whole_heads
from lightning_peft.structure.coupled.units import Coupled
from lightning_peft.structure.edits import Edit
from lightning_peft.weights.maps import split_name
from lightning_peft_plugins.pruning._structured_pruning.budget import Limits, StructuredScope, search, selections
from lightning_peft_plugins.pruning._structured_pruning.coupled import cut_edit, scores
from lightning_peft_plugins.pruning._structured_pruning.cut_proof import CutProof
from lightning_peft_plugins.pruning._structured_pruning.network_copy import CountedCopy

_MOST_REASONS = 5
Counted = Literal["params", "flops", "channels"]


@dataclass
class Baseline:
    """The network as it was before the first cut, which amounts and limits refer to.

    Attributes:
        cost: What it cost.
        units: Units of each group by name.
    """

    cost: float = 0.0
    units: dict[str, int] = field(default_factory=dict)


class Channels:
    """The groups of a network as it is now.

    Args:
        module: The LightningModule.
        path: Qualified name of the network in it.
        network: The network.
        example: What it is called with.
        kinds: What may go: ``"channels"``, ``"heads"``.
        allowed: Qualified names of layers whose outputs may go, ``None`` for all.
        counted: What the amount is a share of.
        excused: Qualified names of layers that need not take part in a call of the network.
        failed: Groups that did not stand the proof before an earlier cut, and why; they are not tried again.

    Attributes:
        groups: What can be cut, proven by a :class:`~lightning_peft_plugins.pruning._structured_pruning.cut_proof.CutProof`.
        whole: Why other layers keep their outputs, by name in the network.
        failed: Those of them that did not stand the proof, now or before.

    Raises:
        MisconfigurationException: The network cannot be traced, or nothing of it can be cut.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        network: nn.Module,
        example: Mapping[str, Any],
        kinds: Collection[str],
        allowed: Collection[str] | None,
        counted: Counted,
        excused: Collection[str] = (),
        failed: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.path, self.counted = module, path, counted
        self._costs: dict[tuple[int, ...], float] = {}
        self.twin = CountedCopy(network, path, example)
        prefix = f"{path}." if path else ""
        heads = stacked_heads(self.twin.module, attention_heads(self.twin.module))
        groups: list[Coupled] = list(heads) if "heads" in kinds else []
        whole: dict[str, str] = {}
        if "channels" in kinds:
            channels, whole = channel_groups(self.twin, layers_of(heads), {name.removeprefix(prefix) for name in excused})
            groups = channels + groups
        if "heads" in kinds:
            whole |= {name: why for name, why in whole_heads(self.twin.module).items() if name not in whole}
        self.whole = {n: why for n, why in whole.items() if why != HEADS and (allowed is None or prefix + n in allowed)}
        groups = [group for group in groups if self._allowed(group, allowed) and self._own(group)]
        self.failed = dict(failed or {})
        if groups := [group for group in groups if group.name not in self.failed]:
            self.failed |= CutProof(network, self.twin.name, example).failing(groups)
        self.whole |= self.failed
        self.groups = [group for group in groups if group.name not in self.failed]
        if not self.groups:
            reasons = self.left_whole(returned=True)
            raise MisconfigurationException(
                f"Nothing of {self.twin.name} can be cut in {' and '.join(kinds)}. {reasons or 'targets= leave nothing.'} "
                "Choose other targets= or another network=."
            )

    def left_whole(self, returned: bool = False) -> str:
        """Say which layers keep outputs that were to go, and why, in a sentence or two; ``""`` when none do.

        Args:
            returned: Whether to speak of what the network returns too, which always stays.
        """
        prefix = f"{self.path}." if self.path else ""
        found = sorted(self.whole.items(), key=lambda item: item[1] == RETURNED)
        reasons = [f"{prefix}{name}: {why}" for name, why in found if returned or why != RETURNED]
        more = f"; and {len(reasons) - _MOST_REASONS} more" if len(reasons) > _MOST_REASONS else ""
        return "; ".join(reasons[:_MOST_REASONS]) + more + "." if reasons else ""

    def _allowed(self, group: Coupled, allowed: Collection[str] | None) -> bool:
        """Whether every layer that writes the group's units may lose outputs; excluded layers read what is left."""
        if allowed is None:
            return True
        prefix = f"{self.path}." if self.path else ""
        return all(prefix + split_name(place.tensor)[0] in allowed for place in group.places if place.written)

    def _own(self, group: Coupled) -> bool:
        """Whether no layer outside the network shares a tensor of the group."""
        reason = tied_outside(self.module, self.path, group)
        if reason is not None:
            self.whole[group.name] = reason
        return reason is None

    @property
    def units(self) -> dict[str, int]:
        """Units of each group by name."""
        return {group.name: group.units for group in self.groups}

    def cost(self, gone: Sequence[Tensor] = ()) -> float:
        """Cost of the network without some units of each group.

        Raises:
            MisconfigurationException: The network does not run any more.
        """
        counts = tuple(map(len, gone))
        if counts not in self._costs:
            self._costs[counts] = self._cost(counts)
        return self._costs[counts]

    def _cost(self, counts: Sequence[int]) -> float:
        if self.counted == "channels":
            return sum(group.units for group in self.groups) - sum(counts)
        # Sizes decide, not which units go, and a cut in one piece is the quickest to make and undo.
        first = [torch.arange(count) for count in counts]
        return self._run(first) if self.counted == "flops" else self.twin.params(self._edit(self.twin.module, "", first))

    def _run(self, gone: Sequence[Tensor]) -> int:
        try:
            return self.twin.flops(self._edit(self.twin.module, "", gone))
        except Exception as error:
            raise MisconfigurationException(
                f"{self.twin.name} fails once channels are removed: {type(error).__name__}: {error}. The usual reason is a "
                "forward with fixed sizes. Leave out the layers before that place with exclude=[...]."
            ) from error

    def check(self, share: float, baseline: Baseline, limits: Limits) -> None:
        """See that a share of the baseline's cost can go, and that the network runs without it.

        Raises:
            MisconfigurationException: Either fails.
        """
        last, choose = selections(self.groups, [torch.zeros(group.units) for group in self.groups], baseline.units, limits)
        least = choose(last)
        if self.cost(least) > (1.0 - share) * baseline.cost + 1e-6:
            raise MisconfigurationException(
                f"{share:.0%} of the {self.counted} of {self.twin.name} cannot be removed: at most "
                f"{1 - self.cost(least) / baseline.cost:.0%} can. Lower amount=, or allow more with min_kept=, round_to= or "
                f"exclude=. {self.left_whole()}".rstrip()
            )
        self._run(least)

    def choose(
        self, values: Mapping[str, Tensor], share: float, baseline: Baseline, limits: Limits, scope: StructuredScope
    ) -> tuple[Edit | None, float]:
        """Choose what goes.

        Args:
            values: Number per weight by name of the tensor in the network.
            share: Share of the baseline's cost to be gone afterwards.
            baseline: The network at first.
            limits: What every group keeps.
            scope: What is ranked together.

        Returns:
            An edit of the module, ``None`` when nothing has to go, and what the network costs then.

        Raises:
            MisconfigurationException: So much cannot go.
        """
        last, choose = selections(self.groups, scores(self.groups, values), baseline.units, limits, scope)
        budget = (1.0 - share) * baseline.cost + 1e-6
        gone = choose(search(last, lambda number: self.cost(choose(number)), budget))
        if self.cost(gone) > budget:
            self.check(share, baseline, limits)
        self._run(gone)
        wanted = any(len(units) for units in gone)
        return (self._edit(self.module, self.path, gone) if wanted else None), self.cost(gone)

    def _edit(self, module: nn.Module, path: str, gone: Sequence[Tensor]) -> Edit:
        return cut_edit(module, path, [(group.under(path), units) for group, units in zip(self.groups, gone, strict=False)])
