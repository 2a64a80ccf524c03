"""The packaged story model, its tokenizer, and books cut into blocks for it."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from recipe_helpers import needs, quick_trainer

from lightning_peft import LoRA
from lightning_peft_recipes.assets import GUTENBERG, STORIES15M
from lightning_peft_recipes.language_model import PretrainedLanguageModel
from lightning_peft_recipes.prose import BOOKS, ProseDataModule, read_book
from lightning_peft_recipes.stories15m import stories_llama, stories_tokenizer, tokenizer_from_scores

pytest.importorskip("transformers")

# What the official tokenizer of Llama 2 makes of the example prompts of its repository, without the first token.
PROMPTS = {
    "I believe the meaning of life is": [306, 4658, 278, 6593, 310, 2834, 338],
    "Simply put, the theory of relativity states that ": [
        *(3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871),
    ],
    "A brief message congratulating the team on the launch:\n\n        Hi everyone,\n\n        I just ": [
        *(319, 11473, 2643, 378, 629, 271, 18099, 278, 3815, 373, 278, 6826, 29901, 13, 13, 4706, 6324, 14332, 29892, 13, 13),
        *(4706, 306, 925, 29871),
    ],
}
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she saw a big, "
    "red ball in the sky."
)


@pytest.fixture
def stories():
    needs(STORIES15M)


@pytest.fixture
def alice(stories):
    needs(GUTENBERG)


@pytest.mark.network
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_tokenizer_is_that_of_llama(stories, prompt):
    tokenizer = stories_tokenizer()
    ids = tokenizer.encode(prompt).ids
    assert ids == PROMPTS[prompt]
    assert tokenizer.decode(ids) == prompt


def test_what_scores_highest_is_joined_first():
    letters = [(b"a", -9.0), (b"b", -9.0), (b"c", -9.0)]
    single = [(b"", 0.0)] * 259
    for scores, pieces in (((-1.0, -2.0), ["ab", "c"]), ((-2.0, -1.0), ["a", "bc"])):
        tokens = [*single, (b" ", -9.0), *letters, (b"ab", scores[0]), (b"bc", scores[1])]
        assert tokenizer_from_scores(tokens).encode("abc").tokens == ["▁", *pieces]


@pytest.mark.network
def test_the_story_model_tells_the_story_that_llama2c_tells(stories):
    tokenizer, model = stories_tokenizer(), stories_llama().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer.encode(STORY).ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, *ids]])).logits[0]
    assert logits[5:-1].argmax(-1).tolist() == ids[5:], "each next token of the greedy story after: Once upon a time,"


@pytest.mark.network
def test_a_book_is_cut_into_parts_that_follow_each_other(alice):
    data = ProseDataModule(context=16, batch_size=4, eval_batch_size=2, val_size=320)
    data.prepare_data()
    data.setup()
    text = read_book("carroll-alice")
    assert text.startswith("[Alice's Adventures in Wonderland by Lewis Carroll 1865]\n\nCHAPTER I. Down the Rabbit-Hole\n\nAl")
    assert "\n" not in text.replace("\n\n", "")
    ids = data.load_tokenizer().encode(text).ids
    parts = [data.load_ids(split, data.tokenizer).tolist() for split in ("train", "val", "test")]
    assert [token for part in parts for token in part] == ids
    assert [round(len(part) / len(ids), 3) for part in parts] == [0.8, 0.1, 0.1]
    assert data._splits["val"].flatten().tolist() == parts[1][:320]
    assert next(iter(data.test_dataloader()))["input_ids"].shape == (2, 16)


@pytest.mark.network
def test_every_book_is_there(alice):
    assert len(set(BOOKS)) == 18
    for book in BOOKS:
        assert len(read_book(book)) > 30_000
    with pytest.raises(MisconfigurationException, match="carroll-alice"):
        ProseDataModule("carroll-snark")


@pytest.mark.network
def test_the_story_model_knows_stories_and_learns_other_prose(alice, tmp_path):
    data = ProseDataModule(context=32, batch_size=4, train_size=640, val_size=64, test_size=640)
    module = PretrainedLanguageModel(lr=3e-3)
    assert module.model.training
    trainer = quick_trainer(tmp_path, max_epochs=1, callbacks=[LoRA(rank=4)], limit_val_batches=0)
    (before,) = quick_trainer(tmp_path).test(module, data, verbose=False)
    embedding = module.model.model.embed_tokens.weight.clone()
    trainer.fit(module, data)
    (after,) = quick_trainer(tmp_path).test(module, data, verbose=False)
    assert set(after) == {"test/loss", "test/perplexity"}
    assert after["test/perplexity"] == pytest.approx(torch.tensor(after["test/loss"]).exp().item(), rel=1e-5)
    assert after["test/perplexity"] < 0.95 * before["test/perplexity"]
    assert torch.equal(module.model.model.embed_tokens.weight, embedding), "embedding and head are one, and stay"
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
