"""Scores from data: masks equal to the official formulas on inputs and gradients recorded beside the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from masked_weights import EVERYTHING
from torch import Tensor, nn

from lightning_peft import GBLM, MaskedPruning, Wanda
from lightning_peft.testing import MethodTester
from lightning_peft.testing.runs import fit
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft_plugins.pruning._shared.deviations import deviation_ratio
from lightning_peft_plugins.pruning._shared.layer_statistics import LayerStatistics
from lightning_peft_plugins.pruning._shared.scores import beta_rank, wanda


class TestBetaRank(MethodTester):
    methods = [lambda: MaskedPruning(0.5, "beta", "channel", "layer", exclude=EVERYTHING, start="25%", end="75%", every=2)]
    no_accumulation = "deviations are over each batch that goes through the network"


class Recorder(Callback):
    """Inputs, gradients and weights of every linear layer in the first steps, taken with hooks of its own."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        self.before: dict[str, list[Tensor]] = {}
        self.biases: dict[str, list[Tensor]] = {}
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for name, layer in pl_module.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            if layer.training:
                self.inputs.setdefault(name, []).append(args[0].detach().clone())

        return hook

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for mapped in mapped_tensors(pl_module):
            name = mapped.name.removesuffix(".weight")
            self.gradients.setdefault(name, []).append(mapped.stored.grad.clone())
            self.before.setdefault(name, []).append(mapped.stored.detach().clone())
            self.biases.setdefault(name, []).append(mapped.layer.bias.detach().clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            self.weights = {m.name.removesuffix(".weight"): m.stored.detach().clone() for m in mapped_tensors(pl_module)}
            self.masks = {m.name.removesuffix(".weight"): m.maps[0].held.clone() for m in mapped_tensors(pl_module)}


def lowest(score: Tensor, share: float) -> Tensor:
    """Mask of what stays when the lowest of each row go, as the official code of Wanda sorts."""
    kept = torch.ones_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=-1, stable=True)[1][:, : int(score.shape[1] * share)]
    return kept.scatter_(1, order, False)


def test_wanda_as_its_official_code_computes_it() -> None:
    record = Recorder(3)
    fit([Wanda(0.5, exclude=EVERYTHING, every=3)], after=[record], max_epochs=1)
    for name, weight in record.weights.items():
        row, samples = torch.zeros(weight.shape[1]), 0
        for batch in record.inputs[name][:3]:  # scaler_row of the official WrappedGPT
            row *= samples / (samples + len(batch))
            samples += len(batch)
            row += batch.t().norm(p=2, dim=1) ** 2 / samples
        assert torch.equal(record.masks[name], lowest(weight.abs() * row.sqrt(), 0.5))


def test_gblm_as_its_official_code_computes_it() -> None:
    record, different = Recorder(3), 0
    fit([GBLM(0.5, exclude=EVERYTHING, every=3)], after=[record], max_epochs=1)
    for name, weight in record.weights.items():
        squares, samples, gradients = torch.zeros(weight.shape[1]), 0, torch.zeros_like(weight)
        for inputs, gradient in zip(record.inputs[name][:3], record.gradients[name][:3], strict=True):
            squares *= samples / (samples + len(inputs))  # a running mean over samples
            samples += len(inputs)
            squares += torch.norm(inputs.t(), p=2, dim=1) ** 2 / samples
            gradients += (gradient * 100).square()  # a sum over steps
        by_inputs = weight.abs() * squares.sqrt()
        first = (by_inputs + weight.abs() * gradients.sqrt()).sort(dim=-1, stable=True)[1][:, : int(weight.shape[1] * 0.5)]
        assert torch.equal(record.masks[name], torch.ones_like(weight).scatter_(1, first, 0.0).bool())
        different += int((record.masks[name] != lowest(by_inputs + weight.abs() * (gradients / 3).sqrt(), 0.5)).sum())
    assert different  # a mean over steps would prune other weights


@pytest.mark.parametrize("score", ["taylor", "gradient", "fisher"])
def test_gradient_scores_are_means_over_the_steps_before(score: str) -> None:
    record = Recorder(3)
    fit([MaskedPruning(0.5, score, scope="row", exclude=EVERYTHING, every=3, start=3)], after=[record], max_epochs=1)
    assert record.weights
    for name, weight in record.weights.items():
        gradients, before = torch.stack(record.gradients[name][:3]), torch.stack(record.before[name][:3])
        value = {
            "taylor": (before * gradients).abs().mean(0),  # each gradient with the weight it is of
            "gradient": gradients.abs().mean(0),
            "fisher": weight.square() * gradients.square().mean(0),
        }[score]
        assert torch.equal(record.masks[name], lowest(value, 0.5))


def test_what_was_loaded_follows_the_weights_to_their_device() -> None:
    seen = LayerStatistics({"|g|"})
    seen.load_state({"sums": {"|g|": torch.ones(2, 3)}, "steps": 1})
    weight = torch.empty(2, 3, device="meta")
    seen.see_gradient(weight, weight)
    assert seen.mean("|g|").device == weight.device


def test_wanda_knows_the_inputs_of_convolutions() -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    layer = nn.Conv2d(3, 2, 3)
    seen = LayerStatistics({"x^2"})
    seen.see_inputs(layer, images)
    torch.testing.assert_close(seen.mean("x^2"), images.square().sum((0, 2, 3)) / 4)
    seen.see_inputs(layer, images)
    torch.testing.assert_close(seen.mean("x^2"), images.square().sum((0, 2, 3)) / 4)
    score = wanda(layer.weight, seen.mean("x^2"), 1)
    torch.testing.assert_close(score[1, 2], layer.weight[1, 2].abs() * (images[:, 2].square().sum() / 4).sqrt())


def beta_by_hand(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The official loops over filters and places, with patches cut along the axes of the filter."""
    (tall, wide), (down, right) = layer.weight.shape[2:], layer.stride
    inputs = nn.functional.pad(inputs, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    ranks = []
    for channel, weight in enumerate(layer.weight):
        total = torch.zeros_like(weight)
        for y in range(outputs.shape[2]):
            for x in range(outputs.shape[3]):
                patch = inputs[:, :, y * down : y * down + tall, x * right : x * right + wide]
                total += (weight * outputs[:, channel, y, x].std(correction=0) / patch.std(correction=0)).abs()
        ranks.append(total.mean())
    return torch.stack(ranks).detach()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}], ids=str)
def test_beta_rank_as_its_official_code_loops(options: dict[str, Any]) -> None:
    images, layer = torch.randn(6, 3, 7, 6), nn.Conv2d(3, 5, (3, 2), **options)
    outputs = layer(images)
    score = beta_rank(layer.weight, deviation_ratio(layer, images, outputs), 1).flatten(1).mean(1)
    torch.testing.assert_close(score * outputs[0, 0].numel(), beta_by_hand(layer, images, outputs))


def test_beta_rank_chooses_by_the_calls_before() -> None:
    record = Recorder(3)
    fit([MaskedPruning(0.5, "beta", "channel", "layer", exclude=EVERYTHING, every=3)], after=[record], max_epochs=1)
    assert record.weights
    for name, weight in record.weights.items():
        ratios = torch.zeros(len(weight))
        for inputs, before, bias in zip(record.inputs[name][:3], record.before[name], record.biases[name], strict=False):
            outputs = nn.functional.linear(inputs, before, bias)
            ratios += outputs.std(0, correction=0) / inputs.std(correction=0) / 3
        kept = record.masks[name].any(1)
        assert torch.equal(record.masks[name].all(1), kept)
        score = weight.abs().mean(1) * ratios
        assert 0 < kept.sum() < len(kept)
        assert score[kept].min() > score[~kept].max()


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_each_choice_sees_only_the_steps_before_it(pattern: str) -> None:
    method = GBLM(pattern=pattern, scope="layer", exclude=EVERYTHING, start=4, end=8, every=4)
    fit([method], max_epochs=2)
    assert {seen.steps for seen in method.recorder.seen.values()} == {0}, "the last choice was after the last step"
