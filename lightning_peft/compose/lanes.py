"""Lanes give methods their order; resources say what they read and write, so that conflicts are found before training."""

from __future__ import annotations

from enum import Enum, IntEnum


class Lane(IntEnum):
    """Where in a step a method acts; lower lanes act first, and undo runs in reverse."""

    STRUCTURE = 0
    REPARAM = 1
    DELTA = 2
    MASK = 3
    LOSS = 4
    GRADIENT = 5
    ADAPT = 6
    REPORT = 7


class Resource(Enum):
    """A thing that methods read or write.

    ``LOGITS``, ``INPUTS`` and ``SAMPLE_INDEX`` are read. ``LOSS_SCALE`` has room for one writer per
    training step, ``PREDICTIONS`` for one per evaluation; ``WEIGHT_MAP``, ``DELTA`` and ``MASK`` for one writer per tensor.
    A method that reads ``STRUCTURE`` assumes it is fixed and cannot be combined with one that writes it, nor can two that write
    it. ``GRADIENT`` and ``OPTIMIZER`` may have several writers as long as it is known who comes first.
    """

    LOGITS = "logits"
    INPUTS = "inputs"
    SAMPLE_INDEX = "sample index"
    LOSS_SCALE = "scale of the base loss"
    PREDICTIONS = "predictions during evaluation"
    WEIGHT_MAP = "weight map"
    DELTA = "low-rank delta"
    MASK = "mask"
    STRUCTURE = "structure"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"


ONE_WRITER = frozenset({Resource.LOSS_SCALE, Resource.PREDICTIONS})
ONE_WRITER_PER_TENSOR = frozenset({Resource.WEIGHT_MAP, Resource.DELTA, Resource.MASK})
