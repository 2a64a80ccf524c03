"""Which edits a growing network goes through: what to grow, checked before anything is touched."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.structure.block_positions import other_at_its_place, positions
from lightning_peft.structure.depth import blocks_at, blocks_edit
from lightning_peft.structure.depth_settings import drop_rates, redrawn
from lightning_peft.structure.edits import Edit, Operator
from lightning_peft.structure.journal import journal_of
from lightning_peft.structure.width_edit import width_edit
from lightning_peft.structure.width_map import WidthMap
from lightning_peft_plugins.growth._layer_growth.depth_operators import new_places
from lightning_peft_plugins.growth._layer_growth.operators import OPERATORS
from lightning_peft_plugins.growth._layer_growth.sizes import DEPTH, Size, width_of
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map
from lightning_peft_plugins.growth._shared.blocks_to_grow import are_equal, equal_run, find_blocks


class GrowthPlan:
    """The sizes a network is to have, one after the other.

    Args:
        operator: Name of the operator.
        sizes: Size after each event.
        start: Blocks to begin with.
        blocks: Name of the list of blocks.
        outputs: Layers of a block that write into the residual stream.
        width_map: How the network is made of axes.
        follow: Whether other methods act on new layers.
        check: Whether the network's class must be able to build what it grows into.
        sources: Old position of every block after growth, where the user says it.

    Attributes:
        found: Whether :meth:`find` has looked at a module.
        path: Qualified name of the list of blocks; ``""`` when depth does not change.
        past: Events that an earlier training of the module went through.
    """

    def __init__(
        self,
        operator: str,
        sizes: list[Size],
        start: int | None,
        blocks: str | None,
        outputs: list[str],
        width_map: WidthMap | None,
        follow: bool,
        check: str = "class",
        sources: list[int] | None = None,
    ) -> None:
        self.operator, self.kind = OPERATORS[operator], operator
        self.sizes, self.start, self.blocks = sizes, start, blocks
        self.outputs, self.width_map, self.follow, self.check = outputs, width_map, follow, check
        self.sources = sources
        self.found, self.path, self._network = False, "", ""
        self.past = 0
        self._built = 0
        self._ends: dict[str, tuple[float, float]] = {}
        self._around: int | None = None  # a block of the run that grows, where training begins with fewer of it
        self._deepens = start is not None or any(DEPTH in size for size in sizes)
        if not self.operator.widens and any(map(width_of, sizes)):
            wide = ", ".join(name for name, entry in OPERATORS.items() if entry.widens)
            raise MisconfigurationException(f"The operator {operator!r} deepens only. Operators that widen: {wide}.")

    def find(self, module: nn.Module, network: str, *, grown: bool = False) -> None:
        """Find what grows, and check every size.

        Args:
            module: The LightningModule.
            network: Qualified name of the network.
            grown: Whether the module was grown before, so that there is nothing to begin smaller with.

        Raises:
            MisconfigurationException: No blocks, an unknown network, or sizes that do not grow.
        """
        self._network = network
        if self._deepens:
            self._find_blocks(module, self._first_of(module) if grown else None)
        self.past = self._events_past(module) if grown else 0
        if self._deepens:
            self._check_depths(module, None if grown else self.start)
        for size in self.sizes[self.past :]:
            if width := width_of(size):
                self._width_edit(module, width)
                break  # later ones start from what this one makes
        self.found = True

    def _find_blocks(self, module: nn.Module, first: Edit | None) -> None:
        """Find the list, and how it was built: as it is, unless a training began with a part of it."""
        self.path = find_blocks(module, self.blocks, self._network)
        blocks = list(blocks_at(module, self.path))
        if self.sources is None and self.start is not None:
            equal_run(module, self.path)
        self._built = len(blocks) if first is None else first["from"]
        rates = drop_rates(blocks) if first is None else first["old_rates"]
        self._ends = {name: (values[0], values[-1]) for name, values in rates.items() if redrawn(values, 2)}
        if first is not None and (gone := set(range(first["from"])) - set(first["sources"])):
            self._around = min(gone) - 1

    def _first_of(self, module: nn.Module) -> Edit | None:
        """The edit by which the module began small."""
        edits = journal_of(module)
        return edits[0] if self.start is not None and edits and edits[0]["op"] == "blocks" and "event" not in edits[0] else None

    def _check_depths(self, module: nn.Module, start: int | None) -> None:
        blocks = list(blocks_at(module, self.path))
        self.operator.settings(blocks if self.outputs else blocks[-1:], self.outputs)
        if start is not None and not 0 < start <= len(blocks):
            raise MisconfigurationException(f"start={start}: {self.path} has {len(blocks)} blocks to begin with.")
        if start == 1 and self._ends:
            raise MisconfigurationException("A single block has no stochastic depth to grow from: begin with start=2 or more.")
        now = start or len(blocks)
        for size in self.sizes[self.past :]:
            target = self._depth(size)
            if target is None:
                continue
            self._check_deeper(now, target)
            self._check_sources(now)
            now = target

    def _depth(self, size: Size) -> int | None:
        return size.get(DEPTH, None if size else self._built)

    def _check_deeper(self, now: int, target: int) -> None:
        if target <= now:
            raise MisconfigurationException(
                f"{self.path} has {now} blocks by then and cannot grow to={target}. Give a larger to=, or begin with fewer by "
                "start=."
            )

    def first_edit(self, module: nn.Module) -> Edit | None:
        """Return the edit to begin small; ``None`` to begin as built."""
        if self.start is None:
            return None
        run, count = equal_run(module, self.path), len(blocks_at(module, self.path))
        if self.start <= count - len(run):
            raise MisconfigurationException(
                f"start={self.start}: {count - len(run)} of the {count} blocks of {self.path} are unlike the others and stay, "
                "and one of the others must. Give more."
            )
        self._around = run.start
        gone = run[len(run) - (count - self.start) :]
        kept = [place for place in range(count) if place not in gone]
        return blocks_edit(module, self.path, kept, check=self.check) | {"follow": self.follow}

    def check_next(self, module: nn.Module, event: int, part: int) -> None:
        """Refuse a module that has the size of the next event already, before training goes on.

        Raises:
            MisconfigurationException: It cannot grow to that size any more.
        """
        if event < len(self.sizes):
            self.edit(module, event, part)

    def _events_past(self, module: nn.Module) -> int:
        """Count the events whose size an edited module has already, because an earlier training went through them."""
        if not journal_of(module):
            return 0
        return max((event + 1 for event, size in enumerate(self.sizes) if self._has(module, size)), default=0)

    def _has(self, module: nn.Module, size: Size) -> bool:
        width, depth = width_of(size), self._depth(size)
        return (depth is None or len(blocks_at(module, self.path)) == depth) and (not width or self._is_wide(module, width))

    def _is_wide(self, module: nn.Module, width: Size) -> bool:
        axes = next((edit["axes"] for edit in reversed(journal_of(module)) if edit["op"] == "resize"), {})
        now = {axis: new for axis, (_, new) in axes.items()}
        if {"kv_heads", "groups"} <= set(now):
            now["heads"] = now["kv_heads"] * now["groups"]
        return all(now.get(axis) == units for axis, units in width.items())

    def edit(self, module: nn.Module, event: int, part: int) -> tuple[Edit, Operator | None, bool]:
        """Return one edit of an event.

        Args:
            module: The module.
            event: Which event.
            part: Which of its edits: wider comes before deeper.

        Returns:
            The edit, what gives new tensors their values, and whether it is the last of the event.
        """
        size = self.sizes[event]
        width, depth = width_of(size), self._depth(size)
        if width and part == 0:
            return self._width_edit(module, width), self.operator.width, depth is None
        assert depth is not None
        return self._depth_edit(module, depth), self.operator.blocks, True

    def _width_edit(self, module: nn.Module, width: Size) -> Edit:
        network = module.get_submodule(self._network)
        edit = width_edit(network, self._network, self.width_map or find_width_map(network), width)
        return {**self.operator.prepare(edit), "follow": self.follow}

    def _depth_edit(self, module: nn.Module, depth: int) -> Edit:
        blocks = list(blocks_at(module, self.path))
        self._check_deeper(len(blocks), depth)
        rates = {name: redrawn(ends, depth) or [] for name, ends in self._ends.items()}
        sources = self._sources(module, len(blocks), depth)
        edit = blocks_edit(module, self.path, sources, rates=rates or None, check=self.check)
        copied = [blocks[sources[place]] for place in new_places(sources)]
        return edit | self.operator.settings(copied, self.outputs) | {"follow": self.follow}

    def keeps(self, edit: Edit) -> bool:
        """Whether the operator promises that the network computes after an edit what it did."""
        if edit["op"] == "blocks":
            return "depth" in self.operator.keeps
        multiples = all(new % old == 0 for old, new in edit["axes"].values())
        return "width" in self.operator.keeps or ("multiples" in self.operator.keeps and multiples)

    def other_place(self, module: nn.Module, edit: Edit) -> str:
        """Say which block computes something else at its new place, where the operator promises that none does."""
        if edit["op"] != "blocks" or not self.keeps(edit) or self.check == "off":
            return ""
        found = other_at_its_place(module, self.path, edit["sources"])
        return found and (
            f"{self.kind!r} promises that the grown network computes what it did, but {found} there. 'zero' leaves blocks "
            "where they are and adds its own behind them."
        )

    def _sources(self, module: nn.Module, now: int, depth: int) -> list[int]:
        """Old position of every block: as the user says, or by the operator's rule, among blocks that are equal.

        Blocks that differ repeat as a whole where the network's class makes them differ in the same way at the new positions.
        """
        if self.sources is not None:
            self._check_sources(now)
            return self.sources
        run = range(now)
        if not are_equal(module, self.path):
            try:
                whole = self.operator.sources(now, depth)
                if self.check != "off" and positions(module, self.path, whole) is not None:
                    return whole
            except MisconfigurationException:
                pass  # the class makes other ones there
            run = equal_run(module, self.path, self._around)
        inner = [run[source] for source in self.operator.sources(len(run), depth - now + len(run))]
        return [*range(run.start), *inner, *range(run.stop, now)]

    def _check_sources(self, now: int) -> None:
        if self.sources is not None and max(self.sources) >= now:
            raise MisconfigurationException(
                f"sources={self.sources} names block {max(self.sources)}; {self.path} has {now} by then, counted from 0."
            )

    def blocks_now(self, module: nn.Module) -> int:
        """Count the blocks."""
        return len(blocks_at(module, self.path))

    def describe(self, module: nn.Module) -> str:
        """Name what grows, and to which sizes."""
        path = self.path or (find_blocks(module, self.blocks, self._network) if self._deepens else "")
        count = len(blocks_at(module, path)) if path else 0
        begin = f"{self.start} of {count}" if self.start is not None and not self.found else f"{count}"
        now = f"{path}: {begin} blocks, " if path else ""
        return f"{now}{self.kind} -> {' -> '.join(self._shown(size) for size in self.sizes)}"

    def _shown(self, size: Size) -> str:
        if not size:
            return f"{self._built or 'as built'}"
        parts: list[Any] = [size[DEPTH]] if set(size) == {DEPTH} else [f"{axis} {units}" for axis, units in size.items()]
        return " ".join(map(str, parts))
