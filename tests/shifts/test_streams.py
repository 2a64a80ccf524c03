"""Protocols lay out every sample once, and only their order differs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.shifts import PROTOCOLS, Part, episodes, stream_loader
from lightning_peft.shifts.data import CLEAN, choose_parts
from lightning_peft.shifts.loader import labels_in
from lightning_peft.shifts.streams import BY_LABEL, correlated

FOG, RAIN = Part("fog", 3), Part("rain", 0)


def labels(samples=40, classes=4):
    found = torch.arange(samples) % classes
    return dict.fromkeys((CLEAN, FOG, RAIN, Part("fog", 1), Part("fog", 2)), found)


def rows(episode):
    """The shift and sample of every row of an episode, without the clean end."""
    return [(episode.parts[part].shift, sample) for part, sample in episode.order().tolist() if episode.parts[part] != CLEAN]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_sample_of_every_shift_comes_once_and_clean_samples_end_each_stream(protocol) -> None:
    found = episodes(protocol, [FOG, RAIN], labels(), seed=1, clean=5)
    seen = [row for episode in found for row in rows(episode)]
    assert sorted(seen) == [(shift, sample) for shift in ("fog", "rain") for sample in range(40)]
    assert len(found) == (2 if protocol == "reset" else 1)
    for episode in found:
        assert episode.parts[-1] == CLEAN
        assert len(episode.segments[-1]) == 5
        assert (episode.segments[-1][:, 0] == len(episode.parts) - 1).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_seed_makes_a_stream(protocol) -> None:
    first, again, other = (episodes(protocol, [FOG, RAIN], labels(), seed=seed) for seed in (1, 1, 2))
    assert [episode.digest() for episode in first] == [episode.digest() for episode in again]
    assert [episode.digest() for episode in first] != [episode.digest() for episode in other]


@pytest.mark.parametrize("protocol", sorted(set(PROTOCOLS) - {*BY_LABEL}))
def test_other_protocols_do_not_look_at_labels(protocol) -> None:
    sizes = {part: range(len(found)) for part, found in labels().items()}
    streams = [episodes(protocol, [FOG, RAIN], known, seed=1) for known in (labels(), sizes)]
    assert [episode.digest() for episode in streams[0]] == [episode.digest() for episode in streams[1]]


def test_mixed_is_one_segment_and_continual_one_a_shift() -> None:
    assert len(episodes("mixed", [FOG, RAIN], labels(), clean=0)[0].segments) == 1
    assert [len(segment) for segment in episodes("continual", [FOG, RAIN], labels(), clean=0)[0].segments] == [40, 40]


def test_gradual_rises_and_falls() -> None:
    episode = episodes("gradual", [FOG, RAIN], labels(), clean=0)[0]
    severities = [episode.parts[int(segment[0, 0])].severity for segment in episode.segments]
    assert severities == [1, 2, 3, 2, 1, 0]
    assert [len(segment) for segment in episode.segments] == [8, 8, 8, 8, 8, 40]


@given(st.integers(1, 6), st.integers(1, 60), st.floats(0.01, 10), st.integers(0, 99))
def test_correlated_is_a_permutation(classes, samples, concentration, seed) -> None:
    found = torch.arange(samples) % classes
    order = correlated(found, concentration, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(samples))


def test_correlated_labels_come_in_runs() -> None:
    found = torch.arange(1000) % 10
    draw = torch.Generator().manual_seed(0)
    changes = {c: int(found[correlated(found, c, draw)].diff().count_nonzero()) for c in (0.01, 100.0)}
    shuffled = int(found[torch.randperm(1000)].diff().count_nonzero())
    assert changes[0.01] < changes[100.0] <= 100 < shuffled


def test_wrong_names_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="no protocol 'rest'"):
        episodes("rest", [FOG], labels())
    with pytest.raises(MisconfigurationException, match="no shift to evaluate"):
        episodes("reset", [], labels())
    with pytest.raises(MisconfigurationException, match="Did you mean fog"):
        choose_parts({"fog": (1, 2)}, ["frog"])
    with pytest.raises(MisconfigurationException, match="it has 1, 2"):
        choose_parts({"fog": (1, 2)}, severities=[3])


def test_choose_parts_takes_the_highest_severity_unless_told() -> None:
    offered = {"fog": (1, 2, 3), "town": ()}
    assert choose_parts(offered) == [Part("fog", 3), Part("town", 0)]
    assert choose_parts(offered, ["fog"], [1, 2]) == [Part("fog", 1), Part("fog", 2)]


def test_no_batch_crosses_a_border_and_small_rests_join_the_batch_before() -> None:
    sets = {
        part: TensorDataset(torch.arange(n) + start, torch.arange(n) % 2) for part, n, start in ((FOG, 18, 0), (RAIN, 14, 100))
    }
    template = DataLoader(sets[FOG], batch_size=8)
    found = {part: labels_in(template, data) for part, data in sets.items()} | {CLEAN: torch.zeros(0, dtype=torch.long)}
    episode = episodes("continual", [FOG, RAIN], found)[0]
    batches = [x for x, _ in stream_loader(template, sets, episode)]
    assert [len(batch) for batch in batches] == [8, 10, 8, 6]
    assert all((batch < 100).all() or (batch >= 100).all() for batch in batches)
    assert torch.cat(batches[:2]).sort().values.tolist() == list(range(18))


def test_what_cannot_be_streamed_says_so() -> None:
    data = TensorDataset(torch.zeros(4, 2))
    with pytest.raises(MisconfigurationException, match="labels"):
        labels_in(DataLoader(data, batch_size=2), data)
    own = DataLoader(data, batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(MisconfigurationException, match="batch_size"):
        stream_loader(own, {FOG: data}, episodes("reset", [FOG], labels())[0])
