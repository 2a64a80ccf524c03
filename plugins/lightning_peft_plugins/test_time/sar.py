"""SAR: sharpness-aware entropy minimisation that recovers from collapse."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.resolve import resolve_network
from lightning_peft_plugins.test_time._shared.entropy import EntropyMethod
from lightning_peft_plugins.test_time.functional.predictions import entropy_margin, softmax_entropy

# What the official code leaves alone: the last stage of a ResNet, the last blocks of a ViT-B, and the last norm of a ViT.
TOP = re.compile(r"layer4|blocks\.(9|10|11)|norm\.|^norm$")


class SAR(EntropyMethod):
    """Minimises the entropy of reliable predictions and its sharpness, and returns to the source when predictions collapse.

    Each update takes two passes: the gradient of the first moves the parameters to the worst point within ``rho``, the gradient
    there is the one that counts (SAM). Where samples do not depend on each other the second pass runs on the reliable samples
    only. A moving average of the loss below ``reset_threshold`` means collapse (equations 3 to 5).

    Args:
        e_margin: Entropy margin of reliable predictions, in units of ``ln(classes)``.
        rho: Radius of the neighbourhood.
        reset_threshold: Average loss, in nats, below which the source comes back.
        official: Do as the published code where it departs from the paper: the average loss and the optimizer's momentum
            survive a recovery, and a batch without a reliable sample still drifts along the momentum.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.entropy.EntropyMethod`. Without ``exclude``, the
            last blocks of ResNets and of ViTs with twelve blocks are left alone, as in the paper.

    Example:
        >>> SAR(rho=0.1).rho
        0.1
    """

    paper = "Niu et al.: Towards Stable Test-Time Adaptation in Dynamic Wild World, ICLR 2023, https://arxiv.org/abs/2302.12400"

    weighs_in_threads = True

    def __init__(
        self,
        *,
        e_margin: float = 0.4,
        rho: float = 0.05,
        reset_threshold: float = 0.2,
        official: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.e_margin, self.rho, self.reset_threshold, self.official = e_margin, rho, reset_threshold, official
        self.average: float | None = None

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        found = super().select(module)
        if self.exclude is not None:
            return found
        network = resolve_network(module, self.network)[0] if self.run is None else self.run.network_name
        own_names = {name: name.removeprefix(f"{network}.") for name in found}  # what the network calls them
        return {name: layer for name, layer in found.items() if not TOP.search(own_names[name])} or found

    def weigh(self, call: Call, logits: Tensor, entropy: Tensor) -> Tensor:
        return (entropy < entropy_margin(self.e_margin, logits.shape[-1])).to(entropy.dtype)

    def descend(self, call: Call) -> Any:
        output, count = self.walk(call)
        climbed = self._climb()
        self.drop_gradients()
        second = self._second_loss(call, output) if count else None
        self._climb_down(climbed)
        if second is None and self.official:
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        self.step(1 if second is not None or self.official else 0)
        self._watch(self.shared(second))
        return output

    def _second_loss(self, call: Call, output: Any) -> float | None:
        """Leave the gradients at the worst point; return the loss there, if any prediction is reliable there too."""
        reliable = self.weights(call, self.predictions(output)) > 0
        if self.independent(call):
            rows = reliable.any(-1).nonzero().squeeze(-1)
            call, reliable = call.take(rows), reliable[rows]
        with torch.enable_grad():
            logits = self.predictions(call())
            reliable = reliable & (self.weights(call, logits.detach()) > 0)
            if not bool(reliable.any()):
                return None
            loss = softmax_entropy(logits[reliable]).mean()
            loss.backward()
        return float(loss)

    @torch.no_grad()
    def _climb(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Go ``rho`` up the gradient; return what was before."""
        moving = [p for p in self.parameters.values() if p.grad is not None]
        if not moving:
            return []
        length = torch.stack(torch._foreach_norm([p.grad for p in moving])).norm()
        before = [(p, p.detach().clone()) for p in moving]
        for parameter in moving:
            assert parameter.grad is not None
            parameter.add_(parameter.grad * (self.rho / (length + 1e-12)))
        return before

    @torch.no_grad()
    def _climb_down(self, before: list[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter, value in before:
            parameter.copy_(value)

    def _watch(self, loss: float | None) -> None:
        if loss is not None:
            self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        if self.average is not None and self.average < self.reset_threshold:
            if self.official:
                self.put_back()
            else:
                self.to_source()

    def forget(self) -> None:
        super().forget()
        self.average = None
