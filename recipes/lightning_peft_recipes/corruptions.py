"""Common corruptions of images at five severities (Hendrycks and Dietterich, ICLR 2019), repeatable image by image.

The arithmetic is that of the optional package ``imagecorruptions-imaug``. Its figures are **not** comparable with published
ones, because the images differ from those of ImageNet-C and CIFAR-10-C:

- ImageNet-C was saved as JPEG of quality 85 after the corruption; these images are not.
- Motion blur and snow are written anew without ImageMagick. Elastic transform has no affine part and other constants.
  Pixelate enlarges with nearest neighbours, zoom blur crops at the top left, the frost pictures are never made smaller.
- Strengths are those of ImageNet-C, made for 224 pixels, whatever the size. CIFAR-10-C has its own, far milder ones: Gaussian
  noise of severity 5 has a standard deviation of 0.38 here and of 0.10 there, and its severity 3 is our severity 1 (0.08).
- Pixels are truncated to whole numbers, as in the original code: a grey of 100 becomes 99 under every contrast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.assets import Asset, derived

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 corruptions of the benchmark, in its order."""

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Four more, which the benchmark keeps for validation."""

NOTE = (
    "Corruptions made by imagecorruptions-imaug with the strengths of ImageNet-C, whatever the image size: figures are not "
    "comparable with those of ImageNet-C or of the far milder CIFAR-10-C."
)
"""What readers of results on these corruptions have to know."""

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32

# These two draw from generators of their own; the others from NumPy's global state.
_TAKE_SEED = ("impulse_noise", "glass_blur")


def corrupt(
    images: Tensor, shift: str, severity: int, *, seed: int = 0, indices: Sequence[int] | None = None, progress: bool = False
) -> Tensor:
    """Corrupt images, each with random numbers of its own.

    What becomes of an image depends on ``(seed, shift, severity, index)`` and the image alone: not on the batch it comes in,
    its neighbours, the process, or the state of any random generator, and no such state is changed.

    Args:
        images: uint8, shape ``[images, 3, height, width]``, at least 32 pixels high and wide.
        shift: One of :data:`CORRUPTIONS` or :data:`EXTRA_CORRUPTIONS`.
        severity: 1 to 5.
        seed: Chooses the random numbers.
        indices: Number of each image, as in the full data set; by default 0, 1, 2, ...
        progress: Show a progress bar on a terminal, one line elsewhere, on standard error.

    Returns:
        uint8, same shape.

    Raises:
        MisconfigurationException: The optional package is missing, or an argument is out of range.
    """
    check_shift(shift, severity)
    check_images(images)
    apply = _library()
    numbers = range(len(images)) if indices is None else indices
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    corrupted = np.empty_like(pixels)
    steps = _counted(len(pixels), f"{shift} {severity}") if progress else range(len(pixels))
    with _quiet_and_repeatable():
        for row in steps:
            corrupted[row] = _one(apply, pixels[row], shift, severity, seed, int(numbers[row]))
    return torch.from_numpy(corrupted).permute(0, 3, 1, 2).contiguous()


def cached_corruption(
    asset: Asset, subset: str, images: Tensor, shift: str, severity: int, *, seed: int = 0, indices: Sequence[int] | None = None
) -> Tensor:
    """:func:`corrupt`, computed once and kept beside the asset the images come from.

    Args:
        asset: Where the images come from; with ``subset`` it must say which images these are.
        subset: Part of a file name: data set, split, side and number of the images.
        images: As in :func:`corrupt`, as are all that follow.
        shift: Name of the corruption.
        severity: 1 to 5.
        seed: Chooses the random numbers.
        indices: Number of each image in the full data set.
    """
    check_shift(shift, severity)
    check_images(images)
    name = f"{subset}-{shift}-{severity}-seed{seed}-{_release()}.npz"

    def build(path: Path) -> None:
        result = corrupt(images, shift, severity, seed=seed, indices=indices, progress=True)
        np.savez_compressed(path, images=result.numpy())

    with np.load(derived(asset, name, build), allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["images"])


def check_shift(shift: str, severity: int) -> None:
    """Refuse a corruption or severity that does not exist.

    Raises:
        MisconfigurationException: Lists what there is.
    """
    known = CORRUPTIONS + EXTRA_CORRUPTIONS
    if shift not in known:
        raise MisconfigurationException(f"There is no corruption {shift!r}; there are {', '.join(known)}.")
    if severity not in SEVERITIES:
        raise MisconfigurationException(f"severity={severity!r} of {shift} must be one of {SEVERITIES}.")


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of colour images of a size the corruptions are defined for.

    Raises:
        MisconfigurationException: Says what was given.
    """
    given = f"{tuple(images.shape)} {images.dtype}"
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise MisconfigurationException(f"Corruptions need uint8 images of shape [images, 3, height, width], not {given}.")
    if min(images.shape[-2:]) < SMALLEST_SIDE:
        raise MisconfigurationException(f"Corruptions need images of at least {SMALLEST_SIDE} pixels a side, not {given}.")


def _one(apply: Callable[..., np.ndarray], image: np.ndarray, shift: str, severity: int, seed: int, index: int) -> np.ndarray:
    place = (CORRUPTIONS + EXTRA_CORRUPTIONS).index(shift)
    own = int(np.random.SeedSequence([seed, place, severity, index]).generate_state(1)[0])
    np.random.seed(own)  # the library draws from the global state
    options: dict[str, Any] = {"seed": own} if shift in _TAKE_SEED else {}
    return apply(image, corruption_name=shift, severity=severity, **options)


@contextlib.contextmanager
def _quiet_and_repeatable() -> Iterator[None]:
    """Keep NumPy's global random state, and keep the library's prints out of standard output, where JSON may go."""
    before = np.random.get_state()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        np.random.set_state(before)


def _counted(count: int, title: str) -> Iterator[int]:
    """Count to ``count`` with a progress bar on a terminal, one line elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(range(count), f"Corrupting: {title}", console=console, transient=True)
    else:
        console.print(f"Corrupting {count} images: {title}", soft_wrap=True)
        yield from range(count)


def _library() -> Callable[..., np.ndarray]:
    _release()
    try:
        import imagecorruptions
    except ImportError as error:  # also one of its own dependencies, such as a system library of OpenCV
        raise _missing(str(error)) from error
    return imagecorruptions.corrupt


def _release() -> str:
    # Asked of the metadata: another package, without seeds, has the same import name.
    try:
        return f"imaug{version('imagecorruptions-imaug')}"
    except PackageNotFoundError as error:
        raise _missing(f"No package metadata of {error}") from error


def _missing(reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f'corruptions need imagecorruptions-imaug: pip install "lightning-peft[corruptions]" ({reason})'
    )
