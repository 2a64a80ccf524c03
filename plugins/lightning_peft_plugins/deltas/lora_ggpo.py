"""LoRA-GGPO: every training step sees weights that are moved at random, the further the larger they and their gradients are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Resource, Run
from lightning_peft.arguments import not_negative
from lightning_peft.contract import SHARDED
from lightning_peft.deltas.slots import Slots
from lightning_peft.network.seeds import name_hash
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form as StateForm
from lightning_peft.structure.forms import dict_of, fields, tensor
from lightning_peft.weights.shards import read_whole, whole
from lightning_peft_plugins.deltas._lora_ggpo.perturbed_form import PerturbedForm
from lightning_peft_plugins.deltas._lora_ggpo.perturbed_part import PerturbedPart
from lightning_peft_plugins.deltas._shared.frozen_weights import frozen_weights
from lightning_peft_plugins.deltas._shared.stepwise import Stepwise
from lightning_peft_plugins.deltas.functional.lora_ggpo import perturbation_spread
from lightning_peft_plugins.deltas.functional.thin_rows import row_norms


class LoRAGGPO(Stepwise):
    """LoRA-GGPO (Chang et al., 2025): gradients are those of weights that are moved at random, for a flat minimum.

    Numbers that are added to a row have a standard deviation of ``(sigma |W_i| + beta |G_i|^2) / sqrt(outputs)``, from the
    weight and its gradient as the step before had them. Nothing but training steps sees moved weights.

    Args:
        rank: Rows of ``A`` and columns of ``B``.
        alpha: Numerator of the scale.
        sigma: Weight of the norms of weights.
        beta: Weight of the squared norms of gradients.
        seed: What is drawn from, together with the step and the name of the tensor.
        **kwargs: Those of :class:`~lightning_peft_plugins.deltas._shared.product_delta.ProductDelta`.

    Raises:
        MisconfigurationException: ``sigma`` or ``beta`` are below zero.

    Example:
        >>> LoRAGGPO(rank=4).sigma
        0.03
    """

    slots = Slots(rule=("lora-ggpo",))
    reads = frozenset({Resource.GRADIENT})
    fixed_arguments = frozenset({"init"})
    strategies = SHARDED  # its random matrices are whole in every process
    kind = PerturbedForm
    part = PerturbedPart
    parts = (PerturbedPart,)
    paper = (
        "Chang et al., LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization, "
        "2025, arXiv 2502.14538v1"
    )

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        sigma: float = 0.03,
        beta: float = 0.01,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank, alpha, init="lora", **kwargs)
        for argument, value in (("sigma", sigma), ("beta", beta)):
            not_negative(argument, value, "Zero leaves its norm out; LoRA moves nothing.")
        self.sigma, self.beta, self.seed = sigma, beta, seed
        self.spreads: dict[str, Tensor] = {}
        self._forms: dict[str, PerturbedForm] = {}
        self._below: dict[str, Tensor] = {}

    def start(self, run: Run) -> None:
        """Find the forms, and measure the frozen weights below them."""
        self._find_forms(run.module)

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Find those of new layers too. Rows may be others now, so the next step moves nothing, as the first did."""
        self.spreads = {}
        self._find_forms(module)

    def _find_forms(self, module: nn.Module) -> None:
        self._forms, self._below = {}, {}
        for name, form, weight in frozen_weights(module, self.deltas(module)):
            self._forms[name], self._below[name] = form, weight.norm(dim=-1)

    @torch.no_grad()
    def after_clipping(self, run: Run, optimizer: Optimizer) -> None:
        """Measure the gradients of the step and the weights that have them."""
        moved, scale = trained_by(optimizer), run.gradient_scale(optimizer)
        for name, form in self._forms.items():
            if form.up in moved and form.up.grad is not None and form.down.grad is not None:
                spread = self._spread(form, self._below[name], scale)
                before = self.spreads.get(name, torch.zeros_like(spread)).to(spread.device)  # it may have been loaded
                # A step that a gradient scaler is about to skip says nothing.
                self.spreads[name] = spread.where(spread.isfinite(), before)

    def _spread(self, form: PerturbedForm, below: Tensor, scale: float) -> Tensor:
        """The spread of a weight's rows, with the gradient that its factors' gradients make: ``scale (B dA + dB A)``."""
        gradient_down, gradient_up = (whole(factor.grad) / scale for factor in (form.down, form.up))
        with read_whole(form):
            down, up = form.rows(), form.up
        weight = torch.hypot(below, form.scale * row_norms(down, up))
        gradient = form.scale * row_norms(torch.cat([gradient_down.view_as(down), down], -2), torch.cat([up, gradient_up], -1))
        return perturbation_spread(weight, gradient, self.sigma, self.beta)

    def finish(self, run: Run) -> None:
        """Leave the weights as they are."""
        super().finish(run)
        self._forms, self._below = {}, {}

    def show(self, step: int | None) -> None:
        """Move the weights for a step."""
        for name, form in self._forms.items():
            spread = None if step is None else self.spreads.get(name)
            form.spread = None if spread is None else spread.to(form.up.device)
            form.seed = torch.tensor(name_hash(f"{self.seed}/{step}/{name}"), device="cpu")

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained, and the mean standard deviation of what is added to weights."""
        means = [spread.mean() for spread in self.spreads.values()]
        return {**super().metrics(run), "spread": torch.stack(means).mean() if means else 0.0}

    def state(self) -> dict[str, Any]:
        return {"spreads": dict(self.spreads)}

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> StateForm:
        return fields({"spreads": dict_of(tensor(), tensors)})

    def load_state(self, state: dict[str, Any]) -> None:
        self.spreads = dict(state["spreads"])
