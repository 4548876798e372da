"""Training that is longer than a fit: moments lie in all of it, and later fits go on along the same plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, ModelCheckpoint
from lit import Lit, digits, fit, seeded

from lightning_prune import Channels, Cubic, Guard, PruningCallback, Rewind, Steps, Taylor
from lightning_prune.schedules.moments import FitLength, TimeUnit, parse_horizon

PLAN = Cubic("1ep", "5ep")


def events(pruning: PruningCallback) -> list[tuple[int, float]]:
    """The optimizer step and the sparsity of each event; there are 5 steps an epoch."""
    return [(each.step, each.sparsity) for each in pruning.report.history if each.metric is None]


def whole(folder: Path, **options: Any) -> list[tuple[int, float]]:
    """The events of one fit that is all of the plan."""
    pruning = PruningCallback(0.8, schedule=PLAN, measure_seconds=0, **options)
    fit(folder, seeded(Lit), pruning, max_epochs=6)
    return events(pruning)


def part(schedule: Any = PLAN, **options: Any) -> PruningCallback:
    return PruningCallback(0.8, schedule=schedule, horizon="6ep", measure_seconds=0, **options)


def test_a_moment_beyond_the_fit_is_refused_without_a_horizon(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end='5ep' lies beyond the fit, which has 2 epochs"):
        fit(tmp_path, Lit(), PruningCallback(0.8, schedule=PLAN), max_epochs=2)
    with pytest.raises(ValueError, match=r"end='7ep' lies beyond the fit, which has 6 epochs"):
        fit(tmp_path, Lit(), part(Cubic("1ep", "7ep")), max_epochs=2)


def test_further_fits_with_new_trainers_go_on(tmp_path: Path) -> None:
    model, pruning = seeded(Lit), part()
    for epochs in (2, 1, 3):
        fit(tmp_path, model, pruning, max_epochs=epochs)
    assert events(pruning) == whole(tmp_path)
    assert not pruning.events_left


def test_the_same_trainer_made_longer_goes_on(tmp_path: Path) -> None:
    model, pruning = seeded(Lit), part()
    run = fit(tmp_path, model, pruning, max_epochs=2)
    run.fit_loop.max_epochs = 6
    run.fit(model, digits(), digits(examples=100))
    assert events(pruning) == whole(tmp_path)


def test_checkpoints_of_each_fit_go_on(tmp_path: Path) -> None:
    model, pruning = seeded(Lit), part(criterion=Taylor())
    run = fit(tmp_path, model, pruning, max_epochs=2)
    run.save_checkpoint(tmp_path / "first.ckpt")
    resumed, again = Lit(), part(criterion=Taylor())
    fit(tmp_path, resumed, again, max_epochs=6, ckpt_path=tmp_path / "first.ckpt")
    assert events(again) == whole(tmp_path, criterion=Taylor())
    # a checkpoint of a fit that goes on from another one, which counts its steps from 0
    keep = ModelCheckpoint(tmp_path / "second", filename="{epoch}", save_top_k=-1)
    fit(tmp_path, model, pruning, keep, max_epochs=4, enable_checkpointing=True)
    resumed, last = Lit(), part(criterion=Taylor())
    fit(tmp_path, resumed, last, max_epochs=4, ckpt_path=tmp_path / "second" / "epoch=1.ckpt")
    assert events(last) == events(pruning)
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))


def test_another_callback_goes_on_from_a_state_and_changed_arguments_count(tmp_path: Path) -> None:
    model, first = seeded(Lit), part()
    fit(tmp_path, model, first, max_epochs=3)
    done = events(first)
    again = part()
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    first.target = 0.9
    fit(tmp_path, copy.deepcopy(model), again, max_epochs=3)
    fit(tmp_path, model, first, max_epochs=3)
    assert events(again) == whole(tmp_path)
    assert events(first)[: len(done)] == done
    assert first.sparsity == pytest.approx(0.9, abs=1e-4)


def test_reset_begins_the_plan_anew(tmp_path: Path) -> None:
    model, pruning = Lit(), part(Steps({"4ep": 1.0}))
    fit(tmp_path, model, pruning, max_epochs=3)
    pruning.reset()
    fit(tmp_path, model, pruning, max_epochs=3)
    assert pruning.sparsity == 0


def test_what_follows_the_last_event_waits_for_it(tmp_path: Path) -> None:
    """The network is compacted, rewound and judged where it would be in one fit."""
    schedule = Steps({"1ep": 0.5, "3ep": 1.0})
    model, pruning = seeded(Lit), part(schedule, structure=Channels(), compact=True)
    fit(tmp_path, model, pruning, max_epochs=2)
    assert model.net[0].weight.shape[0] == 8
    assert pruning.events_left
    fit(tmp_path, model, pruning, max_epochs=2)
    assert model.net[0].weight.shape[0] < 8
    model, guarded = seeded(Lit), part(schedule, guard=Guard("acc", max_drop=0.0))
    fit(tmp_path, model, guarded, max_epochs=2)
    assert not guarded.report.decisions
    fit(tmp_path, model, guarded, max_epochs=2)
    assert len(guarded.report.decisions) in (1, 2)


def test_a_further_fit_rewinds_to_a_moment_of_the_first_one(tmp_path: Path) -> None:
    model, found = seeded(Lit), []
    initial = model.net[6].weight.detach().clone()

    class Begin(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            found.append(pl_module.net[6].weight.detach().clone())

    rewound = part(Steps({"3ep": 1.0}), rewind=Rewind("0ep"))
    for _ in range(2):
        fit(tmp_path, model, rewound, Begin(), max_epochs=2)
    assert [torch.equal(each, initial) for each in found] == [True, False, False, False]
    assert torch.equal(found[3], initial * rewound.masks["net.6.weight"])


@pytest.mark.parametrize("horizon", ["30%", "0ep", "1.5ep", 10, "soon", True])
def test_a_wrong_horizon_is_refused_by_name(horizon: Any) -> None:
    with pytest.raises(ValueError, match=r"horizon=.* must be a whole number of epochs"):
        PruningCallback(0.5, horizon=horizon)


def test_a_horizon_in_steps_places_shares_and_epochs() -> None:
    length = FitLength(2, None, 5).of_plan(parse_horizon("40st"))
    assert length == FitLength(None, 40, 5)
    table = Cubic("1ep", "50%", every="10st").timetable(length)
    assert table.unit is TimeUnit.STEP
    assert [each.position for each in table.events] == [5, 15, 20]
