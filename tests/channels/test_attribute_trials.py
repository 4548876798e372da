"""Which sets of attributes are tried, given how others have failed."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.channels.compaction.attribute_trials import AttributeTrials
from lightning_prune.channels.compaction.failures import Failure

NUMBERS = [("", f"number{place}") for place in range(5)]
SETS = [each for size in range(1, 6) for each in combinations(NUMBERS, size)]


@given(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=5, unique=True), st.booleans())
def test_what_passes_is_found_by_few_trials(needed: list[tuple[str, str]], known: bool) -> None:
    """Lines of a forward that each need one more number, in this order."""

    def stops_at(chosen: tuple[tuple[str, str], ...]) -> Failure | None:
        places = (place for place, each in enumerate(needed) if each not in chosen)
        return next((Failure("does not fit", (place,)) for place in places), None)

    trials = AttributeTrials(SETS, stops_at(()) if known else None)
    tried = 0
    while failure := stops_at(chosen := trials.next() or ()):
        assert chosen
        tried += 1
        trials.note(chosen, failure)
    assert set(chosen) == set(needed)
    if known:  # the numbers alone, then those with what leads on
        assert tried <= sum(range(5, 5 - len(needed), -1))


def test_an_attribute_in_all_modules_is_tried_without_a_trial_of_some() -> None:
    stops = Failure("stops", (1,))
    trials = AttributeTrials([(NUMBERS[0],), tuple(NUMBERS), (NUMBERS[0], NUMBERS[1])], stops)
    assert trials.next() == (NUMBERS[0],)
    trials.note((NUMBERS[0],), stops)
    assert trials.next() == tuple(NUMBERS)
    trials.note(tuple(NUMBERS), stops)
    assert trials.next() is None  # the first number has changed nothing, and the second one alone was not tried
