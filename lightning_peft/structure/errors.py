"""The error of everything that is read back."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


class CheckpointError(MisconfigurationException):
    """A checkpoint cannot be read, does not fit the methods in use, or is not plain data."""
