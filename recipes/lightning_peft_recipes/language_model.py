"""Causal language models, a small Llama trained from scratch and pretrained ones, as any Lightning user would write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightning_peft_recipes.classification import warmup_cosine
from lightning_peft_recipes.stories15m import stories_llama


class CausalModel(LightningModule):
    """Base of the language models, on batches of ``input_ids`` and ``labels``; a subclass sets ``model``.

    Logs ``train/loss``, ``val/loss`` and ``test/loss``, cross-entropy in nats per predicted token, and ``test/perplexity``,
    its exponential.

    Args:
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices, the embedding included; normalisation weights have none.
        warmup: Share of all steps in which the learning rate rises linearly.
        floor: Where the cosine after it ends, as a share of ``lr``.
    """

    model: nn.Module

    def __init__(self, lr: float, weight_decay: float, warmup: float, floor: float) -> None:
        super().__init__()
        self.lr, self.weight_decay, self.warmup, self.floor = lr, weight_decay, warmup, floor
        self.test_loss = MeanMetric()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits, shape ``[batch, tokens, vocab_size]``, of token ids, shape ``[batch, tokens]``."""
        return self.model(input_ids=input_ids).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        loss, tokens = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=tokens)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss on validation data."""
        loss, tokens = self._loss(batch)
        self.log("val/loss", loss, prog_bar=True, batch_size=tokens, sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss on test data."""
        self.test_loss.update(*self._loss(batch))
        self.log("test/loss", self.test_loss)

    def on_test_epoch_end(self) -> None:
        """Perplexity: of the mean over all tokens, not a mean over batches."""
        self.log("test/perplexity", self.test_loss.compute().exp(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with two parameter groups, stepped per batch by warm-up and cosine."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        total = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, self.warmup, self.floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Mean cross-entropy, in which each token predicts the next, and the number of tokens predicted."""
        logits, targets = self(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), targets.numel()


class LanguageModel(CausalModel):
    """A Llama of transformers (Touvron et al., 2023) with random weights.

    Under Lightning's ``ModelParallelStrategy`` processes share the weights of each block; elsewhere nothing is different.

    Args:
        vocab_size: Tokens in the vocabulary, as many as the data have.
        context: Longest sequence.
        hidden_size: Width of the blocks.
        depth: Number of blocks.
        heads: Attention heads.
        ffn: Hidden width of the blocks' feed-forward parts.
        lr: See :class:`CausalModel`, as for all that follow.
        weight_decay: Weight decay of matrices.
        warmup: Share of all steps in which the learning rate rises.
        floor: Where the cosine after it ends, as a share of ``lr``.

    Raises:
        MisconfigurationException: transformers is missing, or ``heads`` does not divide ``hidden_size``.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        context: int = 128,
        hidden_size: int = 192,
        depth: int = 8,
        heads: int = 6,
        ffn: int = 512,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
        floor: float = 0.1,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, floor)
        self.save_hyperparameters()
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise MisconfigurationException(f'text models need: pip install "lightning-peft[language]" ({error})') from error
        if hidden_size % heads or hidden_size // heads % 2:  # rotary positions turn pairs of channels
            raise MisconfigurationException(f"hidden_size={hidden_size} must be an even multiple of heads={heads}")
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=ffn,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                max_position_embeddings=context,
                tie_word_embeddings=True,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=0,
            )
        )

    def configure_model(self) -> None:
        """Shard every block by itself, and the embedding, which is the head too, with the whole."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class PretrainedLanguageModel(CausalModel):
    """A causal model of transformers with its weights, to be trained on other text.

    Args:
        weights: ``"packaged"`` for the pinned story model (Llama, 6 layers, width 288), or the name or folder of a hub model.
        lr: See :class:`CausalModel`, as for all that follow.
        weight_decay: Weight decay of matrices.
        warmup: Share of all steps in which the learning rate rises.
        floor: Where the cosine after it ends, as a share of ``lr``.

    Raises:
        MisconfigurationException: transformers is missing.
    """

    def __init__(
        self,
        weights: str = "packaged",
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        floor: float = 0.1,
    ) -> None:
        super().__init__(lr, weight_decay, warmup, floor)
        self.save_hyperparameters()
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise MisconfigurationException(f'text models need: pip install "lightning-peft[language]" ({error})') from error
        self.model = stories_llama() if weights == "packaged" else AutoModelForCausalLM.from_pretrained(weights)
        self.model.train()  # transformers hands its models out in evaluation mode
