"""Rewind: what goes back after an event, to where, and that a resumed run goes back to the same point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, LightningModule, ModelCheckpoint, Trainer
from lit import Lit, Manual, digits, fit, same, seeded, trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lightning_prune import (
    Channels,
    Cubic,
    Guard,
    Linear,
    OneShot,
    PruningCallback,
    Rewind,
    Steps,
    Taylor,
    Unstructured,
)
from lightning_prune.schedules.moments import FitLength
from lightning_prune.training.snapshots import (
    TrainingObjects,
    copy_plain,
    not_reinitialized,
    reinitialize_,
    restore_optimizer_,
    restore_snapshot_,
    take_snapshot,
)

TWICE = Steps({"2ep": 0.5, "3ep": 1.0})


class Watch(Callback):
    """All that training changes, as it is before each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.lrs: list[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.seen.append(take_snapshot(TrainingObjects(pl_module, trainer.optimizers, schedules)))
        self.lrs.append([group["lr"] for each in trainer.optimizers for group in each.param_groups])


def masked(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """With 0 where a mask says so."""
    return {name: value * masks[name] if name in masks else value for name, value in tensors.items()}


class Masks(Callback):
    """Copies of the masks before each batch."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append({name: mask.clone() for name, mask in self.pruning.masks.items()})


class Scheduled(Lit):
    """With a learning-rate schedule of the test's choice."""

    def __init__(self, schedule: str = "onecycle") -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), 0.05, momentum=0.9)
        configs: dict[str, dict[str, Any]] = {
            "onecycle": {"scheduler": OneCycleLR(optimizer, 0.1, total_steps=20), "interval": "step"},
            "epochs": {"scheduler": MultiStepLR(optimizer, [1, 2])},
            "lambda": {"scheduler": LambdaLR(optimizer, lambda epoch: 0.5**epoch)},
            "plateau": {"scheduler": ReduceLROnPlateau(optimizer, "max", patience=0), "monitor": "acc"},
            "chain": {
                "scheduler": SequentialLR(
                    optimizer,
                    [LambdaLR(optimizer, lambda step: 0.5), OneCycleLR(optimizer, 0.1, total_steps=30)],
                    [4],
                ),
                "interval": "step",
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": configs[self.schedule]}


class Two(Manual):
    """Two optimizers, each with a schedule that is stepped by hand."""

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [MultiStepLR(each, [1, 2]) for each in optimizers]


@pytest.mark.parametrize(("to", "batch"), [("0ep", 0), (0, 0), ("1ep", 5), ("25%", 5), ("7st", 7)])
def test_survivors_are_what_they_were_bit_for_bit_after_each_event(
    tmp_path: Path, to: str | float, batch: int
) -> None:
    pruning = PruningCallback(0.5, schedule=TWICE, rewind=Rewind(to))
    watch, masks = Watch(), Masks(pruning)
    fit(tmp_path, seeded(Scheduled), pruning, watch, masks)
    then = watch.seen[batch]
    for event, share in ((10, 0.25), (15, 0.5)):
        now = watch.seen[event]
        assert sum(int((~mask).sum()) for mask in masks.seen[event].values()) == round(share * 4840)
        assert same(now["weights"], masked(then["weights"], masks.seen[event]))
        assert same(now["schedules"], then["schedules"])
        assert watch.lrs[event] == watch.lrs[batch]
    assert not same(watch.seen[14]["weights"], masked(then["weights"], masks.seen[14]))


def test_without_rewinding_nothing_goes_back(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=TWICE)
    watch, masks = Watch(), Masks(pruning)
    fit(tmp_path, seeded(Scheduled), pruning, watch, masks)
    before, after = watch.seen[0]["weights"], watch.seen[10]["weights"]
    assert not any(torch.equal(after[name], masked(before, masks.seen[10])[name]) for name in pruning.masks)
    assert watch.lrs[10] != watch.lrs[0]


def test_buffers_go_back(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("2ep"), rewind=Rewind("1ep"))
    watch = Watch()
    fit(tmp_path, Lit(), pruning, watch)
    for name in ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"):
        assert torch.equal(watch.seen[10]["weights"][name], watch.seen[5]["weights"][name])
        assert not torch.equal(watch.seen[9]["weights"][name], watch.seen[5]["weights"][name])


def test_a_run_repeats_training_from_the_point_it_went_back_to(tmp_path: Path) -> None:
    """The control: with nothing to mask in a layer's way, the same batches give the same weights."""

    class Still(Lit):
        def configure_optimizers(self) -> Any:
            return SGD(self.net[4:].parameters(), 0.05, momentum=0.9)  # the first layer does not train

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[1].eval()

        def forward(self, images: Tensor) -> Tensor:
            return self.net[4:](self.net[3](images.repeat(1, 8, 1, 1)[:, :, :6, :6]))

    pruning = PruningCallback(
        0.5, structure=Unstructured(include="net.0"), schedule=OneShot("2ep"), rewind=Rewind("0ep")
    )
    watch = Watch()
    fit(tmp_path, seeded(Still), pruning, watch)
    for first, again in zip(watch.seen[:10], watch.seen[10:], strict=True):
        assert torch.equal(first["weights"]["net.4.weight"], again["weights"]["net.4.weight"])
        assert same(first["optimizers"], again["optimizers"])


@pytest.mark.parametrize("model", [Scheduled, Two])
def test_learning_rate_rewinding_keeps_weights(tmp_path: Path, model: type[Lit]) -> None:
    class Before(Watch):
        """Comes before the pruning callback, at the start of the epoch: when the event is yet to come."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.on_train_batch_start(trainer, pl_module)

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
            if not batch:
                super().on_train_batch_start(trainer, pl_module)

    pruning = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("1ep", weights=False))
    before, watch, masks = Before(), Watch(), Masks(pruning)
    fit(tmp_path, seeded(model), before, pruning, watch, masks)
    then, now, mask = watch.seen[5], watch.seen[15], masks.seen[15]
    assert same(now["weights"], masked(before.seen[3]["weights"], mask))
    assert not same(now["weights"], masked(then["weights"], mask))
    assert same(now["schedules"], then["schedules"])
    assert watch.lrs[15] == watch.lrs[5] != watch.lrs[14]
    names = list(mask)
    for present, earlier in zip(now["optimizers"], then["optimizers"], strict=True):
        assert same(present["param_groups"], earlier["param_groups"])
        for place, memory in earlier["state"].items():
            for key, value in memory.items():
                found = present["state"][place][key]
                fits = [m for m in names if mask[m].shape == value.shape]
                assert torch.equal(found, value * mask[fits[0]] if fits else value)


@pytest.mark.parametrize("schedule", ["epochs", "lambda", "plateau", "chain"])
def test_every_kind_of_schedule_goes_back(tmp_path: Path, schedule: str) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("1ep"))
    watch = Watch()
    fit(tmp_path, seeded(lambda: Scheduled(schedule)), pruning, watch, max_epochs=5)
    assert same(watch.seen[15]["schedules"], watch.seen[5]["schedules"])
    assert not same(watch.seen[14]["schedules"], watch.seen[5]["schedules"])
    assert watch.lrs[15] == watch.lrs[5]


@pytest.mark.filterwarnings("ignore:Linear.* prunes all at once:UserWarning")
def test_the_snapshot_at_the_moment_of_an_event_is_from_before_it(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=Linear("1ep", "2ep"), rewind=Rewind("1ep"))
    watch = Watch()
    fit(tmp_path, seeded(Lit), pruning, watch, max_epochs=3)
    assert watch.seen[5]["weights"]["net.4.weight"].count_nonzero() == 4608  # the first event removes nothing
    assert same(watch.seen[10]["weights"], masked(watch.seen[5]["weights"], dict(pruning.masks)))
    together = PruningCallback(0.5, schedule=Steps({"1ep": 0.5, "2ep": 1.0}), rewind=Rewind("1ep"))
    held: list[Any] = []

    class Held(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            held.append(together.state_dict()["snapshot"])

    fit(tmp_path, seeded(Lit), together, Held(), max_epochs=3)
    assert held[5]["weights"]["net.4.weight"].count_nonzero() == 4608
    assert held[5] is held[9]
    assert held[4] is held[10] is None  # not taken yet, and of no more use


@pytest.mark.parametrize("schedule", [OneShot("2ep"), OneShot("10st")])
def test_channels_that_need_an_example_go_back_to_the_first_weights(tmp_path: Path, schedule: Any) -> None:
    pruning = PruningCallback(0.5, structure=Channels(), schedule=schedule, rewind=Rewind(0))
    watch = Watch()
    fit(tmp_path, seeded(Lit), pruning, watch, max_epochs=3)
    assert same(watch.seen[10]["weights"], masked(watch.seen[0]["weights"], dict(pruning.masks)))


# --- from scratch


def test_random_weights_are_fresh_and_the_same_for_every_run(tmp_path: Path) -> None:
    def run(rewind: Rewind | None, noise: int) -> tuple[Watch, PruningCallback, Tensor]:
        pruning = PruningCallback(0.5, schedule=OneShot("2ep"), rewind=rewind)
        watch, model = Watch(), seeded(lambda: Scheduled("epochs"))
        torch.manual_seed(noise)
        fit(tmp_path, model, pruning, watch, max_epochs=3)
        return watch, pruning, torch.rand(3)

    first, pruning, after = run(Rewind("random", seed=1), 7)
    second, _, _ = run(Rewind("random", seed=1), 8)
    third, _, _ = run(Rewind("random", seed=2), 7)
    fresh = seeded(Lit)
    reinitialize_(fresh, 1)
    now = first.seen[10]
    assert same(now["weights"], masked(take_snapshot(TrainingObjects(fresh))["weights"], dict(pruning.masks)))
    assert same(now["weights"], second.seen[10]["weights"])
    assert not same(now["weights"], third.seen[10]["weights"])
    assert not same(now["weights"], masked(first.seen[0]["weights"], dict(pruning.masks)))
    assert int(now["weights"]["net.1.num_batches_tracked"]) == 0
    assert not now["weights"]["net.1.running_mean"].any()
    assert same(now["optimizers"], first.seen[0]["optimizers"])
    assert same(now["schedules"], first.seen[0]["schedules"])
    assert torch.equal(after, run(None, 7)[2])  # the run's own random state is where it would be


def test_drawing_leaves_the_random_state_alone() -> None:
    model = Lit()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    reinitialize_(model, 0)
    first = take_snapshot(TrainingObjects(model))
    assert torch.equal(torch.rand(4), expected)
    reinitialize_(model, 0)
    assert same(take_snapshot(TrainingObjects(model)), first)


def test_the_initialisation_of_a_parent_wins() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def reset_parameters(self) -> None:
            self.child.bias.zero_()
            self.scale.fill_(2.0)

    model = nn.Sequential(
        Parent(), nn.MultiheadAttention(4, 2), nn.Transformer(4, 2, 1, 1, 8, batch_first=True)
    )
    before = model[1].in_proj_weight.detach().clone()
    reinitialize_(model, 0)
    assert model[0].child.bias.tolist() == [0.0] * 3
    assert model[0].scale.tolist() == [2.0] * 3
    assert not torch.equal(model[1].in_proj_weight, before)
    assert not_reinitialized(model, 0) == []


class Own(Lit):
    """Has a parameter that nothing redraws."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


def test_a_parameter_that_no_module_redraws_is_named_and_nothing_has_changed(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, rewind=Rewind("random"))
    model = seeded(Own)
    before = take_snapshot(TrainingObjects(model))
    with pytest.raises(ValueError, match=r"cannot redraw 'scale': .*, or one around it, needs a reset_p"):
        fit(tmp_path, model, pruning)
    assert same(take_snapshot(TrainingObjects(model)), before)

    class Around(Own):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.scale)

    fit(tmp_path, seeded(Around), pruning)
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


# --- resuming


class Keep(ModelCheckpoint):
    """A checkpoint of every epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.parametrize(
    ("rewind", "model"),
    [(Rewind("1ep"), Scheduled), (Rewind("7st", weights=False), Two), (Rewind("random"), Scheduled)],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    tmp_path: Path, rewind: Rewind, model: type[Lit]
) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(0.8, criterion=Taylor(), schedule=Cubic("2ep", "4ep"), rewind=rewind)

    whole, pruning, watch = seeded(model), callback(), Watch()
    keep = Keep(tmp_path)
    fit(tmp_path, whole, pruning, watch, keep, max_epochs=6, enable_checkpointing=True)
    for epoch in range(5):
        path = tmp_path / f"epoch={epoch}.ckpt"
        torch.load(path, weights_only=True)
        resumed, again, seen = seeded(model), callback(), Watch()
        torch.manual_seed(99)
        fit(tmp_path, resumed, again, seen, ckpt_path=path, max_epochs=6)
        assert same(seen.seen, watch.seen[5 * (epoch + 1) :])
        assert same(take_snapshot(TrainingObjects(resumed)), take_snapshot(TrainingObjects(whole)))
        assert same(dict(again.masks), dict(pruning.masks))


def test_a_snapshot_holds_nothing_but_tensors_and_plain_values(tmp_path: Path) -> None:
    class Odd(Scheduled):
        """Its schedule and its optimizer hold functions."""

        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            made["lr_scheduler"]["scheduler"].extra = print
            made["optimizer"].param_groups[0]["rule"] = max
            return made

    pruning = PruningCallback(0.5, schedule=OneShot("2ep"), rewind=Rewind("1ep"))
    states: list[Any] = []

    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (6, 10):
                torch.save(pruning.state_dict(), tmp_path / "state.pt")
                states.append(torch.load(tmp_path / "state.pt", weights_only=True))
                assert trainer.optimizers[0].param_groups[0]["rule"] is max
                assert trainer.lr_scheduler_configs[0].scheduler.extra is print

    fit(tmp_path, Odd("lambda"), pruning, Save(), max_epochs=3)
    assert set(states[0]["snapshot"]) == {"weights", "optimizers", "schedules"}
    assert states[1]["snapshot"] is None


class Closure(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2, history_size=4)


def test_a_memory_that_is_filled_on_the_way_can_be_brought_back(tmp_path: Path) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(0.8, schedule=OneShot("3ep"), rewind=Rewind("1st"))

    whole, pruning = seeded(Closure), callback()
    fit(tmp_path, whole, pruning, Keep(tmp_path), max_epochs=5, enable_checkpointing=True)
    resumed = seeded(Closure)
    fit(tmp_path, resumed, callback(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=5)
    assert same(take_snapshot(TrainingObjects(resumed)), take_snapshot(TrainingObjects(whole)))


def test_a_checkpoint_without_a_snapshot_cannot_be_resumed_past_the_point(tmp_path: Path) -> None:
    fit(tmp_path, Lit(), Keep(tmp_path), max_epochs=2, enable_checkpointing=True)
    late = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("1ep"))
    with pytest.raises(ValueError, match=r"Rewind\(to='1ep'.* cannot go back: .*without a snapshot"):
        fit(tmp_path, Lit(), late, ckpt_path=tmp_path / "epoch=1.ckpt")
    in_time = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("2ep"))
    fit(tmp_path, Lit(), in_time, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert in_time.report.removed == 2420


@pytest.mark.parametrize("to", ["0ep", "random"])
def test_the_advice_for_a_checkpoint_from_after_the_beginning_works(tmp_path: Path, to: str) -> None:
    fit(tmp_path, Lit(), Keep(tmp_path), max_epochs=2, enable_checkpointing=True)

    def run(rewind: Rewind, path: Path | None = tmp_path / "epoch=0.ckpt") -> int:
        pruning = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=rewind)
        fit(tmp_path, Lit(), pruning, ckpt_path=path)
        return pruning.report.removed

    with pytest.raises(ValueError, match=r"begin without ckpt_path, or rewind to a later moment\.$"):
        run(Rewind(to))
    assert run(Rewind(to), None) == run(Rewind("1ep")) == 2420


def test_another_rewind_does_not_take_over_the_snapshot(tmp_path: Path) -> None:
    first = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("0ep"))
    fit(tmp_path, Lit(), first, Keep(tmp_path), enable_checkpointing=True)
    path = tmp_path / "epoch=1.ckpt"
    watch, other = Watch(), PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("2ep"))
    fit(tmp_path, Lit(), other, watch, ckpt_path=path)
    assert same(watch.seen[5]["weights"], masked(watch.seen[0]["weights"], dict(other.masks)))
    late = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("1ep"))
    with pytest.raises(ValueError, match="cannot go back"):
        fit(tmp_path, Lit(), late, ckpt_path=path)


def test_after_the_last_event_there_is_no_way_back_for_a_higher_target(tmp_path: Path) -> None:
    first = PruningCallback(0.5, schedule=OneShot("2ep"), rewind=Rewind("1ep"))
    fit(tmp_path, Lit(), first, Keep(tmp_path), enable_checkpointing=True)
    path = tmp_path / "epoch=2.ckpt"
    higher = PruningCallback(0.8, schedule=OneShot("2ep"), rewind=Rewind("1ep"))
    with pytest.raises(ValueError, match=r"cannot go back: .*without a snapshot"):
        fit(tmp_path, Lit(), higher, ckpt_path=path)
    lower = PruningCallback(0.3, schedule=OneShot("2ep"), rewind=Rewind("1ep"))
    fit(tmp_path, Lit(), lower, ckpt_path=path)
    assert lower.report.removed == first.report.removed == 2420


def test_an_epoch_that_has_begun_is_no_longer_its_start(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=8)
    run = trainer(tmp_path, keep, max_epochs=2, enable_checkpointing=True)
    run.fit(Lit(), digits())
    late = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("1ep"))
    with pytest.raises(ValueError, match="cannot go back"):
        trainer(tmp_path, late).fit(Lit(), digits(), ckpt_path=tmp_path / "middle.ckpt")


def test_a_second_fit_goes_back_to_its_own_beginning(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    pruning = PruningCallback(0.5, schedule=OneShot("1ep"), rewind=Rewind())
    with pytest.warns(UserWarning, match="ended before the last pruning event"):
        fit(tmp_path, model := Lit(), pruning, Stop(), max_epochs=2)
    watch = Watch()
    fit(tmp_path, model, pruning, watch, max_epochs=2)
    assert same(watch.seen[5]["weights"], masked(watch.seen[0]["weights"], dict(pruning.masks)))


@pytest.mark.parametrize("rewind", [Rewind("1ep"), Rewind("2st"), Rewind("random"), Rewind(weights=False)])
@pytest.mark.parametrize("batches", [1, 4])
def test_fast_dev_run_runs(tmp_path: Path, rewind: Rewind, batches: int) -> None:
    run = fit(tmp_path, Lit(), PruningCallback(0.5, rewind=rewind), fast_dev_run=batches)
    assert run.state.finished


# --- the pieces


def test_a_snapshot_can_be_used_again() -> None:
    model = nn.Linear(3, 3)
    optimizer = Adam(model.parameters(), 0.1)
    training = TrainingObjects(model, [optimizer], [MultiStepLR(optimizer, [2])])

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        training.schedules[0].step()  # type: ignore[attr-defined]

    step()
    snapshot = take_snapshot(training)
    kept = copy_plain(snapshot)
    for _ in range(2):
        step()
        step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
        restore_snapshot_(training, snapshot)
        assert same(take_snapshot(training), kept)
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert same(snapshot, kept)


def test_groups_that_an_optimizer_was_given_since_stay() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SGD(first.parameters(), 0.1, momentum=0.9)
    state = copy_plain(optimizer.state_dict())
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.5})
    optimizer.param_groups[0]["lr"] = 0.2
    restore_optimizer_(optimizer, state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_further_moments_fall_on_the_grid_of_the_events() -> None:
    horizon = FitLength(10, None, 5)
    also = [Rewind("7st").moment]
    table = OneShot("2ep").timetable(horizon, also)
    assert [event.position for event in table.events] == [10]
    assert table.marks == (7,)
    assert OneShot("2ep").timetable(horizon, [Rewind("1ep").moment]).marks == (1,)
    assert OneShot("2ep").timetable(horizon).marks == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "soon"}, r"to='soon' is no moment: .*; or \"random\"\."),
        ({"to": 1.5}, r"to=1.5 must lie between"),
        ({"to": None}, r"to=None is no moment"),
        ({"to": "2.5st"}, r"to='2.5st' must be a whole number"),
        ({"weights": 1}, r"weights=1 must be True or False"),
        ({"seed": 1.5}, r"seed=1.5 must be an integer"),
        ({"seed": 1.0}, r"seed=1.0 must be an integer"),
        ({"to": "random", "weights": False}, r"weights=False .* to='random'"),
    ],
)
def test_bad_arguments_are_named_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewind(**arguments)


def test_what_is_no_rewind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewind='1ep' is no Rewind: give an instance of one of Rewind\."):
        PruningCallback(0.5, rewind="1ep")  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [{"rewind": Rewind()}, {"guard": Guard("acc")}])
def test_what_another_callback_has_removed_is_not_brought_back(tmp_path: Path, part: dict[str, Any]) -> None:
    one = PruningCallback(0.5, structure=Unstructured(include="net.0"), name="one")
    two = PruningCallback(0.5, structure=Unstructured(exclude="net.0"), **part)
    with pytest.raises(ValueError, match=r"rewind and guard .* for a single PruningCallback"):
        fit(tmp_path, Lit(), one, two)


@pytest.mark.parametrize(
    ("schedule", "to"), [(OneShot("2ep"), "3ep"), (Cubic("1ep", "3ep"), "12st"), (OneShot("4st"), "1ep")]
)
def test_a_point_after_the_first_event_stops_before_training(tmp_path: Path, schedule: Any, to: str) -> None:
    class NoStep(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("training began")

    pruning = PruningCallback(0.5, schedule=schedule, rewind=Rewind(to))
    name = type(schedule).__name__
    with pytest.raises(ValueError, match=rf"Rewind\(to='{to}'.* is later .* first event of {name}"):
        fit(tmp_path, Lit(), pruning, NoStep())
    with pytest.raises(ValueError, match="to='9ep' lies beyond the fit"):
        fit(tmp_path, Lit(), PruningCallback(0.5, rewind=Rewind("9ep")), NoStep())


@pytest.mark.filterwarnings("ignore:Linear.* prunes all at once:UserWarning")
def test_a_fit_made_longer_once_all_is_gone_goes_on(tmp_path: Path) -> None:
    def pruning() -> PruningCallback:
        return PruningCallback(0.5, schedule=Linear("25%", "50%"), rewind=Rewind("0ep"))

    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, seeded(Lit), pruning(), every, max_epochs=4, enable_checkpointing=True)
    longer, again = seeded(Lit), pruning()
    fit(tmp_path, longer, again, ckpt_path=tmp_path / "epoch=3.ckpt", max_epochs=10)
    assert again.report.sparsity == pytest.approx(0.5, abs=1e-3)
