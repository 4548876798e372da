"""Guard: rounds that are good, halved and undone, driven by a metric that the test chooses for each epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, LightningModule, ModelCheckpoint, Trainer
from lit import Lit, Manual, digits, fit, same, seeded, trainer

from lightning_prune import (
    Channels,
    Cubic,
    Guard,
    Linear,
    OneShot,
    PrunedCheckpoint,
    PruningCallback,
    Rewind,
    Steps,
    Taylor,
    Unstructured,
)
from lightning_prune.core.schema import read
from lightning_prune.report.report import REPORT
from lightning_prune.training.snapshots import TrainingObjects, copy_plain, optimizer_memory, take_snapshot

SIZE = 72 + 4608 + 160
FOUR = Steps({"1ep": 0.25, "2ep": 0.5, "3ep": 0.75, "4ep": 1.0})
FIVE = Steps({"1ep": 0.25, "2ep": 0.5, "3ep": 0.75, "4ep": 0.875, "5ep": 1.0})
GUARD = Guard("score", max_drop=0.25)
DENSE = 0.75
GOOD, BAD = 0.5, 0.4375  # just within the bound, and just beyond it: exact in binary


def scripted(values: list[float], base: type[Lit] = Lit) -> Lit:
    """A model that logs these values, one an epoch, as if it had measured them."""

    class Scripted(base):
        def on_validation_epoch_end(self) -> None:
            self.log("score", values[self.current_epoch])

    return seeded(Scripted)


class Watch(Callback):
    """Weights, masks and what optimizers remember, before each epoch and at its end."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.lrs: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.before.append(self.look(trainer, module))
            self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after.append(self.look(trainer, pl_module))

    def look(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        return {
            "weights": take_snapshot(TrainingObjects(module))["weights"],
            "masks": copy_plain(self.pruning.masks),
            "memory": [optimizer_memory(optimizer) for optimizer in trainer.optimizers],
        }


def removed(look: dict[str, Any]) -> int:
    return sum(int((~mask).sum()) for mask in look["masks"].values())


def run(
    folder: Path, values: list[float], guard: Guard = GUARD, base: type[Lit] = Lit, schedule: Steps = FOUR
) -> tuple[PruningCallback, Watch, Lit]:
    pruning = PruningCallback(0.8, schedule=schedule, guard=guard)
    watch, model = Watch(pruning), scripted(values, base)
    fit(folder, model, pruning, watch, max_epochs=len(values))
    return pruning, watch, model


def shares(*fractions: float) -> list[int]:
    return [round(fraction * 0.8 * SIZE) for fraction in fractions]


def test_good_rounds_go_on_as_scheduled(tmp_path: Path) -> None:
    pruning, watch, _ = run(tmp_path, [0.9, GOOD + 0.15, 0.9, 0.95, 0.65])
    assert [removed(look) for look in watch.before] == shares(0, 0.25, 0.5, 0.75, 1)
    assert [line.partition(":")[0] for line in pruning.report.decisions] == [
        f"epoch {epoch}" for epoch in (2, 3, 4, 5)
    ]
    assert pruning.report.decisions[2] == (
        "epoch 4: score 0.95 is 0.05 above the dense 0.9, within max_drop=0.25: 60 % removed are good enough"
    )


@pytest.mark.parametrize("base", [Lit, Manual])
def test_a_bad_round_goes_back_to_the_last_good_one_for_good(tmp_path: Path, base: type[Lit]) -> None:
    with pytest.warns(UserWarning, match="epoch 3: score 0.4375 .*back to 20 % removed, no further pruning"):
        pruning, watch, _ = run(tmp_path, [DENSE, GOOD, BAD, DENSE, DENSE, DENSE], base=base)
    assert [removed(look) for look in watch.before] == shares(0, 0.25, 0.5, 0.25, 0.25, 0.25)
    assert same(watch.before[3], watch.after[1])
    assert not same(watch.before[3]["weights"], watch.after[2]["weights"])
    assert pruning.report.decisions == (
        "epoch 2: score 0.5 is 0.25 below the dense 0.75, within max_drop=0.25: 20 % removed are good enough",
        "epoch 3: score 0.4375 is 0.3125 below the dense 0.75, more than max_drop=0.25: back to 20 % removed,"
        " no further pruning",
    )
    assert pruning.report.removed == shares(0.25)[0]
    assert (pruning.report.dense_metric, pruning.report.pruned_metric) == (DENSE, DENSE)
    for name, mask in watch.after[-1]["masks"].items():
        assert not watch.after[-1]["weights"][name][~mask].any()


@pytest.mark.parametrize("value", [BAD, float("nan"), float("-inf")])
def test_nothing_good_yet_is_the_dense_network_before_the_first_event(tmp_path: Path, value: float) -> None:
    with pytest.warns(UserWarning, match="back to 0 % removed"):
        pruning, watch, _ = run(tmp_path, [DENSE, value, 0.9, GOOD, 0.875])
    assert [removed(look) for look in watch.before] == shares(0, 0.25, 0, 0, 0)
    assert same(watch.before[2], watch.after[0])
    assert (pruning.report.dense_metric, pruning.report.pruned_metric) == (DENSE, 0.875)


def test_nan_has_a_line_of_its_own(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="epoch 2: score nan does not compare with the dense 0.75: back"):
        run(tmp_path, [DENSE, float("nan"), DENSE, DENSE, DENSE])


def test_a_metric_that_should_fall(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="score 1.5 is 0.5 above the dense 1, more than max_drop=0.25"):
        pruning, _, _ = run(tmp_path, [1.0, 1.25, 1.5, 1.0], Guard("score", "min", 0.25))
    assert pruning.report.removed == shares(0.25)[0]


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
def test_with_patience_bad_rounds_halve_the_next_step(tmp_path: Path) -> None:
    values = [DENSE, BAD, GOOD, BAD, BAD, DENSE]
    with pytest.warns(UserWarning, match="epoch 2: .*: half a step, to 37.5 % of the target"):
        pruning, watch, _ = run(tmp_path, values, Guard("score", max_drop=0.25, patience=1), schedule=FIVE)
    # 0.25 was bad: half of the way to 0.5; that was good: on to 0.75; bad: half of the way to 0.875; bad: back
    assert [removed(look) for look in watch.before] == shares(0, 0.25, 0.375, 0.75, 0.8125, 0.375)
    assert same(watch.before[5], watch.after[2])
    assert [line.rpartition(": ")[2] for line in pruning.report.decisions] == [
        "half a step, to 37.5 % of the target",
        "30 % removed are good enough",
        "half a step, to 81.2 % of the target",
        "back to 30 % removed, no further pruning",
    ]


@pytest.mark.parametrize("patience", [0, 5])
def test_a_bad_last_round_goes_back_whatever_patience_says(tmp_path: Path, patience: int) -> None:
    guard = Guard("score", max_drop=0.25, patience=patience)
    with pytest.warns(UserWarning, match="epoch 5: .*back to 60 % removed"):
        pruning, watch, model = run(tmp_path, [DENSE, GOOD, GOOD, GOOD, BAD], guard)
    assert removed(watch.before[4]) == shares(1)[0]
    assert same(take_snapshot(TrainingObjects(model))["weights"], watch.after[3]["weights"])
    assert same(dict(pruning.masks), watch.after[3]["masks"])
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["removed"] == pruning.report.removed == shares(0.75)[0]
    assert saved["decisions"][-1].endswith("back to 60 % removed, no further pruning")
    assert saved["pruned_metric"] == GOOD
    assert saved["decisions"][-1] in pruning.report.table()


def test_going_back_leaves_learning_rates_where_they_are(tmp_path: Path) -> None:
    class Decay(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    with pytest.warns(UserWarning, match="back to"):
        _, watch, _ = run(tmp_path, [DENSE, GOOD, BAD, DENSE, DENSE], base=Decay)
    assert watch.lrs == [0.05, 0.025, 0.0125, 0.00625, 0.003125]
    assert same(watch.before[3], watch.after[1])


def test_after_going_back_nothing_is_gathered_any_more(tmp_path: Path) -> None:
    counts: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            statistics = pruning.state_dict()["pruner"]["statistics"]
            counts.append(int(statistics["net.4.weight"]["count"]))

    pruning = PruningCallback(0.8, criterion=Taylor(), schedule=FOUR, guard=GUARD)
    values = [DENSE, BAD, DENSE, DENSE, DENSE]
    with pytest.warns(UserWarning, match="back to 0 %"):
        fit(tmp_path, scripted(values), pruning, Count(), max_epochs=5)
    assert counts == [5, 5, 5, 5, 5]  # one epoch each until it was reset or went on; none after the second
    assert pruning.settled


def test_the_dense_metric_is_the_last_one_before_the_first_event(tmp_path: Path) -> None:
    pruning = PruningCallback(
        0.8, schedule=Cubic("1ep", "3ep"), guard=GUARD
    )  # whose first event removes nothing
    fit(tmp_path, scripted([0.25, DENSE, GOOD, GOOD]), pruning)
    assert [line[:35] for line in pruning.report.decisions] == [
        "epoch 3: score 0.5 is 0.25 below th",
        "epoch 4: score 0.5 is 0.25 below th",
    ]


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
def test_a_round_in_which_nothing_was_measured_is_not_judged(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8, schedule=Steps({"2ep": 0.25, "3ep": 0.5, "4ep": 1.0}), guard=GUARD)
    watch, values = Watch(pruning), [0.0, DENSE, 0.0, BAD, 0.0, GOOD]
    with pytest.warns(UserWarning, match="cannot be judged: no score") as warned:
        fit(tmp_path, scripted(values), pruning, watch, max_epochs=6, check_val_every_n_epoch=2)
    assert sum("cannot be judged" in str(each.message) for each in warned) == 1
    assert [removed(look) for look in watch.before] == shares(0, 0, 0.25, 0.5, 0, 0)


def test_between_epochs_rounds_are_judged_by_the_latest_look(tmp_path: Path) -> None:
    class Looks(Lit):
        def on_validation_epoch_end(self) -> None:
            self.log("score", values.pop(0))

    values = [DENSE, DENSE, BAD, GOOD, GOOD, BAD]  # two looks an epoch
    pruning = PruningCallback(0.8, schedule=Steps({"5st": 0.5, "10st": 1.0}), guard=GUARD)
    with pytest.warns(UserWarning, match="epoch 3: .* back to 40 %"):
        fit(tmp_path, seeded(Looks), pruning, max_epochs=3, val_check_interval=2)
    assert pruning.report.removed == shares(0.5)[0]


def test_rewinding_and_a_guard_go_together(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8, schedule=FOUR, guard=GUARD, rewind=Rewind())
    watch = Watch(pruning)
    with pytest.warns(UserWarning, match="back to 20 %"):
        fit(tmp_path, scripted([DENSE, GOOD, BAD, DENSE, DENSE]), pruning, watch, max_epochs=5)
    first = watch.before[0]["weights"]["net.4.weight"]
    for epoch in (1, 2):
        look = watch.before[epoch]
        assert torch.equal(look["weights"]["net.4.weight"], first * look["masks"]["net.4.weight"])
    assert same(watch.before[3], watch.after[1])
    assert pruning.state_dict()["snapshot"] is None
    assert pruning.state_dict()["judge"]["good"] is None


def test_channels_that_went_back_are_compacted_as_they_are(tmp_path: Path) -> None:
    schedule = Steps({"1ep": 0.5, "2ep": 1.0})
    pruning = PruningCallback(0.5, structure=Channels(), schedule=schedule, guard=GUARD, compact=True)
    with pytest.warns(UserWarning, match="epoch 3: .*back to"):
        fit(tmp_path, model := scripted([DENSE, GOOD, BAD]), pruning, max_epochs=3)
    plain = PruningCallback(0.25, structure=Channels(), schedule=OneShot("1ep"), compact=True)
    fit(tmp_path, other := scripted([DENSE, GOOD]), plain, max_epochs=2)
    assert same(
        take_snapshot(TrainingObjects(model))["weights"], take_snapshot(TrainingObjects(other))["weights"]
    )
    assert pruning.report.decisions[-1].endswith("no further pruning")


# --- resuming


class Keep(ModelCheckpoint):
    """A checkpoint of every epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize("rewind", [None, Rewind("1ep")])
@pytest.mark.parametrize(
    "values",
    [[DENSE, BAD, GOOD, BAD, BAD, DENSE, BAD], [DENSE, GOOD, GOOD, GOOD, GOOD, GOOD, BAD]],
    ids=["stopped", "undone at the end"],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    tmp_path: Path, values: list[float], rewind: Rewind | None
) -> None:
    def callback() -> PruningCallback:
        guard = Guard("score", max_drop=0.25, patience=1)
        return PruningCallback(0.8, criterion=Taylor(), schedule=FIVE, rewind=rewind, guard=guard)

    whole, pruning = scripted(values), callback()
    watch = Watch(pruning)
    fit(tmp_path, whole, pruning, watch, Keep(tmp_path), max_epochs=7, enable_checkpointing=True)
    for epoch in range(6):
        path = tmp_path / f"epoch={epoch}.ckpt"
        torch.load(path, weights_only=True)
        resumed, again = scripted(values), callback()
        seen = Watch(again)
        fit(tmp_path, resumed, again, seen, ckpt_path=path, max_epochs=7)
        assert same(seen.before, watch.before[epoch + 1 :])
        assert same(take_snapshot(TrainingObjects(resumed)), take_snapshot(TrainingObjects(whole)))
        assert again.report.decisions == pruning.report.decisions
        assert again.report.history == pruning.report.history
        assert same(again.state_dict(), pruning.state_dict())


def test_the_report_of_a_checkpoint_has_the_decisions(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8, schedule=FOUR, guard=GUARD)
    model = scripted([DENSE, GOOD, GOOD, GOOD, GOOD])
    fit(tmp_path, model, pruning, Keep(tmp_path), max_epochs=5, enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)["callbacks"]["PruningCallback"]
    report = PruningCallback(0.8).report_of(Lit(), state)
    assert report.decisions == pruning.report.decisions[:3]
    again = read(report.to_state(), REPORT, "the report")
    assert again == report
    older = {k: v for k, v in report.to_state().items() if k != "decisions"}
    assert read(older, REPORT, "the report").decisions == ()


def test_a_state_from_before_there_were_guards_can_be_resumed(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8, schedule=FOUR)
    fit(tmp_path, scripted([DENSE] * 5), pruning, Keep(tmp_path), max_epochs=5, enable_checkpointing=True)
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["PruningCallback"]
    for key in ("judge", "snapshot"):
        del state[key]
    for key in ("rewind", "guard"):
        del state["settings"][key]
    del state["agenda"]["stopped"]
    torch.save(checkpoint, path)
    again = PruningCallback(0.8, schedule=FOUR)
    fit(tmp_path, scripted([DENSE] * 5), again, ckpt_path=path, max_epochs=5)
    assert again.report.removed == shares(1)[0]


def test_another_metric_does_not_compare_with_the_dense_one(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8, schedule=FOUR, guard=GUARD)
    fit(tmp_path, scripted([0.0] * 5), pruning, Keep(tmp_path), max_epochs=5, enable_checkpointing=True)
    other = PruningCallback(0.8, schedule=FOUR, guard=Guard("acc", "min", max_drop=0.0))
    with pytest.warns(UserWarning, match="cannot be judged: no acc"):
        fit(tmp_path, scripted([0.0] * 5), other, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=5)
    assert other.report.removed == shares(1)[0]


@pytest.mark.parametrize("batches", [1, 4])
def test_fast_dev_run_runs(tmp_path: Path, batches: int) -> None:
    pruning = PruningCallback(0.5, guard=Guard("acc"))
    fit(tmp_path, Lit(), pruning, fast_dev_run=batches)
    assert pruning.report.removed == (0 if batches == 1 else round(0.5 * SIZE))


# --- what bad input gets


class NoStep(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("training began")


def test_a_metric_that_validation_does_not_log_stops_at_the_sanity_check(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, guard=Guard("val_acc"))
    message = r"monitor='val_acc' must be one that validation logs: acc, score\. One that only training steps"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, scripted([DENSE] * 4), pruning, NoStep(), num_sanity_val_steps=1)
    fit(tmp_path, Lit(), PruningCallback(0.5, guard=Guard("acc", max_drop=1.0)), num_sanity_val_steps=1)


def test_without_a_sanity_check_it_stops_before_the_first_event(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "3ep"), guard=Guard("val_acc"))
    message = (
        r"monitor='val_acc' was not measured before the first pruning event: .* logged by then: acc, loss\.$"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Lit(), pruning)
    assert pruning.report.removed == 0


def test_the_advice_for_a_metric_that_was_not_measured_works(tmp_path: Path) -> None:
    def run(guard: Guard, at: str = "1ep", **options: Any) -> float:
        pruning = PruningCallback(0.5, schedule=OneShot(at), guard=guard)
        fit(
            tmp_path,
            seeded(Lit),
            pruning,
            **{"check_val_every_n_epoch": 2, "num_sanity_val_steps": 1} | options,
        )
        return round(pruning.sparsity, 3)

    guard, other = Guard("acc", max_drop=1.0), Guard("loss", "min", max_drop=9.0)
    sanity = r"One that only training steps log needs num_sanity_val_steps=0\.$"
    with pytest.raises(ValueError, match=rf"start later, validate earlier, or .* by then: loss\. {sanity}"):
        run(guard)
    assert run(guard, at="2ep") == run(guard, check_val_every_n_epoch=1) == 0.5
    with pytest.raises(ValueError, match=rf"monitor='loss' must be one that validation logs: acc\. {sanity}"):
        run(other)
    assert run(other, num_sanity_val_steps=0) == 0.5


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (0, {}),
        ("4st", {}),
        ("2st", {"val_check_interval": 3}),
        ("1st", {"val_check_interval": 3, "accumulate_grad_batches": 2}),
        ("4st", {"limit_val_batches": 0}),
    ],
)
def test_an_event_before_the_first_look_at_the_metric_is_refused_before_training(
    tmp_path: Path, at: Any, options: dict[str, Any]
) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot(at), guard=Guard("acc"))
    with pytest.raises(ValueError, match=r"prunes before Guard\(monitor='acc'.* can have seen a metric"):
        fit(tmp_path, Lit(), pruning, NoStep(), **options)


@pytest.mark.parametrize(
    ("at", "options"),
    [
        ("5st", {}),
        ("3st", {"val_check_interval": 3}),
        ("2st", {"val_check_interval": 3, "accumulate_grad_batches": 2}),
    ],
)
def test_an_event_right_after_the_first_look_at_the_metric_is_not(
    tmp_path: Path, at: str, options: dict[str, Any]
) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot(at), guard=Guard("acc", max_drop=1.0))
    fit(tmp_path, Lit(), pruning, max_epochs=2, **options)
    assert pruning.report.removed == SIZE // 2
    assert pruning.report.dense_metric is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": ""}, "monitor='' must be the name"),
        ({"monitor": None}, "monitor=None must be the name"),
        ({"mode": "up"}, "mode='up' must be one of 'min', 'max'"),
        ({"max_drop": -0.1}, "max_drop=-0.1 must be a finite number from 0 on"),
        ({"max_drop": float("inf")}, "max_drop=inf must"),
        ({"max_drop": float("nan")}, "max_drop=nan must"),
        ({"max_drop": "1"}, "max_drop='1' must"),
        ({"max_drop": True}, "max_drop=True must"),
        ({"patience": -1}, "patience=-1 must be an integer from 0 on"),
        ({"patience": 1.0}, "patience=1.0 must"),
        ({"patience": True}, "patience=True must"),
    ],
)
def test_bad_arguments_are_named_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**{"monitor": "acc"} | arguments)


def test_what_is_no_guard_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guard='acc' is no Guard: give an instance of one of Guard\."):
        PruningCallback(0.5, guard="acc")  # type: ignore[arg-type]


# --- checkpoints


def best(folder: Path, values: list[float], guard: Guard | None, **options: Any) -> tuple[str, str]:
    keep = PrunedCheckpoint(folder, filename="{epoch}", monitor="score", mode="max", save_last=True, **options)
    schedule = Steps({"1ep": 0.5, "2ep": 1.0})
    pruning = PruningCallback(0.8, schedule=schedule, guard=guard)
    fit(folder, scripted(values), pruning, keep, max_epochs=len(values), enable_checkpointing=True)
    return Path(keep.best_model_path).stem, Path(keep.last_model_path).stem


def test_the_best_checkpoint_is_the_best_at_the_final_sparsity(tmp_path: Path) -> None:
    assert best(tmp_path, [0.9, 0.8, 0.5, 0.6, 0.55], None) == ("epoch=3", "last")
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    masks = saved["callbacks"]["PruningCallback"]["pruner"]["masks"]
    zeros = sum(int((saved["state_dict"][name] == 0).sum()) for name in masks)
    assert zeros == shares(1)[0]
    ordinary = ModelCheckpoint(tmp_path / "other", filename="ordinary", monitor="score", mode="max")
    pruning = PruningCallback(0.8, schedule=OneShot("1ep"))
    fit(tmp_path, scripted([0.9, 0.8]), pruning, ordinary, max_epochs=2, enable_checkpointing=True)
    assert ordinary.best_model_score == pytest.approx(0.9)  # of the dense network


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
def test_with_a_guard_a_bad_round_has_no_best_checkpoint(tmp_path: Path) -> None:
    guard = Guard("score", max_drop=0.25)
    assert best(tmp_path / "late", [0.75, 0.75, 0.4375, 0.5, 0.5], guard)[0] == "epoch=3"
    # but for what came back
    assert best(tmp_path / "never", [0.75, 0.75, 0.4375, 0.4375], guard) == ("epoch=4", "last")
    assert best(tmp_path / "undone", [0.75, 0.25, 0.5, 0.625], guard)[0] == "epoch=3"


def test_without_pruning_it_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    keep = PrunedCheckpoint(tmp_path, filename="{epoch}", monitor="score", mode="max")
    fit(tmp_path, scripted([0.9, 0.8]), keep, max_epochs=2, enable_checkpointing=True)
    assert Path(keep.best_model_path).stem == "epoch=0"


def test_a_guarded_fit_without_validation_data_says_what_is_logged(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"), guard=Guard("acc"))
    with pytest.raises(ValueError, match=r"monitor='acc' was not measured .*: loss\.$"):
        trainer(tmp_path, pruning).fit(Lit(), digits())


def saved_removed(path: str) -> int:
    """Zeros in the covered weights of a checkpoint."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return sum(int((state[f"net.{layer}.weight"] == 0).sum()) for layer in (0, 4, 6))


def test_the_last_checkpoint_is_saved_before_the_last_event_too(tmp_path: Path) -> None:
    there: list[bool] = []

    class Look(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            there.append((tmp_path / "last.ckpt").exists())

    best = PrunedCheckpoint(tmp_path, monitor="score", mode="max", save_last=True)
    pruning = PruningCallback(0.5, schedule=OneShot("3ep"))
    model = scripted([0.9, 0.8, 0.7, 0.3, 0.6, 0.4])
    fit(tmp_path, model, pruning, best, Look(), max_epochs=6, enable_checkpointing=True)
    assert there == [False, True, True, True, True, True]
    assert best.best_model_score == pytest.approx(0.6)
    assert saved_removed(best.best_model_path) == SIZE // 2


def test_what_came_back_at_the_end_is_saved_as_the_best_and_the_last(tmp_path: Path) -> None:
    best = PrunedCheckpoint(tmp_path, monitor="score", mode="max", save_last=True)
    pruning = PruningCallback(0.5, schedule=Steps({"1ep": 0.5, "3ep": 1.0}), guard=GUARD)
    model = scripted([0.9, 0.9, 0.9, 0.9, 0.1])  # good at first in the last round, and then not
    with pytest.warns(UserWarning, match=r"Checkpoints of this last round .* saved .* by a PrunedCheckpoint"):
        fit(tmp_path, model, pruning, best, max_epochs=5, enable_checkpointing=True)
    assert pruning.undone
    assert saved_removed(best.best_model_path) == saved_removed(best.last_model_path) == SIZE // 4
    assert pruning.report.removed == SIZE // 4


def test_a_module_that_logs_nothing_in_a_sanity_check_is_not_refused(tmp_path: Path) -> None:
    class Quiet(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    pruning = PruningCallback(0.5, schedule=OneShot("1ep"), guard=Guard("acc", max_drop=1.0))
    fit(tmp_path, seeded(Quiet), pruning, max_epochs=2, num_sanity_val_steps=1)
    assert pruning.report.sparsity == pytest.approx(0.5, abs=1e-3)


def first_of(folder: Path, pruning: PruningCallback, epochs: int = 4) -> Path:
    every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    fit(folder, scripted([0.9] * epochs), pruning, every, max_epochs=epochs, enable_checkpointing=True)
    return folder / "epoch=1.ckpt"


def test_a_resumed_run_with_a_mistyped_metric_stops(tmp_path: Path) -> None:
    path = first_of(tmp_path, PruningCallback(0.5, schedule=FOUR, guard=GUARD), 5)
    wrong = PruningCallback(0.5, schedule=FOUR, guard=Guard("scor", max_drop=0.25))
    never = r"monitor='scor' is not logged: .*score"
    with pytest.warns(UserWarning, match="cannot be judged"), pytest.raises(ValueError, match=never):
        fit(tmp_path, scripted([0.9] * 5), wrong, ckpt_path=path, max_epochs=5)


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.filterwarnings("ignore:A pruning event waits:UserWarning")
def test_a_network_that_comes_back_brings_no_masks_of_layers_that_were_added_since(tmp_path: Path) -> None:
    schedule = Steps({"1ep": 0.5, "3ep": 1.0})

    def callback(include: str | None) -> PruningCallback:
        structure, guard = Unstructured(include=include), Guard("score", max_drop=0.25, patience=1)
        return PruningCallback(0.5, criterion=Taylor(), structure=structure, schedule=schedule, guard=guard)

    steps = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, scripted([0.9] * 4), callback("net.0"), steps, max_epochs=4, enable_checkpointing=True)
    wider, model = callback(None), scripted([0.9, 0.1, 0.1, 0.1])
    fit(tmp_path, model, wider, ckpt_path=tmp_path / "step=7.ckpt", max_epochs=4)  # before the round is judged
    assert wider.report.decisions[-1].endswith("back to 0 % removed, no further pruning")
    assert all(bool(mask.all()) for mask in wider.masks.values())
    assert set(wider.masks) == {"net.0.weight", "net.4.weight", "net.6.weight"}


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize(
    ("target", "guard"),
    [(0.5, None), (0.5, Guard("score", max_drop=0.95)), (0.1, Guard("score", max_drop=0.25))],
    ids=["no guard", "a looser one", "a lower target"],
)
def test_what_was_undone_at_the_end_is_done_again_if_that_is_taken_back(
    tmp_path: Path, target: float, guard: Guard | None
) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"), guard=GUARD)
    run = fit(tmp_path, scripted([0.9, 0.1, 0.1]), pruning, max_epochs=3)
    assert pruning.undone
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = PruningCallback(target, schedule=OneShot("1ep"), guard=guard)
    fit(tmp_path, scripted([0.9] * 6), again, ckpt_path=tmp_path / "end.ckpt", max_epochs=6)
    assert again.report.removed == round(target * SIZE)
    assert again.settled


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize("rewind", [None, Rewind("0ep")])
@pytest.mark.parametrize("guarded", [True, False])
def test_what_a_halved_last_step_has_left_goes_in_a_longer_fit(
    tmp_path: Path, guarded: bool, rewind: Rewind | None
) -> None:
    schedule, guard = Steps({"25%": 0.5, "50%": 1.0}), Guard("score", max_drop=0.25, patience=2)
    half = PruningCallback(0.5, schedule=schedule, guard=guard, rewind=rewind)
    values = [0.9, 0.1, 0.9, 0.9]
    fit(tmp_path, scripted(values), half, Keep(tmp_path), max_epochs=4, enable_checkpointing=True)
    assert half.report.removed == round(0.375 * SIZE)
    again = PruningCallback(0.5, schedule=schedule, guard=guard if guarded else None, rewind=rewind)
    fit(
        tmp_path,
        scripted([0.9] * 8),
        again,
        ckpt_path=tmp_path / "epoch=3.ckpt",
        max_epochs=8 if guarded else 6,
    )
    assert again.report.removed == round(0.5 * SIZE)


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize("target", [0.5, 0.55, 0.45])
def test_a_resume_with_another_target_does_not_cut_a_round_short(tmp_path: Path, target: float) -> None:
    values, schedule = [0.9, 0.5, 0.6, 0.9, 0.7, 0.9], Steps({"1ep": 0.5, "4ep": 1.0})
    guard = Guard("score", max_drop=0.25)
    pruning = PruningCallback(0.5, schedule=schedule, guard=guard)
    fit(tmp_path, scripted(values), pruning, Keep(tmp_path), max_epochs=6, enable_checkpointing=True)
    again = PruningCallback(target, schedule=schedule, guard=guard)
    fit(tmp_path, scripted(values), again, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=6)
    assert again.report.removed == round(target * SIZE)


LOOSER = Guard("score", max_drop=0.95)


@pytest.mark.parametrize("guard", [None, LOOSER])
def test_a_run_that_was_stopped_goes_on_without_its_guard_or_with_a_looser_one(
    tmp_path: Path, guard: Guard | None
) -> None:
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    stopped = PruningCallback(0.5, schedule=FOUR, guard=GUARD)
    with pytest.warns(UserWarning, match="no further pruning"):
        fit(
            tmp_path,
            scripted([0.9, 0.1, 0.1, 0.1, 0.1]),
            stopped,
            every,
            max_epochs=5,
            enable_checkpointing=True,
        )
    assert stopped.report.removed == 0
    path = tmp_path / "epoch=2.ckpt"
    fit(
        tmp_path, scripted([0.9] * 5), again := PruningCallback(0.5, schedule=FOUR, guard=GUARD), ckpt_path=path
    )
    assert again.report.removed == 0
    pruning = PruningCallback(0.5, schedule=FOUR, guard=guard)
    fit(tmp_path, scripted([0.1] * 5), pruning, ckpt_path=path, max_epochs=5)
    assert pruning.report.removed == SIZE // 2
    assert pruning.state_dict()["judge"]["good"] is None
