"""The results of one finished training, as plain data in one JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.atomic_files import whole
from lightning_peft.measure.confidence import Bins
from lightning_peft.report.contents import number

LOWER_IS_BETTER = ("loss", "ece", "error", "perplexity")
SHARES = ("accuracy", "acc", "ece", "f1", "auroc", "precision", "recall", "error")


@dataclass
class Trial:
    """A finished training and its test.

    Attributes:
        name: ``"dense"``, ``"composed"``, ``"without PSKD"``.
        seed: Seed of everything; ``None`` for a run without one.
        methods: Class name, log name and arguments of each method.
        plan: The printed plan.
        metrics: Test metrics.
        seconds: Time in ``fit``, validation included, summed over the sessions of a resumed run.
        flops: Floating point operations of the training steps in one process, as
            :class:`~lightning_peft.measure.flop_meter.FlopMeter` counts them; 0 when they are not known.
        forward_flops: The same of one sample's way through the tested network; 0 when it is not known.
        epochs: Epochs trained.
        steps: Optimizer steps taken.
        parameters: Trainable and frozen values of the module.
        nonzero: How many of them are not zero in the final, baked module.
        calibration: Reliability bins of the test samples; empty when they could not be told from the module.
        calibration_errors: Calibration of the test samples by each estimator, as it is and with a fitted temperature.
        learnt: What training changed, as :class:`~lightning_peft.measure.weight_changes.Learnt` has it as data; empty when it
            was not measured.
        notes: Settings of the recipe that were overruled, a sentence each.
        made_with: Digest of all its settings; empty in files of versions that did not write one.
    """

    name: str
    seed: int | None
    methods: list[dict[str, Any]] = field(default_factory=list)
    plan: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    flops: float = 0.0
    epochs: int = 0
    steps: int = 0
    parameters: int = 0
    nonzero: int = 0
    calibration: Bins = field(default_factory=list)
    calibration_errors: dict[str, list[float]] = field(default_factory=dict)
    forward_flops: float = 0.0
    learnt: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    made_with: str = ""

    @property
    def seed_text(self) -> str:
        """The seed for people."""
        return "no seed" if self.seed is None else f"seed {self.seed}"

    def write(self, path: Path) -> None:
        """Write it whole or not at all, so that a file found later is a finished trial."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, path: Path) -> Trial:
        """Read what :meth:`write` wrote."""
        return cls(**json.loads(path.read_text()))


def short(metric: str) -> str:
    """Return a metric's name without its stage.

    Example:
        >>> short("test/accuracy"), short("test_loss")
        ('accuracy', 'test_loss')
    """
    return metric.rsplit("/", 1)[-1]


def _last_word(metric: str) -> str:
    return short(metric).rsplit("_", 1)[-1].lower()


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return _last_word(metric) in SHARES


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good."""
    return _last_word(metric) in LOWER_IS_BETTER


def show(metric: str, value: float | None) -> str:
    """Write a metric's value for people.

    Example:
        >>> show("test/accuracy", 0.7671), show("test/loss", 0.81234)
        ('76.7 %', '0.8123')
    """
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if is_share(metric) else number(value)


def show_difference(metric: str, value: float) -> str:
    """Write a difference of two values of a metric for people.

    Example:
        >>> show_difference("test/accuracy", -0.0125), show_difference("test/loss", 0.25)
        ('-1.2 points', '+0.25')
    """
    return f"{100 * value:+.1f} points" if is_share(metric) else ("+" if value >= 0 else "-") + number(abs(value))


def duration(seconds: float) -> str:
    """Write a duration for people.

    Example:
        >>> duration(42.31), duration(185), duration(119.7)
        ('42.3 s', '3 min 05 s', '2 min 00 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 100 else f"{minutes} min {rest:02d} s"


def flop_text(flops: float) -> str:
    """Write a number of floating point operations for people; nothing when it is not known.

    Example:
        >>> flop_text(1.234e15), flop_text(61440), flop_text(999.9e6), flop_text(0)
        ('1.23 PFLOP', '61.4 kFLOP', '1.00 GFLOP', '')
    """
    if flops <= 0:
        return ""
    scale, unit = flop_unit(float(f"{flops:.3g}"))
    digits = 2 - math.floor(math.log10(float(f"{flops:.3g}") / scale) + 1e-9)
    return f"{flops / scale:.{max(0, digits)}f} {unit}"


def flop_unit(flops: float) -> tuple[float, str]:
    """Return the unit that suits a number of floating point operations, and how many of them it is.

    Example:
        >>> flop_unit(3.2e16), flop_unit(5.0)
        ((1000000000000000.0, 'PFLOP'), (1.0, 'FLOP'))
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = min(max(0, math.floor(math.log10(flops) / 3 + 1e-9)), len(prefixes) - 1) if flops > 0 else 0
    return 1000.0**power, f"{prefixes[power]}FLOP"
