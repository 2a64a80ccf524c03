"""Evaluation under distribution shift: which samples come in which order, and what is written down about each stream.

Works with every module, data module and callback; no method lives here, and nothing here prints or parses.
"""

from lightning_peft.shifts.data import Part, ShiftedData
from lightning_peft.shifts.loader import stream_loader
from lightning_peft.shifts.record import EpisodeRecord, StreamRecorder
from lightning_peft.shifts.streams import PROTOCOLS, Episode, episodes

__all__ = ["PROTOCOLS", "Episode", "EpisodeRecord", "Part", "ShiftedData", "StreamRecorder", "episodes", "stream_loader"]
