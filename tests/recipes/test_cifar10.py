from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from recipe_helpers import needs, quick_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.network.channel_units import channel_units
from lightning_peft_recipes.assets import CIFAR10, CIFAR10_CNN
from lightning_peft_recipes.cifar10 import MEAN, STD, CIFAR10DataModule, normalise, random_crops
from lightning_peft_recipes.cifar10_vgg import CIFAR10VGG

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def small():
    needs(CIFAR10)
    data = CIFAR10DataModule(batch_size=20, eval_batch_size=25, train_size=60, val_size=0.01, test_size=200)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.network
def test_splits_are_stratified_and_the_order_is_the_original(small):
    assert [len(small._splits[split]) for split in ("train", "val", "test")] == [60, 50, 200]
    for split, each in (("train", 6), ("val", 5), ("test", 20)):
        assert torch.bincount(small._splits[split].tensors[1]).tolist() == [each] * 10
    whole = CIFAR10DataModule()
    whole.setup("test")
    images, labels = whole._splits["test"].tensors
    assert labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1], "as in torchvision"
    assert (images.shape, images.dtype) == ((10_000, 3, 32, 32), torch.uint8)
    assert torch.equal(small._splits["test"].tensors[0], images[small._test_indices])


@pytest.mark.network
def test_validation_images_are_held_out_whatever_the_sizes():
    needs(CIFAR10)
    data = CIFAR10DataModule(batch_size=500)
    data.setup("fit")
    assert [len(data._splits[split]) for split in ("train", "val")] == [45_000, 5_000]
    pixels = torch.cat([normalise(data._splits[split].tensors[0][::5]) for split in ("train", "val")])
    assert pixels.mean((0, 2, 3)).abs().max() < 0.02
    assert (pixels.std((0, 2, 3)) - 1).abs().max() < 0.02
    held_out = {image.numpy().tobytes() for image in data._splits["val"].tensors[0]}
    assert not held_out & {image.numpy().tobytes() for image in data._splits["train"].tensors[0]}


@pytest.mark.network
def test_batches_are_normalised_and_repeat_with_the_seed(small):
    images, labels = next(iter(small.test_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((25, 3, 32, 32), torch.float32, torch.int64)
    assert torch.equal(images, normalise(small._splits["test"].tensors[0][:25]))
    runs = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        runs.append(torch.cat([images for images, _ in small.train_dataloader()]))
    assert runs[0].shape == (60, 3, 32, 32)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_crops_shift_and_flip_whole_images():
    ramp = torch.arange(32, dtype=torch.uint8).expand(300, 3, 32, 32).contiguous()
    torch.manual_seed(0)
    crops = random_crops(ramp)
    assert (crops.shape, crops.dtype) == (ramp.shape, torch.uint8)
    middle = crops[:, 0, :, 6:26].int()
    assert bool((middle == middle[:, :1]).all()), "all rows alike"
    steps = middle[:, 0].diff(dim=1)
    flipped = (steps == -1).all(1)
    assert bool(((steps == 1).all(1) | flipped).all())
    assert 100 <= int(flipped.sum()) <= 200
    shifts = (middle[~flipped, 0, 0] - 6).unique().tolist()
    assert shifts == list(range(-4, 5))
    same = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert set(same.unique().tolist()) >= set(random_crops(same).unique().tolist())


def test_pixels_are_scaled_per_channel():
    grey = normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert torch.allclose(grey, (1 - torch.tensor(MEAN)) / torch.tensor(STD))


@pytest.mark.network
def test_shifted_images_are_the_test_images_in_their_order(small):
    pytest.importorskip("imagecorruptions")
    from lightning_peft_recipes.corruptions import CORRUPTIONS, SEVERITIES, corrupt

    assert small.shifts() == dict.fromkeys(CORRUPTIONS, SEVERITIES)
    template = small.test_dataloader()
    clean, labels = template.dataset.tensors
    noisy = small.shifted("gaussian_noise", 1)
    assert torch.equal(noisy.tensors[0], corrupt(clean, "gaussian_noise", 1, indices=small._test_indices))
    assert torch.equal(noisy.tensors[1], labels)
    deviation = (noisy.tensors[0].float() - clean.float())[(clean > 90) & (clean < 160)].std() / 255
    assert deviation == pytest.approx(0.08, abs=0.003), "the strength of ImageNet-C, twice that of CIFAR-10-C"
    images, _ = next(iter(DataLoader(noisy, template.batch_size, collate_fn=template.collate_fn)))
    assert images.shape == (25, 3, 32, 32)
    with pytest.raises(MisconfigurationException, match="rain"):
        small.shifted("rain", 1)


def test_torchvision_is_the_online_source(monkeypatch, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path))
    asked = []

    def fake(root, train, download):
        asked.append((root.name, train, download))
        count = 400 if train else 40
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=[index % 10 for index in range(count)])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    data = CIFAR10DataModule("torchvision", batch_size=8, test_size=20)
    data.prepare_data()
    data.setup()
    assert asked[:2] == [("torchvision", True, True), ("torchvision", False, True)]
    assert not any(download for _, _, download in asked[2:])
    assert [len(data._splits[split]) for split in ("train", "val", "test")] == [360, 40, 20]
    assert next(iter(data.train_dataloader()))[0].shape == (8, 3, 32, 32)


def test_bad_arguments_are_refused():
    for arguments, message in (({"source": "kaggle"}, "torchvision"), ({"test_size": -1}, "subset=")):
        with pytest.raises(MisconfigurationException, match=message):
            CIFAR10DataModule(**arguments)


@pytest.mark.network
def test_the_packaged_network_is_as_good_as_its_package(small):
    pytest.importorskip("h5py")
    needs(CIFAR10_CNN)
    from lightning_peft_recipes.cifar10_cnn import CIFAR10CNN

    module = CIFAR10CNN().eval()
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()) == 6
    data = CIFAR10DataModule(eval_batch_size=250, test_size=1000)
    data.setup("test")
    with torch.no_grad():
        right = sum(int((module(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
    assert right == pytest.approx(807, abs=1)  # 8,014 of all 10,000
    assert isinstance(module.head(), nn.Linear)


def test_scaling_is_folded_into_the_first_convolution_exactly(monkeypatch):
    h5py = pytest.importorskip("h5py")
    import io

    from lightning_peft_recipes import cifar10_cnn

    # A file as Keras writes it, with raw-pixel weights of our own.
    torch.manual_seed(0)
    raw = cifar10_cnn.cnn().eval()
    file = io.BytesIO()
    with h5py.File(file, "w") as out:
        for kind, layer_type in (("conv2d", nn.Conv2d), ("batch_normalization", nn.BatchNorm2d), ("dense", nn.Linear)):
            for index, layer in enumerate(layer for layer in raw if isinstance(layer, layer_type)):
                name = f"{kind}_{index}" if index else kind
                for own, key in cifar10_cnn.KERAS[kind].items():
                    value = getattr(layer, own).detach().numpy()
                    turned = value.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim])
                    out[f"model_weights/{name}/{name}/{key}:0"] = turned
    monkeypatch.setattr(cifar10_cnn, "open_member", lambda *_: io.BytesIO(file.getvalue()))
    network = cifar10_cnn.cnn().eval()
    cifar10_cnn.load_packaged(network)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(network[:-1](normalise(pixels)), raw[:-1](pixels.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.network
def test_the_small_transformer_trains_and_has_no_batch_norm(small, tmp_path):
    pytest.importorskip("timm")
    from lightning_peft_recipes.small_vit import SmallViT

    module = SmallViT(dim=16, depth=2, heads=2, stem=[8, 8], strides=[2, 2, 2])
    kinds = {type(layer).__name__ for layer in module.modules()}
    assert "LayerNorm" in kinds
    assert not any("BatchNorm" in kind for kind in kinds)
    trainer = quick_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, small)
    assert trainer.global_step == 3
    (tested,) = trainer.test(module, small, verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy", "test/ece"}
    module.eval()
    images = next(iter(small.test_dataloader()))[0]
    assert torch.allclose(module(images)[:3], module(images[:3]), atol=1e-5), "a prediction is its image's alone"


def test_a_stem_that_does_not_fit_is_refused():
    pytest.importorskip("timm")
    from lightning_peft_recipes.small_vit import SmallViT

    for strides in ([2, 2], [3, 2, 2]):
        with pytest.raises(MisconfigurationException, match="strides"):
            SmallViT(stem=[8, 8], strides=strides)


def test_the_vgg_is_all_units_whose_channels_can_be_left_out():
    module = CIFAR10VGG(num_classes=7)
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    units = channel_units(module.model)
    assert [unit.channels for unit in units] == [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    assert all(unit.consumers for unit in units)
