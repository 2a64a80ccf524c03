"""A book as one stream of tokens, for adapting a pretrained language model to it.

The books are those of Project Gutenberg that NLTK selected (Bird, Loper and Klein, "Natural Language Processing with Python",
2009).
"""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.assets import derived, open_member
from lightning_peft_recipes.assets import GUTENBERG
from lightning_peft_recipes.stories15m import stories_tokenizer
from lightning_peft_recipes.token_blocks import TokenBlocksDataModule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOOKS = (
    *("austen-emma", "austen-persuasion", "austen-sense", "bible-kjv", "blake-poems", "bryant-stories", "burgess-busterbrown"),
    *("carroll-alice", "chesterton-ball", "chesterton-brown", "chesterton-thursday", "edgeworth-parents"),
    *("melville-moby_dick", "milton-paradise", "shakespeare-caesar", "shakespeare-hamlet", "shakespeare-macbeth"),
    "whitman-leaves",
)
"""Names of the books."""

SPLITS = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
"""From where to where in the book each split goes."""


class ProseDataModule(TokenBlocksDataModule):
    """A book as batches of ``input_ids`` and the same ``labels``, both ``[batch, context]``, for a causal language model.

    Its first 80 % train, the next 10 % validate, the last 10 % test. Lines of a paragraph are joined. Tokens are made once,
    into the asset cache.

    Args:
        book: One of :data:`BOOKS`.
        tokenizer: ``"packaged"`` for the pinned story model's, or the name or folder of a hub tokenizer.
        context: See :class:`~lightning_peft_recipes.token_blocks.TokenBlocksDataModule`, as for all that follow.
        batch_size: Blocks per batch.
        eval_batch_size: Blocks per batch in validation and test; ``None`` is as in training.
        train_size: Training tokens to use.
        val_size: Validation tokens to use.
        test_size: Test tokens to use.
        num_workers: Loader processes.

    Raises:
        MisconfigurationException: Unknown book, a size out of range, or transformers is missing.
    """

    def __init__(
        self,
        book: str = "carroll-alice",
        tokenizer: str = "packaged",
        context: int = 128,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        train_size: float | None = None,
        val_size: float | None = None,
        test_size: float | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(context, batch_size, eval_batch_size, train_size, val_size, test_size, num_workers)
        if book not in BOOKS:
            raise MisconfigurationException(f"book={book!r} must be one of {', '.join(BOOKS)}")
        self.book, self.tokenizer_name = book, tokenizer

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MisconfigurationException(f'prose needs: pip install "lightning-peft[language]" ({error})') from error
        if self.tokenizer_name == "packaged":
            return stories_tokenizer()
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, use_fast=True).backend_tokenizer
        return tokenizer

    def load_ids(self, split: str, tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
        """The tokens of a split."""
        rules = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
        path = derived(GUTENBERG, f"prose-{self.book}-{rules}.npz", partial(_tokenise, book=self.book, tokenizer=tokenizer))
        with np.load(path, allow_pickle=False) as arrays:
            ids = arrays["ids"]
        first, last = (round(share * len(ids)) for share in SPLITS[split])
        return ids[first:last]


def read_book(book: str) -> str:
    """The text of a book, a line for every paragraph and an empty one between them."""
    text = open_member(GUTENBERG, f"package/gutenberg/{book}.txt").getvalue().decode("latin-1")
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\r?\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _tokenise(path: Path, book: str, tokenizer: Tokenizer) -> None:
    np.savez(path, ids=np.array(tokenizer.encode(read_book(book), add_special_tokens=False).ids, dtype=np.int32))
