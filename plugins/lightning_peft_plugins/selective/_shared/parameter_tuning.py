"""Training of one kind of the parameters a network has, and of its head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Lane, Method, Run
from lightning_peft.arguments import one_of
from lightning_peft.contract import SPLIT
from lightning_peft.network.targets import TargetSpec, excluded, select
from lightning_peft.network.tunable import share_trained, tunable
from lightning_peft_plugins.selective._shared.untied_heads import described_heads, untied_heads


class ParameterTuning(Method):
    """Trains parameters of one kind as they are, and the head; the rest is frozen for the fit.

    Subclasses name the kind, and what to do instead where there is none.

    Args:
        head: Train the layers that write the logits too. A head that is tied to an embedding stays frozen.
        targets: Layers whose parameters of this kind are trained, with all that is in them; all layers by default.
        exclude: Layers that are left alone.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: There is nothing of this kind to train.
    """

    strategies = SPLIT
    lane = Lane.DELTA
    kind: ClassVar[Literal["bias", "norm"]]
    called: ClassVar[tuple[str, str]]
    instead: ClassVar[str]

    def __init__(
        self,
        head: bool = True,
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = None,
        *,
        checkpoint: Literal["full", "trained"] = "trained",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude, name=name)
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.head, self.checkpoint = head, checkpoint

    def claims(self, module: nn.Module) -> Iterable[str]:
        """No tensor gets a map."""
        return ()

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters of this kind, and the head's."""
        own, head = self._of_kind(module), self._heads(module)
        if not any(parameter.requires_grad for parameter in own if parameter not in head):
            where = "" if self.targets is None and self.exclude is None else " among its targets"
            raise MisconfigurationException(
                f"{self.name}: {type(module).__name__} has no {self.called[0]}{where} that can be trained, but in its head. "
                f"{self.instead}"
            )
        return {**own, **head}

    def _of_kind(self, module: nn.Module) -> dict[nn.Parameter, str]:
        """Parameters of this kind in the targets, each with the name of its layer."""
        chosen = set(module.modules())
        if self.targets is not None:
            chosen = {part for layer in select(module, self.targets).values() for part in layer.modules()}
        chosen -= excluded(module, self.exclude)
        found = tunable(module, (self.kind,)).items()
        return {parameter: layer for parameter, layer in found if module.get_submodule(layer) in chosen}

    def _heads(self, module: nn.Module) -> dict[nn.Parameter, str]:
        return untied_heads(module)[0] if self.head else {}

    def describe(self, module: nn.Module) -> str:
        """Count what is trained, and say what of the head is not."""
        own, head = self._of_kind(module), self._heads(module)
        parts = [f"{len(own)} {self.called[len(own) != 1]}", *(described_heads(module) if self.head else ())]
        return f"{', '.join(parts)}, {sum(p.numel() for p in {**own, **head}):,} parameters"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}
