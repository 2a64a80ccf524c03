"""What moves is what was chosen, whatever the precision: `exclude=`, half precision, padding."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_outputs import Language, bert, tokens
from test_stream import every_method
from tta_toys import NETS, Classifier, batch_norm_net, close, layer_norm_net, run, stream

from lightning_peft import LAME, MEMO, SAR, BatchNormAdapt, CoTTA, RoTTA, Tent
from lightning_peft.capture.evaluation import Call
from lightning_peft.testing.modules import trainer
from lightning_peft_plugins.test_time._shared.fine_parameters import FineParameters
from lightning_peft_plugins.test_time._shared.padding import attention_mask
from lightning_peft_plugins.test_time._shared.views import RandomViews
from lightning_peft_plugins.test_time.functional.roid import soft_likelihood_ratio


def moved(net, *methods):
    """Names of the parameters that a method moves."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    run(net, *methods, loaders=stream(2))
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("method", [CoTTA, MEMO])
@pytest.mark.parametrize("exclude", ["head", "net.8", ["re:8$"]])
def test_the_whole_module_without_what_is_excluded(method, exclude):
    options = {"episodic": False} if method is MEMO else {}
    found = moved(batch_norm_net(), method(exclude=exclude, lr=0.1, views=2, keep=True, **options))
    assert {"0.weight", "1.weight", "4.bias"} <= found
    assert not found & {"8.weight", "8.bias"}


@pytest.mark.parametrize("make", [lambda **o: CoTTA(lr=0.1, views=2, **o), lambda **o: Tent(lr=0.1, **o)])
def test_a_container_is_excluded_with_everything_in_it(make):
    net = torch.nn.Sequential(batch_norm_net()[:4], batch_norm_net()[4:])
    assert any(name.startswith("0.") for name in moved(copy.deepcopy(net), make(keep=True)))
    found = moved(net, make(exclude="net.0", keep=True))
    assert found
    assert all(name.startswith("1.") for name in found)


def test_statistics_move_in_the_layers_chosen_alone():
    net = batch_norm_net()
    before = copy.deepcopy(net.state_dict())
    run(net, BatchNormAdapt(momentum=0.5, exclude="net.4", keep=True))
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert torch.equal(net[4].running_mean, before["4.running_mean"])
    for choice in ({"exclude": "norm"}, {"targets": "all-linear"}):
        with pytest.raises(MisconfigurationException, match="names none of the 2 BatchNorm layers"):
            run(net, BatchNormAdapt(**choice))


def test_a_choice_that_can_have_no_effect_is_refused():
    with pytest.raises(MisconfigurationException, match="Leave targets= and exclude= out"):
        LAME(exclude="head")
    with pytest.raises(MisconfigurationException, match="leaves no parameter to adapt"):
        run(layer_norm_net(), CoTTA(exclude="net"))
    with pytest.raises(MisconfigurationException, match="matches no module"):
        run(layer_norm_net(), CoTTA(exclude="nte"))


class Half(Classifier):
    """Casts its inputs, as a module under a true half precision has to."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return super().test_step((batch[0].to(self.dtype), batch[1]), batch_idx)


@every_method
@pytest.mark.parametrize("kind", NETS)
def test_bf16_true(make, kind):
    if kind == "layer norm" and isinstance(make(), BatchNormAdapt):
        pytest.skip("no BatchNorm layer")
    if make()._arguments.get("fisher") is not None:
        pytest.skip("the scores of clean data are tested with the estimator")
    plain, half = Half(NETS[kind]()), Half(NETS[kind]())
    trainer(callbacks=[make()]).test(plain, stream(2), verbose=False)
    trainer(callbacks=[make()], precision="bf16-true").test(half, stream(2), verbose=False)
    assert half.predictions[-1].dtype == torch.bfloat16
    error = (plain.predictions[0].softmax(-1) - half.predictions[0].float().softmax(-1)).abs().mean()
    # MEMO steps on one sample at a time here, twelve times, which carries a rounding as far as 0.06.
    assert error < 0.07, f"probabilities of the first batch differ by {error:.3g} on average"


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: CoTTA(lr=0.02, views=1, threshold=0.0, restore=0.0, teacher_momentum=0.999, **o),
        lambda **o: RoTTA(lr=0.01, every=6, capacity=12, teacher_momentum=0.001, augment=lambda x: x, **o),
    ],
    ids=["CoTTA", "RoTTA"],
)
def test_a_slow_teacher_moves_in_half_precision_too(make):
    moved = []
    for precision in ("32-true", "bf16-true"):
        net, method = layer_norm_net(), make()
        teachers = []
        release = method.release
        method.release = lambda method=method, release=release, teachers=teachers: (
            teachers.append({name: value.float().clone() for name, value in method.teacher.items()}),
            release(),
        )
        method.to_source = lambda: None
        trainer(callbacks=[method], precision=precision).test(Half(net), stream(6), verbose=False)
        source = dict(layer_norm_net().to(torch.bfloat16 if precision == "bf16-true" else torch.float32).named_parameters())
        pairs = [(source[name.removeprefix("net.")].detach().float(), value) for name, value in teachers[0].items()]
        moved.append(sum(float((value - before).norm()) for before, value in pairs))
    assert moved[0] > 0
    assert 0.5 < moved[1] / moved[0] < 2, moved


def test_random_numbers_are_those_of_float32_whatever_the_default():
    x = torch.rand(2, 3, 8, 8)
    expected = RandomViews()(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = RandomViews()(x)
        restored = run(layer_norm_net().bfloat16(), CoTTA(views=1, restore=0.001), loaders=_half(stream(1)))
    finally:
        torch.set_default_dtype(torch.float32)
    close([found], [expected], 0)
    assert restored[0].isfinite().all()


def _half(loader):
    x, y = loader.dataset.tensors
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.bfloat16(), y), batch_size=12)


def test_the_ratio_of_half_logits_by_hand():
    sure = soft_likelihood_ratio(torch.tensor([[4.0, 0.0]], dtype=torch.bfloat16))
    p = torch.tensor([4.0, 0.0]).softmax(0)
    torch.testing.assert_close(sure, -(p * (p / (1 - p) + 1e-5).log()).sum()[None])


@pytest.mark.parametrize("way", ["whole", "chunks", "second-pass"])
def test_the_second_pass_of_sar_does_not_look_at_padding(way):
    """The same sentences with other tokens behind their end, which attention does not see."""

    def adapted(filler):
        batches = tokens()
        rows = [
            {
                "input_ids": torch.where(row["attention_mask"] > 0, row["input_ids"], filler),
                "attention_mask": row["attention_mask"],
            }
            for row in batches.dataset
        ]
        net = bert("BertForTokenClassification").double()
        net.classifier.weight.data *= 40
        method = SAR(lr=0.5, rho=0.5, e_margin=0.9, reset_threshold=0.0, backward=way, keep=True)
        module = Language(net)
        loader = torch.utils.data.DataLoader(rows, batch_size=6)
        trainer(callbacks=[method], precision="64-true").test(module, loader, verbose=False)
        return [p.detach() for p in net.parameters()], method.average

    (first, average), (second, other) = adapted(3), adapted(40)
    assert average == pytest.approx(other, rel=1e-9)
    close(first, second, 1e-9)


def test_a_mask_is_found_however_it_is_given():
    ids, mask = torch.ones(2, 3), torch.zeros(2, 3)

    def forward(input_ids, attention_mask=None, labels=None): ...

    for call in (
        Call(forward, (ids, mask), {}),
        Call(forward, (ids,), {"attention_mask": mask}),
        Call(forward, ({"input_ids": ids, "attention_mask": mask},), {}),
    ):
        assert attention_mask(call) is mask
    assert attention_mask(Call(forward, (ids,), {})) is None
    assert attention_mask(Call(lambda x, y: x, (ids, mask), {})) is None


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@pytest.mark.parametrize("kind", NETS)
def test_adam_steps_on_fine_copies_of_half_weights(kind, precision):
    adam = {"optimizer": "Adam", "lr": 1e-3}
    for make in (lambda: RoTTA(capacity=12, every=6, teacher_momentum=0.5, **adam), lambda: Tent(**adam)):
        exact, rough = run(NETS[kind](), make()), run(NETS[kind](), make(), precision=precision)
        assert all(bool(logits.isfinite().all()) for logits in rough), type(make()).__name__
        error = max(float((a.softmax(-1) - b.float().softmax(-1)).abs().max()) for a, b in zip(exact, rough, strict=True))
        assert error < 0.1, f"{type(make()).__name__}: probabilities differ by {error:.3g}"


def test_a_half_weight_written_by_others_is_followed():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    fine = FineParameters([weight])
    sgd = torch.optim.SGD(fine.stepped_on, lr=1.0)
    for _ in range(4):  # each step is a quarter of what a half weight of 1 can tell
        weight.grad = torch.full((2,), 2.0**-12, dtype=torch.float16)
        fine.take_gradients()
        sgd.step()
        fine.give_values()
    assert weight.tolist() == [1 - 2.0**-10] * 2
    weight.data[0] = 3.0
    weight.grad = torch.zeros_like(weight)
    fine.take_gradients()
    assert fine.stepped_on[0].tolist() == [3.0, 1 - 2.0**-10]
