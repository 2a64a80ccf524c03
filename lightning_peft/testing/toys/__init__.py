"""Small methods, one file for each way of acting.

They stand in for other people's methods wherever a test needs some, and are the shortest complete examples of each kind.
"""

from lightning_peft.testing.toys.answers import ToyCentring
from lightning_peft.testing.toys.calibration import ToyWanda
from lightning_peft.testing.toys.gradients import ToyNoise, ToySAM, ToyTwice, moved, with_gradient
from lightning_peft.testing.toys.losses import ToyEntropy
from lightning_peft.testing.toys.maps import ScaleMap, ShiftMap, ThresholdMap, ToyScale, ToyShift, ToyThreshold
from lightning_peft.testing.toys.optimizers import Lookahead, ToyLookahead
from lightning_peft.testing.toys.parts import GatePart, LowRankPart, ToyGate, ToyLowRank
from lightning_peft.testing.toys.structure import Adapted, Adapter, ToyWrap
from lightning_peft.testing.toys.trained import ToyTuning

__all__ = [
    "Adapted",
    "Adapter",
    "GatePart",
    "Lookahead",
    "LowRankPart",
    "ScaleMap",
    "ShiftMap",
    "ThresholdMap",
    "ToyCentring",
    "ToyEntropy",
    "ToyGate",
    "ToyLookahead",
    "ToyLowRank",
    "ToyNoise",
    "ToySAM",
    "ToyScale",
    "ToyShift",
    "ToyThreshold",
    "ToyTuning",
    "ToyTwice",
    "ToyWanda",
    "ToyWrap",
    "moved",
    "with_gradient",
]
