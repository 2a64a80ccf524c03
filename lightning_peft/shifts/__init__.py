"""Evaluation under distribution shift: which samples come in which order, and what is written down about each stream.

Works with every module, data module and callback; no method lives here, and nothing here prints or parses.
"""

from lightning_peft.shifts.changing import changing_episode, find_walk
from lightning_peft.shifts.data import Part, ShiftedData
from lightning_peft.shifts.loader import stream_loader
from lightning_peft.shifts.record import EpisodeRecord, StreamRecorder
from lightning_peft.shifts.streams import PROTOCOLS, Episode, episodes
from lightning_peft.shifts.twice import TwiceShiftedData, TwoShifts, shifted_set

__all__ = [
    "PROTOCOLS",
    "Episode",
    "EpisodeRecord",
    "Part",
    "ShiftedData",
    "StreamRecorder",
    "TwiceShiftedData",
    "TwoShifts",
    "changing_episode",
    "episodes",
    "find_walk",
    "shifted_set",
    "stream_loader",
]
