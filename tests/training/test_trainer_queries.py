"""What the callback reads off a Trainer: how long the fit is, where it stands, what it is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightnings import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LightningModule,
    ModelCheckpoint,
    Trainer,
)
from lit import Lit, Manual, digits, fit, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    Channels,
    Cubic,
    Gradient,
    Linear,
    OneShot,
    PruningCallback,
    Schedule,
    Steps,
    Structure,
    Unstructured,
)


def stepped(pruning: PruningCallback) -> list[int]:
    """Steps before each pruning event."""
    return [entry.step for entry in pruning.report.history if entry.metric is None]


class Watch(Callback):
    """Notes the first batch that trains with masks, as (epoch, batch)."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.first: tuple[int, int] | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if self.first is None and not all(mask.all() for mask in self.pruning.masks.values()):
            self.first = (trainer.current_epoch, index)


# --- steps: 5 batches an epoch, and what is left over at its end is a step too


def test_accumulation_by_a_callback_is_known_before_the_fit(tmp_path: Path) -> None:
    """Five batches an epoch: two steps."""
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "3ep", every="1st"))
    fit(tmp_path, Lit(), GradientAccumulationScheduler({0: 4, 9: 1}), pruning)
    assert [(entry.epoch, entry.step) for entry in pruning.report.history][-1] == (3, 6)
    assert pruning.report.removed == 2420


@pytest.mark.parametrize("schedule", [Linear("1ep", "3ep", every="1st"), Cubic("2st", "50%", every="2st")])
def test_steps_are_no_part_of_epochs_where_accumulation_changes(tmp_path: Path, schedule: Schedule) -> None:
    changing = GradientAccumulationScheduler({2: 4})
    run = trainer(tmp_path, PruningCallback(0.5, schedule=schedule), changing)
    with pytest.raises(ValueError, match=r"accumulation (changes|that does not change)"):
        run.fit(Lit(), digits())
    assert run.global_step == 0
    for alike in (Linear("1ep", "3ep", every="1ep"), Linear("2st", "6st", every="2st")):
        pruning = PruningCallback(0.5, schedule=alike)
        fit(tmp_path, Lit(), pruning, GradientAccumulationScheduler({2: 4}))
        assert pruning.report.removed == 2420


@pytest.mark.parametrize(
    ("model", "accumulate", "moment", "first"),
    [(Lit, 1, "7st", (1, 2)), (Lit, 2, "4st", (1, 2)), (Lit, 2, "6st", (2, 0)), (Manual, 1, "7st", (1, 2))],
)
def test_a_step_is_a_batch_at_whose_end_weights_changed(
    tmp_path: Path, model: type[Lit], accumulate: int, moment: str, first: tuple[int, int]
) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot(moment))
    watch = Watch(pruning)
    fit(tmp_path, model(), pruning, watch, max_epochs=3, accumulate_grad_batches=accumulate)
    assert watch.first == first
    assert stepped(pruning) == [int(moment.removesuffix("st"))]


@pytest.mark.parametrize(
    ("model", "accumulate", "moment", "first"),
    [(Lit, 1, "12st", (2, 2)), (Lit, 2, "8st", (2, 4)), (Manual, 1, "12st", (2, 2))],
)
def test_steps_before_pruning_was_there_count(
    tmp_path: Path, model: type[Lit], accumulate: int, moment: str, first: tuple[int, int]
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    keep = ModelCheckpoint(tmp_path, filename="dense")
    fit(tmp_path, model(), keep, max_epochs=2, enable_checkpointing=True, **options)
    pruning = PruningCallback(0.5, schedule=OneShot(moment))
    watch = Watch(pruning)
    fit(tmp_path, model(), pruning, watch, ckpt_path=tmp_path / "dense.ckpt", **options)
    assert watch.first == first
    assert stepped(pruning) == [int(moment.removesuffix("st"))]


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
def test_another_model_starts_anew_from_a_checkpoint_without_pruning(
    tmp_path: Path, structure: Structure
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="dense")
    fit(tmp_path, Lit(), keep, max_epochs=2, enable_checkpointing=True)
    pruning = PruningCallback(0.5, structure=structure, schedule=Steps({"3st": 0.2, "12st": 1.0}))
    fit(tmp_path, Lit(), pruning)
    watch = Watch(pruning)
    fit(tmp_path, Lit(), pruning, watch, ckpt_path=tmp_path / "dense.ckpt")
    assert watch.first == (2, 0)
    assert stepped(pruning) == [10, 12]
    assert pruning.report.sparsity >= 0.5


# --- the length of a fit


def test_an_epoch_with_accumulation_has_a_step_for_what_is_left_over(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=Steps({"1ep": 0.2, "7st": 0.4, "3ep": 1.0}))
    fit(tmp_path, Lit(), pruning, max_epochs=4, accumulate_grad_batches=2)
    assert stepped(pruning) == [3, 7, 9]


@pytest.mark.parametrize(("max_steps", "expected"), [(32, [4, 8, 12]), (33, [4, 8, 12, 13])])
def test_max_steps_is_shared_by_the_optimizers(tmp_path: Path, max_steps: int, expected: list[int]) -> None:
    pruning = PruningCallback(0.5, schedule=Linear("25%", "75%", "25%"))
    run = fit(tmp_path, Manual(), pruning, max_epochs=-1, max_steps=max_steps)
    assert run.global_step == max_steps + max_steps % 2
    assert stepped(pruning) == expected


def test_the_last_step_of_two_optimizers_may_be_half(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("16st"))
    fit(tmp_path, Manual(), pruning, max_epochs=-1, max_steps=33)
    assert stepped(pruning) == [16]


class Stream(IterableDataset[Any]):
    """The digits, without a length."""

    def __iter__(self) -> Any:
        yield from digits().dataset


class Stop(Callback):
    """Ends the fit after 3 epochs."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 2


def test_data_without_length_can_be_counted_in_epochs_or_steps(tmp_path: Path) -> None:
    for schedule in (Cubic("1ep", "3ep"), OneShot("7st"), Cubic("25%", "75%")):
        pruning = PruningCallback(0.5, schedule=schedule)
        trainer(tmp_path, pruning, max_epochs=4).fit(Lit(), DataLoader(Stream(), 64))
        assert pruning.report.removed == pruning.report.size // 2
    with pytest.raises(ValueError, match="start='1ep' cannot be turned into optimizer steps"):
        trainer(tmp_path, PruningCallback(0.5, schedule=Cubic("1ep", "9st"))).fit(
            Lit(), DataLoader(Stream(), 64)
        )


def test_shares_of_max_steps(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=Linear("25%", "75%", "25%"))
    fit(tmp_path, Lit(), pruning, max_epochs=-1, max_steps=16)
    assert stepped(pruning) == [4, 8, 12]


def test_a_single_epoch_is_divided_by_batches(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, criterion=Gradient(), schedule=OneShot("40%"))
    fit(tmp_path, Lit(), pruning, max_epochs=1)
    assert stepped(pruning) == [2]


@pytest.mark.parametrize("moment", ["2ep", "10st"])
@pytest.mark.parametrize("data", [digits(), DataLoader(Stream(), 64)])
def test_counts_need_no_end_and_no_length(tmp_path: Path, data: Any, moment: str) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot(moment))
    watch = Watch(pruning)
    trainer(tmp_path, pruning, watch, Stop(), max_epochs=-1).fit(Lit(), data)
    assert watch.first == (2, 0)


@pytest.mark.parametrize("data", [digits(), DataLoader(Stream(), 64)])
def test_shares_need_an_end(tmp_path: Path, data: Any) -> None:
    run = trainer(tmp_path, PruningCallback(0.5, schedule=OneShot("30%")), max_epochs=-1)
    with pytest.raises(ValueError, match="at='30%' needs to know how long the fit is: set a finite max_epochs"):
        run.fit(Lit(), data)
    assert run.global_step == 0


def test_shares_of_one_epoch_need_a_length(tmp_path: Path) -> None:
    run = trainer(tmp_path, PruningCallback(0.5, schedule=OneShot("30%")), max_epochs=1)
    with pytest.raises(ValueError, match=r"at='30%' needs to know .*: set limit_train_batches, or max_steps"):
        run.fit(Lit(), DataLoader(Stream(), 64))
    assert run.global_step == 0


TO_STEPS = r'count every moment, every= too, in "ep", or every one in "st"\.'
TO_LENGTH = (
    r"needs to know how long the fit is: set .* max_steps with max_epochs=-1 and every= in \"st\"; or count"
)
IN_ONE = r'count every moment, every= too, in "st", or set limit_train_batches\.'
OF_ONE = r'set limit_train_batches, or max_steps and every= in "st"; or count every moment in "st"\.'


@pytest.mark.parametrize(
    ("schedule", "options", "message", "follow"),
    [
        (
            Cubic(start="2st"),
            {},
            TO_LENGTH,
            [
                (Cubic(start="2st", every="2st"), {"max_steps": 18, "max_epochs": -1}),
                (Cubic("1ep", "3ep"), {}),
                (Cubic("2st", "12st", "2st"), {}),
                (Cubic(start="2st"), {"limit_train_batches": 5}),
            ],
        ),
        (Cubic(), {"max_steps": 18, "max_epochs": -1}, TO_STEPS, [(Cubic("1ep", "3ep"), {})]),
        (Cubic(start="2st"), {"max_steps": 18}, TO_STEPS, [(Cubic("2st", "12st", "2st"), {})]),
        (Cubic("1st", "12st"), {}, TO_STEPS, [(Cubic("1st", "12st", "2st"), {}), (Cubic("1ep", "3ep"), {})]),
        (
            OneShot("1ep"),
            {"max_epochs": 1},
            IN_ONE,
            [(OneShot("3st"), {}), (OneShot("1ep"), {"limit_train_batches": 5})],
        ),
        (
            OneShot("50%"),
            {"max_epochs": 1},
            OF_ONE,
            [
                (OneShot("3st"), {}),
                (OneShot("50%"), {"max_steps": 5}),
                (OneShot("50%"), {"limit_train_batches": 5}),
            ],
        ),
        (Cubic(), {"max_epochs": 1}, OF_ONE, [(Cubic(every="1st"), {"max_steps": 5})]),
    ],
)
def test_the_advice_for_data_without_length_works(
    tmp_path: Path, schedule: Schedule, options: dict[str, Any], message: str, follow: list[Any]
) -> None:
    data = DataLoader(Stream(), 64)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, PruningCallback(0.5, schedule=schedule), **options).fit(Lit(), data)
    for other, more in follow:
        pruning = PruningCallback(0.5, schedule=other)
        trainer(tmp_path, pruning, **options | more).fit(Lit(), data)
        assert pruning.report.removed == pruning.report.size // 2


# --- what a run is judged by


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ((), None),
        (({},), None),
        (("acc",), "acc"),
        (({"monitor": "loss"},), "loss"),
        (("acc", {"monitor": "loss"}), "loss"),
        (("acc", {}), "acc"),
        (({}, {"monitor": "loss"}, {"monitor": "acc", "mode": "max"}), "loss"),
    ],
)
def test_the_monitored_metric_is_a_checkpoints_or_else_early_stoppings(
    tmp_path: Path, callbacks: tuple[Any, ...], expected: str | None
) -> None:
    watching = [
        EarlyStopping(each, patience=9, mode="max")
        if isinstance(each, str)
        else ModelCheckpoint(tmp_path, filename=f"{index}", **each)
        for index, each in enumerate(callbacks)
    ]
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), pruning, *watching, max_epochs=2, enable_checkpointing=True)
    assert pruning.report.monitor == expected
    looks = [entry for entry in pruning.report.history if entry.metric is not None]
    assert len(looks) == (0 if expected is None else 2)
