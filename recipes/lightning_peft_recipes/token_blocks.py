"""What the data modules of running text share: one stream of tokens a split, cut into blocks for a causal language model."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_peft_recipes.reviews import SPLITS, splits_for
from lightning_peft_recipes.split_loaders import SplitLoaders
from lightning_peft_recipes.subsets import subset_count

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenBlocksDataModule(SplitLoaders):
    """Base of the data modules of running text; a subclass says what the tokenizer is and which tokens a split has.

    Batches are dictionaries of ``input_ids`` and the same ``labels``, both ``[batch, context]``. The model does the shift:
    position ``i`` predicts label ``i + 1``. A size takes the first tokens of a split; what is left over at its end is not used.

    Args:
        context: Tokens per block.
        batch_size: Blocks per batch. An incomplete last training batch is dropped: every step sees as many tokens.
        eval_batch_size: Blocks per batch in validation and test; ``None`` is as in training.
        train_size: Training tokens to use: a share in (0, 1), a number, or ``None`` for all.
        val_size: Validation tokens to use.
        test_size: Test tokens to use.
        num_workers: Loader processes. The tokens are in memory, so 0 is usually fastest.

    Attributes:
        tokenizer: The tokenizer, after ``setup``.

    Raises:
        MisconfigurationException: A size out of range.
    """

    tokenizer: Tokenizer

    def __init__(
        self,
        context: int,
        batch_size: int,
        eval_batch_size: int | None,
        train_size: float | None,
        val_size: float | None,
        test_size: float | None,
        num_workers: int,
    ) -> None:
        super().__init__()
        if context < 2:
            raise MisconfigurationException(f"context={context} must be at least 2: there is nothing to predict in one token")
        self.context = context
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for size in self.sizes.values():
            subset_count(size, 1)  # refuse a bad value now, not after the download
        self._splits: dict[str, Tensor] = {}

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, from the asset cache once it is there."""

    @abstractmethod
    def load_ids(self, split: str, tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
        """Token ids of a split, one stream, from the asset cache once they are there."""

    def prepare_data(self) -> None:
        """Fetch the texts and tokenise every split, into the asset cache."""
        tokenizer = self.load_tokenizer()
        for split in SPLITS:
            self.load_ids(split, tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that ``stage`` (``fit``, ``validate``, ``test``, ``predict``; ``None`` for all) needs."""
        self.tokenizer = self.load_tokenizer()
        for split in splits_for(stage):
            if split not in self._splits:
                self._splits[split] = self._blocks(split)

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
        blocks = self._splits[split]
        return DataLoader(
            _Blocks(blocks),
            batch_size=self.batch_size if split == "train" else self.eval_batch_size or self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and len(blocks) >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_collate,
        )

    def _blocks(self, split: str) -> Tensor:
        ids = self.load_ids(split, self.tokenizer)
        used = subset_count(self.sizes[split], len(ids))
        if used < self.context:
            raise MisconfigurationException(
                f"{split}_size={self.sizes[split]} is {used} of {len(ids)} tokens, under one block of context={self.context}"
            )
        return torch.from_numpy(ids[: used - used % self.context].astype(np.int32)).view(-1, self.context)


class _Blocks(Dataset[Tensor]):
    """Rows of a matrix of token ids."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


def _collate(blocks: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(blocks).long()
    return {"input_ids": ids, "labels": ids.clone()}
