from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_peft.attach.hub import apply_terms
from lightning_peft.compose.loss import NonFiniteLossError
from lightning_peft.testing import MethodTester
from lightning_peft.testing import loader as toy_loader
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import Root
from lightning_peft.testing.toys import ToyScale
from lightning_peft_plugins.regularizers.pskd import PSKD
from lightning_peft_plugins.regularizers.pskd_functional import pskd_alpha, soft_cross_entropy, soften_targets

torch.set_num_threads(1)
CLASSES, SIZE, EPOCHS = 4, 22, 3


class Points(Dataset[Any]):
    """Each sample is (x, y) or, with its index, what ``wrap`` makes of (x, y, index)."""

    def __init__(self, size: int = SIZE, wrap: Callable[..., Any] = lambda x, y, i: (x, y)) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, 5, generator=generator)
        self.y = torch.randint(CLASSES, (size,), generator=generator)
        self.wrap = wrap

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.wrap(self.x[index], self.y[index], index)


class Net(nn.Module):
    def __init__(self, classes: int = CLASSES, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Lit(L.LightningModule):
    def __init__(self, criterion: Callable[..., Tensor] = F.cross_entropy, **net: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Net(**net)
        self.criterion = criterion

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        return self.criterion(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Losses(Callback):
    """What was optimised in each step, undivided by accumulation."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def loader(size: int = SIZE, workers: int = 0, wrap: Any = None, **options: Any) -> DataLoader[Any]:
    data = Points(size) if wrap is None else Points(size, wrap)
    options = {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(7)} | options
    return DataLoader(data, num_workers=workers, **options)


def epoch_loader(**options: Any) -> DataLoader[Any]:
    return loader(shuffle=False, generator=None, **options)


def trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**{**defaults, **options})


def fit(method: PSKD | None, module: L.LightningModule, data: Any, **options: Any) -> list[float]:
    losses = Losses()
    callbacks = [*([method] if method else []), losses, *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(11)
    trainer(*callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return losses.seen


def with_index(x: Tensor, y: Tensor, index: int) -> tuple[Tensor, Tensor, int]:
    return x, y, index


def official(data: Any, alpha_final: float, epochs: int, smoothing: float = 0.0) -> tuple[list[float], nn.Module, Tensor]:
    """The published loop as its authors wrote it: a full target for every sample, in a loop of our own."""
    module = Lit()
    net = module.net.train()
    optimizer = module.configure_optimizers()
    memory = torch.zeros(SIZE, CLASSES)
    losses = []
    torch.manual_seed(11)
    for epoch in range(epochs):
        alpha = alpha_final * (epoch + 1) / epochs
        for x, y, index in data:
            onehot = F.one_hot(y, CLASSES).float() * (1 - smoothing) + smoothing / CLASSES
            if epoch == 0:
                memory[index] = onehot
            target = (1 - alpha) * onehot + alpha * memory[index]
            logits = net(x)
            loss = -(target * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory[index] = logits.detach().softmax(1)
            losses.append(loss.item())
    return losses, net, memory


def close(a: nn.Module, b: nn.Module, tolerance: float) -> bool:
    return all(torch.allclose(p, q, atol=tolerance, rtol=0) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# The mathematics.


def test_official_vectors() -> None:
    assert [pskd_alpha(e, 300, 0.8) for e in (0, 149, 299)] == pytest.approx([0.8 / 300, 0.4, 0.8])
    assert pskd_alpha(500, 300, 0.8) == 0.8
    target = soften_targets(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.3, 0.2]), 0.4)
    assert torch.allclose(target, torch.tensor([0.2, 0.72, 0.08]))
    log_probabilities = torch.tensor([[2.0, 0.0, 0.0]]).log_softmax(1)
    assert soft_cross_entropy(log_probabilities, target[None]).item() == pytest.approx(1.839545, abs=1e-6)
    assert soft_cross_entropy(log_probabilities, torch.tensor([[0.0, 1.0, 0.0]])).item() == pytest.approx(2.239545, abs=1e-6)


def test_a_ruled_out_class_counts_nothing() -> None:
    logits = torch.tensor([[1.0, float("-inf"), 0.0]], requires_grad=True)
    loss = soft_cross_entropy(logits.log_softmax(1), torch.tensor([[0.5, 0.0, 0.5]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


# Parity with the published loop, through a real fit.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sample_index", ["auto", "2"])
def test_equals_the_published_loop(workers: int, sample_index: str) -> None:
    expected, net, memory = official(loader(wrap=with_index, workers=workers), 0.8, EPOCHS)
    method, module = PSKD(0.8, sample_index), Lit()
    wrap = with_index if sample_index == "2" else None
    losses = fit(method, module, loader(wrap=wrap, workers=workers))
    assert losses == pytest.approx(expected, abs=1e-6)
    assert close(module.net, net, 1e-5)
    assert torch.allclose(method.memory.probabilities, memory, atol=1e-5)
    assert torch.allclose(memory.sum(1), torch.ones(SIZE))
    plain = fit(None, Lit(), loader(workers=workers))
    per_epoch = len(plain) // EPOCHS
    assert losses[:per_epoch] == plain[:per_epoch]
    assert losses != pytest.approx(plain, abs=1e-3)


def test_equals_the_published_loop_with_smoothed_labels() -> None:
    expected, *_ = official(loader(wrap=with_index), 0.8, EPOCHS, smoothing=0.1)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert fit(PSKD(0.8), Lit(smooth), loader()) == pytest.approx(expected, abs=1e-6)


class Recorded:
    """A criterion that keeps what it was given."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        self.calls.append((logits.detach(), y))
        return F.cross_entropy(logits, y, **self.options)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0])}])
def test_the_users_part_stays_the_users(options: dict[str, Any]) -> None:
    criterion, reduction = Recorded(**options), options.get("reduction", "mean")
    losses = fit(PSKD(0.8, reduction=reduction), Lit(criterion), epoch_loader(), max_epochs=2)
    assert len(losses) == len(criterion.calls) == 12
    for step in range(6, 12):
        (before, _), (logits, y) = criterion.calls[step - 6], criterion.calls[step]
        soft = -(before.softmax(1) * logits.log_softmax(1)).sum(1)
        expected = 0.2 * F.cross_entropy(logits, y, **options) + 0.8 * getattr(soft, reduction)()
        assert losses[step] == pytest.approx(expected.item(), rel=1e-5)


# What changes nothing.


def test_alpha_zero_is_plain_training_bit_for_bit() -> None:
    plain, with_method = Lit(), Lit()
    assert fit(None, plain, loader()) == fit(PSKD(0.0), with_method, loader())
    assert close(plain, with_method, 0.0)


class Given:
    """A batch sampler with a list of batches for every epoch."""

    def __init__(self, *epochs: list[list[int]]) -> None:
        self.epochs = list(epochs)

    def __iter__(self) -> Any:
        return iter(self.epochs.pop(0))

    def __len__(self) -> int:
        return 2


def test_samples_that_are_new_in_a_later_epoch_keep_the_users_loss() -> None:
    """Two of four samples were dropped in the first epoch: half of alpha goes to the memory, the rest is the user's."""
    criterion, method = Recorded(), PSKD(0.8)
    sampler = Given([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 20, 3, 21], [8, 9, 10, 11]])
    losses = fit(method, Lit(criterion), DataLoader(Points(), batch_sampler=sampler), max_epochs=2)
    (first, _), _, (mixed, y), (unseen, labels) = criterion.calls
    soft = -(first[[1, 3]].softmax(1) * mixed[[0, 2]].log_softmax(1)).sum(1)
    assert losses[2] == pytest.approx((0.6 * F.cross_entropy(mixed, y) + 0.8 * soft.sum() / 4).item(), abs=1e-6)
    assert losses[3] == F.cross_entropy(unseen, labels).item()
    assert method.memory.seen.nonzero().flatten().tolist() == [*range(12), 20, 21]


def test_a_sample_drawn_twice_in_the_first_epoch_stays_plain() -> None:
    criterion = Recorded()
    data = DataLoader(Points(), batch_sampler=Given([[0, 1], [1, 0]], [[0, 1], [1, 0]]))
    losses = fit(PSKD(0.8), Lit(criterion), data, max_epochs=2)
    plain = [F.cross_entropy(*call).item() for call in criterion.calls]
    assert losses[:2] == plain[:2]
    assert losses[2] != pytest.approx(plain[2], abs=1e-6)


def test_drop_last() -> None:
    method = PSKD(0.8)
    losses = fit(method, Lit(), loader(batch_size=6, drop_last=True))
    assert len(losses) == 3 * EPOCHS
    assert 18 <= int(method.memory.seen.sum()) <= SIZE


# Settings it must work in.


def test_accumulation_divides_the_sum() -> None:
    expected = fit(PSKD(0.8), Lit(dropout=0.0), loader(), max_steps=1)
    losses = fit(PSKD(0.8), Lit(dropout=0.0), loader(), accumulate_grad_batches=2)
    assert losses[0] == pytest.approx(expected[0], abs=1e-6)
    assert len(losses) == EPOCHS * 6


def test_bf16_keeps_a_float32_memory() -> None:
    method = PSKD(0.8)
    losses = fit(method, Lit(), loader(), precision="bf16-mixed")
    assert method.memory.probabilities.dtype == torch.float32
    assert torch.allclose(method.memory.probabilities.sum(1), torch.ones(SIZE), atol=1e-5)
    assert losses == pytest.approx(fit(PSKD(0.8), Lit(), loader()), abs=0.1)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda x, y, i: {"x": x, "y": y, "index": i}, "index"),
        (lambda x, y, i: {"x": x, "y": y, "meta": {"where": [0, i]}}, "meta.where.1"),
        (lambda x, y, i: (x, y, {"id": i}), "2.id"),
        (lambda x, y, i: (x, y, i), "-1"),
    ],
)
def test_index_from_the_batch(wrap: Any, path: str) -> None:
    method = PSKD(0.8, path)
    assert fit(method, Lit(), loader(wrap=wrap)) == pytest.approx(fit(PSKD(0.8), Lit(), loader()), abs=1e-7)
    assert method.memory.size == SIZE


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("index", r"'index' is not in the batch, which has 2 items \(positions 0 to 1\)"),
        ("5", "'5' is not in the batch"),
        ("0.index", "has a single Tensor"),
        ("0", "leads to a tensor of torch.float32"),
    ],
)
def test_missing_index_says_what_the_batch_has(path: str, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(PSKD(0.8, path), Lit(), loader())


def test_missing_key_names_the_keys() -> None:
    wrap = lambda x, y, i: {"x": x, "y": y}  # noqa: E731
    with pytest.raises(MisconfigurationException, match=r"'idx' is not in the batch, which has the keys \['x', 'y'\]"):
        fit(PSKD(0.8, "idx"), Lit(), loader(wrap=wrap))


def test_manual_optimization_and_repeated_evaluation() -> None:
    """A step that evaluates its batch twice (a closure) remembers the first prediction and reads the old one twice."""

    class Twice(Lit):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.automatic_optimization = False
            self.pairs: list[tuple[float, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            first = apply_terms(self, self.criterion(self(batch[0]), batch[1]))
            second = apply_terms(self, self.criterion(self(batch[0]), batch[1]))
            self.pairs.append((first.item(), second.item()))
            optimizer.zero_grad()
            self.manual_backward(second)
            optimizer.step()

    module = Twice()
    torch.manual_seed(0)
    trainer(PSKD(0.8)).fit(module, loader())
    assert all(first == second for first, second in module.pairs)


def test_after_the_learning_rate_finder() -> None:
    class Tuned(Lit):
        lr = 0.1

    method = PSKD(0.8)
    losses = fit(method, Tuned(), epoch_loader(size=64), callbacks=[LearningRateFinder(num_training_steps=8)])
    assert len(losses) == 16 * EPOCHS
    assert method.memory.seen.all()


def test_a_row_that_is_not_finite_never_enters() -> None:
    class Breaks(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            self.net.head.bias.data.fill_(float("nan") if self.current_epoch == 1 else 0.0)
            return self.criterion(logits, batch[1])

    method = PSKD(0.8)
    with pytest.raises(NonFiniteLossError):
        fit(method, Breaks(), loader())
    assert torch.isfinite(method.memory.probabilities).all()
    assert method.memory.seen.all()


def test_logs_alpha_coverage_and_its_loss() -> None:
    logged: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    fit(PSKD(0.8), Lit(), loader(), callbacks=[Watch()], log_every_n_steps=1)
    assert [row["peft/pskd/alpha"] for row in logged] == pytest.approx([0.8 / 3, 1.6 / 3, 0.8])
    assert logged[-1]["peft/pskd/coverage"] == 1.0
    assert logged[0]["peft/loss/pskd"] == 0.0
    assert logged[-1]["peft/loss/pskd"] > 0.0


# Resume.


class SaveAt(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.parametrize("teacher", ["memory", "copy"])
@pytest.mark.parametrize("storage", ["ram", "mapped"])
def test_resume_at_an_epoch_boundary_is_bit_exact(tmp_path: Path, teacher: str, storage: str) -> None:
    file = tmp_path / "epoch0.ckpt"
    options: dict[str, Any] = {"teacher": teacher, "memory": storage}
    full = Lit(dropout=0.0)
    losses = fit(PSKD(0.8, **options), full, epoch_loader(), callbacks=[SaveAt(file, 6)], default_root_dir=tmp_path)
    torch.load(file, weights_only=True)
    resumed = Lit(dropout=0.0)
    rest = fit(PSKD(0.8, **options), resumed, epoch_loader(), ckpt_path=file, default_root_dir=tmp_path)
    assert rest == losses[6:]
    assert close(full, resumed, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0.ckpt"]


def test_saved_after_the_fit_resumes(tmp_path: Path) -> None:
    file = tmp_path / "done.ckpt"
    whole = fit(PSKD(0.8, epochs=3), Lit(dropout=0.0), epoch_loader())
    losses, method = Losses(), PSKD(0.8, epochs=3)
    short = trainer(method, losses, max_epochs=2)
    short.fit(Lit(dropout=0.0), epoch_loader())
    short.save_checkpoint(file, weights_only=False)
    assert fit(PSKD(0.8, epochs=3), Lit(dropout=0.0), epoch_loader(), ckpt_path=file) == whole[12:]


def test_resume_refuses_another_dataset_or_head(tmp_path: Path) -> None:
    file = tmp_path / "epoch0.ckpt"
    fit(PSKD(0.8), Lit(), epoch_loader(), callbacks=[SaveAt(file, 6)])
    with pytest.raises(MisconfigurationException, match="of 22 training samples, but the training dataset now has 24"):
        fit(PSKD(0.8), Lit(), epoch_loader(size=24), ckpt_path=file)
    method = PSKD(0.8)
    saved = torch.load(file, weights_only=True)
    saved["callbacks"]["lightning_peft/pskd"]["state"]["probabilities"] = torch.full((SIZE, 7), 1 / 7)
    torch.save(saved, file)
    with pytest.raises(MisconfigurationException, match="over 7 classes, but the network now returns 4"):
        fit(method, Lit(), epoch_loader(), ckpt_path=file)
    with pytest.raises(MisconfigurationException, match="teacher='memory'"):
        fit(PSKD(0.8, teacher="copy"), Lit(), epoch_loader(), ckpt_path=file)
    saved["callbacks"]["lightning_peft/pskd"]["state"]["seen"] = torch.ones(3)
    torch.save(saved, file)
    with pytest.raises(MisconfigurationException, match="malformed"):
        fit(PSKD(0.8), Lit(), epoch_loader(), ckpt_path=file)


def test_a_new_training_forgets_and_a_continued_one_remembers() -> None:
    method = PSKD(0.8, epochs=4)
    first = fit(method, Lit(dropout=0.0), epoch_loader())
    assert fit(method, Lit(dropout=0.0), epoch_loader()) == first
    losses, module = Losses(), Lit(dropout=0.0)
    run = trainer(PSKD(0.8, epochs=4), losses, max_epochs=2)
    run.fit(module, epoch_loader())
    run.fit_loop.max_epochs = 3
    run.fit(module, epoch_loader())
    assert losses.seen[12] == pytest.approx(first[12], abs=1e-6)  # later steps differ: Lightning makes a new optimizer


# The teacher copy.


def test_teacher_copy_distils_the_network_of_the_epoch_before() -> None:
    ends: list[nn.Module] = []
    calls: list[tuple[int, Tensor, Tensor, Tensor]] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            ends.append(copy.deepcopy(pl_module.net).eval())

    class Recorded(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            calls.append((self.current_epoch, batch[0], batch[1], logits.detach()))
            return self.criterion(logits, batch[1])

    method = PSKD(0.8, teacher="copy")
    losses = fit(method, Recorded(), loader(), callbacks=[Watch()])
    for loss, (epoch, x, y, logits) in zip(losses, calls, strict=True):
        expected = F.cross_entropy(logits, y)
        if epoch:
            alpha = 0.8 * (epoch + 1) / EPOCHS
            soft = -(ends[epoch - 1](x).softmax(1) * logits.log_softmax(1)).sum(1).mean()
            expected = (1 - alpha) * expected + alpha * soft
        assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert method.memory is None


def test_teacher_copy_beside_weight_maps_and_of_the_module_itself() -> None:
    for callbacks in ([ToyScale()], []):
        module = Root()
        torch.manual_seed(0)
        trainer(PSKD(0.8, teacher="copy"), *callbacks).fit(module, toy_loader(), toy_loader())
        assert all(torch.isfinite(p).all() for p in module.parameters())
        assert "forward" not in vars(module)


class TestContract(MethodTester):
    methods = [PSKD, lambda: PSKD(0.5, memory="mapped"), lambda: PSKD(teacher="copy")]


# Refusals.


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 1.2},
        {"alpha": -0.1},
        {"epochs": 0},
        {"num_samples": 0},
        {"memory": "disk"},
        {"teacher": "ema"},
        {"dtype": "int8"},
    ],
)
def test_impossible_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(arguments))):
        PSKD(**arguments)


def test_logits_of_tokens_are_refused() -> None:
    class PerToken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, None].expand(-1, 3, -1)

    class Tokens(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).mean()

    module = Tokens()
    module.net = PerToken()
    with pytest.raises(MisconfigurationException, match=r"shape \(batch, classes\)"):
        fit(PSKD(0.8), module, loader())


def test_a_step_that_repeats_its_samples_is_refused() -> None:
    class Views(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self(torch.cat([batch[0], -batch[0]])), batch[1].repeat(2))

    with pytest.raises(MisconfigurationException, match="logits of 8 samples for a batch of 4"):
        fit(PSKD(0.8), Views(), loader())


def test_a_trainer_without_end_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"PSKD\(epochs=...\)"):
        fit(PSKD(0.8), Lit(), loader(), max_epochs=-1)


def test_an_index_beyond_the_given_size_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="outside the memory of 5 samples"):
        fit(PSKD(0.8, num_samples=5), Lit(), loader())


def test_state_is_plain_data() -> None:
    method = PSKD(0.8)
    fit(method, Lit(), loader())
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)["state"]) == {"teacher", "fixed", "probabilities", "seen"}


# Two processes.


class Dealt(Sampler[int]):
    """The order in which ``DistributedSampler(shuffle=True)`` deals samples to its ranks."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Plain(Lit):
    """Without batch statistics and dropout, two half batches equal a whole one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))  # type: ignore[assignment]


class SaveMidEpoch(Callback):
    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 1:
            trainer.save_checkpoint(self.file, weights_only=False)


def train(sizes: list[int], devices: int, folder: str) -> list[dict[str, Any]]:
    """Train once for each size, with a whole batch of 4 over all ranks, and return what this rank ends with."""
    results = []
    for size in sizes:
        method, module = PSKD(0.9), Plain()
        order = {"shuffle": True} if devices > 1 else {"sampler": Dealt(size)}
        run = trainer(
            method,
            SaveMidEpoch(f"{folder}/{size}-{devices}.ckpt"),
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
        )
        run.fit(module, DataLoader(Points(size), batch_size=4 // devices, **order))
        assert method.memory is not None
        weights = {name: weight.clone() for name, weight in module.state_dict().items()}
        results.append({"weights": weights, **method.memory.state()})
    return results


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    # 18 samples are dealt evenly; of 17 the sampler deals one twice.
    first, second = run_ddp(f"{__file__}:train", {"sizes": [18, 17], "devices": 2, "folder": str(tmp_path)})
    [single] = train([18], 1, str(tmp_path))
    assert torch.allclose(first[0]["probabilities"], single["probabilities"], atol=1e-6)
    for name, weight in single["weights"].items():
        assert torch.allclose(first[0]["weights"][name], weight, atol=1e-6), name
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine["probabilities"], other["probabilities"])
        assert mine["seen"].all()
        assert other["seen"].all()
    states = [
        torch.load(tmp_path / f"18-{devices}.ckpt", weights_only=True)["callbacks"]["lightning_peft/pskd"]["state"]
        for devices in (2, 1)
    ]
    assert int(states[0]["seen"].sum()) == 8
    assert torch.equal(states[0]["seen"], states[1]["seen"])
    assert torch.allclose(states[0]["probabilities"], states[1]["probabilities"], atol=1e-6)
