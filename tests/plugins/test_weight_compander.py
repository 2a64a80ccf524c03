from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.func import functional_call, grad, vmap

import lightning_peft
from lightning_peft.testing import Plain, loader
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.runs import assert_same, fit
from lightning_peft.testing.toys import ToyThreshold
from lightning_peft.weights.maps import attach_map, mapped_tensors, set_plain_values
from lightning_peft_plugins.regularizers._weight_compander.maps import FLOOR, CompanderMap, FittedCompanderMap
from lightning_peft_plugins.regularizers.functional.compander import (
    PUBLISHED,
    compand,
    compand_inverse,
    compander_scales,
    weight_decay_gradient,
)
from lightning_peft_plugins.regularizers.weight_compander import WeightCompander

scales = st.floats(0.05, 20.0)


def attached(module: nn.Module, *names: str, **options: float) -> nn.Module:
    for name in names or [name for name, _ in module.named_parameters() if name.endswith("weight")]:
        attach_map(module, name, FittedCompanderMap(**options))
    return module


class TestFunction:
    @given(a=scales, b=scales)
    def test_shape_of_the_curve(self, a: float, b: float) -> None:
        v = torch.linspace(-50, 50, 1001, dtype=torch.float64)
        w = compand(v, a, b)
        assert torch.equal(compand(-v, a, b), -w), "odd"
        assert (w.diff() > 0).all(), "monotone"
        assert w.abs().max() < a * math.pi / 2, "bounded"
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(compand(zero, a, b), zero)
        assert slope.item() == pytest.approx(a / b)

    @given(a=scales, b=scales)
    def test_inverse(self, a: float, b: float) -> None:
        v = torch.linspace(-5, 5, 101, dtype=torch.float64)
        assert torch.allclose(compand_inverse(compand(v, a, b), a, b), v, rtol=1e-9)

    @given(k=st.floats(1.0, 1e3))
    def test_large_equal_scales_are_the_identity(self, k: float) -> None:
        v = torch.linspace(-1, 1, 101, dtype=torch.float64)
        error = (compand(v, k, k) - v).abs()
        assert (error <= v.abs() ** 3 / (3 * k * k) + 1e-15).all()

    def test_gradients(self) -> None:
        v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.4))
        assert torch.autograd.gradcheck(compand, (v, a, b))
        assert torch.autograd.gradgradcheck(compand, (v, a, b))

    @pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradient_of_one_input_alone(self, wanted: tuple[bool, ...]) -> None:
        values = [torch.randn(3, 4).double(), torch.tensor(0.7).double(), torch.tensor(0.4).double()]
        inputs = [value.clone().requires_grad_(want) for value, want in zip(values, wanted, strict=True)]
        compand(*inputs).sum().backward()
        plain = [value.clone().requires_grad_(want) for value, want in zip(values, wanted, strict=True)]
        (plain[1] * torch.atan(plain[0] / plain[2])).sum().backward()
        for ours, theirs, want in zip(inputs, plain, wanted, strict=True):
            assert (ours.grad is not None) == want
            assert not want or torch.allclose(ours.grad, theirs.grad)

    @pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last"])
    def test_memory_layouts(self, layout: str) -> None:
        v = torch.randn(4, 6, 2, 2)
        v = {"strided": v, "transposed": v.transpose(0, 1), "channels_last": v.to(memory_format=torch.channels_last)}[layout]
        v, a, b = v.requires_grad_(), torch.tensor(0.7, requires_grad=True), torch.tensor(0.4, requires_grad=True)
        weight = torch.randn(v.shape)
        ours = torch.autograd.grad((compand(v, a, b) * weight).sum(), (v, a, b))
        plain = torch.autograd.grad((a * torch.atan(v / b) * weight).sum(), (v, a, b))
        for left, right in zip(ours, plain, strict=True):
            assert torch.allclose(left, right, atol=1e-5)

    def test_inverse_refuses_what_lies_beyond_the_bound(self) -> None:
        for value in (1.6, math.nan):
            with pytest.raises(ValueError, match="bound"):
                compand_inverse(torch.tensor([value]), 1.0, 1.0)


class TestMap:
    @pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
    @pytest.mark.parametrize("options", [{}, {"headroom": 1.01}, {"headroom": 50.0}, {"slope": 0.1}, {"slope": 10.0}])
    def test_function_is_preserved(self, scale: float, options: dict[str, float]) -> None:
        layer = nn.Linear(64, 32)
        plain = layer.weight.detach() * scale
        layer.weight.data.copy_(plain)
        attached(layer, **options)
        assert (layer.weight - plain).abs().max() <= 1e-6 * plain.abs().max()
        assert layer.weight.abs().max() < layer.weight_maps["weight"].maps[0].log_a.exp() * math.pi / 2

    @pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
    def test_constant_weights(self, value: float) -> None:
        layer = nn.Linear(4, 3)
        nn.init.constant_(layer.weight, value)
        attached(layer)
        assert torch.allclose(layer.weight, torch.full((3, 4), value), rtol=1e-6, atol=0)
        layer(torch.randn(2, 4)).sum().backward()
        assert layer._parameters["weight"].grad.abs().min() > 0, "zero weights can still learn"

    def test_documented_defaults(self) -> None:
        weight = torch.randn(8, 8)
        log_a, log_b = compander_scales(weight)
        bound = math.exp(log_a) * math.pi / 2
        assert 2.0 <= bound / weight.abs().max() <= 2.0 * math.exp(1 / 16)
        assert log_a == log_b, "slope 1 at zero"
        assert compander_scales(weight, slope=4.0)[1] == pytest.approx(log_a - math.log(4.0), abs=1 / 32)
        assert compander_scales(torch.zeros(8, 16)) == compander_scales(torch.full((8, 16), 0.25)), "1/sqrt(fan_in)"

    def test_assigned_weights_are_kept_whatever_their_size(self) -> None:
        layer = attached(nn.Linear(4, 3))
        big = 100 * torch.randn(3, 4)
        set_plain_values(layer, {"weight": big})
        assert torch.allclose(layer.weight, big, rtol=1e-6)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
    def test_half_precision(self, dtype: torch.dtype, tolerance: float) -> None:
        layer = nn.Linear(64, 32)
        plain = layer.weight.detach().clone()
        attached(layer)
        log_a = layer.weight_maps["weight"].maps[0].log_a.item()
        layer.to(dtype)
        assert layer.weight_maps["weight"].maps[0].log_a.item() == log_a, "scales survive the conversion exactly"
        assert layer.weight.dtype == dtype
        assert ((layer.weight - plain).abs() <= tolerance * plain.abs() + 1e-6).all()
        inputs = torch.randn(2, 64, dtype=dtype)
        layer(inputs).float().sum().backward()
        found = [parameter.grad.float() for parameter in layer.parameters()]
        layer.float().zero_grad()
        layer(inputs.float()).sum().backward()
        for rough, parameter in zip(found, layer.parameters(), strict=True):
            assert (rough - parameter.grad).norm() <= 4 * tolerance * parameter.grad.norm()

    def test_double_precision(self) -> None:
        layer = nn.Linear(16, 8).double()
        plain = layer.weight.detach().clone()
        assert torch.allclose(attached(layer).weight, plain, rtol=1e-13)

    @pytest.mark.parametrize("learnable", [True, False])
    def test_compiles_without_graph_breaks(self, learnable: bool) -> None:
        net = attached(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), learnable=learnable)
        twin, inputs = copy.deepcopy(net), torch.randn(4, 16)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        net(inputs).square().sum().backward()
        compiled(inputs).square().sum().backward()
        for left, right in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(left.grad, right.grad, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.allclose(compiled(inputs), net(inputs), atol=1e-2)
        torch._dynamo.reset()

    def test_per_sample_gradients(self) -> None:
        net, inputs = attached(nn.Sequential(nn.Linear(16, 3))), torch.randn(5, 16)
        parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

        def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            return functional_call(net, parameters, (sample[None],)).square().sum()

        each = vmap(grad(loss), (None, 0))(parameters, inputs)
        net(inputs).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert torch.allclose(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)

    def test_config_rebuilds_it(self) -> None:
        config = FittedCompanderMap(3.0, 2.0, learnable=False).config()
        assert config == {"headroom": 3.0, "slope": 2.0, "learnable": False}
        assert FittedCompanderMap(**config).config() == config
        config = CompanderMap(0.7, 0.8, learnable=False).config()
        assert config == {"a": 0.7, "b": 0.8, "learnable": False}
        assert CompanderMap(**config).config() == config

    @pytest.mark.parametrize("options", [{"headroom": 1.0}, {"headroom": "2"}, {"slope": 0.0}, {"slope": math.nan}])
    def test_impossible_options(self, options: dict[str, float]) -> None:
        with pytest.raises(MisconfigurationException, match=next(iter(options))):
            WeightCompander(init="fitted", **options)


class TestPublishedMap:
    @pytest.mark.parametrize("learnable", [True, False])
    @pytest.mark.parametrize("preset", ["resnet18/cifar10", "vgg19/cifar10"])
    def test_it_is_the_formula_of_the_paper(self, preset: str, learnable: bool) -> None:
        a, b = PUBLISHED[preset]
        layer = nn.Linear(64, 32).double()
        plain = layer.weight.detach().clone()
        attach_map(layer, "weight", CompanderMap(a, b, learnable))
        tolerance = 1e-6 if learnable else 1e-14  # learned scales are stored in single precision
        assert torch.allclose(layer._parameters["weight"], b * torch.tan(plain / a), rtol=tolerance)
        assert torch.allclose(layer.weight, plain, rtol=1e-12)
        assert len(list(layer.parameters())) == (4 if learnable else 2)

    @pytest.mark.parametrize("scale", [0.78, 0.79, 30.0, 1e6])
    def test_a_layer_beyond_the_bound_begins_with_a_wider_one_and_the_same_slope(self, scale: float) -> None:
        layer, compander = nn.Linear(8, 4), CompanderMap()
        plain = torch.linspace(-scale, scale, 32).view(4, 8)
        layer.weight.data.copy_(plain)
        attach_map(layer, "weight", compander)
        assert compander.widened == (scale > 0.5 * math.pi / 2)
        assert (layer.weight - plain).abs().max() <= 2e-6 * scale
        assert (compander.b / compander.a).item() == pytest.approx(2.0)
        if compander.widened:
            assert compander.a.item() * math.pi / 2 == pytest.approx(2 * scale)

    def test_half_precision(self) -> None:
        layer = nn.Linear(64, 32)
        plain = layer.weight.detach().clone()
        attach_map(layer, "weight", CompanderMap())
        layer.to(torch.bfloat16)
        assert ((layer.weight - plain).abs() <= 2**-7 * plain.abs() + 1e-6).all()

    def test_gradient_of_the_decay(self) -> None:
        v = torch.randn(5, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(0.3 / 2 * (0.7 * torch.atan(v / 0.4)).square().sum(), v)
        assert torch.allclose(weight_decay_gradient(v.detach(), 0.7, 0.4, 0.3), expected)


class DecayedSGD(Plain):
    decay = 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, weight_decay=self.decay)


class TestPublishedTraining:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("clip", [None, 0.5])
    def test_fixed_scales_decay_the_weights(self, accumulate: int, clip: float | None) -> None:
        torch.manual_seed(0)
        module = DecayedSGD()
        a, b = PUBLISHED["resnet18/cifar10"]
        weights = [p for p in module.parameters() if p.ndim > 1]
        biases = [p for p in module.parameters() if p.ndim == 1]
        stored = [(b * torch.tan(w.detach() / a)).requires_grad_() for w in weights]
        groups = [{"params": stored, "weight_decay": 0.0}, {"params": biases, "weight_decay": module.decay}]
        optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
        names = [name for name, p in module.named_parameters() if p.ndim > 1]
        for number, (inputs, labels) in enumerate(list(loader()) * 3, 1):
            values = {name: a * torch.atan(v / b) for name, v in zip(names, stored, strict=True)}
            logits = functional_call(module, values, (inputs,))
            (nn.functional.cross_entropy(logits, labels) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_([*stored, *biases], clip)
                # The decay of the paper, on w, where SGD adds its own: after clipping, once a step.
                penalty = module.decay / 2 * sum((a * torch.atan(v / b)).square().sum() for v in stored)
                for v, gradient in zip(stored, torch.autograd.grad(penalty, stored), strict=True):
                    v.grad += gradient
                optimizer.step()
                optimizer.zero_grad()
        method = WeightCompander(preset="resnet18/cifar10")
        settings = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate, "max_epochs": 3}
        run = fit([method], style=DecayedSGD, **settings)
        for name, v in zip(names, stored, strict=True):
            expected = (a * torch.atan(v / b)).detach()
            assert torch.allclose(run.module.get_parameter(name), expected, atol=1e-5), name
        undecayed = type("Undecayed", (DecayedSGD,), {"decay": 0.0})
        other = fit([WeightCompander(preset="resnet18/cifar10")], style=undecayed, **settings)
        assert not torch.allclose(other.module.get_parameter(name), expected, atol=1e-3)

    def test_decay_that_is_a_step_of_its_own_is_warned_of(self) -> None:
        with pytest.warns(UserWarning, match="weight decay of AdamW is a step of its own"):
            fit([WeightCompander(learnable=False)], style=Decayed)

    def test_weights_beyond_the_bound_are_told_of_and_each_advice_helps(self) -> None:
        def beyond() -> Plain:
            torch.manual_seed(0)
            module = Plain()
            with torch.no_grad():
                module.model[2].weight.mul_(10)
            return module

        with pytest.warns(UserWarning, match=r"1 of 3 layers .* bound 0\.785 of a=0\.5 .*model\.2\.weight with 3\.18"):
            fit([WeightCompander()], module=beyond())
        with pytest.raises(MisconfigurationException, match=r"model\.2\.weight .*give a= above 1\.59"):
            fit([WeightCompander(learnable=False)], module=beyond())
        for cure in ({"a": 1.6, "learnable": False}, {"init": "fitted"}, {"exclude": "model.2", "learnable": False}):
            fit([WeightCompander(**cure)], module=beyond())

    def test_learned_scales_stay_positive(self) -> None:
        class Greedy(Plain):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=50.0)

        seen: list[float] = []

        class Follow(WeightCompander):
            def after_step(self, run) -> None:
                super().after_step(run)
                maps = [m for mapped in mapped_tensors(run.module) for m in mapped.maps]
                seen.append(min(scale.item() for m in maps for scale in m.parameters()))

        fit([Follow()], style=Greedy)
        assert min(seen) == pytest.approx(FLOOR)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"headroom": 3.0}, 'add init="fitted"'),
            ({"init": "fitted", "a": 0.5}, "leave out a="),
            ({"preset": "resnet18/cifar10", "b": 0.5}, "leave out either"),
            ({"preset": "resnet18/cifar"}, "Did you mean resnet18/cifar10"),
            ({"a": 0.0}, "a=0.0 must be positive"),
        ],
    )
    def test_arguments_that_contradict_one_another(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            WeightCompander(**options)


class Look(Callback):
    """Notes how the scales are trained."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        maps = [m for mapped in mapped_tensors(pl_module) for m in mapped.maps if isinstance(m, CompanderMap)]
        ids = {id(parameter) for weight_map in maps for parameter in weight_map.parameters()}
        self.groups = [
            (group["weight_decay"], group["lr"], sum(id(p) in ids for p in group["params"]), len(group["params"]))
            for group in trainer.optimizers[0].param_groups
        ]
        self.scales = torch.tensor([[torch.as_tensor(scale).item() for scale in m.scales(torch.float32)] for m in maps])


class Decayed(Plain):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class TestTraining:
    def test_output_is_unchanged_at_attachment(self) -> None:
        torch.manual_seed(0)
        module, inputs = Plain(), torch.randn(4, 16)
        before = module(inputs).detach()
        seen = []

        class First(Callback):
            def on_train_start(self, trainer, pl_module):
                seen.append(pl_module(inputs).detach())
                assert [type(m) for mapped in mapped_tensors(pl_module) for m in mapped.maps] == [CompanderMap] * 3

        fit([WeightCompander()], module=module, after=[First()])
        assert torch.allclose(seen[0], before, rtol=1e-5, atol=1e-6)

    def test_scales_have_no_weight_decay_and_follow_the_scheduler(self) -> None:
        look = Look()
        run = fit([WeightCompander()], style=Decayed, after=[look])
        decayed, free = look.groups
        assert decayed[0] == 0.1, "weight decay stays on the stored values"
        assert decayed[2] == 0
        assert free[0] == 0.0
        assert free[2] == free[3] == 6
        assert decayed[1] == free[1] == pytest.approx(0.02 * 0.5**4), "both groups follow the scheduler"
        assert run.trainer.global_step == 4

    @pytest.mark.parametrize("learnable", [True, False])
    def test_learnable(self, learnable: bool) -> None:
        look, start = Look(), Look()
        fit([WeightCompander(learnable=learnable)], after=[start], max_steps=1)
        fit([WeightCompander(learnable=learnable)], after=[look], max_epochs=2)
        assert torch.equal(look.scales, start.scales) != learnable

    def test_frozen_layers_keep_their_function(self) -> None:
        module = Plain()
        module.model[0].requires_grad_(False)
        before = module.model[0].weight.detach().clone()
        fit([WeightCompander()], module=module)
        assert torch.allclose(module.model[0].weight, before, rtol=1e-6)

    def test_resumes_bit_exactly_under_a_scheduler(self, tmp_path) -> None:
        whole = fit([WeightCompander()], style=Decayed, after=[every_epoch(tmp_path)], max_epochs=3)
        resumed = fit([WeightCompander()], style=Decayed, seed=9, resume=tmp_path / "epoch=0.ckpt", max_epochs=3)
        assert_same(whole, resumed, "uninterrupted against resumed")

    def test_bake_is_the_live_function_and_bounded(self) -> None:
        run = fit([WeightCompander()], max_epochs=2)
        assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in run.module.model)
        probe: list[torch.Tensor] = []

        class Live(Callback):
            def on_train_end(self, trainer, pl_module):
                probe.append(pl_module(inputs).detach())
                probe.append(lightning_peft.bake(copy.deepcopy(pl_module))(inputs).detach())

        inputs = torch.randn(4, 16)
        run = fit([WeightCompander()], after=[Live()], max_epochs=2)
        assert torch.equal(probe[0], probe[1])
        assert torch.equal(probe[0], run.module(inputs))

    def test_loads_plain_weights_larger_than_its_bound(self, tmp_path) -> None:
        plain = fit([], max_epochs=1)
        with torch.no_grad():
            for parameter in plain.module.parameters():
                parameter.mul_(30)
        plain.trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
        seen = []

        class First(Callback):
            def on_test_start(self, trainer, pl_module):
                seen.append({mapped.name: mapped.layer.weight.clone() for mapped in mapped_tensors(pl_module)})

        module = Plain()
        runner = lightning_peft.testing.trainer(callbacks=[WeightCompander(), First()])
        runner.test(module, loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True, verbose=False)
        for name, weight in seen[0].items():
            assert torch.allclose(weight, plain.module.get_parameter(name), rtol=1e-6)

    def test_composes_with_a_mask(self, tmp_path) -> None:
        def methods() -> list:
            return [ToyThreshold(), WeightCompander()]

        whole = fit(methods(), after=[every_epoch(tmp_path)], max_epochs=2)
        assert_same(whole, fit(methods()[::-1], max_epochs=2), "order of the callbacks")
        assert_same(whole, fit(methods(), seed=3, resume=tmp_path / "epoch=0.ckpt", max_epochs=2), "resumed")
        for layer in (0, 2, 4):
            weight = whole.module.model[layer].weight
            assert (weight == 0).any(), "the mask is applied last"

    def test_metrics(self) -> None:
        run = fit([WeightCompander()], log_every_n_steps=1)
        logged = run.trainer.logged_metrics
        assert logged["peft/weight_compander/a"] > 0
        assert logged["peft/weight_compander/b"] > 0

    def test_embeddings_and_norms_are_left_alone(self) -> None:
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 2, 1))
        assert list(WeightCompander().claims(net)) == ["1.weight", "3.weight"]

    @pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
    def test_weights_without_a_stored_value(self, value: float) -> None:
        module = Plain()
        with torch.no_grad():
            module.model[2].weight[0, 0] = value
        before = [type(layer) for layer in module.model]
        with pytest.raises(MisconfigurationException, match=r"model\.2\.weight .*exclude 'model\.2'"):
            fit([WeightCompander()], module=module)
        assert [type(layer) for layer in module.model] == before


class Finetuned(Plain):
    """Trains its head first, in the way ``BackboneFinetuning`` asks for."""

    def build(self) -> None:
        super().build()
        self.backbone = self.model[:2]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def test_scales_of_a_backbone_begin_to_train_when_it_does() -> None:
    trained: dict[int, set[str]] = {}
    values: list[float] = []

    class Follow(WeightCompander):
        def after_step(self, run) -> None:
            names = {parameter: name for name, parameter in run.module.named_parameters()}
            held = {names[p] for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
            trained[run.epoch] = {name for name in held if name.endswith(".0.a")}
            values.append(dict(run.module.named_parameters())[scale].item())
            super().after_step(run)

    method = Follow()
    scale = "model.0.parametrizations.weight.0.a"
    run = fit([method], after=[BackboneFinetuning(unfreeze_backbone_at_epoch=1)], style=Finetuned, max_epochs=2)
    assert scale not in trained[0]
    assert scale in trained[1]
    assert len(set(values)) == 1 + 4, "unchanged in the first epoch of four steps, and by each step of the second"
    assert sum(run.losses[4:]) < sum(run.losses[:4])
