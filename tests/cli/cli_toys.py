"""A module, data and two methods that train in a blink; recipes of the tests name them."""

from __future__ import annotations

import os
import signal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import Lane, Method, Resource, WeightMap


class ToyModule(LightningModule):
    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
        self.score = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def _evaluate(self, batch, stage: str) -> None:
        logits = self.model(batch[0])
        self.score(logits, batch[1])
        self.log(f"{stage}/accuracy", self.score)
        self.log(f"{stage}/loss", F.cross_entropy(logits, batch[1]))

    def validation_step(self, batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class NoisyModule(ToyModule):
    """Draws in every step, in later ranks more."""

    def training_step(self, batch, batch_idx: int) -> Tensor:
        noise = sum(torch.randn_like(batch[0]) for _ in range(self.global_rank + 1))
        return super().training_step([batch[0] + noise, batch[1]], batch_idx)


class ShardedModule(ToyModule):
    """Shared by processes, layer by layer."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.model[0], mesh=mesh)
            fully_shard(self.model, mesh=mesh)


class ToyData(LightningDataModule):
    def __init__(self, samples: int = 64, batch: int = 16, shuffle: bool = True) -> None:
        super().__init__()
        self.batch, self.shuffle = batch, shuffle
        inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(inputs, inputs[:, :3].argmax(1))

    def train_dataloader(self):
        if self.shuffle:
            return DataLoader(self.data, self.batch, shuffle=True)
        ranks, rank = self.trainer.world_size, self.trainer.global_rank  # Lightning's own sampler would shuffle
        return DataLoader(self.data, self.batch, sampler=DistributedSampler(self.data, ranks, rank, shuffle=False))

    def val_dataloader(self):
        return DataLoader(self.data, 16)

    def test_dataloader(self):
        return DataLoader(self.data, 16)


class HalfMap(WeightMap):
    """Keeps the two largest of every four inputs."""

    kind = "half"
    lane = Lane.MASK

    def forward(self, weight: Tensor) -> Tensor:
        groups = weight.reshape(weight.shape[0], -1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.abs().topk(2).indices, True)
        return torch.where(kept, groups, 0.0).reshape(weight.shape)

    def config(self):
        return {}


class ToyMask(Method):
    """Keeps half of the weights."""

    lane = Lane.MASK
    writes = frozenset({Resource.MASK})
    weight_maps = (HalfMap,)

    def __init__(self, targets: str | list[str] = "all-linear") -> None:
        super().__init__(targets=targets)

    def attach(self, module) -> None:
        for name in self.claims(module):
            self.map_weight(module, name, HalfMap())


class ToyTerm(Method):
    """Adds a term to the loss."""

    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS})

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, step) -> Tensor:
        return self.weight * step.logits.softmax(-1).pow(2).sum(-1).mean()

    def metrics(self, run):
        return {"clock": float(run.step)}


class Killer(Callback):
    """Sends the process a signal, `kill -9` or another, in the middle of an epoch, when the environment says so.

    Of several processes it is that of a rank, or the command that started them if its number is there. In place of a signal it
    may be an error.
    """

    def on_train_batch_end(self, trainer, *_) -> None:
        composed = any(isinstance(callback, ToyMask) for callback in trainer.callbacks)
        rank = os.environ.get("TOY_RANK", "0")
        if composed and (os.environ.get("TOY_KILL_AT"), rank) == (str(trainer.global_step), str(trainer.global_rank)):
            name = os.environ.get("TOY_SIGNAL", "SIGKILL")
            if name == "an error":
                raise MisconfigurationException("The toy cannot go on.")
            os.kill(int(os.environ.get("TOY_COMMAND", os.getpid())), signal.Signals[name])


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).relu()


class DeepModule(ToyModule):
    """A list of equal blocks, for methods that change structure."""

    def __init__(self, width: int = 8, depth: int = 4, lr: float = 0.1) -> None:
        super().__init__(width, lr)  # saves these arguments
        self.model = DeepNetwork(width, depth)


class DeepNetwork(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ForgetfulModule(ToyModule):
    """Does not save its arguments, as many modules do not."""

    def __init__(self, size: int = 4) -> None:
        LightningModule.__init__(self)
        self.lr = 0.1
        self.model = nn.Sequential(nn.Linear(8, size), nn.ReLU(), nn.Linear(size, 3))
        self.score = MulticlassAccuracy(3, average="micro")


class Untraceable(nn.Sequential):
    """Decides by its values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class UntraceableModule(ToyModule):
    def __init__(self, width: int = 16, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.model = Untraceable(*self.model)
