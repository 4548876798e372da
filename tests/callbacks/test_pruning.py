"""PruningCallback in a Trainer: what a user gives, gets, sees, saves and resumes."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from lightnings import NAME, Callback, CSVLogger, EarlyStopping, LightningModule, ModelCheckpoint, Trainer
from lit import Lit, Manual, digits, fit, same, seeded, trainer
from torch import nn

from lightning_prune import (
    Channels,
    Criterion,
    Cubic,
    Exponential,
    Fisher,
    Global,
    Gradient,
    Linear,
    Magnitude,
    Movement,
    NofM,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    Random,
    Steps,
    Structure,
    Taylor,
    Threshold,
    Unstructured,
)
from lightning_prune.report.entries import HistoryEntry

SIZE = 72 + 4608 + 160
at_once = pytest.mark.filterwarnings("ignore:Cubic.* prunes all at once:UserWarning")


@pytest.mark.parametrize("target", [0.5, 0.9, 1 / 3])
@pytest.mark.parametrize("criterion", [Magnitude(), Random(), Gradient(), Taylor(), Movement(), Fisher()])
def test_the_target_is_met_exactly(tmp_path: Path, criterion: Any, target: float) -> None:
    pruning = PruningCallback(target, criterion=criterion, schedule=Cubic("1ep", "3ep"))
    fit(tmp_path, Lit(), pruning)
    assert pruning.report.size == SIZE
    assert pruning.report.removed == round(target * SIZE)
    assert sum(int((~mask).sum()) for mask in pruning.masks.values()) == round(target * SIZE)


@pytest.mark.parametrize(
    ("schedule", "events"),
    [
        (Cubic("1ep", "5ep"), {5: 0.0, 10: 0.578125, 15: 0.875, 20: 0.984375, 25: 1.0}),
        (Linear("1ep", "5ep", "2ep"), {5: 0.0, 15: 0.5, 25: 1.0}),
        (Linear("10st", "20st", "4st"), {10: 0.0, 14: 0.4, 18: 0.8, 20: 1.0}),
        (Steps({"1ep": 0.25, "50%": 1.0}), {5: 0.25, 15: 1.0}),
        (OneShot("7st"), {7: 1.0}),
        (OneShot(0.5), {15: 1.0}),
        (Exponential("3ep", "3ep"), {15: 1.0}),
    ],
)
def test_each_event_removes_what_the_schedule_says(
    tmp_path: Path, schedule: Any, events: dict[int, float]
) -> None:
    pruning = PruningCallback(0.7, schedule=schedule)
    fit(tmp_path, Lit(), pruning, max_epochs=6)
    found = {event.step: round(event.sparsity * SIZE) for event in pruning.report.history}
    assert found == {step: round(share * 0.7 * SIZE) for step, share in events.items()}


def test_the_modules_own_epoch_start_sees_the_pruned_weights(tmp_path: Path) -> None:
    class Looks(Lit):
        def on_train_epoch_start(self) -> None:
            seen.append(sum(int((self.net[index].weight == 0).sum()) for index in (0, 4, 6)))

    seen: list[int] = []
    fit(tmp_path, Looks(), PruningCallback(0.5, schedule=OneShot("1ep")), max_epochs=2)
    assert seen == [0, round(0.5 * SIZE)]


def test_per_layer_counts_are_exact(tmp_path: Path) -> None:
    pruning = PruningCallback(0.7, selector=PerLayer(), schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), pruning, max_epochs=2)
    assert [layer.kept for layer in pruning.report.layers] == [
        layer.size - round(0.7 * layer.size) for layer in pruning.report.layers
    ]


# --- saving and resuming


def run_to_the_end(folder: Path, pruning: PruningCallback, epochs: int, **options: Any) -> tuple[Any, Any]:
    model = seeded(Lit)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit(folder, model, pruning, keep, max_epochs=epochs, enable_checkpointing=True, **options)
    return model, pruning


class Stop(Callback):
    """Ends the fit after an epoch, as a time limit would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


@at_once
def test_masks_survive_a_resume_into_more_epochs(tmp_path: Path) -> None:
    _, pruning = run_to_the_end(tmp_path, PruningCallback(0.9, schedule=Cubic("1ep", "2ep")), 3)
    again = PruningCallback(0.9, schedule=Cubic("1ep", "2ep"))
    fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=5)
    assert again.report.removed == round(0.9 * SIZE)
    for name, mask in pruning.masks.items():
        assert torch.equal(again.masks[name], mask)


def test_a_checkpoint_is_plain_and_masks_take_a_bit_a_weight(tmp_path: Path) -> None:
    run_to_the_end(tmp_path, PruningCallback(0.9, criterion=Taylor(), schedule=OneShot("1ep")), 3)
    loaded = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    masks = loaded["callbacks"]["PruningCallback"]["pruner"]["masks"]
    assert {name: entry["bits"].numel() for name, entry in masks.items()} == {
        "net.0.weight": 9,
        "net.4.weight": 576,
        "net.6.weight": 20,
    }


@at_once
def test_a_resume_with_other_settings_says_what_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whether Lightning's records reach the root logger depends on who was imported first
    monkeypatch.setattr(logging.getLogger(NAME), "propagate", True)
    run_to_the_end(tmp_path, PruningCallback(0.5, schedule=Cubic("1ep", "2ep")), 3)
    again = PruningCallback(0.8, criterion=Taylor(), schedule=Cubic("1ep", "4ep"))
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="event waits"):
        fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=5)
    assert "target was 0.5, is now 0.8" in caplog.text
    assert "criterion was Magnitude(p=1.0), is now Taylor()" in caplog.text
    assert "statistics start anew: those of the state are of Magnitude(p=1.0)" in caplog.text
    assert again.report.removed == round(0.8 * SIZE)


SHARES = Cubic("20%", "60%", every="20%")
FINISHED = {  # whether masks are what was asked for
    "weights": lambda masks: sum(int((~mask).sum()) for mask in masks.values()) >= round(0.5 * SIZE),
    "channels": lambda masks: (
        sum(int((~masks[f"net.{at}.weight"].flatten(1).any(1)).sum()) for at in (0, 4)) >= 12
    ),
    "2:4": lambda masks: bool((masks["net.4.weight"].unflatten(1, (-1, 4)).sum(-1) <= 2).all()),
}


@pytest.mark.filterwarnings("ignore:A pruning event waits:UserWarning")
@at_once
@pytest.mark.parametrize("before", KINDS)
def test_a_resume_with_another_structure_or_length_ends_with_what_is_asked_for_now(
    tmp_path: Path, before: str
) -> None:
    """Before the first event; after it, into a fit that should be done; after the last; into a longer fit."""
    saved = KINDS[before](criterion=Taylor(), schedule=SHARES)
    run_to_the_end(tmp_path, saved, 5)
    for now, (epoch, epochs) in itertools.product(KINDS, [(0, 5), (2, 4), (3, 5), (3, 8)]):
        path = tmp_path / f"epoch={epoch}.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        again = KINDS[now](criterion=Taylor(), schedule=SHARES)
        fit(tmp_path, model := Lit(), again, ckpt_path=path, max_epochs=epochs)
        assert FINISHED[now](again.masks)
        assert again.settled
        assert again.report.history[-1].sparsity == pytest.approx(again.report.sparsity)
        if epoch > 0:
            gone = {name for name in again.masks if name in saved.masks and (state[name] == 0).any()}
            assert len(gone) > 1
            for name in gone:
                assert not again.masks[name][state[name] == 0].any()  # nothing comes back
                assert not model.state_dict()[name][~again.masks[name]].any()


@pytest.mark.filterwarnings("ignore:A pruning event waits:UserWarning")
def test_a_higher_target_after_the_last_event_is_reached_at_once(tmp_path: Path) -> None:
    run_to_the_end(tmp_path, PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("1ep")), 4)
    again = PruningCallback(0.8, criterion=Taylor(), schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=4)
    assert again.report.removed == round(0.8 * SIZE)
    assert [entry.sparsity for entry in again.report.history] == pytest.approx([0.5, 0.8], abs=1e-4)
    late = PruningCallback(0.9, schedule=OneShot("1ep"))
    with pytest.warns(UserWarning, match="the target is not reached"):
        fit(tmp_path, Lit(), late, ckpt_path=tmp_path / "epoch=3.ckpt", max_epochs=4)


def test_statistics_are_taken_over_all_or_none() -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def seen(pruner: Pruner) -> list[int]:
        return [int(each["count"]) for each in pruner.state_dict()["statistics"].values()]

    model = layers()
    some = Pruner(model, 0.5, criterion=Taylor(), structure=Unstructured(include=["0"]))
    model(torch.randn(4, 8)).sum().backward()
    some.observe()
    again = Pruner(layers(), 0.5, criterion=Taylor(), structure=Unstructured(include=("0",)))
    assert again.load_state_dict(some.state_dict()) == []
    assert seen(again) == [1]
    more = Pruner(layers(), 0.5, criterion=Taylor())
    assert more.load_state_dict(some.state_dict()) == [
        "statistics start anew: the state has none of '2.weight'"
    ]
    assert seen(more) == [0, 0]
    other = Pruner(layers(), 0.5, criterion=Gradient(), structure=Unstructured(include="0"))
    assert other.load_state_dict(some.state_dict()) == [
        "statistics start anew: those of the state are of Taylor()"
    ]
    assert seen(other) == [0]


@pytest.mark.parametrize(("one", "other"), [(["net.4"], ("net.4",)), ("net.4", ["net.4"])])
def test_patterns_are_the_same_however_they_are_written(one: Any, other: Any) -> None:
    for structure in (Unstructured, Channels):
        assert structure(include=one) == structure(include=other)
        assert repr(structure(exclude=one)) == repr(structure(exclude=other))


@pytest.mark.parametrize("target", [0.5, None])
def test_a_resume_with_the_same_settings_written_otherwise_changes_nothing(
    tmp_path: Path, target: float | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(NAME), "propagate", True)

    class Own(Taylor):
        """What it is made of has an address, another one in each process."""

        def __init__(self) -> None:
            vars(self)["weigh"] = lambda number: number

    schedule = OneShot("1ep")
    run_to_the_end(tmp_path, PruningCallback(criterion=Own(), selector=NofM(2, 4), schedule=schedule), 3)
    again = PruningCallback(target, criterion=Own(), selector=NofM(2, 4), schedule=schedule)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert "resumes with a change" not in caplog.text
    assert len([entry for entry in again.report.history if entry.metric is None]) == 1


class Turns(Manual):
    """The second optimizer steps at the last of five batches alone."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        optimizer = second if batch_idx == 4 else first
        optimizer.zero_grad()
        self.toggle_optimizer(optimizer)
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def test_layers_of_which_no_step_was_seen_are_named(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("3st"))
    with pytest.warns(
        UserWarning, match=r"left net\.4\.weight, net\.6\.weight alone, and .*: Taylor\(\) .* no finite step"
    ):
        fit(tmp_path, Turns(), pruning, max_epochs=2)
    assert pruning.report.removed == 36
    reason = "Taylor() has seen no step of it"
    assert pruning.report.frozen == {"net.4.weight": reason, "net.6.weight": reason}


@pytest.mark.parametrize("criterion", [Taylor(), Fisher()])
@pytest.mark.parametrize("kind", ["weights", "2:4"])
def test_frozen_layers_that_no_gradient_shows_are_named(
    tmp_path: Path, kind: str, criterion: Criterion
) -> None:
    class Transfer(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net[4].requires_grad_(requires_grad=False)

    # by name, since what does not train stays otherwise
    parts: dict[str, Any] = {"criterion": criterion, "structure": Unstructured(include="net")}
    pruning = KINDS[kind](**parts, schedule=Linear("1ep", "3ep", every="1ep"))
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match=r"left net\.4\.weight alone, and took its share of the rest"):
        fit(tmp_path, Transfer(), pruning, keep, enable_checkpointing=True)
    assert pruning.report.frozen["net.4.weight"] == f"{criterion!r} has seen no step of it"
    assert pruning.masks["net.4.weight"].all()
    again = KINDS[kind](**parts, schedule=Linear("1ep", "3ep", every="1ep"))
    fit(tmp_path, Transfer(), again, ckpt_path=tmp_path / "epoch=3.ckpt", max_epochs=5)
    assert again.report.frozen == pruning.report.frozen


@pytest.mark.parametrize("later", [{"target": 0.7}, {"structure": Unstructured()}])
def test_a_compacted_network_that_is_to_lose_more_warns(tmp_path: Path, later: Any) -> None:
    settings = {"target": 0.5, "structure": Channels(), "schedule": OneShot("1ep"), "compact": True}
    run = fit(tmp_path, Lit(), PruningCallback(**settings), max_epochs=2)
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = PruningCallback(**settings | later)
    with pytest.warns(UserWarning, match="network is compacted, and nothing more of it is pruned"):
        fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "small.ckpt", max_epochs=3)


@at_once
def test_a_lower_target_brings_nothing_back(tmp_path: Path) -> None:
    _, pruning = run_to_the_end(tmp_path, PruningCallback(0.8, schedule=Cubic("1ep", "2ep")), 3)
    again = PruningCallback(0.5, schedule=Cubic("1ep", "4ep"))
    fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=5)
    assert again.report.removed == pruning.report.removed == round(0.8 * SIZE)


def test_what_another_structure_covered_does_not_count_unless_it_is_masked(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target": 0.5, "schedule": OneShot("2ep")}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, Lit(), PruningCallback(**settings, structure=Channels()), keep, enable_checkpointing=True)
    for epoch, others in ((0, False), (2, True)):
        again = PruningCallback(**settings)
        fit(tmp_path, Lit(), again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", max_epochs=5)
        assert ("net.1.bias" in again.masks) == others
        assert (again.report.removed == 2420) == (not others)
        assert int((~again.masks["net.4.weight"]).sum()) > 1000


def test_a_layer_that_is_excluded_on_resume_stays_masked(tmp_path: Path) -> None:
    run_to_the_end(tmp_path, PruningCallback(0.8, schedule=OneShot("1ep")), 3)
    again = PruningCallback(0.8, structure=Unstructured(exclude="net.4"), schedule=OneShot("1ep"))
    fit(tmp_path, model := Lit(), again, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=4)
    assert int((model.net[4].weight == 0).sum()) == int((~again.masks["net.4.weight"]).sum()) > 2000


def test_a_state_of_another_version_or_architecture_is_refused(tmp_path: Path) -> None:
    run_to_the_end(tmp_path, pruning := PruningCallback(0.5, schedule=OneShot("1ep")), 2)
    state = pruning.state_dict()
    with pytest.raises(ValueError, match="version 99"):
        PruningCallback(0.5).load_state_dict(state | {"version": 99})
    other = PruningCallback(0.5)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"'net.0.weight'"):
        other.bind(nn.Linear(3, 3))


def test_a_checkpoint_without_pruning_starts_from_dense(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="dense")
    fit(tmp_path, Lit(), keep, max_epochs=2, enable_checkpointing=True)
    pruning = PruningCallback(0.5, criterion=Gradient(), schedule=OneShot("3ep"))
    fit(tmp_path, Lit(), pruning, ckpt_path=tmp_path / "dense.ckpt", max_epochs=4)
    assert pruning.report.removed == round(0.5 * SIZE)


def test_a_test_run_in_between_does_not_turn_masks_back(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8, schedule=Cubic("1ep", "3ep"))
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path, model := Lit(), pruning, keep, enable_checkpointing=True)
    run.validate(model, digits(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    kept = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            kept.append(sum(int(mask.sum()) for mask in pruning.masks.values()))

    with pytest.warns(UserWarning, match=r"are not 0 any more: .* call the callback's reset\(\)"):
        fit(tmp_path, model, pruning, Watch())
    assert set(kept) == {SIZE - round(0.8 * SIZE)}


class SaveEarly(Callback):
    """Comes before the pruning callback, and saves when that has not started yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_before_any_training_has_no_state(tmp_path: Path) -> None:
    path = tmp_path / "early.ckpt"
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    assert pruning.state_dict() == {}
    fit(tmp_path, Lit(), SaveEarly(path), pruning, max_epochs=2)
    assert "PruningCallback" not in torch.load(path, weights_only=True)["callbacks"]
    again = PruningCallback(0.5, schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), again, ckpt_path=path, max_epochs=2)
    assert again.report.removed == SIZE // 2


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
def test_a_checkpoint_of_another_model_before_it_trains_has_no_state(
    tmp_path: Path, structure: Structure
) -> None:
    path = tmp_path / "early.ckpt"
    pruning = PruningCallback(0.5, structure=structure, schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), pruning, max_epochs=2)
    fit(tmp_path, Lit(), SaveEarly(path), pruning, max_epochs=2)
    assert "PruningCallback" not in torch.load(path, weights_only=True)["callbacks"]


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
@pytest.mark.parametrize("how", ["new", "used before", "with another model"])
def test_a_checkpoint_before_a_resumed_run_trains_hands_the_state_on(
    tmp_path: Path, how: str, structure: Structure
) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(0.8, criterion=Taylor(), structure=structure, schedule=Cubic("1ep", "3ep"))

    _, pruning = run_to_the_end(tmp_path, callback(), 4)
    path, early = tmp_path / "epoch=1.ckpt", tmp_path / "early.ckpt"
    used, model = callback(), Lit()
    if how != "new":
        fit(tmp_path, model if how == "used before" else Lit(), used)
    fit(tmp_path, model, SaveEarly(early), used, ckpt_path=path)
    again = callback()
    fit(tmp_path, Lit(), again, ckpt_path=early)
    assert all(torch.equal(again.masks[name], mask) for name, mask in pruning.masks.items())
    assert again.report.history == pruning.report.history
    assert again.state_dict()["agenda"] == pruning.state_dict()["agenda"]


@at_once
def test_a_second_fit_goes_on_and_a_new_model_starts_anew(tmp_path: Path) -> None:
    pruning = PruningCallback(0.6, schedule=Cubic("1ep", "2ep"))
    fit(tmp_path, model := Lit(), pruning)
    first = {name: mask.clone() for name, mask in pruning.masks.items()}
    fit(tmp_path, model, pruning)
    assert all(torch.equal(pruning.masks[name], mask) for name, mask in first.items())
    kept = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            kept.append(sum(int(mask.sum()) for mask in pruning.masks.values()))

    fit(tmp_path, Lit(), pruning, Watch())
    assert kept[0] == SIZE
    assert kept[-1] == SIZE - round(0.6 * SIZE)


def test_two_callbacks_keep_apart_by_name(tmp_path: Path) -> None:
    one = PruningCallback(
        0.5, structure=Unstructured(include="net.0"), schedule=OneShot("1ep"), name="convolution"
    )
    two = PruningCallback(0.9, structure=Unstructured(exclude="net.0"), schedule=OneShot("1ep"))
    keep = ModelCheckpoint(tmp_path, filename="two")
    fit(tmp_path, Lit(), one, two, keep, max_epochs=2, enable_checkpointing=True)
    assert one.report.removed == 36
    assert two.report.removed == round(0.9 * (SIZE - 72))
    assert {"PruningCallback", "PruningCallback[convolution]"} < set(
        torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    )


# --- what a user sees


@pytest.mark.renders
def test_reports_go_beside_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = PruningCallback(0.75, schedule=Cubic("1ep", "3ep"))
    logger = CSVLogger(tmp_path)
    run = fit(tmp_path, Lit(), pruning, EarlyStopping("acc", mode="max", patience=9), logger=logger)
    folder = Path(logger.log_dir)
    saved = json.loads((folder / "report.json").read_text())
    assert saved["sparsity"] == pruning.report.sparsity == round(0.75 * SIZE) / SIZE
    assert saved["monitor"] == "acc"
    assert [event["step"] for event in saved["history"] if event["metric"] is not None] == [5, 10, 15, 20]
    assert saved["pruned_metric"] == saved["history"][-1]["metric"]
    assert (folder / "report.png").stat().st_size > 0
    with (folder / "metrics.csv").open() as lines:
        logged = [float(row["prune/sparsity"]) for row in csv.DictReader(lines) if row["prune/sparsity"]]
    assert [round(value * SIZE) for value in logged] == [0, round(0.875 * 0.75 * SIZE), round(0.75 * SIZE)]
    assert float(run.progress_bar_metrics["prune/sparsity"]) == pytest.approx(0.75)
    printed = capsys.readouterr().out
    assert "net.4.weight" in printed
    assert "Zeros alone make nothing faster" in printed
    assert "acc: dense 0." in printed


def test_each_event_reaches_every_logger_with_every_layer(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name) for name in ("one", "other")]
    pruning = PruningCallback(0.75, selector=PerLayer(), schedule=Cubic("1ep", "3ep"))
    fit(tmp_path, Manual(), pruning, logger=loggers)
    sizes = {"": SIZE, "/net.0.weight": 72, "/net.4.weight": 4608, "/net.6.weight": 160}
    expected = {
        step: {name: round(share * 0.75 * size) for name, size in sizes.items() if name}
        for step, share in {5: 0.0, 10: 0.875, 15: 1.0}.items()
    }
    for removed in expected.values():
        removed[""] = sum(removed.values())
    for logger in loggers:
        with (Path(logger.log_dir) / "metrics.csv").open() as lines:
            rows = [row for row in csv.DictReader(lines) if row["prune/sparsity"]]
        assert expected == {
            int(row["step"]): {
                name: round(float(row[f"prune/sparsity{name}"]) * size) for name, size in sizes.items()
            }
            for row in rows
        }


@pytest.mark.parametrize("shown", ["progress_bar_metrics", "callback_metrics"])
def test_the_sparsity_is_shown_after_the_batch_that_trained_with_it(tmp_path: Path, shown: str) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(float(getattr(trainer, shown)["prune/sparsity"]))

    seen: list[float] = []
    fit(tmp_path, Lit(), PruningCallback(0.5, schedule=OneShot("7st")), Watch(), max_epochs=3)
    assert seen == [0.0] * 7 + [0.5] * 8


def test_the_sparsity_can_be_monitored(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="prune/sparsity", mode="max", save_top_k=-1)
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "3ep"))
    fit(tmp_path, Lit(), pruning, keep, max_epochs=5, enable_checkpointing=True)
    found = {Path(path).stem: float(value) for path, value in keep.best_k_models.items()}
    assert found == {"epoch=0": 0.0, "epoch=1": 0.0, "epoch=2": 0.25, "epoch=3": 0.5, "epoch=4": 0.5}


def test_the_history_has_each_event_and_each_look_at_the_metric_in_order(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="acc", mode="max", save_top_k=-1)
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "3ep"))
    fit(tmp_path, Manual(), pruning, keep, max_epochs=4, enable_checkpointing=True)
    metrics = [float(keep.best_k_models[str(tmp_path / f"epoch={epoch}.ckpt")]) for epoch in range(4)]
    assert pruning.report.history == (
        HistoryEntry(0, 5, 0.0, metrics[0]),
        HistoryEntry(1, 5, 0.0),
        HistoryEntry(1, 10, 0.0, metrics[1]),
        HistoryEntry(2, 10, 0.25),
        HistoryEntry(2, 15, 0.25, metrics[2]),
        HistoryEntry(3, 15, 0.5),
        HistoryEntry(3, 20, 0.5, metrics[3]),
    )


def test_without_validation_the_metric_is_noted_once_an_epoch(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["loss"]))

    losses: list[float] = []
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="loss", save_top_k=-1)
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    run = trainer(tmp_path, pruning, Watch(), keep, max_epochs=3, enable_checkpointing=True)
    run.fit(Lit(), digits())
    assert pruning.report.history == (
        HistoryEntry(0, 5, 0.0, losses[4]),
        HistoryEntry(1, 5, 0.5),
        HistoryEntry(1, 10, 0.5, losses[9]),
        HistoryEntry(2, 15, 0.5, losses[14]),
    )
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["PruningCallback"]
    assert saved["history"][-1]["metric"] == losses[9]


class LastLoss(Lit):
    """Logs at every step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("value", loss)
        return loss


class MeanLoss(Lit):
    """Logs the mean over an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("value", loss, on_step=False, on_epoch=True)
        return loss


class AtEpochEnd(Lit):
    """Logs when the epoch is over."""

    def on_train_epoch_end(self) -> None:
        self.log("value", self.net[6].weight.abs().sum())


@pytest.mark.parametrize("model", [LastLoss, MeanLoss, AtEpochEnd])
@pytest.mark.parametrize("every", [1, 2])
def test_a_metric_of_training_is_noted_in_its_own_epoch(tmp_path: Path, model: type[Lit], every: int) -> None:
    class Watch(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.append(float(trainer.callback_metrics["value"]))

    logged: list[float] = []
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "3ep"))
    watch = Watch(tmp_path, monitor="value")
    fit(tmp_path, model(), pruning, watch, check_val_every_n_epoch=every, enable_checkpointing=True)
    assert [entry for entry in pruning.report.history if entry.metric is not None] == [
        HistoryEntry(0, 5, 0.0, logged[0]),
        HistoryEntry(1, 10, 0.0, logged[1]),
        HistoryEntry(2, 15, 0.25, logged[2]),
        HistoryEntry(3, 20, 0.5, logged[3]),
    ]


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"check_val_every_n_epoch": 2}, [10, 20]), ({"val_check_interval": 2}, [2, 4, 7, 9, 12, 14, 17, 19])],
)
def test_a_metric_of_validation_is_noted_where_it_was_measured(
    tmp_path: Path, options: dict[str, int], steps: list[int]
) -> None:
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "3ep"))
    fit(tmp_path, Lit(), pruning, EarlyStopping("acc", mode="max", patience=9), **options)
    assert [entry.step for entry in pruning.report.history if entry.metric is not None] == steps


def test_a_metric_is_noted_at_the_end_of_an_epoch_that_was_resumed_in_its_middle(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    stop = EarlyStopping("loss", patience=9, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=8)
    run = trainer(tmp_path, pruning, stop, keep, max_epochs=3, enable_checkpointing=True)
    run.fit(model := Lit(), digits())
    again = trainer(tmp_path, pruning, stop, max_epochs=3)
    again.fit(model, digits(), ckpt_path=tmp_path / "middle.ckpt")
    assert [entry.step for entry in pruning.report.history if entry.metric is not None] == [5, 10, 15]


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
def test_a_resume_that_is_judged_by_another_metric_leaves_out_the_earlier_one(
    tmp_path: Path, structure: Structure
) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(0.3, structure=structure, schedule=OneShot("1ep"))

    keep = ModelCheckpoint(
        tmp_path, filename="{epoch}", monitor="acc", save_top_k=-1, save_on_train_epoch_end=True
    )
    fit(tmp_path, Lit(), callback(), keep, max_epochs=2, enable_checkpointing=True)
    stop, path = EarlyStopping("loss", patience=9), tmp_path / "epoch=1.ckpt"
    fit(tmp_path, Lit(), other := callback(), stop, ckpt_path=path, max_epochs=3)
    assert other.report.monitor == "loss"
    assert [(entry.step, entry.metric is None) for entry in other.report.history] == [(5, True), (15, False)]
    fit(tmp_path, Lit(), none := callback(), ckpt_path=path, max_epochs=3)
    assert none.report.monitor == "acc"
    assert [entry.step for entry in none.report.history if entry.metric is not None] == [5, 10, 15]


def test_only_validation_between_training_steps_is_noted(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    stop = EarlyStopping("acc", mode="max", patience=9)
    options = {"max_epochs": 2, "num_sanity_val_steps": 2}
    run = fit(tmp_path, model := Lit(), pruning, stop, **options)
    first = [entry.step for entry in pruning.report.history if entry.metric is not None]
    assert first == [5, 10]
    run.validate(model, digits(), verbose=False)
    fit(tmp_path, model, pruning, stop, **options)
    assert [entry.step for entry in pruning.report.history if entry.metric is not None] == first * 2


def test_multiply_adds_are_those_of_the_layers(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, selector=PerLayer(), schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), pruning, max_epochs=2)
    assert pruning.report.macs == 72 * 36 + 4608 + 160
    assert pruning.report.macs_kept == pruning.report.macs // 2
    assert pruning.report.params == SIZE + 8 + 16 + 16 + 10


@pytest.mark.renders
def test_nothing_optional_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rich", "rich.console", "rich.table", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    run = fit(tmp_path, Lit(), pruning, max_epochs=2)
    assert run.state.finished
    assert json.loads((tmp_path / "report.json").read_text())["removed"] == SIZE // 2
    assert not (tmp_path / "report.png").exists()
    assert "net.4.weight" in capsys.readouterr().out


def test_a_plan_shows_what_a_fit_would_do_and_does_nothing(tmp_path: Path) -> None:
    model = seeded(Lit)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruning = PruningCallback(0.9, schedule=OneShot("0%"))
    plan = pruning.plan(model, torch.zeros(1, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(pruning.masks) == 0
    fit(tmp_path, model, pruning, max_epochs=1)
    assert plan.layers == pruning.report.layers
    assert plan.macs_kept == pruning.report.macs_kept


def test_a_plan_does_not_claim_to_know_what_gradients_will_say() -> None:
    plan = PruningCallback(0.9, criterion=Taylor()).plan(Lit())
    assert [layer.kept for layer in plan.layers] == [None, None, None]
    assert "?" in plan.table()


def test_a_report_before_the_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="nothing to report"):
        _ = PruningCallback(0.5).report


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_is_of_the_network_that_was_loaded(tmp_path: Path, kind: str) -> None:
    """A checkpoint from before the last event, looked at after the fit; then trained on."""
    pruning = KINDS[kind](schedule=Linear("1ep", "3ep", every="1ep"), compact=kind == "channels")
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path, model := seeded(Lit), pruning, keep, enable_checkpointing=True)
    final = pruning.report.to_json()
    seen = []
    for epoch in (1, 2, 3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        run.validate(model, digits(), ckpt_path=path)
        parameters = dict(model.named_parameters())
        assert set(pruning.masks) <= set(parameters)
        assert all(not parameters[name][~mask].any() for name, mask in pruning.masks.items())
        kept = [int(mask.sum()) for mask in pruning.masks.values()]
        assert [layer.kept for layer in pruning.report.layers] == kept
        assert pruning.report.sparsity == pytest.approx(pruning.sparsity)
        seen.append(pruning.sparsity)
    assert seen[0] == 0 < seen[1] < seen[2]
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = KINDS[kind](schedule=Linear("1ep", "3ep", every="1ep"), compact=kind == "channels")
    fit(tmp_path, seeded(Lit), again, ckpt_path=tmp_path / "last.ckpt")
    assert json.loads(again.report.to_json())["sparsity"] == json.loads(final)["sparsity"]


@pytest.mark.parametrize("make", [Lit, Manual])
def test_a_state_that_is_saved_before_the_callback_has_its_turn_has_the_step(tmp_path: Path, make: Any) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("6st"))
    found: list[tuple[int, int]] = []

    class Saves(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            found.append((pruning.state_dict()["agenda"]["steps"], len(found) + 1))

    fit(tmp_path, seeded(make), Saves(), pruning, Saves(), max_epochs=2)
    assert [steps for steps, _ in found] == [step for step in range(1, 11) for _ in range(2)]


def test_a_name_is_in_the_files_of_the_report(tmp_path: Path) -> None:
    one = PruningCallback(0.5, structure=Unstructured(include="net.0"), schedule=OneShot("1ep"), name="first")
    two = PruningCallback(0.5, structure=Unstructured(exclude="net.0"), schedule=OneShot("1ep"))
    folder = tmp_path / "new" / "folder"
    fit(folder, Lit(), one, two, max_epochs=2)
    names = {path.name for path in folder.iterdir()}
    stems, suffixes = ("report", "report-first"), ("html", "json", "png")
    assert names == {f"{stem}.{suffix}" for stem in stems for suffix in suffixes}
    assert json.loads((folder / "report-first.json").read_text())["removed"] == 36


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("criterion", [Magnitude(), Taylor()])
def test_fast_dev_run_runs(tmp_path: Path, criterion: Any, batches: int) -> None:
    pruning = PruningCallback(0.5, criterion=criterion)
    fit(tmp_path, Lit(), pruning, fast_dev_run=batches)
    assert pruning.report.removed == (0 if batches == 1 else round(0.5 * SIZE))
    assert list(tmp_path.iterdir()) == []


def test_a_ramp_that_falls_on_one_moment_warns(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=Cubic("5%", "40%", every="5%"))
    with pytest.warns(UserWarning, match="Cubic.*prunes all at once.*in steps"):
        fit(tmp_path, Lit(), pruning, max_epochs=2)
    assert pruning.report.removed == round(0.5 * SIZE)


@pytest.mark.parametrize("schedule", [OneShot("5%"), Cubic("2st", "4st", every="1st"), Cubic("1ep", "1ep")])
def test_what_falls_on_one_moment_as_it_was_told_to_does_not_warn(tmp_path: Path, schedule: Any) -> None:
    fit(tmp_path, Lit(), PruningCallback(0.5, schedule=schedule), max_epochs=2)


def test_a_fit_that_ends_early_warns(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=Cubic("1ep", "5ep"))
    with pytest.warns(UserWarning, match="ended before the last pruning event"):
        fit(tmp_path, Lit(), pruning, Stop(2), max_epochs=6)
    assert 0 < pruning.report.removed < round(0.5 * SIZE)


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
@pytest.mark.parametrize("after_validation", [False, True])
def test_a_fit_that_is_resumed_after_its_last_step_does_what_was_left(
    tmp_path: Path, structure: Any, after_validation: bool
) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(0.5, structure=structure, schedule=OneShot("1ep"), compact=True)

    keep = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=not after_validation)
    fit(tmp_path, whole := Lit(), done := callback(), keep, max_epochs=2, enable_checkpointing=True)
    fit(tmp_path, again := Lit(), resumed := callback(), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    assert same(dict(resumed.masks), dict(done.masks))
    assert replace(resumed.report, dense=None, latency={}) == replace(done.report, dense=None, latency={})


@at_once
def test_a_fit_without_a_batch_warns_and_keeps_the_state(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, Lit(), done := PruningCallback(0.5), keep, max_epochs=3, enable_checkpointing=True)
    again = PruningCallback(0.5)
    with pytest.warns(UserWarning, match="ended before its first batch: nothing is pruned"):
        fit(tmp_path, Lit(), again, ckpt_path=tmp_path / "last.ckpt", limit_train_batches=0)
    assert again.state_dict()["history"] == done.state_dict()["history"]


# --- what bad input gets, before the first step


class NoStep(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("training began")


class Lazy(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.LazyLinear(4)


class NoGradient(Lit):
    def __init__(self) -> None:
        super().__init__()
        for module in (self.net[0], self.net[4], self.net[6]):
            module.weight.requires_grad_(False)


BAD = {
    "beyond": (PruningCallback(0.5, schedule=OneShot("9ep")), Lit, "at='9ep' lies beyond the fit"),
    "steps": (PruningCallback(0.5, schedule=OneShot("20st")), Lit, "at='20st'"),
    "order": (PruningCallback(0.5, schedule=Cubic("15st", "1ep")), Lit, "start='15st' comes after end='1ep'"),
    "include": (PruningCallback(0.5, structure=Unstructured(include="nett")), Lit, "include='nett' .*'net"),
    "exclude": (PruningCallback(0.5, structure=Unstructured(exclude="fc")), Lit, "exclude='fc' matches no"),
    "empty": (PruningCallback(0.5, structure=Unstructured(exclude="net")), Lit, "nothing to prune"),
    "tiny": (PruningCallback(1e-5), Lit, "target=1e-05 of 4840 units removes none"),
    "early": (PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("0%")), Lit, "before the first batch"),
    "frozen": (PruningCallback(0.5), NoGradient, "does not train: name it in include to prune it"),
    "no gradients": (
        PruningCallback(0.5, criterion=Taylor(), structure=Unstructured(include="net")),
        NoGradient,
        "needs gradients",
    ),
    "lazy": (PruningCallback(0.5), Lazy, "'extra.weight' has no shape yet"),
    "whole": (
        PruningCallback(0.5, structure=Channels(round_to=16)),
        Lit,
        "finds nothing to prune in Lit.* net.0, net.4: keeps all: no smaller .* multiple of round_to=16",
    ),
    "pattern": (PruningCallback(selector=NofM(3, 7)), Lit, "can prune no layer.*multiple of m=7"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_settings_stop_before_training(tmp_path: Path, case: str) -> None:
    pruning, model, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model(), pruning, NoStep())


def test_two_callbacks_over_one_parameter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two PruningCallbacks prune 'net\.0\.weight'"):
        fit(tmp_path, Lit(), PruningCallback(0.5), PruningCallback(0.5, name="other"), NoStep())


def test_a_threshold_that_removes_nothing_is_an_error(tmp_path: Path) -> None:
    pruning = PruningCallback(selector=Threshold(value=1e-12), schedule=OneShot("1ep"))
    with pytest.raises(RuntimeError, match=r"removed nothing .* raise the target, or the level of a Threshold"):
        fit(tmp_path, Lit(), pruning)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, r"target=0.0 must be a number above 0 and below 1"),
        ({"target": 1}, r"target=1 "),
        ({"target": -0.5}, r"target=-0.5 "),
        ({"target": float("nan")}, r"target=nan "),
        ({"target": "half"}, r"target='half' "),
        ({"target": True}, r"target=True "),
        ({}, r"target=None "),
        ({"target": 0.5, "selector": Threshold(std=1.0)}, r"target=0.5 must be None"),
        ({"target": 0.6, "selector": NofM(2, 4)}, r"target=0.6 must be left out or be 0.5"),
        ({"target": 0.5, "criterion": "magnitude"}, r"criterion='magnitude'.*Magnitude.*Taylor"),
        ({"target": 0.5, "criterion": Magnitude}, r"criterion=<class.*of .*Fisher, "),
        ({"target": 0.5, "structure": Global()}, r"structure=Global\(.*Unstructured"),
        ({"target": 0.5, "selector": None}, r"selector=None.*PerLayer"),
        ({"target": 0.5, "schedule": 0.3}, r"schedule=0.3.*OneShot"),
        ({"target": 0.5, "compact": "no"}, r"compact='no' must be True or False"),
        ({"target": 0.5, "name": "a/b"}, r"name='a/b' must be 1 to 100 characters without slashes"),
        ({"target": 0.5, "name": ""}, r"name='' must be"),
        ({"target": 0.5, "name": [1]}, r"name=\[1\] must be"),
        ({"target": 0.5, "name": 101 * "x"}, r"name='x+' must be"),
    ],
)
def test_bad_arguments_are_named_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningCallback(**arguments)
