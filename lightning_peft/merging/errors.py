"""The error of models that cannot be merged."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


class MergeError(MisconfigurationException):
    """Models that cannot be merged, or not so; the message names the model, the tensor and the cure."""
