"""What tests of packaged data and modules share."""

from __future__ import annotations

import pytest
from lightning import Trainer

from lightning_peft.assets import Asset, AssetError, fetch


def needs(*assets: Asset) -> None:
    """Skip a test whose assets cannot be had."""
    try:
        for asset in assets:
            fetch(asset, progress=False)
    except AssetError as error:
        pytest.skip(str(error))


def quick_trainer(tmp_path, **options) -> Trainer:
    """A Trainer for the CPU that says nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=tmp_path, accelerator="cpu", **(quiet | options))
