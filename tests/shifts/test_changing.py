"""Walks between pairs of shifts, beside those of the official code, and the streams made of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.shifts import (
    Part,
    StreamRecorder,
    TwoShifts,
    changing_episode,
    episodes,
    find_walk,
    shifted_set,
    stream_loader,
)
from lightning_peft.shifts.data import CLEAN
from lightning_peft.testing import Plain
from lightning_peft.testing.modules import trainer

WALKS = json.loads((Path(__file__).parents[1] / "fixtures" / "test_time_official.json").read_text())["CCC"]["walks"]
NAMES = ("fog", "snow", "frost")


def grid(levels, kind):
    """Accuracies in percent that fall with both severities, not quite smoothly."""
    i, j = torch.arange(levels, dtype=torch.float64)[:, None], torch.arange(levels, dtype=torch.float64)[None]
    return 80 * torch.exp(-(i * (1 + kind / 3) + j) / levels * 1.5) + 3 * torch.sin(7 * i + 3 * j + kind)


@pytest.mark.parametrize("key", WALKS)
def test_walks_are_those_of_the_official_code(key):
    levels, kind, target = map(int, key.split(", "))
    assert find_walk(grid(levels, kind), target) == [tuple(place) for place in WALKS[key]]


def accuracy(part):
    """Of a baseline that loses a tenth at every severity."""
    return 0.9 - 0.1 * (part.severity + getattr(part, "second_severity", 0))


def test_a_stream_walks_from_shift_to_shift():
    asked = []
    episode = changing_episode(
        NAMES, lambda part: asked.append(part) or accuracy(part), target=0.6, images=50, total=1000, speed=30
    )
    assert len(asked) == len(set(asked))
    (order,) = episode.segments
    assert order.shape == (1000, 2)
    stages = [episode.parts[int(part)] for part in order[::30, 0]]
    assert all((order[at : at + 30, 0] == order[at, 0]).all() for at in range(0, 1000, 30))
    assert all(len({*order[at : at + 30, 1].tolist()}) == 30 for at in range(0, 990, 30)), "an image twice at one place"
    for before, after in itertools.pairwise(stages):
        names = [{name for name in (p.shift, getattr(p, "second", "")) if name} for p in (before, after)]
        assert names[0] & names[1], "from a shift to one that was not there"
    mean = sum(accuracy(part) for part in stages) / len(stages)
    assert mean == pytest.approx(0.6, abs=0.03)
    assert len({part.shift for part in stages}) == 3


def test_seeds_speeds_and_ends():
    def stream(**options):
        return changing_episode(NAMES, accuracy, target=0.6, images=40, total=300, **options)

    assert stream(seed=1).digest() == stream(seed=1).digest() != stream(seed=2).digest()
    assert len(stream(speed=100).segments[0][:, 0].unique()) < len(stream(speed=20).segments[0][:, 0].unique())
    assert len(stream(speed=100, clean=7).segments[1]) == 7
    assert stream(clean=7).parts[-1] == CLEAN
    with pytest.raises(MisconfigurationException, match="two shifts at least"):
        changing_episode(["fog", "fog"], accuracy, target=0.6, images=4, total=4)
    with pytest.raises(MisconfigurationException, match="speed"):
        stream(speed=0)


class Pixels:
    """Test sets whose numbers tell which shift they are under."""

    def __init__(self, twice=True):
        self.clean = TensorDataset(torch.zeros(12, 16), torch.arange(12) % 3)
        if twice:
            self.shifted_twice = lambda a, i, b, j: self.shifted(a, 10 * i + j)

    def shifts(self):
        return dict.fromkeys(NAMES, (1, 2, 3, 4, 5))

    def shifted(self, shift, severity):
        return TensorDataset(self.clean.tensors[0] + severity, self.clean.tensors[1])

    def test_dataloader(self):
        return DataLoader(self.clean, batch_size=4)


class Logits(Plain):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.model(batch[0])

    test_step = validation_step


def test_the_stream_can_be_loaded_and_recorded():
    data = Pixels()
    episode = changing_episode(NAMES, accuracy, target=0.6, images=12, total=30, speed=6, clean=4)
    sets = {part: shifted_set(data, part) for part in episode.parts}
    assert any(isinstance(part, TwoShifts) for part in sets)
    for part, found in sets.items():
        second = getattr(part, "second_severity", 0)
        assert (found.tensors[0] == (10 * part.severity + second if second else part.severity)).all()
    recorder = StreamRecorder()
    loader = stream_loader(data.test_dataloader(), sets, episode)
    trainer(callbacks=[recorder]).test(Logits(), loader, verbose=False)
    record = recorder.record(episode, "source", "changing", 0)
    assert record.samples == 34
    assert [part.part for part in record.parts] == [str(part) for part in episode.parts[:-1]]
    with pytest.raises(MisconfigurationException, match="shifted_twice"):
        shifted_set(Pixels(twice=False), TwoShifts("fog", 1, "snow", 2))


def test_mixed_and_correlated_at_once():
    labels = torch.arange(400) % 10
    known = dict.fromkeys((CLEAN, Part("fog", 1), Part("snow", 1)), labels)
    (order,) = episodes("mixed_correlated", [Part("fog", 1), Part("snow", 1)], known, clean=0, concentration=0.01)[0].segments
    runs, shifts = int(labels[order[:, 1]].diff().count_nonzero()), int(order[:, 0].diff().count_nonzero())
    assert runs < 100, "labels come in runs"
    assert shifts > 300, "and shifts do not"
