"""Blocks that share their weights by stages, and then do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.network.block_lists import ties
from lightning_peft.network.resolve import resolve_network
from lightning_peft.structure.carry import RULES
from lightning_peft.structure.depth import blocks_at, blocks_edit
from lightning_peft.structure.depth_settings import drop_rates, redrawn
from lightning_peft.structure.edits import Edit, EditRequest
from lightning_peft.structure.journal import journal_of
from lightning_peft_plugins.growth._shared.blocks_to_grow import check_equal, find_blocks
from lightning_peft_plugins.growth._shared.timed import TimedMethod
from lightning_peft_plugins.growth._stage_sharing.stages import middles, spread, stage_means, stage_of_block


class StageSharing(TimedMethod):
    """Trains a network whose blocks share one set of weights per stage, then expands it into one of any depth (Learngene SWS).

    The module is built as usual. While stages share, the list of blocks holds one block per stage, each at several positions in
    a row, so that few weights are trained at the cost of many layers. At the trigger every position gets a block of its own,
    a copy of its stage's, and training goes on. To distil from a teacher, as the paper does, is the business of the module's
    own loss.

    Args:
        stages: Positions of each stage, ``[3, 3, 4, 3, 3]`` in the paper, or the number of stages, over which the blocks that
            were built are spread.
        at: When to expand: ``"step:5000"``, ``"epoch:2"``, ``"30%"``, ``"tokens:1e9"`` or ``"plateau"``.
        to: Blocks of the expanded network, spread over the stages, or a list of how many each stage becomes; ``None`` for as
            many as were built. When that is the number of positions, stages keep their lengths and nothing jumps.
        optimizer_state: ``"reset"`` begins anew for all parameters, as the paper's fine-tuning does; ``"copy"`` gives copies
            the state of their stage; ``"pad"`` lets copies begin anew beside it.
        lr: ``"continue"``, ``"restart"`` or ``"rewarm:<length>@<peak>"``, from the expansion on; see ``LayerGrowth``.
        blocks: Qualified name of the list of blocks, when it cannot be found.
        check: ``"class"``: a network that its class builds from a configuration (``net.config``) is refused if the class cannot
            build what it is expanded into, or makes blocks of one stage different; ``"off"``: it is not.
        monitor: Metric that ``"plateau"`` watches, by default the first logged one with "val" and "loss" in its name.
        patience: Looks at it without progress that make a plateau.
        min_delta: Relative fall that counts as progress.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: No list of blocks (candidates are listed), or lengths that do not fit it.

    Example:
        >>> StageSharing([3, 3, 4, 3, 3], at="epoch:150", to=12)
        StageSharing(stages=[3, 3, 4, 3, 3], at='epoch:150', to=12, ...)
    """

    lane = Lane.STRUCTURE
    writes = frozenset({Resource.STRUCTURE})
    paper = (
        "Xia et al., Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models, IJCAI 2024, "
        "arXiv 2404.16897"
    )

    def __init__(
        self,
        stages: int | Sequence[int],
        at: str | float = "90%",
        to: int | Sequence[int] | None = None,
        *,
        optimizer_state: str = "reset",
        lr: str = "continue",
        blocks: str | None = None,
        check: str = "class",
        **kwargs: Any,
    ) -> None:
        super().__init__(at=at, lr=lr, **kwargs)
        one_of("optimizer_state", optimizer_state, RULES)
        one_of("check", check, ("class", "off"))
        self.check = check
        self.count = stages if isinstance(stages, int) else len(stages)
        self.lengths = None if isinstance(stages, int) else list(stages)
        self.to = to if to is None or isinstance(to, int) else list(to)
        _check_lengths(self.count, self.lengths, self.to)
        self.optimizer_state, self.blocks = optimizer_state, blocks
        self._path = ""

    def first_edit(self, module: LightningModule) -> EditRequest | None:
        """Let the positions of each stage hold one block."""
        self._find(module)
        blocks = list(blocks_at(module, self._path))
        lengths = self._lengths(len(blocks))
        chosen = middles(len(blocks), self.count)
        sources = [chosen[stage] for stage in stage_of_block(lengths)]
        lines = {name: redrawn(rates, len(sources)) for name, rates in drop_rates(blocks).items()}
        rates = {name: stage_means(line, lengths) for name, line in lines.items() if line}
        edit = blocks_edit(module, self._path, sources, rates=rates, shared=True, check=self.check)
        return EditRequest({**edit, "follow": True, "by": self.name, "step": 0})

    def _find(self, module: nn.Module) -> None:
        """Find the blocks and check what is asked of them, before anything is changed.

        Raises:
            MisconfigurationException: No blocks, too few, or blocks that cannot stand in two places.
        """
        self._path = self._list_in(module)
        check_equal(module, self._path)
        built = len(blocks_at(module, self._path))
        if self.count > built:
            raise MisconfigurationException(f"{self._path} has {built} blocks, too few for {self.count} stages of its own.")
        if max(self._lengths(built)) == 1:
            raise MisconfigurationException(
                f"With {self.count} stages every block of {self._path} is its own stage, so nothing is shared: give fewer."
            )
        if isinstance(self.to or built, int) and (self.to or built) < self.count:  # type: ignore[operator]
            raise MisconfigurationException(f"to={self.to}: {self.count} stages need at least as many blocks.")
        _refuse_cache(module, self._path)

    def _list_in(self, module: nn.Module) -> str:
        return find_blocks(module, self.blocks, resolve_network(module, self.network)[0] if self.network is not None else "")

    def _lengths(self, built: int) -> list[int]:
        return self.lengths or spread(built, self.count)

    def start(self, run: Run) -> None:
        """Place the trigger in this training.

        Raises:
            MisconfigurationException: The blocks were not shared by stages, or are not any more.
        """
        super().start(run)
        self._path = self._path or self._list_in(run.module)
        if not self.restored and self._expanded_before(run.module):
            self.done = 1
            rank_zero_info(
                f"{self.name}: the stages of {self._path} were expanded in an earlier training, so it trains on as it is. To "
                "share again, build a new module."
            )
        if not self.done and self._shared(run.module) is None:
            raise MisconfigurationException(
                f"The blocks of {self._path} are not shared by stages: this module, or the checkpoint, comes from a training "
                "without StageSharing or from after its expansion. Begin with a new module, or leave StageSharing out."
            )

    def _shared(self, module: nn.Module) -> Edit | None:
        """The edit that made the list what it is, if it shares."""
        edits = [edit for edit in journal_of(module) if edit["path"] == self._path]
        return edits[-1] if edits and edits[-1].get("shared") else None

    def _expanded_before(self, module: nn.Module) -> bool:
        """Whether a training of this method gave every position a block of its own."""
        edits = [edit for edit in journal_of(module) if edit["path"] == self._path]
        return len(edits) > 1 and edits[-1].get("by") == self.name and not edits[-1].get("shared")

    def next_edit(self, run: Run) -> EditRequest | None:
        """Give every position a block of its own when the moment has come."""
        if not self.due(run):
            return None
        shared: Edit = self._shared(run.module)  # type: ignore[assignment]
        kin = ties(blocks_at(run.module, self._path))
        firsts = sorted(set(kin))
        stages = stage_of_block(self._expanded([kin.count(first) for first in firsts], shared["from"]))
        ends = {name: [rates[0], rates[-1]] for name, rates in shared["old_rates"].items() if redrawn(rates, 2)}
        rates = {name: redrawn(line, len(stages)) or [] for name, line in ends.items()}
        edit = blocks_edit(run.module, self._path, [firsts[stage] for stage in stages], rates=rates, check=self.check)
        self.mark_done()
        return EditRequest(
            {**edit, "follow": True, "by": self.name, "step": self.steps},
            optimizer_state=self.optimizer_state,  # type: ignore[arg-type]
            restart_schedulers=self.lr_rule.restart,
        )

    def _expanded(self, lengths: list[int], built: int) -> list[int]:
        """How many blocks each stage becomes."""
        if isinstance(self.to, list):
            return self.to
        to = self.to or built
        return lengths if to == sum(lengths) else spread(to, len(lengths))

    def describe(self, module: nn.Module) -> str:
        """Name the list, its stages and what becomes of them."""
        shown = self.lengths or f"{self.count} stages"
        return f"{self._path or self._list_in(module)}: {shown} share -> {self.to or 'as built'} at {self._arguments['at']}"

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Positions, separate blocks, and the factor on learning rates."""
        kin = ties(blocks_at(run.module, self._path))
        return {"blocks": float(len(kin)), "own_blocks": float(len(set(kin))), "lr_factor": self.lr_factor()}


def _check_lengths(count: int, lengths: list[int] | None, to: int | list[int] | None) -> None:
    """Refuse stages of no length, and a list of another number of stages.

    Raises:
        MisconfigurationException: See above.
    """
    given = {"stages": lengths if lengths is not None else [count], "to": [to] if isinstance(to, int) else to or [1]}
    for argument, values in given.items():
        if not values or not all(type(value) is int and value > 0 for value in values):
            raise MisconfigurationException(f"{argument}={values} must be a number of blocks from 1, or a list of them.")
    if isinstance(to, list) and len(to) != count:
        raise MisconfigurationException(f"to={to} names {len(to)} stages; there are {count}.")


def _refuse_cache(module: nn.Module, path: str) -> None:
    """Refuse transformers' cache of keys and values: it is kept by the number of a layer, which a shared block has once.

    Raises:
        MisconfigurationException: The cache is on, so that later positions would attend to the keys of earlier ones.
    """
    numbered = any("layer_idx" in vars(layer) for layer in blocks_at(module, path).modules())
    parts = path.split(".")
    owners = [module.get_submodule(".".join(parts[:length])) for length in range(len(parts))]
    if numbered and any(getattr(vars(owner).get("config"), "use_cache", False) for owner in owners):
        raise MisconfigurationException(
            f"The blocks of {path} keep keys and values in a cache by layer number, and a shared block has one number for all "
            "its positions. Switch it off for the training: model.config.use_cache = False."
        )
