"""A delta on the side of the activations: no weight is kept, and none gets a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from lightning_peft.compose.lanes import Lane
from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.factored_form import FactoredForm
from lightning_peft.deltas.form import Form, build_form, described
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.low_rank_linear import low_rank_linear
from lightning_peft.network.plain_class import plain_class
from lightning_peft.weights.layer_part import Follows, LayerPart

CONVS = {nn.Conv1d: torch.conv1d, nn.Conv2d: torch.conv2d, nn.Conv3d: torch.conv3d}


class DeltaPart(LayerPart):
    """Adds to what a layer returns what a product of thin matrices makes of its inputs.

    Args:
        form: The form, or what :func:`~lightning_peft.deltas.form.described` says of it.
        dropout: Share of the inputs that the product does not see in training.

    Attributes:
        tuned: What is trained as it is beside the delta: kinds or names of parameters.
    """

    kind = "delta"
    lane = Lane.DELTA
    tuned: tuple[str, ...] = ()

    def __init__(self, form: Form | Mapping[str, Any], dropout: float = 0.0) -> None:
        super().__init__()
        made = form if isinstance(form, Form) else build_form(**form)
        assert isinstance(made, FactoredForm)
        self.form, self.dropout = made, dropout

    @property
    def follows(self) -> Follows | None:  # type: ignore[override]
        """Inputs and outputs of the products are those of the weight; forms of other tensors let nothing be cut."""
        if not isinstance(self.form, LowRankForm):
            return None
        inputs, outputs = (0, 1) if self.form.layout.transposed else (1, 0)
        found: dict[str, dict[int, tuple[str, int]]] = {}
        for start in ("", "taken_") if self.form.taken else ("",):
            found |= {f"form.{start}down": {1: ("weight", inputs)}, f"form.{start}up": {0: ("weight", outputs)}}
        return found | ({"form.magnitude": {0: ("weight", outputs)}} if isinstance(self.form, DecomposedForm) else {})

    def around(self, call: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form = self.form
        if (
            layer.part_stack.parts[0] is self
            and len(args) == 1
            and not kwargs
            and plain_class(layer).forward is nn.Linear.forward
        ):
            dropped, (down, up) = self._dropped(args[0]), form.factors()
            if not isinstance(form, DecomposedForm):
                return low_rank_linear(args[0], layer.weight, layer.bias, down, up, form.scale * form.share, dropped)
            output = low_rank_linear(args[0], layer.weight, None, down, up, form.scale, dropped)
            output = output * form.factor(layer.weight).to(output.dtype)
            return output if layer.bias is None else output + layer.bias.to(output.dtype)
        return call(*args, **kwargs) + self._product(layer, *args, **kwargs)

    def _dropped(self, inputs: Tensor) -> Tensor | None:
        return nn.functional.dropout(inputs, self.dropout) if self.training and self.dropout else None

    def _product(self, layer: Any, inputs: Tensor) -> Tensor:
        (down, up), scale = self.form.factors(), self.form.scale * self.form.share
        if isinstance(layer, nn.Embedding):
            return linear(embedding(inputs, up, layer.padding_idx), down.T * scale)
        dropped = self._dropped(inputs)
        read = inputs if dropped is None else dropped
        down, up = down.to(inputs.dtype), up.to(inputs.dtype) * scale
        for cls, convolve in CONVS.items():
            if isinstance(layer, cls):
                kernel = layer.weight.shape[1:]
                hidden = convolve(read, down.view(-1, *kernel), None, layer.stride, layer.padding, layer.dilation)
                return convolve(hidden, up.view(*up.shape, *(1,) * (len(kernel) - 1)))
        return linear(linear(read, down), up)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight of a layer that computes the same by itself."""
        return self.form.on_weight(weight)

    def config(self) -> dict[str, Any]:
        return {"form": described(self.form), "dropout": self.dropout}
