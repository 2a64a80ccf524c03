"""FOA: prompts found by evolution, without a gradient, and class tokens moved back to where the source had them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Run
from lightning_peft.arguments import positive
from lightning_peft.capture.evaluation import Call
from lightning_peft_plugins.test_time._foa.evolution import Evolution
from lightning_peft_plugins.test_time._foa.token_path import TokenPath
from lightning_peft_plugins.test_time._shared.classifier import Classifier
from lightning_peft_plugins.test_time._shared.source_calls import source_calls
from lightning_peft_plugins.test_time._shared.stream import StreamMethod
from lightning_peft_plugins.test_time.functional.foa import prompt_fitness


class FOA(StreamMethod):
    """Learns prompts, tokens beside those of the image, by an evolution strategy; forward passes only, no weight moves.

    For each batch ``population + 1`` prompts are tried, the last batch's best among them. Their fitness is the entropy of the
    predictions plus how far mean and deviation of the class token after every block are from the source's. The fittest
    predicts, after its class token was moved by the distance between the source's mean and that of the stream.

    Args:
        source: A little of the source, as a dataloader whose batches the module's step takes (labels are not read).
        source_samples: How many samples of it are measured.
        prompts: Number of prompts.
        population: Prompts proposed for each batch.
        strength: Weight of the discrepancy; 0.2 on ImageNet-R.
        shift: How much of the distance class tokens are moved by.
        average_momentum: Of the stream's mean.
        seed: Seed of first prompts and evolution.
        classifier: Qualified name of the linear layer that makes the logits; by default the one whose output is returned.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.stream.StreamMethod`.

    Example:
        >>> FOA(source=[], population=14).prompts
        3
    """

    paper = "Niu et al.: Test-Time Model Adaptation with Only Forward Passes, ICML 2024, https://arxiv.org/abs/2404.01650"

    def __init__(
        self,
        *,
        source: Iterable[Any] | None = None,
        source_samples: int = 32,
        prompts: int = 3,
        population: int = 27,
        strength: float = 0.4,
        shift: float = 1.0,
        average_momentum: float = 0.9,
        seed: int = 2020,
        classifier: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("prompts", prompts), ("population", population)):
            positive(name, value)
        if source is None:
            raise MisconfigurationException(
                f"{self.name} compares activations with the source's. Pass source=<dataloader of clean data>; 32 samples "
                "without labels are enough."
            )
        if self.keep:
            raise MisconfigurationException(
                f"{self.name} adds tokens and leaves the network as it is: there is nothing to keep. Leave keep out."
            )
        self.no_layers_to_choose("prompts= says how many tokens are added")
        self.data, self.source_samples, self.prompts, self.population = source, source_samples, prompts, population
        self.strength, self.shift, self.average_momentum = strength, shift, average_momentum
        self.seed, self.classifier = seed, classifier

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        self._classifier = Classifier(self.name, run, self.classifier)
        self._path: TokenPath | None = None
        features = torch.cat(list(self._source_features(run)))
        if len(features) < 2:
            raise MisconfigurationException(f"{self.name}: source= has {len(features)} samples, too few for a deviation.")
        self._deviation, self._mean = torch.std_mean(features, dim=0)
        self.to_source()

    def _source_features(self, run: Run) -> Iterable[Tensor]:
        """Class tokens of the source, without prompts."""
        seen = 0
        for call in source_calls(run, self.data):
            with torch.no_grad():
                if self._path is None:
                    self._path = TokenPath(self.name, run, self._classifier, call)
                features = self._path.run(call, None)[1]
            yield features.to(torch.promote_types(features.dtype, torch.float32))
            seen += call.size
            if seen >= self.source_samples:
                return

    def update(self, call: Call) -> Any:
        assert self._path is not None
        distance = None if self._stream_mean is None else self._mean[-self._path.width :] - self._stream_mean
        if call.size < 2:  # has no deviation
            return self._predict(call, self._best, distance)[0]
        solutions = [*self._evolution.ask(), self._best.flatten()]
        best, answer, losses, means = math.inf, None, [], []
        for solution in solutions:
            prompts = torch.as_tensor(solution, dtype=torch.float32).view(self.prompts, -1)
            output, logits, features = self._predict(call, prompts, distance)
            losses.append(float(prompt_fitness(logits, features, self._mean, self._deviation, self.strength)))
            means.append(features[:, -self._path.width :].mean(0))
            if losses[-1] < best:
                best, answer, self._best = losses[-1], output, prompts
        if answer is None or not all(map(math.isfinite, losses)):  # what is not finite has no place in a covariance
            self.note(fitness=best)
            return call() if answer is None else answer
        self._evolution.tell(solutions, losses)
        self._stream_mean = self._averaged(torch.stack(means).mean(0))
        self.updates += 1
        self.note(fitness=best)
        return answer

    def _predict(self, call: Call, prompts: Tensor, distance: Tensor | None) -> tuple[Any, Tensor, Tensor]:
        """The output for a call with some prompts, shifted; and its logits before that, and class tokens, for the fitness."""
        assert self._path is not None
        output, features = self._path.run(call, prompts)
        logits = self.logits(output)
        self.one_a_sample(logits, call.size, "it reads the class token of each")
        fine = features.to(self._mean.dtype)
        if distance is not None:
            last = fine[:, -self._path.width :] + self.shift * distance
            output = self.with_logits(output, self._classifier.layer(last.to(features.dtype)))
        return output, logits.to(fine.dtype), fine

    def _averaged(self, mean: Tensor) -> Tensor:
        if self._stream_mean is None:
            return mean
        return self.average_momentum * self._stream_mean + (1 - self.average_momentum) * mean

    def to_source(self) -> None:
        path = getattr(self, "_path", None)
        if path is None:
            return
        limit = math.sqrt(6.0 / (path.fan_in + path.width))
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.rand(self.prompts, path.width, generator=generator, dtype=torch.float32)
        self._best = (2 * first - 1) * limit
        self._evolution = Evolution(self._best.numel(), self.population, self.seed)
        self._stream_mean: Tensor | None = None

    def release(self) -> None:
        self._path = None
