from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.network.targets import TargetSpec, select, tied_names

torch.set_num_threads(1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.xfc1 = nn.Linear(8, 8)
        self.act = nn.ReLU()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.dw = nn.Conv2d(4, 4, 3, groups=4)
        self.pw = nn.Conv2d(4, 4, 1)
        self.mlp = Mlp()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 2)


class MetricWithNetwork(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def update(self) -> None: ...

    def compute(self) -> None: ...


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.metric = MetricWithNetwork()
        self.metrics = torchmetrics.MetricCollection({"one": MetricWithNetwork()})
        self.model = net or Net()
        self.loss = nn.CrossEntropyLoss()


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


LINEAR = ["mlp.fc1", "mlp.xfc1", "blocks.0.fc1", "blocks.0.xfc1", "blocks.1.fc1", "blocks.1.xfc1", "fc"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEAR),
        ("all-conv", ["stem", "dw", "pw"]),
        ("all-weights", ["stem", "dw", "pw", *LINEAR]),
        ("pointwise", ["pw"]),
        ("fc1", ["mlp.fc1", "blocks.0.fc1", "blocks.1.fc1"]),
        ("0.fc1", ["blocks.0.fc1"]),
        ("mlp.fc1", ["mlp.fc1"]),
        (["fc", "stem"], ["stem", "fc"]),
        (["fc1", "re:fc1$"], LINEAR[:-1]),
        (r"re:blocks\.\d+$", ["blocks.0", "blocks.1"]),
        ("type:Linear", LINEAR),
        ("type:_ConvNd", ["stem", "dw", "pw"]),
        (nn.LayerNorm, ["norm"]),
        ((nn.LayerNorm, "pointwise"), ["pw", "norm"]),
    ],
)
def test_grammar(targets: Any, expected: list[str]) -> None:
    assert list(select(Net(), targets)) == expected
    found = select(Module(), targets)
    assert list(found) == [f"model.{name}" for name in expected]  # and nothing of the metrics


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        ("first", ["stem"]),
        ("head", ["fc"]),
        ("depthwise", ["dw"]),
        ("embedding", []),
        (["first", "head", "depthwise", "embedding"], ["stem", "dw", "fc"]),
        ("pointwise", ["pw"]),
        (nn.Linear, LINEAR),
        ([r"re:^blocks\.", "stem"], ["stem", *LINEAR[2:6]]),
    ],
)
def test_exclude(exclude: Any, gone: list[str]) -> None:
    assert list(select(Net(), "all-weights", exclude)) == [n for n in ["stem", "dw", "pw", *LINEAR] if n not in gone]


def test_pointwise_convolutions_have_one_group() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, (1, 3)), nn.Conv3d(4, 4, 1))
    assert list(select(net, "pointwise")) == ["0", "3"]
    assert list(select(net, "all-conv", "depthwise")) == ["0", "2", "3"]


def component(targets: TargetSpec = "all-linear") -> TargetSpec:
    return targets


def test_written_in_yaml() -> None:
    assert auto_cli(component, args=["--targets=re:^a,b$"]) == "re:^a,b$"
    assert auto_cli(component, args=["--targets=[fc1, 'type:Linear', 'group:2-5']"]) == ["fc1", "type:Linear", "group:2-5"]


def test_names_lead_to_the_modules_and_the_model_itself_counts() -> None:
    module = Module()
    assert all(module.get_submodule(name) is found for name, found in select(module, "all-weights").items())
    layer = nn.Linear(2, 2)
    assert select(layer, "all-linear") == {"": layer}


def test_parametrized_layers_match_as_before_and_their_innards_never() -> None:
    net, plain = Net(), Net()
    for layer in (net.fc, net.stem, net.mlp.fc1):
        parametrize.register_parametrization(layer, "weight", Identity())
    for spec in ("all-linear", "all-conv", "pointwise", "type:Linear", nn.Linear, "fc", "re:fc1"):
        assert list(select(net, spec)) == list(select(plain, spec))
    for exclude in ("head", "first", "depthwise"):
        assert list(select(net, "all-weights", exclude)) == list(select(plain, "all-weights", exclude))
    with pytest.raises(MisconfigurationException, match="LayerNorm x1") as error:
        select(net, nn.GRU)
    assert "Linear x7" in str(error.value)
    assert "Parametrized" not in str(error.value)


def test_a_module_under_two_names_is_found_by_either_and_listed_once() -> None:
    net = nn.ModuleDict({"one": nn.Linear(2, 2)})
    net["two"] = net["one"]
    assert list(select(net, "two")) == ["one"]
    assert list(select(net, ["one", "two"])) == ["one"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("fcc1", r"mlp\.fc1|blocks\.0\.fc1"),
        ("mpl.fc1", r"Did you mean mlp\.fc1"),
        ("all-lienar", "all-linear"),
        ("type:Liner", "type:Linear"),
        ("re:blcks", "blocks"),
        (["fc1", "nonsense_at_all"], "nonsense_at_all"),
        (nn.GRU, "'GRU' matches nothing in Net. It has Linear x7, Conv2d x3, LayerNorm x1"),
        ("re:(", "regular expression"),
        ("group:1", "group_matcher"),
        ("group:one", "group:3-5"),
        ([], "empty"),
        ("", "''"),
        (nn.Linear(1, 1), "string or an nn.Module class"),
        ([3], "string or an nn.Module class"),
    ],
)
def test_what_matches_nothing_says_what_was_meant(targets: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        select(Net(), targets)


def test_presets_list_the_layers_present() -> None:
    with pytest.raises(MisconfigurationException, match="It has Linear x2"):
        select(Mlp(), "all-conv")
    with pytest.raises(MisconfigurationException, match="no layer with parameters"):
        select(nn.ReLU(), "all-linear")


def test_excludes_that_match_nothing_or_leave_nothing() -> None:
    with pytest.raises(MisconfigurationException, match="stem"):
        select(Net(), "all-linear", "stm")
    with pytest.raises(MisconfigurationException, match="removes every module"):
        select(Net(), ["stem", "fc"], ["first", "head"])
    assert list(select(Mlp(), "all-linear", "all-conv")) == ["fc1", "xfc1"]  # a preset may be vacuous in `exclude`


def test_tied_names() -> None:
    net = Net()
    assert tied_names(net) == {}
    net.fc.weight = net.mlp.fc1.weight
    net.again = net.norm
    assert tied_names(net) == {
        "mlp.fc1.weight": ["mlp.fc1.weight", "fc.weight"],
        "norm.weight": ["norm.weight", "again.weight"],
        "norm.bias": ["norm.bias", "again.bias"],
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.table.weight
        self.last = nn.Linear(5, 5)


def test_embeddings() -> None:
    assert list(select(Tied(), "all-linear", "embedding")) == ["body", "last"]
    # the first layer is the table, so no linear layer is the first one
    assert list(select(Tied(), "all-linear", "first")) == ["body", "out", "last"]
    assert list(select(Tied(), [nn.Embedding, nn.Linear], "first")) == ["body", "out", "last"]


def test_head_of_a_declared_classifier() -> None:
    class Declared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Dropout())
            self.projector = nn.Linear(2, 2)

    assert list(select(Declared(), "all-linear", "head")) == ["classifier.0", "projector"]


def test_timm_models() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_efficientnet", num_classes=3)
    everything = select(Module(net), "all-weights")
    rest = select(Module(net), "all-weights", ["first", "head", "depthwise"])
    gone = [name for name in everything if name not in rest]
    assert "model.conv_stem" in gone
    assert "model.classifier" in gone
    depthwise = [n for n in gone if n not in ("model.conv_stem", "model.classifier")]
    assert depthwise
    assert all(everything[n].groups > 1 for n in depthwise)
    assert all(m.kernel_size == (1, 1) and m.groups == 1 for m in select(net, "pointwise").values())
    # declared but empty: the user's own head counts
    module = Module(timm.create_model("test_efficientnet", num_classes=0))
    module.head = nn.Linear(2, 2)
    assert "head" not in select(module, "all-weights", "head")
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=12)
    left = select(distilled, "all-linear", "head")
    assert "head" not in left
    assert "head_dist" not in left


def test_timm_groups() -> None:
    timm = pytest.importorskip("timm")
    from timm.models import group_modules

    net = timm.create_model("test_vit", num_classes=3)
    module = Module(net)
    parametrize.register_parametrization(net.blocks[1].mlp.fc1, "weight", Identity())
    groups = group_modules(net, net.group_matcher())
    last = max(groups)
    expected = {f"model.{name}" for group in (1, 2) for name in groups[group] if "parametrizations" not in name}
    assert set(select(module, "group:1-2")) == expected
    assert "model.blocks.1.mlp.fc1" in expected
    assert list(select(module, "all-weights", f"group:1-{last}")) == ["model.patch_embed.proj"]
    assert "model.head" in select(module, f"group:{last}")
    for wrong in (f"group:{last + 1}", f"group:0-{last + 1}", "group:2-1"):
        with pytest.raises(MisconfigurationException, match=f"groups 0 to {last}"):
            select(module, wrong)


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=7, n_embd=4, n_layer=1, n_head=1))
    projections = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(select(gpt2, "all-linear")) == [*projections, "lm_head"]
    assert list(select(gpt2, "all-linear", "head")) == projections
    assert list(select(gpt2, "all-linear", "embedding")) == projections
    assert list(select(gpt2, "type:Conv1D")) == projections
    assert list(select(gpt2, "all-linear", "first")) == [*projections, "lm_head"]
    parametrize.register_parametrization(gpt2.transformer.h[0].mlp.c_fc, "weight", Identity())
    assert list(select(gpt2, "all-linear", "head")) == projections
    assert tied_names(gpt2) == {"transformer.wte.weight": ["transformer.wte.weight", "lm_head.weight"]}
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    bert = Module(transformers.BertForSequenceClassification(config))
    linear = select(bert, "all-linear")
    assert [name for name in linear if name not in select(bert, "all-linear", "head")] == ["model.classifier"]
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**config.to_diff_dict()))
    assert "classifier.dense" in select(roberta, "all-linear", "head")
    assert "classifier.out_proj" not in select(roberta, "all-linear", "head")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 1000)], ["0", "1"]),
        ([nn.Conv2d(3, 8, 16, 16), nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 10)], ["1", "2", "3"]),
        ([nn.Linear(4, 4), nn.Linear(4, 2)], ["0", "1"]),
    ],
    ids=["convolutional", "transformer", "linear"],
)
def test_auto_is_the_kind_of_layer_that_holds_most_weights(layers: list[nn.Module], expected: list[str]) -> None:
    assert list(select(nn.Sequential(*layers), "auto")) == expected


def test_the_head_of_a_copy_beside_the_network_is_a_head_too() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    module = nn.ModuleDict({"net": network(), "target": network()})
    assert list(select(module, "all-linear", "head")) == ["net.0", "target.0"]
    module = nn.ModuleDict({"encoder": network(), "head": nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2))})
    assert list(select(module, "all-linear", "head")) == ["encoder.0", "encoder.2", "head.0"]
