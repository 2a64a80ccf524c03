"""Protocols: in which order the samples of several shifts come, and where the model begins anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.registry import suggest
from lightning_peft.shifts.data import CLEAN, Part

PROTOCOLS = {
    "reset": "every shift from the source model",
    "continual": "all shifts in turn, without a return to the source",
    "mixed": "the samples of all shifts shuffled together",
    "gradual": "every shift rises from severity 1 and falls again, all in turn",
    "correlated": "as continual, with labels that come in runs",
    "mixed_correlated": "as mixed, with labels that come in runs",
}
"""Protocols by name, each in a few words."""

BY_LABEL = ("correlated", "mixed_correlated")
"""Protocols that order samples by their labels."""


@dataclass(frozen=True)
class Episode:
    """One stream, from the source model to its end.

    Attributes:
        name: Name among the episodes of its protocol.
        parts: Test sets it draws from.
        segments: Which samples in which order, each of shape ``[samples, 2]``: index of the part, index of the sample in it.
            No batch crosses from one segment to the next.
    """

    name: str
    parts: tuple[Part, ...]
    segments: tuple[Tensor, ...]

    def order(self) -> Tensor:
        """All segments in one."""
        return torch.cat(self.segments)

    def digest(self) -> str:
        """Tells streams apart."""
        text = "|".join(map(str, self.parts)).encode()
        rows = b"|".join(segment.numpy().tobytes() for segment in self.segments)
        return hashlib.sha256(text + rows).hexdigest()[:16]


def episodes(
    protocol: str,
    parts: Sequence[Part],
    labels: Mapping[Part, Sized],
    *,
    seed: int = 0,
    clean: int | None = None,
    concentration: float = 0.1,
) -> list[Episode]:
    """Lay out the streams of a protocol.

    Every stream ends in clean samples, on which forgetting is measured: the error of the adapted model, which still adapts,
    against the error of the source. EATA's official code puts the clean set after every corruption of a continual run; here it
    comes once, so that nobody recovers on it in between.

    Args:
        protocol: One of :data:`PROTOCOLS`. ``"gradual"`` divides each test set among the severities 1, ..., s, ..., 1, so that
            all protocols see equally many samples; CoTTA's shows the whole set at each.
        parts: The shifted test sets, in order.
        labels: Class indices of each test set used, the clean one and the lower severities of ``"gradual"`` included. Only
            those of :data:`BY_LABEL` look at them, at those of ``parts``; else anything as long will do, such as the test set
            itself.
        seed: Seed of the order; two calls with one seed give one order.
        clean: Clean samples at the end; ``None`` for all, 0 for none.
        concentration: Of :data:`BY_LABEL`: parameter of the Dirichlet distribution by which each class is dealt out over time.

    Raises:
        MisconfigurationException: Unknown protocol, or no part.
    """
    check_protocol(protocol)
    if not parts:
        raise MisconfigurationException("There is no shift to evaluate under.")
    draw = torch.Generator().manual_seed(seed)
    end = torch.randperm(len(labels[CLEAN]), generator=draw)[:clean]
    if protocol == "gradual":
        stages = [(part, rising_and_falling(part)) for part in parts]
        used = tuple(dict.fromkeys(stage for _, many in stages for stage in many))
        segments = []
        for part, many in stages:
            shares = torch.randperm(len(labels[part]), generator=draw).tensor_split(len(many))
            segments += [_rows(used.index(stage), share) for stage, share in zip(many, shares, strict=True)]
        return [closed("all", used, segments, end)]
    whole = []
    for part in parts:
        if protocol == "correlated":
            order = correlated(torch.as_tensor(labels[part]), concentration, draw)
        else:
            order = torch.randperm(len(labels[part]), generator=draw)
        whole.append(order)
    if protocol == "reset":
        return [closed(str(part), (part,), [_rows(0, order)], end) for part, order in zip(parts, whole, strict=True)]
    segments = [_rows(index, order) for index, order in enumerate(whole)]
    if protocol in ("mixed", "mixed_correlated"):
        together = torch.cat(segments)
        if protocol == "mixed":
            order = torch.randperm(len(together), generator=draw)
        else:
            found = [torch.as_tensor(labels[part])[order] for part, order in zip(parts, whole, strict=True)]
            order = correlated(torch.cat(found), concentration, draw)
        segments = [together[order]]
    return [closed("all", tuple(parts), segments, end)]


def check_protocol(protocol: str) -> None:
    """Refuse a protocol that does not exist.

    Raises:
        MisconfigurationException: Names the nearest, or all.
    """
    if protocol not in PROTOCOLS:
        raise MisconfigurationException(f"There is no protocol {protocol!r}.{suggest(protocol, list(PROTOCOLS))}")


def rising_and_falling(part: Part) -> list[Part]:
    """The stages of a shift that comes and goes; a natural shift has one.

    Example:
        >>> [stage.severity for stage in rising_and_falling(Part("fog", 3))]
        [1, 2, 3, 2, 1]
    """
    if part.severity < 2:
        return [part]
    up = list(range(1, part.severity))
    return [Part(part.shift, severity) for severity in (*up, part.severity, *up[::-1])]


def correlated(labels: Tensor, concentration: float, generator: torch.Generator) -> Tensor:
    """Order samples so that their labels come in runs.

    Time has as many slots as there are classes, at most 100. Each class is dealt out over the slots in shares from a symmetric
    Dirichlet distribution; within a slot the classes come one after the other, in random order (Yuan et al., RoTTA, CVPR 2023,
    section 4.1, and its code).

    Args:
        labels: Class indices, shape ``[samples]``.
        concentration: Parameter of the distribution; small values make long runs.
        generator: Source of randomness.

    Returns:
        A permutation of the samples, shape ``[samples]``.
    """
    classes = torch.unique(labels)
    slots: list[list[Tensor]] = [[] for _ in range(min(len(classes), 100))]
    for label in classes.tolist():
        members = (labels == label).nonzero().squeeze(-1)
        members = members[torch.randperm(len(members), generator=generator)]
        shares = torch._sample_dirichlet(torch.full((len(slots),), concentration, dtype=torch.float64), generator)
        borders = (shares.cumsum(0)[:-1] * len(members)).round().long()
        for slot, run in zip(slots, members.tensor_split(borders.tolist()), strict=True):
            slot.append(run)
    runs = [slot[index] for slot in slots for index in torch.randperm(len(slot), generator=generator).tolist()]
    return torch.cat(runs)


def _rows(part: int, samples: Tensor) -> Tensor:
    return torch.stack([torch.full_like(samples, part), samples], 1)


def closed(name: str, parts: tuple[Part, ...], segments: Sequence[Tensor], end: Tensor) -> Episode:
    """An episode of some segments that ends in clean samples, if there are any."""
    if not len(end):
        return Episode(name, parts, tuple(segments))
    return Episode(name, (*parts, CLEAN), (*segments, _rows(len(parts), end)))
