"""Networks that skip: they give what masking gives, in every way, execute less, and stand on their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import FTWT
from lightning_peft.network.channel_units import channel_units
from lightning_peft.testing.modules import Plain
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.pruning._ftwt.skipping.build import build, lay_out
from lightning_peft_plugins.pruning._ftwt.skipping.deploy import Deployed, deploy
from lightning_peft_plugins.pruning._ftwt.skipping.fold import fold_norms
from lightning_peft_plugins.pruning._ftwt.skipping.layers import SelectiveLayer
from lightning_peft_plugins.pruning._ftwt.skipping.native import kernels
from lightning_peft_plugins.pruning._ftwt.skipping.predictor import ChannelPredictor, channel_means, chosen


class Mobile(nn.Module):
    """An expansion, a depthwise filter, a projection, a residual; then a plain convolution, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.expand, self.norm1 = nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128)
        self.filter, self.norm2 = nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False), nn.BatchNorm2d(128)
        self.project, self.norm3 = nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.last, self.act = nn.Conv2d(64, 80, 3, padding=1, stride=2), nn.SiLU(inplace=True)
        self.hidden, self.head = nn.Linear(80 * 4, 32), nn.Linear(32, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(inputs)))
        y = F.relu6(self.norm2(self.filter(F.relu6(self.norm1(self.expand(x))))))
        x = x + self.norm3(self.project(y))
        x = F.max_pool2d(self.act(self.last(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def network(kind: type[nn.Module] = Mobile) -> nn.Module:
    torch.manual_seed(0)
    net = kind().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.5)
    return net


def predictors(net: nn.Module, share: float = 0.4) -> dict[str, ChannelPredictor]:
    """Trained ones choose a share of the channels that differs from input to input; so do these."""
    found = {}
    for unit in channel_units(net):
        weight: Tensor = net.get_submodule(unit.producer).weight  # type: ignore[assignment]
        predictor = ChannelPredictor(weight.shape[1], unit.channels, "standard")
        with torch.no_grad():
            predictor.weight.normal_()
            predictor.bias.normal_()
            predictor.bias.sub_(predictor.bias.quantile(1 - share))
        found[unit.producer] = predictor
    return found


def masked(net: nn.Module, inputs: Tensor, gates: dict[str, ChannelPredictor]) -> Tensor:
    """What the network gives when channels are set to zero at their gates, in plain hooks."""
    logits: dict[str, Tensor] = {}
    handles = []
    for unit in channel_units(net):
        producer = net.get_submodule(unit.producer)
        convolution = isinstance(producer, nn.Conv2d)

        def look(layer: Any, args: Any, name: str = unit.producer, convolution: bool = convolution) -> None:
            logits[name] = gates[name](channel_means(args[0], convolution=convolution, tokens=False))

        def cut(layer: Any, args: Any, output: Tensor, name: str = unit.producer) -> Tensor:
            mask = chosen(logits[name])
            return output * mask.view(*mask.shape, *[1] * (output.ndim - 2))

        handles.append(producer.register_forward_pre_hook(look))
        handles.append(net.get_submodule(unit.gate).register_forward_hook(cut))
    result: Tensor = net(inputs)
    for handle in handles:
        handle.remove()
    return result


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, dict[str, ChannelPredictor], Tensor, Deployed]:
    net = network()
    gates, inputs = predictors(net), torch.randn(6, 3, 8, 8)
    return net, gates, inputs, deploy(net, channel_units(net), gates, inputs)


@torch.no_grad()
def test_skipping_is_masking(case: Any) -> None:
    net, gates, inputs, deployed = case
    assert not deployed.masked
    for sample in inputs.split(1):
        torch.testing.assert_close(deployed.network(sample), masked(net, sample, gates), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deployed.network(inputs), masked(net, inputs, gates), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deployed.dense(inputs), net(inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_less_is_executed_and_the_report_says_so(case: Any) -> None:
    net, gates, inputs, _ = case
    deployed = deploy(net, channel_units(net), gates, inputs, calibrate=False)
    assert 0.1 < deployed.flops < 0.6
    assert f"{deployed.flops:.1%} of the dense operations" in str(deployed)
    assert deployed.times.low <= deployed.speedup <= deployed.times.high


@torch.no_grad()
def test_every_way_gives_the_same(case: Any) -> None:
    net, gates, inputs, _ = case
    dense = network()
    fold_norms(dense, channel_units(net))
    skipping = build(dense, channel_units(net), gates, [], False)
    expected = masked(net, inputs[:1], gates)
    ways = 0
    for layer in [layer for layer in skipping.modules() if isinstance(layer, SelectiveLayer)]:
        for way in layer.ways():
            layer.way = way
            torch.testing.assert_close(skipping(inputs[:1]), expected, rtol=1e-4, atol=1e-4)
            ways += 1
    assert ways == (26 if kernels() else 24)


@torch.no_grad()
def test_loaded_weights_are_computed_with(case: Any) -> None:
    net, gates, inputs, _ = case
    dense = network()
    fold_norms(dense, channel_units(net))
    other = network()
    fold_norms(other, channel_units(net))
    for parameter in other.parameters():
        parameter.add_(1.0)
    loaded = build(other, channel_units(net), predictors(net, 0.9), [], False)
    lay_out(loaded, channels_last=True)
    for layer in [layer for layer in loaded.modules() if isinstance(layer, SelectiveLayer)]:
        layer.settle(list(layer.ways())[-1])  # where there are kernels, theirs
    expected = masked(net, inputs[:1], gates)
    assert (loaded(inputs[:1]) - expected).abs().max() > 1.0
    loaded.load_state_dict(build(dense, channel_units(net), gates, [], False).state_dict())
    torch.testing.assert_close(loaded(inputs[:1]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_deployed_network_stands_on_its_own(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 2, 1)
    )
    inputs = torch.randn(3, 3, 8, 8)
    skipping = deploy(net.eval(), channel_units(net), predictors(net), inputs).network
    torch.save(skipping, tmp_path / "net.pt")
    torch.save((inputs[:1], skipping(inputs[:1])), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "net = torch.load('net.pt', weights_only=False)\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(net(inputs), expected)\n"
        "training = ('lightning_peft_plugins.pruning.ftwt', 'lightning_peft.method', 'lightning_peft.attaching.hub')\n"
        "assert not [name for name in sys.modules if name.startswith(training)]\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


@torch.no_grad()
def test_what_does_not_pay_can_be_dropped(case: Any) -> None:
    net, gates, inputs, _ = case
    units = channel_units(net)
    deployed = deploy(net, units, gates, inputs, exact=False)
    kept = {unit.producer for unit in units} - set(deployed.dropped) - set(deployed.fixed)
    predicting = {
        name.split(".")[0]
        for name, layer in deployed.network.named_modules()
        if isinstance(layer, SelectiveLayer) and layer.predictor is not None
    }
    assert predicting == kept


@torch.no_grad()
def test_what_never_changes_is_settled_for_good(case: Any) -> None:
    """Predictors that say the same to every input leave an ordinary smaller layer; the units around it go on as before."""
    net, _, inputs, _ = case
    gates, units = predictors(net), channel_units(net)
    for name in ("expand", "last", "hidden"):
        nn.init.zeros_(gates[name].weight)
    assert {"expand", "last", "hidden"} <= set(deploy(net, units, gates, inputs, exact=False, calibrate=False).fixed)
    for name in ("expand", "last", "hidden"):
        dense = network()
        fold_norms(dense, units)
        kept = (gates[name].bias > 0).nonzero().flatten()
        skipping = build(dense, units, gates, [], False, {name: kept})
        for sample in (inputs[:1], inputs):
            torch.testing.assert_close(skipping(sample), masked(net, sample, gates), rtol=1e-4, atol=1e-4)
        layer: Any = skipping.get_submodule(name)
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        assert layer.predictor is None
        assert len(layer.weight) == len(kept) < len(net.get_submodule(name).weight)  # type: ignore[arg-type]


class Stubborn(Mobile):
    """Reads the number of channels on its way."""

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(inputs)))
        y = F.relu6(self.norm1(self.expand(x)))
        y = F.relu6(self.norm2(self.filter(y)))
        self.check(y)
        x = x + self.norm3(self.project(y))
        x = F.max_pool2d(self.act(self.last(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))

    def check(self, hidden: Tensor) -> None:
        if not isinstance(hidden, torch.fx.Proxy) and hidden.shape[1] != 128:
            raise ValueError("expected 128 channels")


@torch.no_grad()
def test_units_that_need_all_channels_are_masked() -> None:
    net = network(Stubborn)
    gates, inputs = predictors(net), torch.randn(3, 3, 8, 8)
    deployed = deploy(net, channel_units(net), gates, inputs, calibrate=False)
    assert list(deployed.masked) == ["expand"]
    assert "expected 128 channels" in deployed.masked["expand"]
    torch.testing.assert_close(deployed.network(inputs[:1]), masked(net, inputs[:1], gates), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_timm_networks_skip(name: str) -> None:
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=3, **size).eval()
    units = [unit for unit in channel_units(net) if unit.activated]
    all_gates = predictors(net)
    inputs = torch.randn(2, 3, 32, 32)
    deployed = deploy(net, units, {unit.producer: all_gates[unit.producer] for unit in units}, inputs, calibrate=False)
    assert not deployed.masked
    assert deployed.flops < 0.8


class PictureNet(Plain):
    def build(self) -> None:
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten(), nn.Linear(512, 3))


def trained(**settings: Any) -> tuple[FTWT, Any]:
    method = FTWT(0.4, normalise="standard", strength=0.2, **settings)
    return method, fit([method], style=PictureNet, max_epochs=8)


@torch.no_grad()
def test_from_training_to_skipping(tmp_path: Path) -> None:
    method, run = trained()
    inputs = torch.randn(5, 16)
    deployed = method.deploy(run.module, inputs)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = PictureNet()
    other.load_state_dict(run.module.state_dict())
    again = FTWT(0.4).deploy(other, inputs, checkpoint=tmp_path / "last.ckpt", calibrate=False)
    assert again.flops < 1.0  # calibrated by the clock, so small a network may compute everything
    # What the Trainer evaluates with the method in it is the masked network.
    evaluated = torch.cat(run.trainer.predict(run.module, torch.utils.data.DataLoader([(x, 0) for x in inputs], 5)))
    for net in (deployed.network, again.network):
        torch.testing.assert_close(torch.cat([net(sample) for sample in inputs.split(1)]), evaluated, rtol=1e-4, atol=1e-4)
    assert (run.module.model(inputs) - evaluated).abs().max() > 1e-3


class TiedNet(Plain):
    def build(self) -> None:
        first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        second.weight = first.weight
        layers = [nn.Conv2d(1, 8, 1), nn.ReLU(), first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU()]
        self.model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten(), nn.Linear(128, 3))


@torch.no_grad()
def test_convolutions_that_share_a_weight_have_gates_and_norms_of_their_own() -> None:
    method = FTWT(0.5, normalise="standard", strength=0.2)
    run = fit([method], style=TiedNet, max_epochs=6)
    inputs = torch.randn(5, 16)
    skipping = method.deploy(run.module, inputs, calibrate=False).network
    evaluated = torch.cat(run.trainer.predict(run.module, torch.utils.data.DataLoader([(x, 0) for x in inputs], 5)))
    torch.testing.assert_close(torch.cat([skipping(sample) for sample in inputs.split(1)]), evaluated, rtol=1e-4, atol=1e-4)
    assert (run.module.model(inputs) - evaluated).abs().max() > 1e-3


def test_deploying_what_was_not_trained_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"no trained predictor of model\.1, model\.4"):
        FTWT().deploy(PictureNet(), torch.randn(1, 16))
    method, run = trained()
    with pytest.raises(MisconfigurationException, match="at least one real input"):
        method.deploy(run.module, torch.randn(0, 16))
    with torch.no_grad():
        run.module.model[1].weight.add_(1.0)
    with pytest.raises(MisconfigurationException, match="before its weights change again"):
        method.deploy(run.module, torch.randn(1, 16))


def test_transposed_linear_layers_skip_as_ordinary_ones_do() -> None:
    transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D
    ordinary = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3))
    twin = nn.Sequential(transposed(32, 16), nn.GELU(), transposed(3, 32))
    for place in (0, 2):
        twin[place].weight.data, twin[place].bias.data = (
            ordinary[place].weight.data.T.clone(),
            ordinary[place].bias.data.clone(),
        )
    assert str(channel_units(twin)) == str(channel_units(ordinary))
    inputs, gates = torch.randn(4, 6, 16), predictors(ordinary)
    found = [deploy(net, channel_units(net), gates, inputs, tokens=True, calibrate=False) for net in (ordinary, twin)]
    assert torch.equal(found[0].network(inputs), found[1].network(inputs))
    assert found[0].flops == found[1].flops
    assert not found[1].masked
    assert isinstance(twin[0], transposed), "the network itself stays as it is"


class TwoArguments(nn.Module):
    """Needs more than its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, images: Tensor, scale: Tensor) -> Tensor:
        return (self.body(images) * scale.view(-1, 1, 1, 1)).mean((2, 3))


class Scaled(Plain):
    def build(self) -> None:
        self.model = nn.Module()
        self.model.inner = TwoArguments()
        self.model.forward = self.one  # type: ignore[method-assign]

    def one(self, inputs: Tensor) -> Tensor:
        return self.model.inner(inputs.view(-1, 1, 4, 4).expand(-1, 3, -1, -1), inputs[:, 0])


def test_a_network_of_several_arguments_is_refused_with_a_cure_that_works() -> None:
    inputs = torch.randn(2, 16)
    inner = FTWT(0.5, cooldown=None, network="model.inner")
    module = fit([inner], style=Scaled).module
    with pytest.raises(
        MisconfigurationException, match=r"TwoArguments with inputs alone.*missing 1 required.*one that needs one"
    ):
        inner.deploy(module, torch.randn(2, 3, 4, 4), calibrate=False)
    outer = FTWT(0.5, cooldown=None, network="model")
    module = fit([outer], style=Scaled).module
    found = outer.deploy(module, inputs, calibrate=False)
    assert found.network(inputs).shape == (2, 3)
