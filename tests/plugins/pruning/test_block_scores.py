"""BlockPruning: scores of blocks, by hand and as the official codes compute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_networks import (
    TOKENS,
    llama,
    silent,
)
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.modules import Plain, ResidualBlock
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.pruning._block_pruning.weight_scores import magnitude_of, taylor_of
from lightning_peft_plugins.pruning.block_pruning import BlockPruning
from lightning_peft_plugins.pruning.functional.block_influence import block_influence


def test_the_score_is_the_mean_of_the_window() -> None:
    module = silent(blocks=3)
    seen: list[dict[int, Tensor]] = []

    def record(place: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if module.training:
                if place == 0:
                    seen.append({})
                seen[-1][place] = block_influence(args[0].detach(), output.detach())

        return hook

    handles = [block.register_forward_hook(record(place)) for place, block in enumerate(module.blocks)]
    fit([BlockPruning(1, start=4, every=3)], module=module, max_epochs=2)
    for handle in handles:
        handle.remove()
    means = [float(torch.stack([call[place] for call in seen[1:4]]).mean()) for place in range(3)]
    gone = means.index(min(means))
    assert journal_of(module)[0]["sources"] == [place for place in range(3) if place != gone]


def test_weights_and_gradients_rank_too() -> None:
    module = silent(blocks=4)
    with torch.no_grad():
        for layer in (module.blocks[2].fc1, module.blocks[2].fc2):
            layer.weight.mul_(0.1)
    fit([BlockPruning(1, "magnitude", start=2, every=1)], module=module)
    assert journal_of(module)[0]["sources"] == [0, 1, 3]
    module = silent(blocks=4)
    sums: list[list[float]] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            blocks = [[p for p in block.parameters() if p.ndim > 1] for block in module.blocks]
            sums.append([float(sum((p.detach() * p.grad).abs().sum() for p in weights)) for weights in blocks])

    fit([BlockPruning(1, "taylor", start=3, every=2)], module=module, after=[Gradients()])
    means = [(one + two) / 2 for one, two in zip(*sums[1:3], strict=True)]
    gone = means.index(min(means))
    assert journal_of(module)[0]["sources"] == [place for place in range(4) if place != gone]


def test_tuples_are_read_and_features_are_found() -> None:
    images, tokens = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 4)
    flat = block_influence(images.movedim(1, -1).flatten(0, 2), tokens.new_ones(18, 4))
    assert torch.isclose(block_influence(images, torch.ones_like(images), dim=1), flat)
    assert block_influence(tokens.half(), tokens.half()).dtype == torch.float32

    class Pair(ResidualBlock):
        def forward(self, inputs: Tensor) -> Any:
            return super().forward(inputs), None

    class Tuples(Plain):
        def build(self) -> None:
            super().build()
            self.trunk = nn.ModuleList(Pair() for _ in range(3))

        def forward(self, inputs: Tensor) -> Any:
            for block in self.trunk:
                inputs = block(inputs)[0]
            return self.model(inputs)

    assert len(fit([BlockPruning(1, start=3)], style=Tuples).module.trunk) == 2


def official_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Of every token, as icip-cas/ShortGPT computes it (9a2ee8d, metrics.py): the diagonal of all cosines."""
    one, two = inputs.flatten(0, -2), outputs.flatten(0, -2)
    cosines = one @ two.t() / (one.norm(dim=-1, keepdim=True) * two.norm(dim=-1, keepdim=True))
    return 1 - cosines.diagonal()


def test_influence_of_a_llama_is_that_of_the_official_code() -> None:
    torch.manual_seed(0)
    network = llama(5).eval()
    for place, layer in enumerate(network.model.layers):  # else all of them do about as much
        nn.init.normal_(layer.mlp.down_proj.weight, std=0.02 + 0.3 * ((2 * place) % 5))
    given: dict[int, Tensor] = {}
    returned: dict[int, Tensor] = {}

    def record(place: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            given[place], returned[place] = args[0], output

        return hook

    for place, layer in enumerate(network.model.layers):
        layer.register_forward_hook(record(place))
    with torch.no_grad():
        states = network(TOKENS.clamp(min=3), output_hidden_states=True).hidden_states
    assert len(given) == 5
    ours = [float(block_influence(given[place], returned[place])) for place in range(5)]
    theirs = [float(official_influence(states[place], states[place + 1]).mean()) for place in range(5)]
    assert ours[:4] == pytest.approx(theirs[:4], abs=1e-5)
    # Their last state is behind the network's last norm, which is no part of a block.
    assert float(official_influence(given[4], returned[4]).mean()) == pytest.approx(ours[4], abs=1e-5)
    assert sorted(range(4), key=ours.__getitem__) == sorted(range(4), key=theirs.__getitem__)


def test_sums_over_weights_are_those_of_the_official_code_without_norms() -> None:
    torch.manual_seed(0)
    network = llama(3)
    network(TOKENS, labels=TOKENS).loss.backward()
    for layer in network.model.layers:
        # Nota-NetsPresso/shortened-llm (512de2a): projections and norms; with one calibration batch |w g| is what it sums.
        projections = [p for name, p in layer.named_parameters() if "proj" in name]
        magnitude = sum(float(p.detach().abs().sum(1).sum()) for p in projections)
        taylor = sum(float((p.detach() * p.grad).abs().sum(1).sum()) for p in projections)
        assert magnitude_of(layer) == pytest.approx(magnitude, rel=1e-5)
        found = taylor_of(list(layer.parameters()))
        assert found is not None
        assert float(found) == pytest.approx(taylor, rel=1e-5)
