from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.weights import fisher
from lightning_peft.weights.fisher import diagonal_fisher

torch.set_num_threads(1)
Convention = Literal["batch", "sample", "expected"]


@pytest.fixture
def no_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("vmap is off")

    monkeypatch.setattr(fisher, "vmap", refuse)


def data(samples: int = 6, features: int = 3, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator)
    return x, torch.randint(classes, (samples,), generator=generator)


def softmax_regression(classes: int = 4, features: int = 3, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(features, classes, dtype=torch.float64)


def per_sample_gradient(layer: nn.Linear, x: Tensor, label: Tensor) -> Tensor:
    """Of log p(label | x): (one_hot - p) x^T, shape (samples, classes, features)."""
    residual = F.one_hot(label, layer.out_features) - layer(x).detach().softmax(-1)
    return residual[:, :, None] * x[:, None, :]


@given(st.integers(1, 7), st.integers(2, 4), st.integers(0, 50), st.integers(1, 4))
def test_closed_form_of_softmax_regression(samples: int, classes: int, seed: int, chunk: int) -> None:
    x, y = data(samples, classes=classes, seed=seed)
    x = x.double()
    layer = softmax_regression(classes, seed=seed)
    p = layer(x).detach().softmax(-1)
    argmax = p.argmax(-1)
    # sum_c p_c (1[k=c] - p_k)^2 = p_k (1 - p_k)
    expected = ((p * (1 - p))[:, :, None] * x[:, None, :] ** 2).mean(0)
    scores = diagonal_fisher(layer, [x[:2], x[2:]] if samples > 2 else [x], convention="expected", chunk_size=chunk)
    torch.testing.assert_close(scores["weight"], expected)
    torch.testing.assert_close(scores["bias"], (p * (1 - p)).mean(0))
    scores = diagonal_fisher(layer, [x], convention="sample", chunk_size=chunk)
    torch.testing.assert_close(scores["weight"], (per_sample_gradient(layer, x, argmax) ** 2).mean(0))
    scores = diagonal_fisher(layer, [(x, y)], convention="sample", labels="data", chunk_size=chunk)
    torch.testing.assert_close(scores["weight"], (per_sample_gradient(layer, x, y) ** 2).mean(0))
    scores = diagonal_fisher(layer, [(x, y), (2 * x, y)], convention="batch", labels="data")
    batches = [per_sample_gradient(layer, scale * x, y).mean(0) ** 2 for scale in (1, 2)]
    torch.testing.assert_close(scores["weight"], (batches[0] + batches[1]) / 2)


def test_batch_convention_is_what_the_eata_code_accumulates() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    batches = [data(seed=s)[0] for s in range(3)]
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x in batches:
        net.zero_grad()
        logits = net(x)
        F.cross_entropy(logits, logits.argmax(1)).backward()
        for name, p in net.named_parameters():
            expected[name] += p.grad**2 / len(batches)
    net.zero_grad()
    torch.testing.assert_close(diagonal_fisher(net, batches), expected)


@given(st.integers(0, 30))
def test_batches_of_one_make_batch_and_sample_agree(seed: int) -> None:
    layer = softmax_regression(seed=seed)
    batches = list(data(seed=seed)[0].double().split(1))
    torch.testing.assert_close(
        diagonal_fisher(layer, batches, convention="batch"), diagonal_fisher(layer, batches, convention="sample")
    )


def networks() -> Iterator[Any]:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    yield pytest.param(conv, torch.randn(5, 1, 4, 4), id="conv-bn")
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    yield pytest.param(nn.Sequential(attention, nn.Flatten(), nn.Linear(24, 3)), torch.randn(5, 3, 8), id="attention")


@pytest.mark.parametrize(("net", "x"), list(networks()))
@pytest.mark.parametrize("convention", ["sample", "expected"])
def test_one_by_one_equals_vectorised(
    net: nn.Module, x: Tensor, convention: Convention, request: pytest.FixtureRequest
) -> None:
    vectorised = diagonal_fisher(net, [x], convention=convention, chunk_size=2)
    request.getfixturevalue("no_vmap")
    torch.testing.assert_close(diagonal_fisher(net, [x], convention=convention), vectorised)
    assert all(score.any() for name, score in vectorised.items() if "in_proj_bias" not in name)


class Stubborn(nn.Module):
    """Has what vmap cannot do: control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(2 * x)


def test_models_vmap_cannot_take_are_scored_all_the_same() -> None:
    net, x = Stubborn(), data()[0]
    scale = torch.where(x.sum(-1, keepdim=True) > 0, 1, 2)
    for convention in ("sample", "expected"):
        torch.testing.assert_close(
            diagonal_fisher(net, [x], convention=convention)["layer.weight"],
            diagonal_fisher(net.layer, [x * scale], convention=convention)["weight"],
        )


def test_batch_norm_in_train_mode_is_scored_and_its_statistics_stay() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3))
    x = torch.randn(4, 1, 4, 4)
    before = copy.deepcopy(net.state_dict())
    for convention in ("batch", "sample", "expected"):
        training = diagonal_fisher(net, [x], convention=convention, eval_mode=False)
        evaluating = diagonal_fisher(net, [x], convention=convention)
        assert (training["0.weight"] != evaluating["0.weight"]).any()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("convention", ["batch", "sample", "expected"])
def test_nothing_of_the_model_changes(convention: Convention) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].eval()
    net[3].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones(4, 3)
    state = copy.deepcopy(net.state_dict())
    attributes = {name: dict(vars(m)) for name, m in net.named_modules()}
    scores = diagonal_fisher(net, [data()[0]], convention=convention)
    assert set(scores) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert [m.training for m in net] == [True, True, False, True]
    assert not net[3].bias.requires_grad
    assert (net[0].weight.grad == 1).all()
    assert net[3].weight.grad is None
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert attributes == {name: dict(vars(m)) for name, m in net.named_modules()}


@pytest.mark.parametrize("convention", ["batch", "sample", "expected"])
def test_inside_inference_mode(convention: Convention) -> None:
    layer, x = softmax_regression(), data()[0].double()
    expected = diagonal_fisher(layer, [x], convention=convention)
    with torch.inference_mode():
        scores = diagonal_fisher(layer, [x * 1], convention=convention)
    torch.testing.assert_close(scores, expected)
    assert not scores["weight"].is_inference()


def test_mode_is_restored_when_the_model_fails() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        diagonal_fisher(net, [torch.ones(2, 7)], convention="sample")
    assert net.training


class Dictionary(pl.LightningModule):
    """Takes keywords, returns something with logits, has a parameter no output depends on and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.layer.weight
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, values: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        out = self.again(self.layer(values).tanh())
        return {"features": values, "logits": out if scale is None else out * scale}


@pytest.mark.parametrize("convention", ["batch", "sample", "expected"])
def test_dict_batches_tied_and_idle_parameters(convention: Convention) -> None:
    module = Dictionary()
    x, y = data(classes=3)
    labels: Literal["model", "data"] = "model" if convention == "expected" else "data"
    batch = {"values": x, "scale": torch.tensor(2.0), "labels": y}
    scores = diagonal_fisher(module, [batch], convention=convention, labels=labels)
    assert list(scores) == ["idle", "layer.weight", "layer.bias", "again.bias"]
    assert not scores["idle"].any()
    custom = diagonal_fisher(
        module,
        [(x, y)],
        convention=convention,
        labels=labels,
        forward=lambda model, b: (2 * model(b[0])["logits"], "rest"),
    )
    torch.testing.assert_close(scores, custom)


def test_frozen_parameters_can_be_named_and_parametrized_ones_are_stored_tensors() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = softmax_regression()
    x = data()[0].double()
    plain = diagonal_fisher(layer, [x], convention="expected")["weight"]
    layer.requires_grad_(False)
    torch.testing.assert_close(diagonal_fisher(layer, [x], convention="expected", parameters=["weight"]), {"weight": plain})
    with torch.no_grad():
        layer.weight /= 2
    parametrize.register_parametrization(layer, "weight", Double())
    name = "parametrizations.weight.original"
    scores = diagonal_fisher(layer, [x], convention="expected", parameters=[name])
    torch.testing.assert_close(scores[name], 4 * plain)


def test_half_precision_accumulates_in_float32() -> None:
    layer = nn.Linear(3, 4, dtype=torch.bfloat16)
    for convention in ("batch", "sample", "expected"):
        scores = diagonal_fisher(layer, [data()[0].bfloat16()], convention=convention)
        assert scores["weight"].dtype == torch.float32
        assert scores["weight"].any()


@pytest.mark.parametrize(
    ("kwargs", "batches", "message"),
    [
        ({}, [], "empty"),
        ({}, [torch.ones(0, 3)], "no sample"),
        ({"convention": "exact"}, [torch.ones(1, 3)], "expected"),
        ({"convention": "expected", "labels": "data"}, [torch.ones(1, 3)], "reads no labels"),
        ({"labels": "data"}, [torch.ones(1, 3)], r"\(x, y\)"),
        ({"parameters": ["wieght"]}, [torch.ones(1, 3)], "Nearest: weight"),
        ({}, [torch.ones(2, 5, 3)], r"got \(2, 5, 2\)"),
        ({"forward": lambda *_: "text"}, [torch.ones(1, 3)], "logits"),
    ],
)
def test_errors_say_what_to_change(kwargs: dict[str, Any], batches: list[Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        diagonal_fisher(nn.Linear(3, 2), batches, **kwargs)
    with pytest.raises(MisconfigurationException, match="parameters"):
        diagonal_fisher(nn.Linear(3, 2).requires_grad_(False), [torch.ones(1, 3)])


@pytest.mark.parametrize("samples", [1, 7])
def test_real_networks(samples: int) -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    net = timm.create_model("test_vit", num_classes=3, img_size=32)
    images = torch.randn(samples, 3, 32, 32)
    expected = diagonal_fisher(net, [images], convention="expected", parameters=["head.weight"])["head.weight"]
    with torch.no_grad():
        features = net.eval().forward_head(net.forward_features(images), pre_logits=True)
        p = net(images).softmax(-1)
    torch.testing.assert_close(expected, ((p * (1 - p))[:, :, None] * features[:, None] ** 2).mean(0))
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    bert = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(11, (samples, 4)), "attention_mask": torch.ones(samples, 4, dtype=torch.long)}
    name = "classifier.bias"
    scores = diagonal_fisher(bert, [batch], convention="expected", parameters=[name])
    p = bert.eval()(**batch).logits.softmax(-1).detach()
    torch.testing.assert_close(scores[name], (p * (1 - p)).mean(0))
