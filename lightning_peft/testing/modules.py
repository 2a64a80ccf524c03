"""Tiny LightningModules, one for each way people write them, and data and a Trainer to run them with.

All of them classify vectors of 16 numbers into 3 classes and train in milliseconds; every style is a subclass of
:class:`Plain` that changes only what the style is about.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_peft.attaching.hub import apply_terms
from lightning_peft.weights.maps import plain_name

FEATURES, CLASSES = 16, 3


def mlp() -> nn.Sequential:
    """Three linear layers, ``(batch, 16) -> (batch, 3)``; every input width is a multiple of 16."""
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def loader(
    samples: int = 32, batch_size: int = 8, *, shuffle: bool = False, seed: int = 0, workers: int = 0
) -> DataLoader[tuple[Tensor, ...]]:
    """Deterministic batches of a learnable three-class problem.

    Args:
        samples: Size of the dataset.
        batch_size: Samples in a batch.
        shuffle: Draw the samples in random order (from the global generator).
        seed: Seed of the data, not of the order.
        workers: Worker processes.

    Returns:
        A loader of ``(inputs, labels)``: float32 of shape ``(batch, 16)`` and int64 of shape ``(batch,)``.

    Example:
        >>> [tuple(part.shape) for part in next(iter(loader()))]
        [(8, 16), (8,)]
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, FEATURES, generator=generator)
    labels = (inputs[:, 0] > 0.5).long() + (inputs[:, :4].sum(1) > 0).long()
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, shuffle=shuffle, num_workers=workers)


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """The samples of :func:`loader` one after the other, from a source that does not know how many it has."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(loader().dataset)


def stream(batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """The batches of :func:`loader` from a loader without a length."""
    return DataLoader(Stream(), batch_size=batch_size)


def trainer(**overrides: Any) -> Trainer:
    """A Trainer on one CPU that prints and writes nothing; keywords are those of ``Trainer`` and win over the defaults."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saves = any(isinstance(callback, Checkpoint) for callback in overrides.get("callbacks") or ())
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": saves}
    return Trainer(**{**defaults, **quiet, **overrides})


class Plain(LightningModule):
    """The usual module: holds its network as ``model``, two-argument step, one optimizer.

    Args:
        optimizer: ``"adam"`` or ``"sgd"``.
        lr: Learning rate.
    """

    def __init__(self, optimizer: str = "adam", lr: float = 0.02) -> None:
        super().__init__()
        self.kind, self.lr = optimizer, lr
        self.build()

    def build(self) -> None:
        """Make the layers."""
        self.model: Any = mlp()

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)

    def logits(self, inputs: Tensor) -> Tensor:
        """The outputs that the loss is computed from."""
        output: Tensor = self(inputs)
        return output

    def base_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of a batch."""
        loss = F.cross_entropy(self.logits(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.base_loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.base_loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.base_loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch[0])

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer named in the constructor."""
        kinds: dict[str, type[torch.optim.Adam] | type[torch.optim.SGD]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        return kinds[self.kind](parameters, lr=self.lr)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Bare(Plain):
    """Asks nothing of Lightning: logs nothing, has no scheduler, and does not want to know how long the training is."""

    def base_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of a batch."""
        return F.cross_entropy(self.logits(batch[0]), batch[1])


class Shared(Plain):
    """Uses one layer in two places, so that its weight has two names."""

    def build(self) -> None:
        self.model = mlp()
        self.model.insert(3, self.model[2])
        self.model.insert(3, nn.ReLU())


class Teaching(Plain):
    """Keeps a teacher, a copy of its network that follows it parameter by parameter, as code with a momentum encoder does.

    Attributes:
        astray: Parameters of the teacher that followed another than their namesake, so far.
    """

    def build(self) -> None:
        super().build()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.astray: set[str] = set()

    def base_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of a batch, and the distance from the teacher."""
        with torch.no_grad():
            target = self.teacher(batch[0])
        return super().base_loss(batch) + 0.1 * F.mse_loss(self.model(batch[0]), target)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher half the way to the network, with partners found by their place."""
        old, new = ({plain_name(name): p for name, p in part.named_parameters()} for part in (self.teacher, self.model))
        partners = list(zip(self.teacher.parameters(), self.model.parameters(), strict=False))
        followed = {id(of_teacher): of_network for of_teacher, of_network in partners}
        self.astray |= {name for name in self.names if followed.get(id(old[name])) is not new[name]}
        for of_teacher, of_network in partners:
            if of_teacher.shape == of_network.shape:
                of_teacher.lerp_(of_network, 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.follow()
        return self.base_loss(batch)


class Root(Plain):
    """Is the network itself: layers on the module, its own ``forward``."""

    def build(self) -> None:
        self.first, self.second = nn.Linear(FEATURES, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(self.second(self.first(inputs).relu()).relu())
        return output


class Configured(Plain):
    """Builds its network in ``configure_model``."""

    def build(self) -> None:
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = mlp()


class DictOutput(Plain):
    """Returns a mapping with ``loss`` and more from ``training_step``."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.base_loss(batch), "size": len(batch[0])}


class OneArgument(Plain):
    """Its ``training_step`` takes the batch alone."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.base_loss(batch)


class Manual(Plain):
    """Optimizes by hand and asks for the methods' terms with ``apply_terms``."""

    def __init__(self, optimizer: str = "adam", lr: float = 0.02) -> None:
        super().__init__(optimizer, lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(apply_terms(self, self.base_loss(batch)))
        optimizer.step()


class TwoOptimizers(Manual):
    """A small adversarial pair: a generator tries to make inputs that the classifier takes for class 0."""

    def build(self) -> None:
        super().build()
        self.generator = nn.Linear(4, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        classifier_optimizer, generator_optimizer = optimizers
        classifier_optimizer.zero_grad()
        self.manual_backward(apply_terms(self, self.base_loss(batch)))
        classifier_optimizer.step()
        generator_optimizer.zero_grad()
        self.manual_backward(self.model(self.generator(batch[0][:, :4]))[:, 0].mean())
        generator_optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part.parameters()) for part in (self.model, self.generator)]


class Conv(Plain):
    """A convolutional network: the 16 numbers are a 4x4 image with one channel."""

    def build(self) -> None:
        body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, CLASSES)]
        self.model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *body, *head)


class BatchNorm(Plain):
    """Has running statistics, which averaging and resuming must respect."""

    def build(self) -> None:
        self.model = mlp()
        self.model.insert(1, nn.BatchNorm1d(16))


class ModelOutput(dict[str, Tensor]):
    """A mapping whose entries are attributes too, as Hugging Face models return."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(name)


class HuggingFaceNet(nn.Module):
    """Takes its input by keyword and returns a :class:`ModelOutput` with ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.pooler = nn.Linear(FEATURES, 16), nn.Linear(16, 16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, input_values: Tensor) -> ModelOutput:
        hidden = self.pooler(self.encoder(input_values).relu()).relu()
        return ModelOutput(logits=self.classifier(hidden), hidden=hidden)


class HuggingFace(Plain):
    """Holds a network in the manner of Hugging Face."""

    def build(self) -> None:
        self.model = HuggingFaceNet()

    def forward(self, inputs: Tensor) -> Any:
        return self.model(input_values=inputs)

    def logits(self, inputs: Tensor) -> Tensor:
        output: Tensor = self(inputs).logits
        return output


class ResidualBlock(nn.Module):
    """A pre-norm block, ``(batch, 16) -> (batch, 16)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 16), nn.Linear(16, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = inputs + self.fc2(self.fc1(self.norm(inputs)).relu())
        return output


def deepened(style: type[Plain], blocks: int = 4) -> type[Plain]:
    """The same style of module with a list of equal blocks in front, for methods that change depth.

    Example:
        >>> len(deepened(Plain)().blocks)
        4
    """
    name = f"Deep{blocks}{style.__name__}"
    known: Any = globals().get(name)
    if known is not None and known.__base__ is style:
        return known  # type: ignore[no-any-return]

    def build(self: Any) -> None:
        style.build(self)
        self.blocks = nn.Sequential(*(ResidualBlock() for _ in range(blocks)))

    def forward(self: Any, inputs: Tensor) -> Any:
        return style.forward(self, self.blocks(inputs))

    deep = type(name, (style,), {"build": build, "forward": forward, "__module__": __name__, "__qualname__": name})
    globals()[name] = deep  # where pickle looks for the class of a module
    return deep


STYLES: tuple[type[Plain], ...] = (
    Plain,
    Root,
    Configured,
    DictOutput,
    OneArgument,
    Manual,
    TwoOptimizers,
    Conv,
    BatchNorm,
    HuggingFace,
)
