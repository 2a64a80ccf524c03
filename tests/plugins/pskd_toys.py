"""The dataset, the network and the fit that tests of PSKD share, and what they record of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_peft.testing import modules
from lightning_peft_plugins.regularizers.pskd import PSKD

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


class Recorded:
    """A criterion that keeps what it was given."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        self.calls.append((logits.detach(), y))
        return F.cross_entropy(logits, y, **self.options)


def loader(size: int = SIZE, workers: int = 0, wrap: Any = None, **options: Any) -> DataLoader[Any]:
    data = Points(size) if wrap is None else Points(size, wrap)
    options = {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(7)} | options
    return DataLoader(data, num_workers=workers, **options)


def epoch_loader(**options: Any) -> DataLoader[Any]:
    return loader(shuffle=False, generator=None, **options)


def trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    return modules.trainer(**{"max_epochs": EPOCHS, "num_sanity_val_steps": 2, "callbacks": list(callbacks), **options})


def fit(method: PSKD | None, module: L.LightningModule, data: Any, **options: Any) -> list[float]:
    losses = Losses()
    callbacks = [*([method] if method else []), losses, *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(11)
    trainer(*callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return losses.seen


def close(a: nn.Module, b: nn.Module, tolerance: float) -> bool:
    return all(torch.allclose(p, q, atol=tolerance, rtol=0) for p, q in zip(a.parameters(), b.parameters(), strict=True))
