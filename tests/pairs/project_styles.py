"""Miniatures of the modules people write: each trains in milliseconds, written as its kind of project does it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

SAMPLES, BATCH, CLASSES, SIDE, WIDTH = 16, 4, 4, 16, 16


class Rows(Dataset[Any]):
    """A dataset that makes one sample from the random numbers of its position."""

    def __init__(self, make: Any, samples: int = SAMPLES) -> None:
        self.make, self.samples = make, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, place: int) -> Any:
        return self.make(torch.Generator().manual_seed(place))


def image(generator: torch.Generator) -> Tensor:
    return torch.randn(3, SIDE, SIDE, generator=generator)


def label(generator: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (), generator=generator)


def vector(generator: torch.Generator, size: int = WIDTH) -> Tensor:
    return torch.randn(size, generator=generator)


def convolutional(outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs)),
    )


def perceptron(outputs: int, inputs: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)
    )


class Project(LightningModule):
    """Base of the miniatures: data of its own, validation and test as in training."""

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: (image(g), label(g))), batch_size=BATCH, shuffle=True)

    def step(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.step(batch), batch_size=BATCH)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.step(batch), batch_size=BATCH)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Template(Project):
    """lightning-hydra-template: the network is an argument, optimizer and scheduler are partial, metrics are attributes."""

    def __init__(
        self, net: nn.Module | None = None, optimizer: Any = None, scheduler: Any = None, compile: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net", "optimizer", "scheduler"])
        self.net = net or convolutional()
        self.optimizer = optimizer or partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-4)
        self.scheduler = scheduler or partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=1)
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc, self.val_acc = (MulticlassAccuracy(CLASSES) for _ in range(2))
        self.val_loss = MeanMetric()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), logits.argmax(dim=1), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, predictions, targets = self.model_step(batch)
        self.train_acc(predictions, targets)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, predictions, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(predictions, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(params=self.trainer.model.parameters())
        scheduler = {"scheduler": self.scheduler(optimizer=optimizer), "monitor": "val/loss", "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Tutorial(Project):
    """The tutorials of Lightning: layers on the module itself, its own loader, ``F`` in the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_1, self.layer_2, self.layer_3 = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, CLASSES)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: (vector(g), label(g))), batch_size=BATCH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer_2(F.relu(self.layer_1(x))))
        return F.log_softmax(self.layer_3(x), dim=1)

    def step(self, batch: Any) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])


class FineTuned(Project):
    """Hugging Face fine-tuning: dict batches go into a model that returns its loss; a schedule in steps; parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=CLASSES, **settings)
        self.model = transformers.BertForSequenceClassification(config)

    def data(self) -> Any:
        def row(g: torch.Generator) -> dict[str, Tensor]:
            ids = torch.randint(32, (8,), generator=g)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label(g)}

        return DataLoader(Rows(row), batch_size=BATCH)

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        plain = [p for n, p in self.named_parameters() if "bias" in n or "LayerNorm" in n]
        rest = [p for n, p in self.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
        optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=1e-3)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class LanguageModel(Project):
    """A causal language model of a user's own: token ids in, cross entropy of flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 32)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: torch.randint(32, (9,), generator=g)), batch_size=BATCH)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embedding(ids), mask=mask, is_causal=True))

    def step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).reshape(-1, 32), batch[:, 1:].reshape(-1))


class Segmentation(Project):
    """segmentation_models and torchgeo: a U-Net, batches with ``image`` and ``mask``, pixels to ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, 8), self._block(8, 16)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, stride=2), self._block(16, 8)
        self.head = nn.Conv2d(8, CLASSES, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def data(self) -> Any:
        def row(g: torch.Generator) -> dict[str, Tensor]:
            return {"image": image(g), "mask": torch.randint(-1, CLASSES, (SIDE, SIDE), generator=g)}

        return DataLoader(Rows(row), batch_size=BATCH)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        return self.head(self.join(torch.cat([first, self.up(second)], 1)))

    def step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["mask"], ignore_index=-1)


class Adversarial(Project):
    """A GAN by the book: two optimizers by hand, toggled."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = perceptron(WIDTH, 8), perceptron(1)

    def data(self) -> Any:
        return DataLoader(Rows(vector), batch_size=BATCH)

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        noise, ones = torch.randn(len(batch), 8), torch.ones(len(batch), 1)
        self.toggle_optimizer(first)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self(noise)), ones)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        real = F.binary_cross_entropy_with_logits(self.discriminator(batch), ones)
        fake = F.binary_cross_entropy_with_logits(self.discriminator(self(noise).detach()), 0 * ones)
        self.manual_backward((real + fake) / 2)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def step(self, batch: Any) -> Tensor:
        return self.discriminator(batch).mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.discriminator)], []


class AutoEncoder(Project):
    """Encoder and decoder side by side, squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(4), perceptron(WIDTH, 4)

    def data(self) -> Any:
        return DataLoader(Rows(vector), batch_size=BATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def step(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch), batch)


class Variational(Project):
    """A VAE with torch.distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(8), perceptron(WIDTH, 4)

    data = AutoEncoder.data

    def step(self, batch: Any) -> Tensor:
        mean, log_scale = self.encoder(batch).chunk(2, 1)
        code = Normal(mean, log_scale.clamp(-3, 3).exp())
        return F.mse_loss(self.decoder(code.rsample()), batch) + 0.1 * kl_divergence(code, Normal(0.0, 1.0)).mean()


class Bootstrap(Project):
    """lightly's BYOL: a momentum copy of backbone and projection, two views, its own update after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projection, self.prediction = convolutional(16), perceptron(16, 16), perceptron(16, 16)
        self.backbone_momentum, self.projection_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.projection)
        for part in (self.backbone_momentum, self.projection_momentum):
            part.requires_grad_(False)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: ((image(g), image(g)), label(g), f"file_{int(label(g))}")), batch_size=BATCH)

    def step(self, batch: Any) -> Tensor:
        (first, second), _, _ = batch
        loss = torch.zeros(())
        for one, other in ((first, second), (second, first)):
            online = self.prediction(self.projection(self.backbone(one)))
            with torch.no_grad():
                target = self.projection_momentum(self.backbone_momentum(other))
            loss = loss - F.cosine_similarity(online, target, dim=-1).mean()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        pairs = ((self.backbone, self.backbone_momentum), (self.projection, self.projection_momentum))
        for model, momentum in pairs:
            for new, old in zip(model.parameters(), momentum.parameters(), strict=True):
                old.data = old.data * 0.9 + new.data * 0.1


class Distilled(Project):
    """DINO: student and teacher, many crops of several sizes as a list, centring."""

    def __init__(self) -> None:
        super().__init__()
        self.student = convolutional(16)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, 16))

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: [image(g), image(g), image(g)[:, :8, :8]]), batch_size=BATCH)

    def step(self, batch: Any) -> Tensor:
        targets = [((self.teacher(crop) - self.center) / 0.1).softmax(-1).detach() for crop in batch[:2]]
        answers = [(self.student(crop) / 0.2).log_softmax(-1) for crop in batch]
        losses = [-(t * a).sum(-1).mean() for i, t in enumerate(targets) for j, a in enumerate(answers) if i != j]
        return torch.stack(losses).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for new, old in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)


class Contrastive(Project):
    """SimCLR: both views through the network at once, similarities within the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convnet = convolutional(8)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: [image(g), image(g)]), batch_size=BATCH, drop_last=True)

    def step(self, batch: Any) -> Tensor:
        features = F.normalize(self.convnet(torch.cat(batch)), dim=-1)
        similarity = features @ features.T / 0.1
        similarity = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -1e4)
        return F.cross_entropy(similarity, torch.arange(len(similarity)).roll(len(similarity) // 2))


class Forecast(Project):
    """pytorch-forecasting: an LSTM that returns quantiles in a named structure, batches of ``(x, (y, weight))``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output_layer = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)
        self.logging_metrics = nn.ModuleList([MeanMetric()])

    def data(self) -> Any:
        def row(g: torch.Generator) -> Any:
            return {"encoder_cont": torch.randn(6, 4, generator=g), "decoder_lengths": torch.tensor(1)}, (vector(g, 1), 1.0)

        return DataLoader(Rows(row), batch_size=BATCH)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded, _ = self.lstm(x["encoder_cont"])
        return {"prediction": self.output_layer(encoded[:, -1])}

    def step(self, batch: Any) -> Tensor:
        x, (y, _) = batch
        error = y - self(x)["prediction"]
        levels = torch.tensor([0.1, 0.5, 0.9])
        return torch.maximum(levels * error, (levels - 1) * error).mean()


class Replay(IterableDataset[Any]):
    """Transitions from a buffer, without an end that anybody knows."""

    def __iter__(self) -> Iterator[Any]:
        for place in range(SAMPLES):
            g = torch.Generator().manual_seed(place)
            yield vector(g), label(g), vector(g, 1), vector(g)


class QLearning(Project):
    """A DQN: a stream of transitions, a target network that is loaded now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(CLASSES)
        self.target_net = copy.deepcopy(self.net)

    def data(self) -> Any:
        return DataLoader(Replay(), batch_size=BATCH)

    def forward(self, states: Tensor) -> Tensor:
        return self.net(states)

    def step(self, batch: Any) -> Tensor:
        states, actions, rewards, following = batch
        values = self(states).gather(1, actions[:, None]).squeeze(1)
        with torch.no_grad():
            expected = self.target_net(following).max(1).values * 0.9 + rewards.squeeze(1)
        if self.global_step % 2 == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        return F.mse_loss(values, expected)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


class MetaLearning(Project):
    """ProtoMAML: an inner loop on a copy of the network, gradients carried over by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.model = perceptron(8)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: (torch.randn(8, WIDTH, generator=g), torch.arange(8) % 2)), batch_size=2)

    def step(self, batch: Any) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return self.outer_loop([part.clone() for part in batch])

    def outer_loop(self, batch: Any) -> Tensor:
        total = torch.zeros(())
        for inputs, targets in zip(*batch, strict=True):
            local = copy.deepcopy(self.model)
            head = torch.zeros(2, 8, requires_grad=True)
            loss = F.cross_entropy(F.linear(local(inputs[:4]), head), targets[:4])
            (change,) = torch.autograd.grad(loss, head)
            outer = F.cross_entropy(F.linear(self.model(inputs[4:]), head - 0.1 * change), targets[4:])
            total = total + outer
        return total / len(batch[0])


class MultiLabel(Project):
    """Several labels a sample, a collection of metrics, positive weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model = convolutional()
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0] * CLASSES))
        self.metrics = MetricCollection({"loss": MeanMetric()})

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: (image(g), torch.rand(CLASSES, generator=g).round())), batch_size=BATCH)

    def step(self, batch: Any) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])


class MultiTask(Project):
    """One trunk and two heads in a ModuleDict, a dict of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = convolutional(16)
        self.heads = nn.ModuleDict({"kind": nn.Linear(16, CLASSES), "size": nn.Linear(16, 1)})

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: {"image": image(g), "kind": label(g), "size": vector(g, 1)}), batch_size=BATCH)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.step(batch), "extra": 1}

    def step(self, batch: Any) -> Tensor:
        found = self(batch["image"])
        return F.cross_entropy(found["kind"], batch["kind"]) + F.mse_loss(found["size"], batch["size"])


class Detection(Project):
    """Lists of images and of target dicts, losses as a dict, a collate function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.boxes = convolutional(16), nn.Linear(16, 4)

    def data(self) -> Any:
        return DataLoader(
            Rows(lambda g: (image(g), {"boxes": torch.rand(4, generator=g)})),
            batch_size=BATCH,
            collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
        )

    def step(self, batch: Any) -> Tensor:
        images, targets = batch
        found = self.boxes(self.backbone(torch.stack(images)))
        return F.l1_loss(found, torch.stack([target["boxes"] for target in targets]))


class Triplet(Project):
    """Metric learning: three calls of one network in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = perceptron(8)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: tuple(vector(g) for _ in range(3))), batch_size=BATCH)

    def step(self, batch: Any) -> Tensor:
        return F.triplet_margin_loss(*(self.model(part) for part in batch))


class FrozenBackbone(Project):
    """Transfer learning: a frozen backbone in eval mode, a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = convolutional(16).requires_grad_(False).eval()
        self.classifier = nn.Linear(16, CLASSES)

    def step(self, batch: Any) -> Tensor:
        self.feature_extractor.eval()
        with torch.no_grad():
            features = self.feature_extractor(batch[0])
        return F.cross_entropy(self.classifier(features), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.classifier.parameters(), lr=0.1, momentum=0.9)


class Regression(Project):
    """A small network under L-BFGS, which evaluates a step many times."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = perceptron(1)

    def data(self) -> Any:
        return DataLoader(Rows(lambda g: (vector(g), vector(g, 1))), batch_size=BATCH)

    def step(self, batch: Any) -> Tensor:
        return F.mse_loss(self.mlp(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Configured(Project):
    """Builds its network in ``configure_model``, as for sharded strategies."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = convolutional()

    def step(self, batch: Any) -> Tensor:
        assert self.net is not None
        return F.cross_entropy(self.net(batch[0]), batch[1])


STYLES: dict[str, type[Project]] = {
    style.__name__: style
    for style in (
        *(Template, Tutorial, FineTuned, LanguageModel, Segmentation, Adversarial, AutoEncoder, Variational, Bootstrap),
        *(Distilled, Contrastive, Forecast, QLearning, MetaLearning, MultiLabel, MultiTask, Detection, Triplet),
        *(FrozenBackbone, Regression, Configured),
    )
}
