"""Training FLOPs: counted as by hand, of every kind of step, and without a trace in what is trained."""

from __future__ import annotations

import io

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_peft.measure.flop_count import FlopCount
from lightning_peft.measure.flop_meter import FLOPS, FlopMeter
from lightning_peft.testing.modules import Manual, Plain, loader, trainer

# Layers of 16x16, 16x16, 16x3: forward, gradients of the weights, gradients of the inputs of all but the first; times eight.
FORWARD = 2 * 8 * (256 + 256 + 48)
BATCH = 2 * FORWARD + 2 * 8 * (256 + 48)


def free() -> bool:
    return torch._C._len_torch_dispatch_stack() == 0


def measured(module=None, meter=None, data=None, **overrides) -> FlopMeter:
    meter = meter or FlopMeter()
    callbacks = [*overrides.pop("callbacks", []), meter]
    trainer(callbacks=callbacks, **overrides).fit(module or Plain(), data or loader(), loader(8))
    assert free()
    return meter


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.inner, self.outer = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.outer(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("backend", "backward"), [(SDPBackend.FLASH_ATTENTION, 5), (SDPBackend.MATH, 4)])
def test_an_attention_block_is_counted_as_by_hand(backend, backward) -> None:
    batch, length, width = 3, 7, 16
    with sdpa_kernel(backend), FlopCount() as count:
        Attention(width)(torch.randn(batch, length, width)).sum().backward()
    inner = 2 * batch * length * width * 3 * width
    product = 2 * batch * length * length * width  # all heads together; flash computes the scores again for its backward pass
    outer = 2 * batch * length * width * width
    assert count.total == 2 * inner + (2 + backward) * product + 3 * outer
    assert not count.unknown


def test_every_attention_kernel_has_a_formula() -> None:
    for kernel in ("efficient_attention", "flash_attention", "flash_attention_for_cpu", "cudnn_attention"):
        for way in ("", "_backward"):
            assert getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{way}") in flop_registry


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_costs_three_times_its_forward_pass(kind, groups) -> None:
    inputs = torch.randn(2, 8, 5, 5, requires_grad=True)
    layer = kind(8, 16, 3, padding=1, groups=groups)
    with FlopCount() as count:
        layer(inputs).sum().backward()
    assert count.total == 3 * 2 * 2 * 25 * 9 * 8 * 16 // groups


def test_a_recurrent_layer_is_counted() -> None:
    layer = nn.LSTM(8, 16, num_layers=2, batch_first=True)
    with FlopCount() as count:
        layer(torch.randn(4, 5, 8))[0].sum().backward()
    assert count.total == 3 * 2 * 4 * 5 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)


def test_pytorch_counts_the_same_where_it_is_right() -> None:
    network = nn.Sequential(
        nn.Conv1d(4, 16, 3, padding=1), nn.Flatten(1), nn.Unflatten(1, (-1, 16)), Attention(), nn.Linear(16, 2)
    )
    network.append(nn.TransformerEncoderLayer(2, 1, 8, batch_first=True))
    inputs = torch.randn(2, 4, 16)
    with FlopCount() as count:
        network(inputs).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        network(inputs).sum().backward()
    assert count.total == theirs.get_total_flops()


def test_a_teacher_in_inference_mode_is_counted() -> None:
    with FlopCount() as count, torch.inference_mode():
        nn.Linear(3, 5)(torch.ones(2, 3))
    assert count.total == 60


def test_a_formula_that_fails_is_named_and_ends_nothing(monkeypatch) -> None:
    monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, lambda *_, **__: 1 // 0)
    with pytest.warns(UserWarning, match=r"without aten\.addmm"):
        assert measured().total == 4 * (BATCH - FORWARD)


@pytest.mark.parametrize("module", [Plain(), Plain("sgd"), Manual()])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_mlp_is_counted_as_by_hand(module, accumulate) -> None:
    settings = {} if isinstance(module, Manual) else {"accumulate_grad_batches": accumulate}
    assert measured(module, max_epochs=2, **settings).total == 2 * 4 * BATCH
    assert measured(module, data=loader(27)).total == 4 * BATCH - 5 * BATCH // 8  # the last batch has 3 samples


def test_every_closure_of_a_step_is_counted() -> None:
    class Searching(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3, max_eval=3, lr=0.1)

        def training_step(self, batch, batch_idx):
            self.steps = getattr(self, "steps", 0) + 1
            return super().training_step(batch, batch_idx)

    module = Searching()
    total = measured(module).total
    assert module.steps > 4
    assert total == module.steps * BATCH


class Products(torch.optim.SGD):
    """Its step multiplies matrices, as Muon's does."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 2:
                    parameter.grad.mm(parameter.grad.T)
        return loss


def test_the_optimizer_is_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(Plain, "make_optimizer", lambda self, parameters: Products(parameters, lr=0.01))
    assert measured().total == 4 * BATCH


class Grow(Callback):
    """Has half the network for the first two batches."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.rest = pl_module.model
            pl_module.model = nn.Sequential(self.rest[0], self.rest[1], self.rest[4])
        elif batch_idx == 2:
            pl_module.model = self.rest
        elif batch_idx == 3:
            self.rest[0].requires_grad_(False)


def test_a_network_that_grows_or_freezes_is_counted_again() -> None:
    small = 2 * 8 * (2 * (256 + 48) + 48)
    frozen = BATCH - 2 * 8 * (256 + 256)  # neither the gradient of the first weight nor that of what goes into the second
    module = Plain()
    assert measured(module, callbacks=[Grow()]).total == 2 * small + BATCH + frozen


class Ragged(Plain):
    """Every batch has another number of rows."""

    def train_dataloader(self):
        inputs, labels = next(iter(loader(32, 32)))
        return DataLoader([(inputs[:size], labels[:size]) for size in (8, 3, 8, 4, 16)], batch_size=None)


def test_batches_of_other_shapes_are_counted_and_then_scaled() -> None:
    whole = BATCH // 8 * (8 + 3 + 8 + 4 + 16)
    for shapes in (1, 2, 16):  # an MLP is linear in the rows, so scaling is exact
        meter = FlopMeter(shapes)
        runner = trainer(callbacks=[meter])
        runner.fit(Ragged(), val_dataloaders=loader(8))
        assert meter.total == whole
        assert [len(batches) for batches in meter.state_dict()["known"].values()] == [min(shapes, 4)]


class Deep(Plain):
    """Draws random numbers, and computes some activations twice if asked to."""

    def build(self) -> None:
        self.inner, self.attention, self.head = nn.Linear(16, 64), Attention(), nn.Linear(64, 3)
        self.drop = nn.Dropout(0.3)
        self.recompute = None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.drop(self.inner(inputs)).unflatten(-1, (4, 16))
        if self.recompute is None or not self.training:
            return self.head(self.attention(hidden).flatten(1))
        return self.head(checkpoint(self.attention, hidden, use_reentrant=self.recompute == "reentrant").flatten(1))


@pytest.mark.parametrize("recompute", [None, "reentrant", "hooks"])
def test_not_a_bit_of_the_training_changes(recompute) -> None:
    results = []
    for callbacks in ([], [FlopMeter(1)]):
        torch.manual_seed(3)
        module = Deep()
        module.recompute = recompute
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(27, shuffle=True), loader(8))
        results.append([*module.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert free()


def test_recomputed_activations_count_again() -> None:
    module = Deep()
    module.recompute = "reentrant"
    again = 2 * 8 * 4 * 16 * (48 + 16) + 2 * 2 * 8 * 4 * 4 * 16
    assert measured(module).total == measured(Deep()).total + 4 * again


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_module_is_left_alone(inner) -> None:
    module = Plain()
    if inner:
        module.model = torch.compile(module.model, backend="eager")
    else:
        module.model.compile(backend="eager")
    with pytest.warns(UserWarning, match="the module is compiled"):
        assert measured(module).total == 0


class Skips(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        pl_module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx in self.at else None

    def __init__(self, *at: int) -> None:
        self.at = at


def test_batches_that_are_skipped_cost_nothing() -> None:
    assert measured(callbacks=[Skips(0)]).total == 0
    assert measured(callbacks=[Skips(2)]).total == 2 * BATCH


@pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning")  # Lightning says so once a process
def test_a_step_without_a_loss_is_no_measure_of_the_others() -> None:
    class Picky(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    assert measured(Picky()).total == FORWARD + 3 * BATCH


def test_a_crash_leaves_nothing_behind() -> None:
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measured(Broken())
    assert free()


def test_it_goes_on_after_a_checkpoint(tmp_path) -> None:
    meter = FlopMeter(1)
    runner = trainer(callbacks=[meter], max_epochs=1)
    runner.fit(Plain(), loader(27), loader(8))
    runner.save_checkpoint(tmp_path / "model.ckpt")
    resumed = FlopMeter(1)
    trainer(callbacks=[resumed], max_epochs=2).fit(
        Plain(), loader(27), loader(8), ckpt_path=tmp_path / "model.ckpt", weights_only=True
    )
    assert resumed.total == measured(meter=FlopMeter(1), data=loader(27), max_epochs=2).total
    # Larger than 64 bits, as large trainings are.
    file = io.BytesIO()
    torch.save({**resumed.state_dict(), "total": 10**25}, file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.total == 10**25


def test_it_is_logged_beside_the_validation_metrics_of_a_training_only() -> None:
    meter, seen = FlopMeter(), []

    class Listen(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            seen.append(float(trainer.callback_metrics.get(FLOPS, -1)))

    runner = trainer(callbacks=[meter, Listen()], num_sanity_val_steps=1, val_check_interval=2)
    module = Plain()
    runner.fit(module, loader(), loader(8))
    assert seen == [-1, 2 * BATCH, 4 * BATCH]
    (result,) = runner.validate(module, loader(8), verbose=False)
    assert FLOPS not in result
