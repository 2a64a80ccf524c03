from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.compose.course import Course
from lightning_peft.compose.schedule import Point, parse_point

factors = st.dictionaries(st.integers(1, 12), st.integers(1, 9), max_size=4).flatmap(
    lambda later: st.integers(1, 9).map(lambda first: {0: first, **later})
)


def steps_by_walking(batches, accumulation, epochs):
    """Take every batch, step when the factor of the epoch says so and after the epoch's last batch, as Lightning does."""
    ends, steps = [0], 0
    for epoch in range(epochs):
        factor = accumulation[max(first for first in accumulation if first <= epoch)]
        for batch in range(1, batches + 1):
            steps += batch % factor == 0 or batch == batches
        ends.append(steps)
    return ends


@given(st.integers(1, 20), factors, st.integers(1, 15))
def test_steps_are_those_of_a_walk_through_all_batches(batches, accumulation, epochs):
    course = Course(batches, epochs, None, accumulation)
    ends = steps_by_walking(batches, accumulation, epochs)
    assert [course.steps_before(epoch) for epoch in range(epochs + 1)] == ends
    assert course.total == ends[-1]
    assert [course.epochs_after(end) for end in ends] == pytest.approx(list(range(epochs + 1)))
    # "The last epoch" begins where the one before it ends, whatever its own factor.
    assert course.place_from_end(Point(1, "epoch")) == ends[-2]


@given(st.integers(1, 20), factors, st.integers(1, 60))
def test_a_number_of_steps_ends_in_the_epoch_that_takes_them(batches, accumulation, steps):
    ends = steps_by_walking(batches, accumulation, 60)
    inside = next(epoch for epoch, end in enumerate(ends) if end >= steps)
    assert Course(batches, None, steps, accumulation).require_epochs() == inside
    assert Course(batches, 3, steps, accumulation).require_epochs() == min(3, inside)


def test_the_earlier_limit_counts():
    assert Course(10, 5, 20).total == 20
    assert Course(10, 5, 80).total == 50
    assert Course(None, 5, 80).total == 80
    assert Course(10, None, None).total is None
    assert Course(0, 5, None).total == 5  # nothing is trained; nothing may divide by it either


def test_points():
    course = Course(10, 4, None, {0: 1, 1: 4})  # 10 + 3 + 3 + 3
    placed = [course.place(parse_point(text)) for text in ("7", "50%", "1ep", "1.5ep", "2ep")]
    assert placed == [7, round(9.5), 10, round(11.5), 13]
    ends = [course.place_from_end(parse_point(text)) for text in ("7", "50%", "1ep", "4ep", "5ep")]
    assert ends == [12, 19 - round(9.5), 16, 0, -1]


@pytest.mark.parametrize(
    ("course", "point", "cure"),
    [
        (Course(10), "30%", "Give Trainer(max_epochs=...) or Trainer(max_steps=...), or write the point"),
        (Course(None, 3), "30%", "Give Trainer(max_steps=...), since the loader has no length, or write"),
        (Course(None, None, 50), "2ep", "Give Trainer(limit_train_batches=...), the number of batches you call an epoch, or"),
    ],
)
def test_what_cannot_be_placed_names_the_argument_and_the_cure(course, point, cure):
    with pytest.raises(MisconfigurationException, match=re.escape(cure)) as raised:
        course.place(parse_point(point), "every=")
    assert str(raised.value).startswith("every= at ")
    if point == "2ep":
        with pytest.raises(MisconfigurationException, match=re.escape(cure)):
            course.place_from_end(parse_point(point), "every=")


def test_what_has_no_end_is_refused():
    with pytest.raises(MisconfigurationException, match=r"not known beforehand. Give Trainer\(max_epochs=...\) or"):
        Course(10).require_total()
    with pytest.raises(MisconfigurationException, match=r"Give Trainer\(max_epochs=...\)"):
        Course(None, None, 5).require_epochs()
