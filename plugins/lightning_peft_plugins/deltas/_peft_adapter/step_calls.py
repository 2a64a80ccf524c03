"""The calls that PEFT leaves to a training loop: those of AdaLoRA, by PEFT's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.structure.forms import Form, dict_of, fields, flag, list_of, maybe, tensor
from lightning_peft.weights.shards import gathered, whole
from lightning_peft_plugins.deltas._peft_adapter.injection import ADAPTER, built_config

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class StepCalls:
    """What a training of some tuner needs beyond its layers; nothing for most.

    Args:
        data: The configuration as plain data.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._adaptive = data["peft_type"] == "ADALORA"
        self._config = built_config(data) if self._adaptive else None
        self._model: Any = None
        self._restored: dict[str, Any] = {**{name: {} for name in _SCORES}, "rank_pattern": None} if self._adaptive else {}
        self._last = -1

    @property
    def described(self) -> str:
        """A few words for the plan."""
        if self._config is None:
            return ""
        end = self._config.total_step - self._config.tfinal
        return f", rank {self._config.init_r} falls to {self._config.target_r} on average by step {end}"

    def start(self, tuners: Mapping[str, nn.Module]) -> None:
        """Take hold of the adapters, by the names of their layers; what was restored goes on."""
        if self._config is None:
            return
        from peft.tuners.adalora.layer import RankAllocator

        adapters = _Adapters(tuners)
        allocator = RankAllocator(adapters, self._config, ADAPTER)
        device = next(next(iter(tuners.values())).parameters()).device
        for name in _SCORES:
            setattr(allocator, name, {key: score.to(device) for key, score in self._restored[name].items()})
        self._config.rank_pattern = self._restored["rank_pattern"]
        # What PEFT's AdaLoraModel is to its own method.
        self._model = SimpleNamespace(
            model=adapters, peft_config={ADAPTER: self._config}, trainable_adapter_name=ADAPTER, rankallocator=allocator
        )

    def loss(self) -> Tensor | None:
        """AdaLoRA's term: how far the factors are from orthonormal (Zhang et al., ICLR 2023, equation 4), as PEFT means it."""
        if self._model is None or not self._config.orth_reg_weight:
            return None
        terms = []
        for name, factor in self._model.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                factor = whole(factor)
                gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        """Update importances and ranks; the gradients of the step are still there."""
        if self._model is None or step == self._last or not self._model.model.have_gradients():
            return  # after the step of another optimizer
        from peft.tuners.adalora.model import AdaLoraModel

        self._last = step
        with self._model.model.gathered():
            AdaLoraModel.update_and_allocate(self._model, step)

    def awaited(self, steps: int) -> Iterator[str]:
        """Name the end of the schedule of ranks when it was not reached."""
        if self._config is not None and steps < (end := self._config.total_step - self._config.tfinal):
            yield f"its ranks reached their budget (step {end}; give total_step= as many steps as there are)"

    def metrics(self) -> dict[str, float]:
        """Mean rank of the adapters."""
        if self._model is None:
            return {}
        values = [whole(factor) for name, factor in self._model.model.named_parameters() if ".lora_E." in name]
        ranks = [int(factor.count_nonzero()) for factor in values]
        return {"rank": sum(ranks) / max(1, len(ranks))}

    def finish(self) -> None:
        """Let go of the adapters; what a resumed run goes on with can still be asked for."""
        self._restored, self._model = self.state(), None

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        if self._model is None:
            return self._restored
        scores = {name: dict(getattr(self._model.rankallocator, name)) for name in _SCORES}
        return {**scores, "rank_pattern": self._config.rank_pattern}

    @property
    def form(self) -> Form:
        """What :meth:`state` looks like."""
        forms = {**{name: dict_of(tensor()) for name in _SCORES}, "rank_pattern": maybe(dict_of(list_of(flag)))}
        return fields(forms if self._adaptive else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self._restored = dict(state)
        if self._model is not None:
            for name in _SCORES:
                setattr(self._model.rankallocator, name, dict(state[name]))
            self._config.rank_pattern = state["rank_pattern"]


class _Adapters:
    """The adapters as PEFT's loops walk over a model's."""

    def __init__(self, tuners: Mapping[str, nn.Module]) -> None:
        self._tuners = tuners

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, tuner in self._tuners.items():
            yield from ((f"{path}.{name}", parameter) for name, parameter in tuner.named_parameters())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let PEFT's loops see whole adapters and gradients."""
        gradients = {name: whole(parameter.grad) for name, parameter in self.named_parameters()}
        with gathered(*self._tuners.values()):
            for name, parameter in self.named_parameters():
                parameter.grad = gradients[name]
            yield

    def have_gradients(self) -> bool:
        return all(parameter.grad is not None for _, parameter in self.named_parameters() if parameter.requires_grad)
