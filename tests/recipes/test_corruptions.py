from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from warm_python import python

from lightning_peft.assets import Asset
from lightning_peft_recipes import corruptions
from lightning_peft_recipes.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, cached_corruption, corrupt

TINY = Asset("tiny", "lp-tiny-data", "1.0", "tiny-1.0.whl", "ab" * 32, 10, "MIT", "this test", "nothing, it is never fetched")


def pictures(count: int = 3, side: int = 32) -> Tensor:
    """Smooth colours with some texture, different in every picture."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8)


def constant(value: int) -> Tensor:
    return torch.full((1, 3, 32, 32), value, dtype=torch.uint8)


def ramp() -> Tensor:
    return (torch.arange(32, dtype=torch.uint8) * 8).expand(1, 3, 32, 32).contiguous()


def digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


@pytest.fixture
def library():
    pytest.importorskip("imagecorruptions")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path))
    return tmp_path


def test_the_names_are_those_of_the_library(library):
    from imagecorruptions import get_corruption_names

    assert list(CORRUPTIONS) == get_corruption_names("common")
    assert list(EXTRA_CORRUPTIONS) == get_corruption_names("validation")


def test_brightness_adds_to_the_value_of_each_pixel(library):
    grey = [int(corrupt(constant(100), "brightness", severity)[0, 0, 0, 0]) for severity in SEVERITIES]
    assert grey == [125, 151, 176, 202, 227]
    row = corrupt(ramp(), "brightness", 5)[0, 0, 0]
    assert torch.equal(row, (ramp()[0, 0, 0].int() + 127).clamp(max=255).to(torch.uint8))


def test_contrast_shrinks_towards_the_mean_and_truncates(library):
    assert all(bool((corrupt(constant(100), "contrast", severity) == 99).all()) for severity in SEVERITIES)
    row = corrupt(ramp(), "contrast", 5)[0, 0, 0]
    assert (int(row.min()), int(row.max())) == (117, 130)
    assert row.tolist() == sorted(row.tolist())


def test_pixelate_makes_blocks(library):
    assert bool((corrupt(constant(100), "pixelate", 5) == 100).all())
    row = corrupt(ramp(), "pixelate", 5)[0, 0, 0].tolist()
    assert row == [value for value in range(12, 237, 32) for _ in range(4)]


@pytest.mark.parametrize("shift", CORRUPTIONS + EXTRA_CORRUPTIONS)
def test_what_becomes_of_an_image_depends_on_nothing_else(library, shift):
    images = pictures()
    before = np.random.get_state()[1].copy()
    together = corrupt(images, shift, 4, seed=3)
    assert np.array_equal(before, np.random.get_state()[1]), "the global random state is left as it was"
    assert (together.shape, together.dtype) == (images.shape, torch.uint8)
    np.random.seed(99)
    alone = [corrupt(images[[index]], shift, 4, seed=3, indices=[index]) for index in (2, 0, 1)]
    assert torch.equal(together, torch.cat(alone)[[1, 2, 0]])
    assert not torch.equal(together, images)


@pytest.mark.parametrize("shift", ["gaussian_noise", "impulse_noise", "glass_blur", "snow", "fog", "elastic_transform"])
def test_seed_image_and_severity_choose_the_random_numbers(library, shift):
    same = constant(120) if shift not in ("glass_blur", "elastic_transform") else pictures(1)
    two = corrupt(same.repeat(2, 1, 1, 1), shift, 3)
    assert not torch.equal(two[0], two[1]), "images of one content, numbers 0 and 1"
    assert not torch.equal(two[[0]], corrupt(same, shift, 3, seed=1))
    assert torch.equal(two[[1]], corrupt(same, shift, 3, indices=[1]))


def test_another_process_makes_the_same_images(library):
    shifts = ["gaussian_noise", "impulse_noise", "motion_blur", "frost"]
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from test_corruptions import pictures, corrupt, digest;"
        "print(json.dumps([digest(corrupt(pictures(2), shift, 5)) for shift in json.loads(sys.argv[2])]))"
    )
    said = python("-c", code, str(__file__).rsplit("/", 1)[0], json.dumps(shifts))
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == [digest(corrupt(pictures(2), shift, 5)) for shift in shifts]


@pytest.mark.parametrize("side", [33, 73])
def test_odd_sides_keep_standard_output_clean(library, side, capsys):
    for shift in ("zoom_blur", "snow", "frost", "fog", "pixelate"):
        assert corrupt(pictures(1, side), shift, 2).shape == (1, 3, side, side)
    assert capsys.readouterr().out == ""


def test_severity_matters(library):
    images = pictures()
    for shift in ("gaussian_noise", "defocus_blur", "jpeg_compression", "fog"):
        far = [(corrupt(images, shift, severity).float() - images.float()).abs().mean() for severity in (1, 5)]
        assert far[0] < far[1], shift


def test_the_cache_is_read_the_second_time(library, cache, monkeypatch, capsys):
    images = pictures()
    first = cached_corruption(TINY, "tiny-32px-test-3", images, "shot_noise", 2)
    assert torch.equal(first, corrupt(images, "shot_noise", 2))
    assert "Corrupting 3 images: shot_noise 2" in capsys.readouterr().err
    (path,) = (cache / "derived").rglob("*.npz")
    assert path.name.startswith("tiny-32px-test-3-shot_noise-2-seed0-imaug1.")
    monkeypatch.setattr(corruptions, "corrupt", None)
    assert torch.equal(first, cached_corruption(TINY, "tiny-32px-test-3", images, "shot_noise", 2))
    with pytest.raises(TypeError):
        cached_corruption(TINY, "tiny-32px-test-3", images, "shot_noise", 2, seed=1)


def test_an_interrupted_corruption_leaves_nothing(library, cache, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corruptions, "_one", stop)
    with pytest.raises(KeyboardInterrupt):
        cached_corruption(TINY, "tiny", pictures(), "contrast", 1)
    assert list(cache.rglob("*.npz")) == []


def test_arguments_out_of_range_are_refused():
    for images, shift, severity, message in (
        (pictures(), "rain", 1, "no corruption 'rain'"),
        (pictures(), "fog", 6, "severity=6"),
        (pictures(), "fog", 0, "severity=0"),
        (pictures(1, 31), "fog", 1, "at least 32 pixels"),
        (pictures().float(), "fog", 1, "float32"),
        (pictures()[:, :1], "fog", 1, r"\(3, 1, 32, 32\)"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            corrupt(images, shift, severity)


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr(corruptions, "version", _absent)
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning-peft\[corruptions\]"'):
        corrupt(pictures(), "fog", 1)
    monkeypatch.undo()
    monkeypatch.setattr(corruptions, "version", lambda name: "1.1.5")
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # what a missing system library of OpenCV looks like
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning-peft\[corruptions\]"'):
        corrupt(pictures(), "fog", 1)


def _absent(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)
