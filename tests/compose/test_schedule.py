from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.compose.schedule import Point, ResolvedSchedule, Schedule, parse_point

SHAPES = ("constant", "linear", "cosine", "cubic", "exponential", "step")
levels = st.floats(1e-6, 1e6)
resolved = st.builds(
    lambda start, length, shape, values: ResolvedSchedule(start, start + length, shape, values),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.sampled_from(SHAPES),
    st.tuples(levels, levels),
)


@given(resolved, st.integers(0, 30_000), st.integers(0, 30_000))
@example(ResolvedSchedule(0, 10, "exponential", (3.580493746949883, 3.5804937469498834)), 6, 10)  # rounds past the end
def test_monotone_between_the_two_values(schedule: ResolvedSchedule, a: int, b: int) -> None:
    early, late = schedule.value(min(a, b)), schedule.value(max(a, b))
    first, last = schedule.values
    assert (early <= late) if first <= last else (early >= late)
    assert min(first, last) <= early <= max(first, last)


@given(resolved, st.integers(1, 1000))
@example(ResolvedSchedule(5, 9, "linear", (5.1, 404.9)), 1)  # 404.9 + (5.1 - 404.9) is not 5.1
def test_ends_are_exact_and_values_hold_outside(schedule: ResolvedSchedule, beyond: int) -> None:
    assert schedule.value(schedule.end) == schedule.values[-1] == schedule.value(schedule.end + beyond)
    assert schedule.value(schedule.start - beyond) == schedule.values[0]
    if schedule.shape != "constant" and schedule.end > schedule.start:
        assert schedule.value(schedule.start) == schedule.values[0]


@given(st.integers(0, 100), st.integers(1, 50), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.data())
def test_cubic_is_zhu_and_gupta(t0: int, n: int, dt: int, si: float, sf: float, data: st.DataObject) -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 at t in {t0, t0 + dt, ..., t0 + n dt}."""
    t = t0 + dt * data.draw(st.integers(0, n))
    expected = sf + (si - sf) * (1 - (t - t0) / (n * dt)) ** 3
    assert Schedule(t0, t0 + n * dt, "cubic", (si, sf)).resolve(None).value(t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", 0.75), ("cosine", 1 - (1 - math.cos(math.pi / 4)) / 2 * 0.99), ("exponential", 10**-0.5), ("step", 1.0)],
)
def test_a_quarter_of_the_way(shape: str, expected: float) -> None:
    last = {"linear": 0.0, "cosine": 0.01, "exponential": 0.01, "step": 0.0}[shape]
    assert Schedule(100, 500, shape, (1.0, last)).resolve(1000).value(200) == pytest.approx(expected)


def test_steps_hold_each_level_for_an_equal_share() -> None:
    schedule = Schedule(0, 100, "step", (8, 4, 2, 1)).resolve(100)
    assert [schedule.value(t) for t in (0, 24, 25, 49, 50, 74, 75, 100, 1000)] == [8, 8, 4, 4, 2, 2, 1, 1, 1]


def test_constant_switches_at_start() -> None:
    schedule = Schedule("50%", shape="constant").resolve(10)
    assert [schedule.value(t) for t in (4, 5, 9)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0, Point(0, "step")),
        (1, Point(1, "step")),
        (1.0, Point(1.0, "fraction")),
        (0.25, Point(0.25, "fraction")),
        (1e3, Point(1000, "step")),
        ("40", Point(40, "step")),
        ("0.5", Point(0.5, "fraction")),
        ("1e3", Point(1000, "step")),
        ("12.5 %", Point(0.125, "fraction")),
        ("100%", Point(1.0, "fraction")),
        ("2.5ep", Point(2.5, "epoch")),
        ("epoch:3", Point(3.0, "epoch")),
        ("Epoch: 3", Point(3.0, "epoch")),
    ],
)
def test_points(spec: float | str, expected: Point) -> None:
    assert parse_point(spec) == expected
    assert type(parse_point(spec).unit) is str


@pytest.mark.parametrize("spec", [-1, -0.1, 1.5, math.nan, math.inf, True, "101%", "-3ep", "three", "", "ep", "3 epochs", None])
def test_points_that_mean_nothing(spec: object) -> None:
    with pytest.raises(MisconfigurationException, match='"30%"'):
        parse_point(spec)  # type: ignore[arg-type]


def test_resolving_points() -> None:
    assert parse_point("30%").resolve(200, None) == 60
    assert parse_point("1.5ep").resolve(None, 10) == 15
    assert parse_point(7).resolve(None, None) == 7


@pytest.mark.parametrize("total", [None, math.inf, 0])
def test_unknown_length_is_an_error_that_names_the_way_out(total: float | None) -> None:
    with pytest.raises(MisconfigurationException, match="max_steps"):
        Schedule().resolve(total)
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        Schedule(end="3ep").resolve(100, total)
    assert Schedule(end=10).resolve(total).value(5) == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shape": "quadratic"}, "cubic"),
        ({"values": (1.0,)}, "exactly two"),
        ({"values": (1.0, 2.0, 3.0)}, "exactly two"),
        ({"shape": "step", "values": (1.0,)}, "two or more"),
        ({"shape": "exponential"}, "same sign"),
        ({"values": (0.0, math.nan)}, "finite"),
        ({"start": "200%"}, "200%"),
    ],
)
def test_bad_schedules_fail_when_written(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Schedule(**kwargs)  # type: ignore[arg-type]


def test_end_before_start() -> None:
    with pytest.raises(MisconfigurationException, match="step 20 or later"):
        Schedule(20, "10%").resolve(100)


def component(schedule: Schedule = Schedule()) -> Schedule:  # noqa: B008 (what LightningCLI reads)
    return schedule


def test_built_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("schedule: {start: 30%, end: 1.0, shape: exponential, values: [1e-3, 1]}")
    built = auto_cli(component, args=[f"--config={config}"])
    assert built == Schedule("30%", 1.0, "exponential", (1e-3, 1.0))
    assert built.resolve(200) == ResolvedSchedule(60, 200, "exponential", (1e-3, 1.0))
    assert auto_cli(component, args=["--schedule.end=40"]) == Schedule(end=40)
    assert auto_cli(component, args=["--schedule.end=3ep", "--schedule.shape=step", "--schedule.values=[3,2,1]"]) == (
        Schedule(end="3ep", shape="step", values=(3, 2, 1))
    )
    assert auto_cli(component, args=[]) == Schedule()


def test_is_a_value() -> None:
    assert hash(Schedule(values=[0, 1])) == hash(Schedule())  # type: ignore[arg-type]
    assert replace(Schedule(), end="50%").resolve(10).end == 5


def test_plot_draws_the_values() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert Schedule("10%", "50%", "cubic").plot(ax, total_steps=100) is ax
    x, y = ax.lines[0].get_data()
    assert x[0] == 6
    assert (y[0], y[-1]) == (0.0, 1.0)
    plt.close(figure)
    plt.close(Schedule().plot().figure)


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MisconfigurationException, match=r"lightning-peft\[report\]"):
        Schedule().plot()
