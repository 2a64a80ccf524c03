"""Half fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.compose.schedule import parse_point
from lightning_peft.contract import SPLIT
from lightning_peft.network.layers import parameter_names
from lightning_peft.network.targets import TargetSpec, excluded
from lightning_peft.network.tunable import share_trained
from lightning_peft.optim.optimizers import trained_by
from lightning_peft_plugins.selective._hft.categories import Category, categories_of


class HFT(Method):
    """Freezes a random half of every kind of layer in every block, another one each round, and trains the rest.

    A frozen layer gets no gradient, and the optimizer keeps nothing for it: what it had is dropped when a round freezes it.

    Args:
        every: Length of a round, in epochs (``"1ep"``), optimizer steps (``500``) or as a share of the training (``"50%"``).
        others: Train what stands in no block too: embeddings, the last norm, the head.
        exclude: Layers that are trained in every round.
        seed: Seed of the draws.
        checkpoint: ``"trained"`` leaves what no round has trained out of checkpoints, which then need the same base to be
            loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: A round without length, or a network with nothing to draw from.

    Example:
        >>> HFT(every=500)
        HFT(every=500, others=True, seed=0, checkpoint='full')
    """

    lane = Lane.GRADIENT
    reads = frozenset({Resource.STRUCTURE})
    strategies = SPLIT
    paper = "Hui et al., HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv 2404.18466"

    def __init__(
        self,
        every: float | str = "1ep",
        others: bool = True,
        exclude: TargetSpec | None = None,
        seed: int = 0,
        *,
        checkpoint: Literal["full", "trained"] = "full",
        name: str | None = None,
    ) -> None:
        super().__init__(exclude=exclude, name=name)
        self.every = parse_point(every)
        if self.every.amount <= 0:
            raise MisconfigurationException(
                f"every={every!r} is a round without length. Give every='1ep', or a number of steps."
            )
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.others, self.seed, self.checkpoint = others, seed, checkpoint
        self._turn: int | None = None

    def next_trained(self, run: Run) -> bool:
        """Begin a round when its time has come."""
        turn, self._turn = self._turn, self._now(run)
        return self._turn != turn

    def _now(self, run: Run) -> int:
        whole = self.every.unit == "epoch" and self.every.amount == int(self.every.amount)
        if whole:  # an epoch of a stream has no length
            return run.epoch // int(self.every.amount)
        return run.step // max(1, run.place(self.every, "every="))

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter] | None:
        """All parameters but those of the frozen half; all until the first round begins, for optimizers to have them all."""
        if self._turn is None or self.run is None:
            return None
        frozen = self.frozen(module, self._turn)
        at_hand = trained_by(*self.run.trainer.optimizers)
        return [parameter for parameter in module.parameters() if parameter in at_hand and parameter not in frozen]

    def frozen(self, module: nn.Module, turn: int) -> dict[nn.Parameter, str]:
        """Draw what is frozen in a round: parameters, each with its name."""
        categories = self.categories(module)
        names = dict(module.named_parameters(remove_duplicate=False))
        drawn = [layer for category in categories for layer in category.draw(self.seed, turn)]
        if not self.others:
            inside = {layer for category in categories for layer in category.layers}
            spared = excluded(module, self.exclude)
            drawn += [name for name, layer in module.named_modules() if name not in inside and layer not in spared]
        kept = {name: module.get_submodule(name) for name in drawn}
        return {names[name]: name for name in parameter_names(kept)}

    def categories(self, module: nn.Module) -> list[Category]:
        """The layers by block and category.

        Raises:
            MisconfigurationException: No category has two layers, or one in two blocks, to draw from.
        """
        found = categories_of(module, excluded(module, self.exclude))
        if not any(category.draw(self.seed, 0) for category in found):
            raise MisconfigurationException(
                f"{self.name} finds no two layers of a kind in {type(module).__name__} of which it could freeze one. Take "
                "layers out of exclude=, or train without it."
            )
        return found

    def describe(self, module: nn.Module) -> str:
        """Count the layers and blocks."""
        categories = self.categories(module)
        drawn = sum(len(category.draw(self.seed, 0)) for category in categories)
        blocks = len({category.place for category in categories})
        where = f"{blocks} blocks" if blocks > 1 else "the network, which has no list of blocks"
        return f"{drawn} of {sum(len(each.layers) for each in categories)} layers of {where} are frozen in each round"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}
