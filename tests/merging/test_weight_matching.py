"""Weight matching: the function stays, a known order is found again, and the way there never goes down."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, match_weights, merge
from lightning_peft.merging.errors import MergeError
from lightning_peft.structure.coupled.example import record
from lightning_peft.structure.coupled.movable import movable_groups
from lightning_peft.structure.reorder import group_orders, reorder
from lightning_peft.testing.modules import Plain

pytest.importorskip("torch_pruning")
pytest.importorskip("scipy")


class Residual(nn.Module):
    """Convolutions with batch norms around a sum, as in residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        rows = self.stem(images)
        return self.head((rows + self.inner(rows)).relu().mean((2, 3)))


def perceptron():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))


def transformer():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=4)


def grouped_queries():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        vocab_size=20,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def images():
    return torch.randn(2, 3, 32, 32)


NETWORKS = {
    "perceptron": (perceptron, lambda: torch.randn(4, 6), 2),
    "residual": (Residual, images, 2),
    "transformer": (transformer, images, 5),
    "grouped queries": (grouped_queries, lambda: torch.randint(20, (2, 5)), 5),
}


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def output(network, batch):
    """What the network returns; norms of Llama compute in single precision."""
    with torch.no_grad():
        found = network(batch)
    return getattr(found, "logits", found)


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    make, batch, groups = NETWORKS[request.param]
    network = make().double().eval()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data = 1 + torch.rand_like(tensor) / 3  # norms and statistics that tell channels apart
    found = batch()
    return network, found.double() if found.is_floating_point() else found, groups


def test_a_known_order_is_found_again(case):
    network, batch, groups = case
    other = copy.deepcopy(network)
    found = movable_groups(other, "", other, record((batch,), {}), heads=True)
    draw = torch.Generator().manual_seed(3)
    orders = {group.name: (group, torch.randperm(group.units, generator=draw)) for group in found.groups}
    reorder(other, group_orders(other, orders))
    assert any(not torch.equal(one, two) for one, two in zip(network.parameters(), other.parameters(), strict=True))
    assert torch.allclose(output(other, batch), output(network, batch), atol=1e-6)
    matching = match_weights(other, network, batch)
    assert matching.groups == groups
    assert same(network, other)


def test_the_function_stays_and_the_weights_get_nearer(case):
    network, batch, _ = case
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    before, distance = output(other, batch), _distance(network, other)
    matching = match_weights(other, network, batch)
    assert torch.allclose(output(other, batch), before, atol=1e-5)
    assert all(later > earlier for earlier, later in zip(matching.similarity, matching.similarity[1:], strict=False))
    assert len(matching.similarity) > 1
    assert _distance(network, other) < distance
    again = match_weights(other, network, batch)
    assert again.sweeps == 0, "nothing is left to gain"


def _distance(one, two):
    return sum(float((a - b).detach().square().sum()) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_independent_trainings_can_be_averaged_after_it():
    rows = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    labels = (rows[:, :3] * rows[:, 3:]).argmax(1)
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)))
        optimizer = torch.optim.Adam(networks[-1].parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(networks[-1](rows), labels).backward()
            optimizer.step()
    one, two = networks

    def loss(state):
        probe = copy.deepcopy(one)
        probe.load_state_dict(state)
        return float(nn.functional.cross_entropy(output(probe, rows), labels))

    plain = loss(merge([one.state_dict(), two.state_dict()]))
    match_weights(two, one.state_dict(), rows[:2])
    matched = loss(merge([one.state_dict(), two.state_dict()]))
    alone = max(loss(one.state_dict()), loss(two.state_dict()))
    assert matched - alone < 0.6 * (plain - alone)


def test_what_cannot_be_matched_is_said():
    one = perceptron()
    with pytest.raises(MergeError, match=r"0\.weight, .*is not in it"):
        match_weights(one, {}, torch.ones(1, 6))
    wide = nn.Sequential(nn.Linear(6, 13), *list(perceptron())[1:])
    with pytest.raises(MergeError, match=r"\(12, 6\) in the network, is \(13, 6\) in it"):
        match_weights(one, wide, torch.ones(1, 6))
    broken = copy.deepcopy(one)
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(MergeError, match=r"0\.weight holds numbers that are not finite"):
        match_weights(one, broken, torch.ones(1, 6))


def test_adapters_on_the_network_are_refused():
    module = Plain()
    method = LoRA(2, targets="all-linear", exclude=())
    method.attach(module)
    with pytest.raises(MergeError, match=r"'lora' is on the network\. Bake it first"):
        match_weights(module.model, copy.deepcopy(module.model), torch.ones(1, 16))
