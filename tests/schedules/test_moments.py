"""Moments: what parses, and which epoch or batch each falls on."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_prune.schedules.moments import FitLength, Grid, Moment, TimeUnit

THIRTY = FitLength(epochs=30, steps=None, steps_per_epoch=10)
ONE = FitLength(epochs=1, steps=None, steps_per_epoch=40)
UNSIZED = FitLength(epochs=30, steps=None, steps_per_epoch=None)
BY_STEPS = FitLength(epochs=None, steps=205, steps_per_epoch=10)
ENDLESS = FitLength(epochs=None, steps=None, steps_per_epoch=10)


def parse(*moments: str | float) -> list[Moment]:
    return [Moment.parse(moment, "start") for moment in moments]


def place(moment: str | float, horizon: FitLength) -> tuple[TimeUnit, int]:
    (parsed,) = parse(moment)
    grid = Grid.of([parsed], horizon)
    return grid.unit, grid.position(parsed)


@pytest.mark.parametrize(
    ("moment", "value", "unit"),
    [
        ("30%", Fraction(3, 10), TimeUnit.FIT),
        ("12.5%", Fraction(1, 8), TimeUnit.FIT),
        ("0%", Fraction(0), TimeUnit.FIT),
        ("100%", Fraction(1), TimeUnit.FIT),
        (0.3, Fraction(3, 10), TimeUnit.FIT),
        (0.1, Fraction(1, 10), TimeUnit.FIT),
        (1e-05, Fraction(1, 100_000), TimeUnit.FIT),
        (0, Fraction(0), TimeUnit.FIT),
        (0.0, Fraction(0), TimeUnit.FIT),
        (1, Fraction(1), TimeUnit.FIT),
        (1.0, Fraction(1), TimeUnit.FIT),
        ("0ep", Fraction(0), TimeUnit.EPOCH),
        ("5ep", Fraction(5), TimeUnit.EPOCH),
        ("2.5ep", Fraction(5, 2), TimeUnit.EPOCH),
        ("0.1ep", Fraction(1, 10), TimeUnit.EPOCH),
        ("0st", Fraction(0), TimeUnit.STEP),
        ("200st", Fraction(200), TimeUnit.STEP),
        ("200.0st", Fraction(200), TimeUnit.STEP),
        (" 30 % ", Fraction(3, 10), TimeUnit.FIT),
        ("\t5  ep", Fraction(5), TimeUnit.EPOCH),
    ],
)
def test_parses_exactly(moment: str | float, value: Fraction, unit: TimeUnit) -> None:
    parsed = Moment.parse(moment, "start")
    assert (parsed.value, parsed.unit) == (value, unit)
    assert parsed.text == f"start={moment!r}"


@pytest.mark.parametrize(
    "moment",
    [
        *("soon", "", " ", "30", "0.3", "%", "ep", "st", "5epochs", "5EP", "5 epst", "5ep 3st"),
        *("-5ep", "+5ep", "-1%", "1e3st", "1,5ep", ".5ep", "5.ep", "nan%", "infep", "1/2ep"),
        *(None, True, False, [], ["5ep"], b"5ep", 1j, TimeUnit.EPOCH),
        *(math.nan, math.inf, -math.inf),
    ],
)
def test_refuses_what_is_no_moment(moment: object) -> None:
    with pytest.raises(ValueError, match="is no moment") as error:
        Moment.parse(moment, "every")  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith(f"every={moment!r} ")
    assert all(example in message for example in ('"30%"', "0.3", '"5ep"', '"200st"'))


@pytest.mark.parametrize("moment", ["101%", "100.1%", 1.5, 2, 30, -0.1, -1])
def test_refuses_shares_beyond_the_fit(moment: str | float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 100 % of the fit") as error:
        Moment.parse(moment, "end")
    assert str(error.value).startswith(f"end={moment!r} ")


@pytest.mark.parametrize("moment", ["0.5st", "200.25st"])
def test_refuses_part_of_a_step(moment: str) -> None:
    with pytest.raises(ValueError, match=f"^at='{moment}' must be a whole number of optimizer steps"):
        Moment.parse(moment, "at")


@pytest.mark.parametrize(
    ("horizon", "length", "ends_by_steps"),
    [
        (THIRTY, 300, False),
        (ONE, 40, False),
        (UNSIZED, None, False),
        (ENDLESS, None, False),
        (BY_STEPS, 205, True),
        (FitLength(None, 200, None), 200, True),
        (FitLength(30, 100, 10), 100, True),
        (FitLength(3, 100, 10), 30, False),
    ],
)
def test_the_first_limit_ends_the_fit(horizon: FitLength, length: int | None, ends_by_steps: bool) -> None:
    assert (horizon.length, horizon.ends_by_steps) == (length, ends_by_steps)


@pytest.mark.parametrize(
    ("moment", "position"),
    [
        ("0%", 0),
        (0, 0),
        ("0ep", 0),
        ("0.1%", 1),
        ("1%", 1),
        ("5%", 2),  # 1.5: half to even
        ("10%", 3),
        ("15%", 4),  # 4.5: half to even
        (0.3, 9),
        ("70%", 21),
        ("99%", 29),
        ("100%", 29),
        ("0.01ep", 1),
        ("1ep", 1),
        ("2.5ep", 2),
        ("3.5ep", 4),
        ("3.6ep", 4),
        ("29ep", 29),
        ("29.9ep", 29),
        ("30ep", 29),
    ],
)
@pytest.mark.parametrize("horizon", [THIRTY, UNSIZED, FitLength(30, 1000, 10)])
def test_shares_and_epochs_fall_on_epoch_starts(moment: str | float, position: int, horizon: FitLength) -> None:
    assert place(moment, horizon) == (TimeUnit.EPOCH, position)


@pytest.mark.parametrize(("moment", "position"), [("0st", 0), ("1st", 1), ("207st", 207), ("299st", 299)])
def test_steps_fall_before_their_batch(moment: str, position: int) -> None:
    assert place(moment, THIRTY) == (TimeUnit.STEP, position)


@pytest.mark.parametrize(
    ("moment", "position"),
    [
        ("0%", 0),
        ("0ep", 0),
        ("1%", 1),  # 0.4
        ("1.25%", 1),  # 0.5
        ("30%", 12),
        ("100%", 39),
        ("0.5ep", 20),
        ("1ep", 39),
        ("7st", 7),
        ("39st", 39),
    ],
)
def test_one_epoch_is_counted_in_batches(moment: str, position: int) -> None:
    assert place(moment, ONE) == (TimeUnit.STEP, position)


@pytest.mark.parametrize(
    ("horizon", "moment", "position"),
    [
        (BY_STEPS, "0%", 0),
        (BY_STEPS, "10%", 20),  # 20.5: half to even
        (BY_STEPS, "30%", 62),  # 61.5: half to even
        (BY_STEPS, "100%", 204),
        (BY_STEPS, "204st", 204),
        (FitLength(30, 100, 10), "33%", 33),
        (FitLength(None, 205, None), "30%", 62),
        (FitLength(None, 205, None), "3st", 3),
    ],
)
def test_shares_of_a_fit_that_steps_end_are_batches(horizon: FitLength, moment: str, position: int) -> None:
    assert place(moment, horizon) == (TimeUnit.STEP, position)


@pytest.mark.parametrize(
    ("horizon", "moment", "expected"),
    [
        (ENDLESS, "5ep", (TimeUnit.EPOCH, 5)),
        (ENDLESS, "0.1ep", (TimeUnit.EPOCH, 1)),
        (ENDLESS, "1000000st", (TimeUnit.STEP, 1_000_000)),
        (ENDLESS, "0%", (TimeUnit.STEP, 0)),
        (UNSIZED, "12345st", (TimeUnit.STEP, 12_345)),
        (FitLength(None, None, None), "5ep", (TimeUnit.EPOCH, 5)),
        (FitLength(1, None, None), "5st", (TimeUnit.STEP, 5)),
        (BY_STEPS, "5ep", (TimeUnit.EPOCH, 5)),
    ],
)
def test_counts_need_no_end(horizon: FitLength, moment: str, expected: tuple[TimeUnit, int]) -> None:
    assert place(moment, horizon) == expected


@pytest.mark.parametrize(
    ("horizon", "positions"),
    [
        # "5ep", "15%", "30%", "100%", "7st", 0
        (THIRTY, [50, 40, 90, 290, 7, 0]),
        (FitLength(30, 1000, 10), [50, 40, 90, 290, 7, 0]),
        (BY_STEPS, [50, 31, 62, 204, 7, 0]),
    ],
)
def test_one_moment_in_steps_puts_all_on_steps(horizon: FitLength, positions: list[int]) -> None:
    moments = parse("5ep", "15%", "30%", "100%", "7st", 0)
    grid = Grid.of(moments, horizon)
    assert grid.unit is TimeUnit.STEP
    assert [grid.position(moment) for moment in moments] == positions


def test_one_share_puts_all_on_steps_where_steps_end_the_fit() -> None:
    moments = parse("10%", "5ep")
    grid = Grid.of(moments, BY_STEPS)
    assert grid.unit is TimeUnit.STEP
    assert [grid.position(moment) for moment in moments] == [20, 50]


@pytest.mark.parametrize(
    ("horizon", "moment", "unit", "length"),
    [
        (THIRTY, "5%", TimeUnit.EPOCH, Fraction(3, 2)),
        (THIRTY, "2.5ep", TimeUnit.EPOCH, Fraction(5, 2)),
        (THIRTY, "5%", TimeUnit.STEP, Fraction(15)),
        (THIRTY, "2.5ep", TimeUnit.STEP, Fraction(25)),
        (THIRTY, "7st", TimeUnit.STEP, Fraction(7)),
        (BY_STEPS, "10%", TimeUnit.STEP, Fraction(41, 2)),
        (BY_STEPS, "0.25ep", TimeUnit.STEP, Fraction(5, 2)),
    ],
)
def test_stretches_are_not_rounded(horizon: FitLength, moment: str, unit: TimeUnit, length: Fraction) -> None:
    (parsed,) = parse(moment)
    assert Grid(horizon, unit).length_of(parsed) == length


@pytest.mark.parametrize(
    ("horizon", "moment", "message"),
    [
        (THIRTY, "31ep", "start='31ep' lies beyond the fit, which has 30 epochs"),
        (THIRTY, "30.5ep", "start='30.5ep' lies beyond the fit, which has 30 epochs"),
        (THIRTY, "301st", "start='301st' lies beyond the fit, which has 300 optimizer steps"),
        (THIRTY, "300st", "start='300st' leaves no training after it in a fit of 300 optimizer steps"),
        (ONE, "1.5ep", "start='1.5ep' lies beyond the fit, which has 40 optimizer steps"),
        (ONE, "40st", "start='40st' leaves no training after it in a fit of 40 optimizer steps"),
        (BY_STEPS, "205st", "start='205st' leaves no training after it in a fit of 205 optimizer steps"),
        (FitLength(1, None, 1), "50%", "start='50%' leaves no training after it"),
        (ENDLESS, "30%", "start='30%' needs to know how long the fit is: set a finite max_epochs"),
        (FitLength(1, None, None), "30%", "start='30%' needs to know how long the fit is"),
        (FitLength(1, None, None), "0.5ep", "start='0.5ep' cannot be turned into optimizer steps"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(horizon: FitLength, moment: str, message: str) -> None:
    with pytest.raises(ValueError, match="start=") as error:
        place(moment, horizon)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("5ep", "start='5ep' cannot be turned into optimizer steps, since the training data have no length"),
        ("30%", "start='30%' needs to know how long the fit is"),
    ],
)
def test_steps_mix_with_nothing_where_data_have_no_length(moment: str, message: str) -> None:
    grid = Grid.of(parse("7st", moment), UNSIZED)
    with pytest.raises(ValueError, match="start=") as error:
        grid.position(parse(moment)[0])
    assert str(error.value).startswith(message)


horizons = st.builds(
    FitLength,
    epochs=st.integers(1, 60) | st.none(),
    steps=st.integers(2, 2000) | st.none(),
    steps_per_epoch=st.integers(2, 30),
)
shares = st.integers(0, 1000).map(lambda tenths: f"{tenths / 10}%")


@given(horizons, shares, shares)
def test_shares_lie_inside_the_fit_in_order(horizon: FitLength, one: str, other: str) -> None:
    assume(horizon.length is not None)
    moments = sorted(parse(one, other), key=lambda moment: moment.value)
    grid = Grid.of(moments, horizon)
    end = horizon.epochs if grid.unit is TimeUnit.EPOCH else horizon.length
    first, second = (grid.position(moment) for moment in moments)
    assert end is not None
    assert 0 <= first <= second <= end - 1
    assert [position == 0 for position in (first, second)] == [moment.value == 0 for moment in moments]


@given(st.integers(2, 60), st.integers(1, 30), st.data())
def test_epochs_lie_inside_the_fit_in_order(epochs: int, per_epoch: int, data: st.DataObject) -> None:
    horizon = FitLength(epochs, None, per_epoch)
    tenths = st.integers(0, 10 * epochs)
    moments = parse(*(f"{value / 10}ep" for value in sorted((data.draw(tenths), data.draw(tenths)))))
    by_epochs = [Grid(horizon, TimeUnit.EPOCH).position(moment) for moment in moments]
    by_steps = [Grid(horizon, TimeUnit.STEP).position(moment) for moment in moments]
    assert 0 <= by_epochs[0] <= by_epochs[1] <= epochs - 1
    assert by_steps == [position * per_epoch for position in by_epochs]
    for moment, position in zip(moments, by_epochs, strict=True):
        inside = min(max(moment.value, Fraction(1)), Fraction(epochs - 1))
        assert moment.value == 0 or abs(position - inside) <= Fraction(1, 2)


@given(st.integers(2, 60), st.integers(2, 30), st.data())
def test_steps_are_taken_as_they_are(epochs: int, per_epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, epochs * per_epoch - 1))
    assert place(f"{step}st", FitLength(epochs, None, per_epoch)) == (TimeUnit.STEP, step)
