"""Random views of images for methods that compare predictions over them; plain tensor operations, whatever the value range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.capture.evaluation import Call
from lightning_peft.network.batches import tensors_of
from lightning_peft_plugins.test_time._shared.descent import DescentMethod


class ViewMethod(DescentMethod):
    """Base of the methods that compare predictions over views of a sample.

    Args:
        augment: Makes a view of the network's floating point inputs; :class:`RandomViews` by default.
        kwargs: Arguments of :class:`~lightning_peft_plugins.test_time._shared.descent.DescentMethod`.
    """

    def __init__(self, *, augment: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._views = RandomViews()
        self.augment = augment or self._views

    def aligned(self, call: Call, logits: Tensor) -> None:
        """Refuse to compare predictions of positions over views that move them.

        Raises:
            MisconfigurationException: The default views turn and shift images of which every pixel is predicted.
        """
        changed = any(tensor.is_floating_point() for tensor in tensors_of((call.args, call.kwargs)))
        if logits.ndim > 2 and changed and self.augment is self._views:
            raise MisconfigurationException(
                f"{self.name} compares predictions over views that are turned and shifted, but this network predicts positions "
                f"(logits {tuple(logits.shape)}, classes last), which do not line up then. Pass augment=<a change that moves "
                "no position, such as noise or contrast>, or take Tent or ETA."
            )

    def forget(self) -> None:
        self._views.restart()


class RandomViews:
    """Flips, turns, shifts, scales, and changes brightness and contrast of each image on its own, and adds a little noise.

    The official codes jitter colours of images in [0, 1]. A Lightning step may feed a network images that are normalised
    already, so brightness and contrast are changed here relative to each channel's own mean and deviation; hue, saturation and
    gamma, which need the range, are left out. Pass another callable to a method for another augmentation.

    Args:
        turn: Largest rotation, in degrees.
        shift: Largest shift, as a share of the side.
        scale: Largest change of scale.
        contrast: Largest change of contrast, and of brightness in standard deviations.
        noise: Noise, in standard deviations.
        seed: Seed.

    Example:
        >>> RandomViews()(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        turn: float = 15.0,
        shift: float = 1 / 16,
        scale: float = 0.1,
        contrast: float = 0.3,
        noise: float = 0.02,
        seed: int = 0,
    ) -> None:
        self.turn, self.shift, self.scale, self.contrast, self.noise, self.seed = turn, shift, scale, contrast, noise, seed
        self.restart()

    def restart(self) -> None:
        """Begin the sequence of random numbers again."""
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Return one view of each image.

        Args:
            images: Shape ``(batch, channels, height, width)``.

        Returns:
            Same shape and dtype.

        Raises:
            MisconfigurationException: These are no images.
        """
        if images.ndim != 4:
            raise MisconfigurationException(
                "Random views need images (samples, channels, height, width), but the network was given "
                f"{tuple(images.shape)}. Pass augment=<callable on its floating point inputs>, or use EATA or SAR."
            )
        x = self._move(images.float())
        deviation, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
        contrast = 1 + self.contrast * self._uniform(images, 1, 1, 1)
        brightness = self.contrast * self._uniform(images, 1, 1, 1) * deviation
        # Lightning's true half precisions change the default dtype, and half random numbers are coarse.
        grain = torch.randn(images.shape, generator=self._generator, dtype=torch.float32).to(images.device)
        noise = grain * self.noise * deviation
        return ((x - mean) * contrast + mean + brightness + noise).to(images.dtype)

    def _move(self, x: Tensor) -> Tensor:
        angle = self._uniform(x) * math.radians(self.turn)
        scale = 1 + self.scale * self._uniform(x)
        flip = self._uniform(x).sign()
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shift = 2 * self.shift * self._uniform(x, 2)
        rows = (torch.stack((cos * flip, -sin, shift[:, 0]), -1), torch.stack((sin * flip, cos, shift[:, 1]), -1))
        grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
        return torch.nn.functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def _uniform(self, x: Tensor, *shape: int) -> Tensor:
        return (torch.rand(len(x), *shape, generator=self._generator, dtype=torch.float32) * 2 - 1).to(x.device)
