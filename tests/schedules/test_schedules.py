"""Schedules: the exact timetable of each in fits of every size, and the shape in between."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import Cubic, Exponential, Linear, OneShot, Schedule, Steps
from lightning_prune.schedules.base import Event, Timetable
from lightning_prune.schedules.event_queue import EventQueue
from lightning_prune.schedules.moments import FitLength, Grid, Moment, TimeUnit


def fit(epochs: int | None, per_epoch: int | None = 10, steps: int | None = None) -> FitLength:
    return FitLength(epochs, steps, per_epoch)


def positions(schedule: Schedule, horizon: FitLength) -> tuple[str, list[int]]:
    table = schedule.timetable(horizon)
    return table.unit.value, [event.position for event in table.events]


def events(schedule: Schedule, horizon: FitLength) -> list[tuple[int, float]]:
    return [(event.position, event.fraction) for event in schedule.timetable(horizon).events]


def rounded(fractions: list[float]) -> object:
    """Equal but for the last bits of a cube or an exponential."""
    return pytest.approx(fractions, rel=0, abs=2**-51)


@pytest.mark.parametrize(
    ("epochs", "unit", "when"),
    [
        (30, "ep", [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]),
        (10, "ep", [1, 2, 3, 4, 5, 6, 7]),
        (5, "ep", [1, 2, 3, 4]),
        (3, "ep", [1, 2]),
        (2, "ep", [1]),
        (1, "st", [1, 7]),
    ],
)
@pytest.mark.parametrize("schedule", [Cubic(), Linear(), Exponential()])
def test_ramps_have_an_event_an_epoch(schedule: Schedule, epochs: int, unit: str, when: list[int]) -> None:
    assert positions(schedule, fit(epochs)) == (unit, when)


def test_cubic_in_30_epochs() -> None:
    cubes = [0, 919, 1736, 2457, 3088, 3635, 4104, 4501, 4832, 5103]
    cubes += [5320, 5489, 5616, 5707, 5768, 5805, 5824, 5831, 5832]
    table = Cubic().timetable(fit(30))
    assert [event.fraction for event in table.events] == rounded([cube / 5832 for cube in cubes])


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (10, [0, 91 / 216, 152 / 216, 189 / 216, 208 / 216, 215 / 216, 1]),
        (5, [0, 19 / 27, 26 / 27, 1]),
        (3, [0, 1]),
        (2, [1]),
        (1, [0, 1]),
    ],
)
def test_cubic_fractions(epochs: int, expected: list[float]) -> None:
    assert [event.fraction for event in Cubic().timetable(fit(epochs)).events] == rounded(expected)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (30, [(3 + k, k / 18) for k in range(19)]),
        (10, [(1, 0.0), (2, 1 / 6), (3, 2 / 6), (4, 3 / 6), (5, 4 / 6), (6, 5 / 6), (7, 1.0)]),
        (5, [(1, 0.0), (2, 1 / 3), (3, 2 / 3), (4, 1.0)]),
        (3, [(1, 0.0), (2, 1.0)]),
        (2, [(1, 1.0)]),
        (1, [(1, 0.0), (7, 1.0)]),
    ],
)
def test_linear(epochs: int, expected: list[tuple[int, float]]) -> None:
    assert events(Linear(), fit(epochs)) == expected


def test_exponential_in_5_epochs() -> None:
    whole = 1 - math.exp(-5)
    expected = [0, (1 - math.exp(-5 / 3)) / whole, (1 - math.exp(-10 / 3)) / whole, 1]
    assert [event.fraction for event in Exponential().timetable(fit(5)).events] == rounded(expected)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(30, [(9, 1.0)]), (10, [(3, 1.0)]), (5, [(2, 1.0)]), (3, [(1, 1.0)]), (2, [(1, 1.0)]), (1, [(3, 1.0)])],
)
def test_one_shot(epochs: int, expected: list[tuple[int, float]]) -> None:
    assert events(OneShot(), fit(epochs)) == expected


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (30, [(6, 0.5), (15, 1.0)]),
        (10, [(2, 0.5), (5, 1.0)]),
        (5, [(1, 0.5), (2, 1.0)]),
        (3, [(1, 0.5), (2, 1.0)]),
        (2, [(1, 1.0)]),
        (1, [(2, 0.5), (5, 1.0)]),
    ],
)
def test_steps(epochs: int, expected: list[tuple[int, float]]) -> None:
    assert events(Steps(), fit(epochs)) == expected


@pytest.mark.parametrize(
    ("schedule", "horizon", "expected"),
    [
        (OneShot(0), fit(30), ("ep", [0])),
        (OneShot("0st"), fit(30), ("st", [0])),
        (OneShot("123st"), fit(30), ("st", [123])),
        (OneShot("30ep"), fit(30), ("ep", [29])),
        (OneShot("100%"), fit(1), ("st", [9])),
        (OneShot("30%"), fit(None, steps=205), ("st", [62])),
        (OneShot("5ep"), fit(None), ("ep", [5])),
        (Steps({"2ep": 0.3, "5ep": 1.0}), fit(30), ("ep", [2, 5])),
        (Steps({"2ep": 0.3, "5ep": 1.0}), fit(None, None), ("ep", [2, 5])),
        (Steps({"1ep": 0.3, "25st": 1.0}), fit(30), ("st", [10, 25])),
        (Steps({0.2: 0.3, 0.5: 1.0}), fit(30), ("ep", [6, 15])),
        (Cubic(start=0, end="30%"), fit(10), ("ep", [0, 1, 2, 3])),
        (Cubic(start="4ep", end="4ep"), fit(10), ("ep", [4])),
        (Cubic(), fit(None, steps=100), ("st", [10, 20, 30, 40, 50, 60, 70])),
        (Cubic(), fit(30, steps=100), ("st", [10, 20, 30, 40, 50, 60, 70])),
        (Cubic(), fit(10, steps=1000), ("ep", [1, 2, 3, 4, 5, 6, 7])),
        (Cubic(), fit(10, per_epoch=None), ("ep", [1, 2, 3, 4, 5, 6, 7])),
        (Cubic(start="10st", end="45st"), fit(10), ("st", [10, 20, 30, 40, 45])),
        (Cubic(start="15st", end="4ep"), fit(10), ("st", [15, 25, 35, 40])),
        (Cubic(start="1ep", end="50%", every="15st"), fit(10), ("st", [10, 25, 40, 50])),
    ],
)
def test_moments_of_every_unit(schedule: Schedule, horizon: FitLength, expected: tuple[str, list[int]]) -> None:
    assert positions(schedule, horizon) == expected


@pytest.mark.parametrize(
    ("every", "horizon", "expected"),
    [
        ("2ep", fit(30), ("ep", [3, 5, 7, 9, 11, 13, 15, 17, 19, 21])),
        ("5ep", fit(30), ("ep", [3, 8, 13, 18, 21])),
        ("18ep", fit(30), ("ep", [3, 21])),
        ("100ep", fit(30), ("ep", [3, 21])),
        ("2.5ep", fit(30), ("ep", [3, 5, 8, 11, 13, 15, 18, 21])),
        ("0.1ep", fit(10), ("ep", [1, 2, 3, 4, 5, 6, 7])),
        ("10%", fit(30), ("ep", [3, 6, 9, 12, 15, 18, 21])),
        ("15%", fit(30), ("ep", [3, 7, 12, 17, 21])),
        (0.2, fit(30), ("ep", [3, 9, 15, 21])),
        ("1%", fit(10), ("ep", [1, 2, 3, 4, 5, 6, 7])),
        ("45st", fit(30), ("st", [30, 75, 120, 165, 210])),
        ("100st", fit(30), ("st", [30, 130, 210])),
        ("20%", fit(1, per_epoch=40), ("st", [4, 12, 20, 28])),
        ("0.25ep", fit(1, per_epoch=40), ("st", [4, 14, 24, 28])),
        ("7st", fit(1, per_epoch=40), ("st", [4, 11, 18, 25, 28])),
        ("20%", fit(None, per_epoch=None, steps=200), ("st", [20, 60, 100, 140])),
        ("50st", fit(None, per_epoch=None, steps=200), ("st", [20, 70, 120, 140])),
        ("2ep", fit(None, per_epoch=30, steps=200), ("st", [20, 80, 140])),
    ],
)
def test_every(every: str | float, horizon: FitLength, expected: tuple[str, list[int]]) -> None:
    assert positions(Cubic(every=every), horizon) == expected


def test_every_in_steps_gives_fractions_in_steps() -> None:
    ramp = Linear(start="10st", end="50st", every="15st")
    assert events(ramp, fit(30)) == [(10, 0.0), (25, 0.375), (40, 0.75), (50, 1.0)]


def test_moments_that_fall_together_are_one_event() -> None:
    assert events(Steps({"10%": 0.2, "12%": 0.4, "50%": 1.0}), fit(10)) == [(1, 0.4), (5, 1.0)]


EVENTS = Event(2, 0.25), Event(4, 0.5), Event(6, 1.0)


def queue(*events: Event) -> EventQueue:
    """At its beginning."""
    found = EventQueue(0.5)
    found.timetable = Timetable(TimeUnit.EPOCH, events)
    return found


def handle(own: EventQueue, epoch: int, event: Event) -> None:
    """All that it asked for was given."""
    own.mark_handled(epoch, event, event.fraction)


def test_the_latest_event_that_passed_is_due_once() -> None:
    first, second, third = EVENTS
    own = queue(*EVENTS)
    assert own.due(1) is None
    assert own.due(2) is first
    assert own.due(5) is second
    assert own.due(100) is third
    handle(own, 2, first)
    assert own.due(3) is None
    assert own.due(5) is second
    handle(own, 5, second)
    assert own.due(5) is None
    assert not own.finished
    handle(own, 6, third)
    assert own.due(100) is None
    assert own.finished


def test_in_a_fit_of_another_length_what_is_lacking_is_due() -> None:
    own = queue(*EVENTS)
    handle(own, 4, EVENTS[1])
    own.timetable = Timetable(TimeUnit.EPOCH, (Event(1, 0.25), Event(2, 0.5), Event(3, 1.0)))  # shorter
    assert own.due(4) == Event(3, 1.0)
    handle(own, 4, Event(3, 1.0))
    assert own.finished
    own.timetable = Timetable(TimeUnit.EPOCH, (Event(4, 0.25), Event(8, 0.5), Event(12, 1.0)))  # longer
    assert own.due(7) is None
    assert own.due(8) == Event(8, 0.5)
    handle(own, 8, Event(8, 0.5))
    own.timetable = Timetable(TimeUnit.EPOCH, (Event(2, 0.5), Event(4, 1.0)))  # nothing more than was asked for
    assert own.finished


def test_the_last_event_comes_once_more_if_other_units_are_to_go() -> None:
    own = queue(*EVENTS)
    handle(own, 3, EVENTS[0])
    own.resume(anew=True)
    assert own.due(3) is None  # others are to come
    handle(own, 6, EVENTS[2])
    assert own.finished
    own.resume(anew=True)
    assert not own.finished
    assert own.due(7) is EVENTS[2]


def test_what_was_called_off_comes_once_more_if_that_is_taken_back() -> None:
    own = queue(*EVENTS)
    handle(own, 6, EVENTS[2])
    own.cancel(0.25)
    assert own.finished
    assert own.due(7) is None
    own.resume(anew=False)
    assert own.due(7) is EVENTS[2]


def test_what_was_not_given_is_lacking_if_that_is_taken_back() -> None:
    own = queue(*EVENTS)
    own.mark_handled(6, EVENTS[2], 0.75)
    assert own.finished
    own.resume(anew=False)
    assert own.due(7) is EVENTS[2]


@pytest.mark.parametrize(("target", "lacking"), [(0.6, True), (0.5, False), (0.4, False)])
def test_the_last_event_comes_once_more_for_a_higher_target(target: float, lacking: bool) -> None:
    own = queue(*EVENTS)
    handle(own, 6, EVENTS[2])
    again = EventQueue(target)
    again.timetable = own.timetable
    again.load_state_dict(own.state_dict())
    assert again.finished != lacking
    assert (again.due(7) is EVENTS[2]) == lacking


def test_an_event_before_the_first_batch_is_due_at_once() -> None:
    (event,) = OneShot(0).timetable(fit(3)).events
    assert queue(event).due(0) is event
    assert event == Event(0, 1.0)


percent = st.integers(0, 100)
spans = st.tuples(percent, percent).map(sorted).map(lambda pair: tuple(f"{value}%" for value in pair))
intervals = st.sampled_from(["1ep", "3ep", "0.4ep", "7%", "0.5%", "1st", "13st"])
ramps = st.builds(
    lambda ramp, span, every: ramp(*span, every),
    st.sampled_from([Cubic, Linear, Exponential]),
    spans,
    intervals,
)
stairs = st.lists(percent, min_size=1, max_size=5, unique=True).map(
    lambda moments: Steps(
        {f"{moment}%": (index + 1) / len(moments) for index, moment in enumerate(sorted(moments))}
    )
)
schedules = ramps | stairs | st.builds(OneShot, percent.map("{}%".format))
horizons = st.builds(
    FitLength,
    epochs=st.integers(1, 40),
    steps=st.none() | st.integers(2, 500),
    steps_per_epoch=st.integers(2, 20),
)


@given(schedules, horizons)
def test_timetables_rise_to_one_at_the_last_moment(schedule: Schedule, horizon: FitLength) -> None:
    table = schedule.timetable(horizon)
    end = horizon.epochs if table.unit is TimeUnit.EPOCH else horizon.length
    assert end is not None
    when = [event.position for event in table.events]
    shares = [event.fraction for event in table.events]
    assert when == sorted(set(when))
    assert 0 <= when[0] <= when[-1] < end
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == 1.0
    grid = Grid(horizon, table.unit)
    assert when[0] == grid.position(schedule.moments[0])
    assert when[-1] == grid.position(schedule.moments[-1])


@given(ramps, horizons)
def test_events_are_as_far_apart_as_every_says(schedule: Cubic, horizon: FitLength) -> None:
    table = schedule.timetable(horizon)
    stretch = max(1, Grid(horizon, table.unit).length_of(schedule.interval))
    when = [event.position for event in table.events]
    gaps = [later - earlier for earlier, later in pairwise(when)]
    assert all(abs(gap - stretch) < 1 for gap in gaps[:-1])
    assert all(gap <= stretch + 1 for gap in gaps)


@given(schedules, st.floats(0, 1), st.floats(0, 1))
def test_progress_never_takes_anything_back(schedule: Schedule, one: float, other: float) -> None:
    earlier, later = sorted((one, other))
    assert 0.0 <= schedule(earlier) <= schedule(later) <= 1.0
    assert schedule(1.0) == 1.0


@given(schedules, st.floats(0, 1))
def test_nothing_goes_before_the_first_moment(schedule: Schedule, progress: float) -> None:
    first, last = float(schedule.moments[0].value), float(schedule.moments[-1].value)
    if progress < first:
        assert schedule(progress) == 0.0
    if progress >= last:
        assert schedule(progress) == 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Cubic("20%", "60%"), [0.0, 0.0, 0.578125, 0.875, 0.984375, 1.0, 1.0]),
        (Linear("20%", "60%"), [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (OneShot("40%"), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
        (Steps({"20%": 0.5, "40%": 1.0}), [0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_shares_by_progress(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(progress) for progress in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)] == rounded(expected)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("schedule", [Cubic(), OneShot(), Steps()])
def test_progress_outside_the_fit_is_refused(schedule: Schedule, progress: float) -> None:
    with pytest.raises(ValueError, match=rf"^progress={progress!r} must lie in \[0, 1\]"):
        schedule(progress)


@pytest.mark.parametrize(
    ("schedule", "moment"),
    [
        (Cubic(start="1ep"), "start='1ep'"),
        (Cubic(end="100st"), "end='100st'"),
        (OneShot("3ep"), "at='3ep'"),
        (Steps({"10%": 0.1, "7ep": 1.0}), "moment '7ep' in shares"),
    ],
)
def test_progress_knows_no_epochs(schedule: Schedule, moment: str) -> None:
    with pytest.raises(ValueError, match=f"^{moment} has no meaning without a Trainer"):
        schedule(0.5)


def test_progress_needs_no_every() -> None:
    assert Linear(start="0ep", end="50%", every="3st")(0.25) == 0.5


@pytest.mark.parametrize("ramp", [Cubic, Linear, Exponential])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "soon"}, "start='soon' is no moment"),
        ({"end": 5}, "end=5 must lie between 0 and 100 %"),
        ({"every": None}, "every=None is no moment"),
        ({"every": "0.5st"}, "every='0.5st' must be a whole number"),
        ({"every": "0ep"}, "every='0ep' must be more than nothing"),
        ({"every": 0}, "every=0 must be more than nothing"),
        ({"start": "50%", "end": "20%"}, "start='50%' must not come after end='20%'"),
        ({"start": "5ep", "end": "4ep"}, "start='5ep' must not come after end='4ep'"),
    ],
)
def test_ramps_refuse_bad_arguments_when_built(
    ramp: type[Cubic], arguments: dict[str, str | float], message: str
) -> None:
    with pytest.raises(ValueError, match="=") as error:
        ramp(**arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("at", ["soon", None, "120%", "0.5st"])
def test_one_shot_refuses_bad_arguments_when_built(at: str | None) -> None:
    with pytest.raises(ValueError, match=f"^at={at!r} "):
        OneShot(at)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"20%": 0.5},
        {"20%": 0.0, "50%": 1.0},
        {"20%": -0.5, "50%": 1.0},
        {"20%": 0.5, "50%": 0.5},
        {"20%": 0.5, "50%": 0.4},
        {"20%": 1.0, "50%": 1.0},
        {"20%": 0.5, "50%": 1.5},
        {"20%": math.nan, "50%": 1.0},
    ],
)
def test_shares_must_rise_to_one(shares: dict[str, float]) -> None:
    with pytest.raises(
        ValueError,
        match=r"must (be shares of the target above 0 that rise|map moments to shares of the target)",
    ) as error:
        Steps(shares)
    assert str(error.value).startswith(f"shares={shares!r} ")


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"50%": 0.5, "20%": 1.0}, "^moment '20%' in shares must come after moment '50%' in shares"),
        ({"2ep": 0.5, "2.0ep": 1.0}, r"moment '2\.0ep' in shares must come after moment '2ep' in shares"),
        ({"soon": 1.0}, "^moment 'soon' in shares is no moment"),
    ],
)
def test_moments_of_shares_must_rise(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steps(shares)


@pytest.mark.parametrize(
    ("schedule", "horizon", "message"),
    [
        (Cubic(start="5ep", end="20%"), fit(10), "start='5ep' comes after end='20%' in this fit"),
        (
            Steps({"60st": 0.5, "5ep": 1.0}),
            fit(10),
            "moment '60st' in shares comes after moment '5ep' in shares in this fit",
        ),
        (Cubic(end="31ep"), fit(30), "end='31ep' lies beyond the fit, which has 30 epochs"),
        (OneShot("300st"), fit(30), "at='300st' leaves no training after it"),
        (Cubic(), fit(None), "start='10%' needs to know how long the fit is"),
        (Cubic("10st", "50st"), fit(None, None), "every='1ep' cannot be turned into optimizer steps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(schedule: Schedule, horizon: FitLength, message: str) -> None:
    with pytest.raises(ValueError, match=r"fit|steps") as error:
        schedule.timetable(horizon)
    assert str(error.value).startswith(message)


def test_a_schedule_serves_fits_of_any_length() -> None:
    schedule = Cubic()
    before = events(schedule, fit(30))
    assert events(schedule, fit(10)) != before
    assert events(schedule, fit(30)) == before
    assert schedule.moments == (Moment.parse("10%", "start"), Moment.parse("70%", "end"))
