"""RMT: a robust mean teacher, with features held near the source's prototypes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft_plugins.test_time._rmt.source_stream import SourceStream
from lightning_peft_plugins.test_time._shared.classifier import Classifier
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.teacher import TeacherMethod
from lightning_peft_plugins.test_time.functional.predictions import symmetric_cross_entropy
from lightning_peft_plugins.test_time.functional.rmt import contrast_of_groups, nearest_prototypes


class RMT(TeacherMethod):
    """Trains the whole network towards its own moving average, by symmetric cross entropy, and predicts with the sum of both.

    A contrastive loss draws the features of a sample and of a view of it to the source's prototype (mean feature of a class)
    that is nearest to the sample. With source data at hand, its batches are learnt along with their labels (replay), and the
    teacher is warmed up on them before the stream begins.

    Args:
        source: Labelled source data, as a dataloader whose batches the module's step takes; ``None`` for the variant without.
        prototypes: Mean feature of each class in the source, shape ``(classes, width)``, instead of those computed from
            ``source``.
        source_samples: How many samples of ``source`` make the prototypes.
        warm_up: Samples of ``source`` that the warm-up sees; the learning rate rises linearly meanwhile.
        replay: Weight of the cross entropy on ``source``.
        self_training: Weight of the symmetric cross entropy.
        contrast: Weight of the contrastive loss; 0 needs no prototypes.
        temperature: Of the contrastive loss.
        projection: Width of the two layers that features go through before they are compared; 0 compares them as they are.
        seed: Of the two layers' first values.
        classifier: Qualified name of the linear layer that makes the logits; by default the one whose output is returned.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.teacher.TeacherMethod`.

    Raises:
        MisconfigurationException: There is neither ``source`` nor ``prototypes``.

    Example:
        >>> RMT(contrast=0.0).self_training
        1.0
    """

    paper = (
        "Döbler, Marsden, Yang: Robust Mean Teacher for Continual and Gradual Test-Time Adaptation, CVPR 2023, "
        "https://arxiv.org/abs/2211.13081"
    )

    def __init__(
        self,
        *,
        source: Iterable[Any] | None = None,
        prototypes: Tensor | None = None,
        source_samples: int = 100_000,
        warm_up: int = 50_000,
        replay: float = 1.0,
        self_training: float = 1.0,
        contrast: float = 1.0,
        temperature: float = 0.1,
        projection: int = 128,
        seed: int = 0,
        classifier: str | None = None,
        lr: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        if source is None and prototypes is None and contrast:
            raise MisconfigurationException(
                f"{self.name} holds features near the source's prototypes. Pass source=<dataloader of labelled source data>, "
                "or prototypes=<mean feature of each class>, or leave them out of the loss: contrast=0.0."
            )
        self.data, self.prototypes, self.source_samples, self.warm_up = source, prototypes, source_samples, warm_up
        self.replay, self.self_training, self.contrast = replay, self_training, contrast
        self.temperature, self.projection, self.seed, self.classifier = temperature, projection, seed, classifier
        self._projector: nn.Module | None = None
        self._warmed: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None = None
        self._stream: SourceStream | None = None

    # Before the stream.

    def adapt_start(self, run: Run) -> None:
        self._warmed = self._projector = None
        self._stream = None if self.data is None else SourceStream(self.name, run, self.data)
        self._classifier = Classifier(self.name, run, self.classifier)
        super().adapt_start(run)
        self._means = self._prototypes() if self.contrast else None
        if self._means is not None and self.projection:
            self._projector = self._new_projector(self._means)
            self.beside = list(self._projector.parameters())
            self.new_optimizer()
        self._warm_up()

    def _prototypes(self) -> Tensor:
        """Mean feature of each class in the source."""
        if self.prototypes is not None or self._stream is None:
            assert self.prototypes is not None
            assert self.run is not None
            return self.prototypes.to(self.run.module.device)
        features, labels, seen = [], [], 0
        for call, own in self._stream.once():
            with torch.no_grad():
                found = self._classifier.run(call)[1]
            features.append(found.to(torch.promote_types(found.dtype, torch.float32)))
            labels.append(own)
            seen += call.size
            if seen >= self.source_samples:
                break
        return self._means_of(torch.cat(features), torch.cat(labels))

    def _means_of(self, features: Tensor, labels: Tensor) -> Tensor:
        classes = self._classifier.layer.out_features
        missing = sorted({*range(classes)} - {*labels.tolist()})
        if missing:
            raise MisconfigurationException(
                f"{self.name}: the {len(labels)} source samples have none of class {', '.join(map(str, missing[:5]))}, so "
                "those have no prototype. Give more of the source, source_samples=<more>, or prototypes=<one a class>."
            )
        return torch.stack([features[labels == label].mean(0) for label in range(classes)])

    def _new_projector(self, prototypes: Tensor) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # layers draw their first values from the global generator
            torch.manual_seed(self.seed)
            first, second = nn.Linear(prototypes.shape[1], self.projection), nn.Linear(self.projection, self.projection)
        return nn.Sequential(first, nn.ReLU(), second).to(prototypes.device, prototypes.dtype)

    def _warm_up(self) -> None:
        """Let teacher and network part on the source, and keep where they got to: resets lead back there."""
        if self._stream is None or not self.warm_up:
            return
        assert self.optimizer is not None
        call, _ = self._stream.next()
        count = max(1, self.warm_up // call.size)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for place in range(count):
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (place + 1) / count
            with torch.enable_grad():
                logits = self.logits(call())
                with torch.no_grad():
                    target = self.predict_with(call, self.teacher)
                symmetric_cross_entropy(logits, target).mean().backward()
            self.step(call.size)
            self.follow()
            if place + 1 < count:
                call, _ = self._stream.next()
        weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        teacher = {name: value.clone() for name, value in self.teacher.items()}
        self._warmed = (weights, teacher, copy.deepcopy(self.optimizer.state_dict()))
        self._stream.mark()
        self.updates = 0

    # The stream.

    def descend(self, call: Call) -> Any:
        with torch.enable_grad():
            with self.predicting():
                output, features = self._classifier.run(call)
            logits = self.logits(output)
        self.one_a_sample(logits, call.size, "it compares the features of samples")
        with self.predicting():
            target = self.predict_with(call, self.teacher)
        prediction = self.with_logits(output, logits.detach() + target)
        sound = finite_rows(logits.detach()) & finite_rows(target)
        if not bool(sound.all()):  # backwards, 0 times NaN is NaN; what makes a sample NaN is seen before the next batch
            self.note(selected=0.0)
            return prediction
        with torch.enable_grad():
            loss = self._loss(call, logits, features, target)
        loss.backward()
        self.note(selected=1.0, loss=float(loss))
        self.step(call.size)
        self.follow()
        return prediction

    def _loss(self, call: Call, logits: Tensor, features: Tensor, target: Tensor) -> Tensor:
        output, view_features = self._classifier.run(call.with_inputs(self.augment))
        both = symmetric_cross_entropy(logits, target) + symmetric_cross_entropy(self.logits(output), target)
        loss = self.self_training * both.mean() / 2
        if self._means is not None:
            loss = loss + self.contrast * self._contrast(self._means, features, view_features)
        if self._stream is not None and self.replay:
            source, labels = self._stream.next()
            answers = self.logits(source())
            loss = loss + self.replay * nn.functional.cross_entropy(answers, labels)
        return loss

    def _contrast(self, prototypes: Tensor, features: Tensor, views: Tensor) -> Tensor:
        if features.shape[1] != prototypes.shape[1]:
            raise MisconfigurationException(
                f"{self.name}: prototypes are {prototypes.shape[1]} wide, and the classifier's features {features.shape[1]}. "
                "Give the mean of what the classifier is given, one row a class."
            )
        nearest = prototypes[nearest_prototypes(features.detach().to(prototypes.dtype), prototypes)]
        groups = torch.stack([nearest, features.to(prototypes.dtype), views.to(prototypes.dtype)], 1)
        return contrast_of_groups(groups if self._projector is None else self._projector(groups), self.temperature)

    # And back.

    def to_source(self) -> None:
        if self._projector is not None and self._means is not None:
            fresh = self._new_projector(self._means)
            self._projector.load_state_dict(fresh.state_dict())
        super().to_source()
        if self._warmed is not None and self._adapting:
            self._to_warmed(*self._warmed)

    @torch.no_grad()
    def _to_warmed(self, weights: dict[str, Tensor], teacher: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        assert self.optimizer is not None
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
            self.teacher[name].copy_(teacher[name])
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))  # which would be stepped on itself

    def forget(self) -> None:
        if self._stream is not None:
            self._stream.to_mark()
        super().forget()

    def release(self) -> None:
        super().release()
        self._projector = self._stream = self._warmed = self._means = None
