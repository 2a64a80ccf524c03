"""Figures are counted from what runs, checked against arithmetic; times are only compared with themselves."""

from __future__ import annotations

import json

import pytest
import torch
from export_toys import trained
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import NMSparsity, compare_deployments
from lightning_peft.baking.plain_network import plain_network
from lightning_peft.measure.clock import Latency, LiveBytes, file_bytes, time_calls
from lightning_peft.measure.deployment import measure
from lightning_peft.measure.figures import Comparison
from lightning_peft.measure.layers import count_flops
from lightning_peft.measure.quality import judge, split
from lightning_peft.report.compare_deployments import DeploymentReport
from lightning_peft.report.deployment import deployment_report
from lightning_peft.testing.modules import Plain, mlp
from lightning_peft.testing.trace import difference, trace

QUICK = {"runs": 3, "warm_up": 1}
CPU = torch.device("cpu")


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 5))


class Gated(nn.Module):
    """Runs its second layer only for inputs that are positive on average, as dynamic pruning does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.second(hidden) if inputs.mean() > 0 else hidden


@pytest.mark.parametrize("kind", ["conv", "grown", "vision", "text", "tied"])
def test_flops_are_those_of_pytorchs_own_counter(kind: str) -> None:
    module, inputs = trained(kind)
    network = plain_network(module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**inputs) if isinstance(inputs, dict) else network(inputs)
    figures = measure(module, inputs, **QUICK)
    batch = figures.batch_size
    assert figures.flops == (counter.get_total_flops() / batch,)
    assert sum(layer.flops for layer in figures.layers) == counter.get_total_flops()
    assert sum(layer.parameters for layer in figures.layers) == figures.parameters  # tied weights once
    assert sum(layer.nonzero for layer in figures.layers) == figures.nonzero
    assert sum(layer.share for layer in figures.layers) == pytest.approx(1)
    assert figures.unknown == ()


def test_layers_are_what_arithmetic_says() -> None:
    figures = measure(net(4), torch.randn(2, 3, 4, 4), batch_sizes=[1, 8], **QUICK)
    conv, linear, other = figures.layers
    assert (conv.name, conv.kind, conv.shape, conv.parameters) == ("0", "Conv2d", (4, 3, 3, 3), 4 * 27 + 4)
    assert (conv.flops, linear.flops) == (2 * 2 * 16 * 4 * 27, 2 * 2 * 64 * 5)
    assert (other.name, other.flops, other.parameters) == ("(other)", 0, 0)
    assert figures.flops == (2 * 16 * 4 * 27 + 2 * 64 * 5,)
    assert figures.weight_bytes == 4 * figures.parameters
    # Convolution and ReLU out of place: two results of 2 x 4 x 4 x 4 numbers are alive at once.
    assert figures.activation_bytes == 2 * 4 * (2 * 4 * 4 * 4)
    assert figures.file_bytes > figures.weight_bytes
    assert [(latency.batch_size, len(latency.seconds)) for latency in figures.latencies] == [(1, 3), (8, 3)]
    assert all(seconds > 0 for latency in figures.latencies for seconds in latency.seconds)


def test_zeros_of_a_mask_are_counted_as_parameters_and_change_no_flops() -> None:
    module, inputs = trained("conv")
    dense, sparse = measure(type(module)(), inputs, **QUICK), measure(module, inputs, **QUICK)
    assert dense.flops == sparse.flops
    assert dense.parameters == sparse.parameters
    assert sparse.nonzero < 0.7 * dense.nonzero
    assert abs(file_bytes(plain_network(module)) - dense.file_bytes) < 1000


def test_a_module_under_maps_is_measured_as_it_would_be_baked_and_left_alone() -> None:
    module = Plain()
    NMSparsity("2:4", targets=["model.0"], exclude=()).attach(module)
    before = trace(module)
    figures = measure(module, torch.randn(2, 16), **QUICK)
    assert difference(before, trace(module)) is None
    assert figures.layers[0].nonzero == 128 + 16
    assert figures.layers[0].shape == (16, 16)


def test_modes_and_hooks_are_as_before() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    measure(module, torch.randn(6, 4), **QUICK)
    assert [part.training for part in module] == [True, True, False]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert difference(before, dict(module.state_dict())) is None


def test_work_that_depends_on_the_input_is_shown_with_its_spread(tmp_path) -> None:
    samples = [torch.ones(4, 8), -torch.ones(4, 8), torch.ones(2, 8)]
    figures = measure(Gated(), samples, **QUICK)
    assert figures.flops == (256.0, 128.0, 256.0)
    assert (figures.flops_spread.low, figures.flops_spread.high) == (128, 256)
    found = compare_deployments(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Gated(), samples, **QUICK)
    assert found.predicted == pytest.approx(256 / (640 / 3))
    found.write(tmp_path)
    assert (
        "| lowest and highest of 3 samples | 256 FLOP to 256 FLOP | 128 FLOP to 256 FLOP |"
        in (tmp_path / "report.md").read_text()
    )


def test_fused_transformer_layers_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    was = torch.backends.mha.get_fastpath_enabled()
    products = 2 * 3 * 5 * (4 * 16 * 16 + 2 * 16 * 32)
    attention = 2 * 2 * 3 * 5 * 5 * 16
    assert count_flops(layer, torch.randn(3, 5, 16)).total == products + attention
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_calls_take_turns_and_the_first_of_a_round_changes() -> None:
    order = []

    class Notes(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, inputs: Tensor) -> Tensor:
            order.append(self.name)
            return inputs

    networks = {"a": Notes("a"), "b": Notes("b")}
    seconds = time_calls(networks, torch.ones(1), runs=3, warm_up=2, wait=lambda: None)
    assert "".join(order) == "abab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_latency_is_summarised_by_order() -> None:
    latency = Latency(1, (1.0, 9.0, 2.0, 3.0, 4.0))
    assert (latency.median, latency.quartiles) == (3.0, (2.0, 4.0))
    assert Latency(1, (2.0,)).quartiles == (2.0, 2.0)


def test_memory_in_place_and_views_are_free_and_the_dead_are_forgotten() -> None:
    given = torch.zeros(100)
    with LiveBytes() as live:
        value = given + 1
        value.relu_().view(10, 10).t()
        for _ in range(5):
            value = value * 2  # two alive while one makes the next
    assert live.peak == 800
    with LiveBytes() as live:
        given.mul_(2)
        given.view(4, 25)
    assert live.peak == 0


class Answers(nn.Module):
    """Gives the logits it is told to."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def test_accuracy_and_calibration_are_those_of_hand_made_answers() -> None:
    # Confidence 0.9 and right in three of four: accuracy 0.75, calibration error 0.15.
    logits = torch.tensor([[0.9, 0.1]] * 4).log()
    found = judge(Answers(), [(logits[:1], torch.tensor([0])), (logits[1:], torch.tensor([0, 1, 0]))], CPU)
    assert (found.samples, found.accuracy, found.predictions) == (4, 0.75, (0, 0, 0, 0))
    assert found.ece == pytest.approx(0.15, abs=1e-6)
    assert [share for *_, share in found.bins if share] == [1.0]


def test_batches_of_every_kind_are_split() -> None:
    labels = torch.tensor([0, 1])
    inputs, found = split({"input_ids": torch.ones(2, 3), "labels": labels})
    assert list(inputs) == ["input_ids"]
    assert found is labels
    assert split((torch.ones(2, 3), torch.zeros(2), labels))[0][1].shape == (2,)


@pytest.fixture(scope="module")
def comparison() -> DeploymentReport:
    torch.manual_seed(0)
    batches = iter([(torch.randn(8, 3, 4, 4), torch.arange(8) % 5), (torch.randn(3, 3, 4, 4), torch.arange(3))])
    networks = (net(8), net(4))
    return compare_deployments(
        *networks, torch.randn(2, 3, 4, 4), batches, batch_sizes=[1, 4], names=("dense", "thin"), made_by="a test", **QUICK
    )


def test_the_report_says_what_was_promised_and_what_came(comparison: DeploymentReport, tmp_path) -> None:
    files = {path.name for path in comparison.write(tmp_path)}
    assert files == {"report.html", "report.md", "report.json", "latency.png", "layer-flops.png", "reliability.png"}
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["predicted_speedup"] == 2
    medians = [data[name]["latencies"][0]["seconds"] for name in ("dense", "thin")]
    assert data["achieved_speedup"]["1"] == pytest.approx(sorted(medians[0])[1] / sorted(medians[1])[1])
    assert data["quality"]["thin"]["samples"] == 11
    text = (tmp_path / "report.md").read_text()
    assert "By FLOPs thin should be 2.00 times as fast as dense; at batch size 1 by the clock it is" in text
    assert "| FLOPs a sample | 8.19 kFLOP | 4.10 kFLOP | 2.00 x |" in text
    assert "| 0 | 8 x 3 x 3 x 3 to 4 x 3 x 3 x 3 | 112 | 100.0 % |" in text
    assert "11 labelled samples" in text
    assert "Made by `a test`" in text
    assert "thread" in text


def test_equal_networks_are_not_called_faster(tmp_path) -> None:
    latency = Latency(1, (1.0, 2.0, 3.0))
    figures = measure(mlp(), torch.randn(2, 16), **QUICK)
    same = type(figures)(**{**vars(figures), "latencies": (latency,)})
    found = deployment_report(Comparison(same, same, 3, 1))
    assert {fact.label: fact.good for fact in found.facts} == dict.fromkeys(
        ("parameters", "non-zero", "FLOPs a sample", "latency, batch 1")
    )
    assert "after needs as many FLOPs as before, so no difference is predicted" in found.sections[1].text[0]
    assert found.sections[1].tables[0].rows == ((1, "1.00 x", "1.00 x", "100 %", "no"),)
    slow = type(figures)(**{**vars(figures), "latencies": (Latency(1, (4.0, 5.0, 6.0)),)})
    facts = {fact.label: fact for fact in deployment_report(Comparison(same, slow, 3, 1)).facts}
    assert facts["latency, batch 1"].good is False


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: measure(mlp(), []), "at least one sample"),
        (lambda: measure(mlp(), torch.ones(1, 16), runs=0), "runs >= 1"),
        (lambda: measure(mlp(), torch.ones(1, 16), batch_sizes=[0]), "batch sizes >= 1"),
        (lambda: measure(mlp(), {"size": 3}), "no tensor with a batch"),
        (lambda: compare_deployments(mlp(), mlp(), torch.ones(1, 16), names=("a", "a")), "different names"),
        (lambda: compare_deployments(mlp(), mlp(), torch.ones(1, 16), [], **QUICK), "holds no batch"),
        (lambda: judge(mlp(), [torch.ones(2, 16)], CPU), "no class indices"),
        (lambda: judge(Answers(), [(torch.ones(2, 3, 4), torch.zeros(2).long())], CPU), r"shape \(batch, classes\)"),
        (lambda: compare_deployments(mlp(), mlp().to("meta"), torch.ones(1, 16)), "one device"),
    ],
)
def test_bad_input_names_the_fix(call, fix: str) -> None:
    with pytest.raises(MisconfigurationException, match=fix):
        call()
