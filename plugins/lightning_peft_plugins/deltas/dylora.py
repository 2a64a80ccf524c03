"""DyLoRA: a low-rank product that works at any rank up to its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.deltas.layout import Layout
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.on_module import deltas_on
from lightning_peft.deltas.sides import Place
from lightning_peft.deltas.slots import Slots
from lightning_peft.structure.edits import Change
from lightning_peft_plugins.deltas._shared.stepwise import Stepwise


class NestedForm(LowRankForm):
    """``alpha / b · B[:, :b] A[:b]`` for some ``b`` up to the rank (Valipour et al., DyLoRA, EACL 2023, section 3).

    Args:
        layout: How the weight is read as a matrix.
        rank: Rows of ``A``.
        scale: Factor of the product of all of them; with ``b`` it is ``scale * rank / b``.
        table: Whether rows of the weight are looked up, as in an embedding.
        at: ``b`` outside of training steps; all rows by default.
        frozen: Whether a training step trains row ``b`` alone, and the rows before it stay as they are.

    Attributes:
        drawn: ``b`` of a training step; ``None`` outside of one.
    """

    kind = "nested"

    def __init__(
        self,
        layout: Layout,
        rank: int,
        scale: float = 1.0,
        table: bool = False,
        at: int | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__(layout, rank, scale, table)
        self.at, self.frozen = at or rank, frozen
        self._count = torch.tensor(rank, device="cpu")
        self.drawn = None

    @property
    def drawn(self) -> int | None:
        """``b`` of a training step; ``None`` outside of one."""
        return self._drawn

    @drawn.setter
    def drawn(self, count: int | None) -> None:
        self._drawn, self._draws = count, count is not None
        self._count.fill_(count or self.rank)

    @property
    def _compiled(self) -> bool:
        """Whether a step is compiled: once for every ``b``, so it must not look at the number."""
        return self._draws and torch.compiler.is_compiling()

    @property
    def now(self) -> int:
        """``b`` at the moment."""
        return self.drawn or self.at

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Factor of the product at the moment."""
        return self._scale if self._compiled else self._scale * self.rank / self.now

    @scale.setter
    def scale(self, whole: float) -> None:
        self._scale = whole

    def factors(self) -> tuple[Tensor, Tensor]:
        rows, columns = self.rows(), self.up
        if self._compiled:
            return self._all_factors(rows, columns)
        if not (self.drawn and self.frozen):
            return rows[..., : self.now, :], columns[..., : self.now]
        before, last = self.drawn - 1, slice(self.drawn - 1, self.drawn)
        return (
            torch.cat([rows[..., :before, :].detach(), rows[..., last, :]], -2),
            torch.cat([columns[..., :before].detach(), columns[..., last]], -1),
        )

    def _all_factors(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return both factors whole, with zeros in place of what does not count, and what ``b`` has to do with the scale."""
        count, place = self._count, torch.arange(self.rank, device=columns.device)
        if self.frozen:
            last = place == count - 1
            rows = torch.where(last.unsqueeze(-1), rows, rows.detach())
            columns = torch.where(last, columns, columns.detach())
        return rows, torch.where(place < count, columns, 0.0) * (self.rank / count.to(columns.dtype))

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self._scale, "table": self.table, "at": self.at, "frozen": self.frozen}


class DyLoRA(Stepwise):
    """DyLoRA (Valipour et al. 2023): every step trains the first ``b`` rows of ``A`` and columns of ``B``, ``b`` drawn by lot.

    The adapter then works at any rank from ``least`` to ``rank`` by leaving the other rows out.

    Args:
        rank: Largest ``b``, rows of ``A``.
        least: Smallest ``b``.
        alpha: Numerator of the scale, of which ``b`` is the denominator; the rank by default.
        at: ``b`` in evaluations, and of what remains after the fit; the rank by default.
        frozen: Train row and column ``b`` alone, and not those before them.
        seed: What ``b`` is drawn from, together with the step.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.delta_method.DeltaMethod`.

    Raises:
        MisconfigurationException: ``least`` or ``at`` are beyond the rank.

    Example:
        >>> DyLoRA(rank=8, at=4).at
        4
    """

    slots = Slots(control=("dylora",))
    fixed_arguments = frozenset({"scaling", "init"})
    kind = NestedForm
    paper = (
        "Valipour et al., DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank "
        "Adaptation, EACL 2023, arXiv 2210.07558"
    )

    def __init__(
        self,
        rank: int = 8,
        least: int = 1,
        alpha: float | None = None,
        at: int | None = None,
        frozen: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, "rank", "lora", **kwargs)
        for argument, value in (("least", least), ("at", rank if at is None else at)):
            if not 0 < value <= rank:
                raise MisconfigurationException(f"{argument}={value} must be from 1 to rank={rank}, the rows that there are.")
        self.least, self.at, self.frozen, self.seed = least, rank if at is None else at, frozen, seed
        self._forms: list[NestedForm] = []

    def arguments(self, place: Place) -> dict[str, Any]:
        return super().arguments(place) | {"at": self.at, "frozen": self.frozen}

    def attach(self, module: LightningModule) -> None:
        """Put the deltas on; those that are there from an earlier fit work as this one is told to."""
        super().attach(module)
        for _, form in self.forms(module):
            form.at, form.frozen = self.at, self.frozen

    def draw(self, step: int) -> int:
        """Return the ``b`` of a step, the same in every process and after a resume.

        Args:
            step: Optimizer steps before it.
        """
        generator = torch.Generator().manual_seed(hash((self.seed, step)))
        return int(torch.randint(self.least, self.rank + 1, (), generator=generator))

    def start(self, run: Run) -> None:
        """Find the forms."""
        self._forms = [form for _, form in self.forms(run.module)]

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Find those of new layers too."""
        self._forms = [form for _, form in self.forms(module)]

    def finish(self, run: Run) -> None:
        """Leave the rank that was asked for."""
        super().finish(run)
        self._forms = []

    def show(self, step: int | None) -> None:
        """Draw for a step; outside of one the rank is the one that was asked for."""
        drawn = None if step is None else self.draw(step)
        for form in self._forms:
            form.drawn = drawn

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained, and the ``b`` of the step before."""
        return {**super().metrics(run), "rank": float(self.draw(max(run.step - 1, 0)))}

    @staticmethod
    def truncate(module: nn.Module, rank: int, name: str = "dy_lora") -> None:
        """Let an adapter that stays on a module work at another rank, and be baked and saved with it.

        Args:
            module: The module, after a fit with ``keep=True``.
            rank: Rows of ``A`` and columns of ``B`` that count.
            name: Name of the method.

        Raises:
            MisconfigurationException: There is no such adapter on the module, or it has fewer rows.
        """
        forms = [each.form for _, each in deltas_on(module) if each.method == name and isinstance(each.form, NestedForm)]
        if not forms:
            raise MisconfigurationException(
                f"No adapter of DyLoRA called {name!r} is on the module. Train it with DyLoRA(keep=True), and give its name."
            )
        if not 0 < rank <= min(form.rank for form in forms):
            raise MisconfigurationException(f"rank={rank} must be from 1 to {min(form.rank for form in forms)}.")
        for form in forms:
            form.at = rank
