"""T3A: the linear classifier gives way to templates made of the stream's own surest features."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft import Run
from lightning_peft.arguments import positive
from lightning_peft.capture.evaluation import Call
from lightning_peft.contract import SHARDED
from lightning_peft.weights.mapped_layer import is_mapped
from lightning_peft.weights.shards import opened, whole
from lightning_peft_plugins.test_time._shared.classifier import Classifier
from lightning_peft_plugins.test_time._shared.finite_samples import finite_rows
from lightning_peft_plugins.test_time._shared.stream import StreamMethod
from lightning_peft_plugins.test_time.functional.predictions import softmax_entropy
from lightning_peft_plugins.test_time.functional.t3a import class_templates, select_supports


class T3A(StreamMethod):
    """Classifies by similarity to templates, which begin as the classifier's weights and gather features of the stream.

    Every sample joins the support set of the class it is predicted as; each set keeps the features whose predictions are
    surest. The template of a class is the mean direction of its set. No gradient, no parameter moves, and samples of one batch
    help each other. What comes back as logits is the product of features and templates.

    Args:
        per_class: Features kept for each class: 1, 5, 20, 50 or 100 in the paper's search; ``None`` keeps all, and grows with
            the stream.
        classifier: Qualified name of the linear layer that makes the logits; by default the one whose output is returned.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.stream.StreamMethod`; ``keep=True`` leaves the
            templates in the classifier.

    Example:
        >>> T3A(per_class=20).per_class
        20
    """

    strategies = SHARDED
    paper = (
        "Iwasawa, Matsuo: Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization, NeurIPS 2021, "
        "https://openreview.net/forum?id=e_yvNqkJKAW"
    )

    def __init__(self, *, per_class: int | None = 100, classifier: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if per_class is not None:
            positive("per_class", per_class)
        self.no_layers_to_choose("classifier= names the layer that the templates replace")
        self.per_class, self.classifier = per_class, classifier
        self._supports: tuple[Tensor, Tensor, Tensor] | None = None

    def adapt_start(self, run: Run) -> None:
        super().adapt_start(run)
        self.to_source()
        self._classifier = Classifier(self.name, run, self.classifier)

    def update(self, call: Call) -> Any:
        output, features = self._classifier.run(call)
        logits = self.logits(output)
        self.one_a_sample(logits, call.size, "it keeps one feature vector of each")
        layer = self._classifier.layer
        if logits.shape[-1] != layer.out_features:
            raise MisconfigurationException(
                f"{self.name}: the network returns {logits.shape[-1]} classes, and the classifier has {layer.out_features}. "
                "Name the layer that makes the logits: classifier=<name of an nn.Linear>."
            )
        if self.keep and is_mapped(layer, "weight"):
            raise MisconfigurationException(
                f"{self.name} with keep=True writes its templates into the classifier, whose weight another method makes. "
                "Leave keep=True out."
            )
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        finite = finite_rows(features) & finite_rows(logits)
        self._gather(features[finite])
        self.updates += 1
        self.note(supports=float(len(self._supports[0]) if self._supports else 0))
        adjusted = logits.clone()
        adjusted[finite] = (features[finite] @ self._templates().T).to(logits.dtype)
        return self.with_logits(output, adjusted)

    def _gather(self, features: Tensor) -> None:
        """Offer features to the support sets; the first are the classifier's own weights."""
        layer = self._classifier.layer
        weight = whole(layer.weight.detach()).to(features.dtype)
        bias = None if layer.bias is None else whole(layer.bias.detach()).to(features.dtype)
        if self._supports is None:
            features = torch.cat([weight, features])
        answers = torch.nn.functional.linear(features, weight, bias)
        new = (features, answers.argmax(1), softmax_entropy(answers))
        both = new if self._supports is None else tuple(map(torch.cat, zip(self._supports, new, strict=True)))
        supports, labels, entropy = both
        kept = select_supports(entropy, labels, self.per_class)
        self._supports = (supports[kept], labels[kept], entropy[kept])

    def _templates(self) -> Tensor:
        assert self._supports is not None
        supports, labels, _ = self._supports
        return class_templates(supports, labels, self._classifier.layer.out_features)

    def to_source(self) -> None:
        self._supports = None

    @torch.no_grad()
    def leave(self) -> None:
        super().leave()
        if self._supports is not None:
            layer = self._classifier.layer
            with opened(layer.weight) as weight:
                weight.copy_(self._templates())
            if layer.bias is not None:
                layer.bias.zero_()

    def release(self) -> None:
        self._supports = None
