"""Averaging callbacks beside pruning: what they validate, save and leave behind is pruned, too."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, loose, masked
from lightnings import Callback, LightningModule, ModelCheckpoint, StochasticWeightAveraging, Trainer, callbacks
from lit import Lit, digits, fit, same, seeded, trainer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_prune import (
    Channels,
    Cubic,
    Guard,
    OneShot,
    PruningCallback,
    Rewind,
    Unstructured,
    load_compact,
)

EVENTS = Cubic("1ep", "3ep", every="1ep")


class OwnAverage(Callback):
    """Somebody's own: an average of the weights, from the start on, that stands in for them after the fit."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mean = AveragedModel(pl_module, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.mean.update_parameters(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(self.mean.module.state_dict())


AVERAGING: dict[str, Callable[[], Any]] = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "own": OwnAverage,
}
if hasattr(callbacks, "WeightAveraging"):  # which earlier versions of Lightning lack
    AVERAGING["mean"] = callbacks.WeightAveraging
    AVERAGING["ema"] = partial(callbacks.EMAWeightAveraging, decay=0.9)
SAVED = [name for name in AVERAGING if name != "own"]
SWAPPING = [name for name in AVERAGING if name in ("mean", "ema")]


class Looks(Callback):
    """Checks that masked weights are 0 in what trains and in what is validated."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert loose(self.pruning, pl_module) == 0

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert loose(self.pruning, pl_module) == 0
        self.seen.append(masked(self.pruning))


def read(path: Path) -> Any:
    """A checkpoint; torch 2.6 has a function in the state of SWA's schedule."""
    return torch.load(path, weights_only=False)


def loose_in(path: Path, pruning: PruningCallback) -> int:
    """How many weights of a file that are masked now are not 0."""
    weights = read(path)["state_dict"]
    return sum(int((weights[name][~mask] != 0).sum()) for name, mask in pruning.masks.items())


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize(
    ("kind", "order"),
    [("weights", "before"), ("weights", "after"), ("channels", "before"), ("2:4", "after")],
)
def test_averages_are_masked_where_they_are_used_and_saved(
    tmp_path: Path, kind: str, averaging: str, order: str
) -> None:
    pruning, average = KINDS[kind](schedule=EVENTS), AVERAGING[averaging]()
    watch = Looks(pruning)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    pair = (average, pruning) if order == "before" else (pruning, average)
    model = seeded(Lit)
    run = fit(tmp_path, model, *pair, watch, keep, enable_checkpointing=True)
    assert [entry.epoch for entry in pruning.report.history] == [1, 2, 3]
    assert watch.seen[-1] == masked(pruning) > 1000
    assert loose(pruning, model) == 0
    assert loose_in(tmp_path / "epoch=3.ckpt", pruning) == 0
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert loose_in(tmp_path / "end.ckpt", pruning) == 0


class Snapshots(Callback):
    """Keeps the weights at the end of each epoch, and learning rates."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_that_of_the_weights_that_are_left(tmp_path: Path, kind: str) -> None:
    """SWA averages ends of epochs, and takes batch norm's statistics of the average from the data."""
    pruning, snapshots = KINDS[kind](schedule=EVENTS), Snapshots()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    fit(tmp_path, model := seeded(Lit), snapshots, pruning, swa)
    last = snapshots.weights[:4]  # the fifth epoch is that of batch norm
    for name, value in model.named_parameters():
        mean = torch.stack([weights[name] for weights in last[0:3]]).mean(0)
        kept = pruning.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        torch.testing.assert_close(value, mean * kept)
    twin = Lit()
    twin.load_state_dict(model.state_dict())
    torch.optim.swa_utils.update_bn([images for images, _ in digits()], twin)
    torch.testing.assert_close(model.net[1].running_mean, twin.net[1].running_mean)
    torch.testing.assert_close(model.net[1].running_var, twin.net[1].running_var)
    dense = Snapshots()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    fit(tmp_path, seeded(Lit), dense, swa)
    assert snapshots.rates == dense.rates


@pytest.mark.parametrize(("moment", "epoch"), [("50%", 2), ("75%", 3), ("4ep", 3)])
def test_the_epoch_that_swa_adds_is_no_part_of_the_fit(tmp_path: Path, moment: str, epoch: int) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot(moment))
    fit(tmp_path, Lit(), AVERAGING["swa"](), pruning)
    assert [entry.epoch for entry in pruning.report.history] == [epoch]


def test_with_swa_an_event_in_the_epoch_that_it_adds_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, AVERAGING["swa"](), PruningCallback(0.5, schedule=OneShot("5ep")))
    with pytest.raises(ValueError, match="at='5ep' lies beyond the fit"):
        run.fit(Lit(), digits())
    assert run.global_step == 0


@pytest.mark.parametrize("averaging", SWAPPING)
@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_in_a_checkpoint_is_that_of_its_average(tmp_path: Path, kind: str, averaging: str) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="acc", mode="max", save_top_k=-1)
    pruning = KINDS[kind](schedule=EVENTS)
    run = fit(tmp_path, seeded(Lit), pruning, AVERAGING[averaging](), checkpoint, enable_checkpointing=True)
    assert len(checkpoint.best_k_models) == 4
    for path, metric in checkpoint.best_k_models.items():
        plain = trainer(tmp_path)
        (found,) = plain.validate(seeded(Lit), digits(examples=100), ckpt_path=path, verbose=False)
        assert found["acc"] == pytest.approx(float(metric), abs=1e-7)
    assert run.state.finished


@pytest.mark.parametrize("averaging", SAVED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_average_is_that_of_the_run_that_was_not_stopped(
    tmp_path: Path, kind: str, averaging: str
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, parts = seeded(Lit), (KINDS[kind](schedule=EVENTS), AVERAGING[averaging]())
    fit(tmp_path, whole, *parts, keep, enable_checkpointing=True)
    resumed, again = seeded(Lit), (KINDS[kind](schedule=EVENTS), AVERAGING[averaging]())
    fit(tmp_path, resumed, *again, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert same(dict(again[0].masks), dict(parts[0].masks))


@pytest.mark.parametrize("averaging", AVERAGING)
def test_averages_shrink_with_the_network(tmp_path: Path, averaging: str) -> None:
    def parts(compact: bool) -> list[Any]:
        return [
            PruningCallback(0.5, structure=Channels(), schedule=EVENTS, compact=compact),
            AVERAGING[averaging](),
        ]

    fit(tmp_path, wide := seeded(Lit), *parts(compact=False))
    run = fit(tmp_path, model := seeded(Lit), *parts(compact=True))
    images = next(iter(digits()))[0]
    torch.testing.assert_close(model.eval()(images), wide.eval()(images))
    run.save_checkpoint(tmp_path / "small.ckpt")
    small = load_compact(read(tmp_path / "small.ckpt"), Lit()).eval()
    assert torch.equal(small(images), model(images))
    assert small.net[4].weight.numel() < 4608 / 2


@pytest.mark.parametrize("averaging", SAVED)
def test_a_compacted_network_trains_on_with_its_average(tmp_path: Path, averaging: str) -> None:
    def parts() -> list[Any]:
        return [
            AVERAGING[averaging](),
            PruningCallback(0.5, structure=Channels(), schedule=EVENTS, compact=True),
        ]

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path, model := seeded(Lit), *parts(), keep, enable_checkpointing=True)
    run.save_checkpoint(tmp_path / "small.ckpt")
    shape = model.net[4].weight.shape
    average, pruning = parts()
    fit(tmp_path, resumed := Lit(), average, pruning, ckpt_path=tmp_path / "small.ckpt", max_epochs=6)
    assert resumed.net[4].weight.shape == shape
    # and back, from a checkpoint of the dense network
    fit(tmp_path, resumed, parts()[0], pruning, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.net[4].weight.shape == shape
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))


# --- averages of a part, and within the module


class Kept(Lit):
    """Keeps an average of its own network."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = AveragedModel(self.net, avg_fn=get_ema_avg_fn(0.9))

    def on_train_batch_end(self, *_: Any) -> None:
        self.mean.update_parameters(self.net)


class Beside(Callback):
    """Keeps an average of a module's network."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mean = AveragedModel(pl_module.net, avg_fn=get_ema_avg_fn(0.9))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.mean.update_parameters(pl_module.net)


def averaged(tmp_path: Path, place: str, pruning: PruningCallback, **options: Any) -> tuple[Lit, Any, Trainer]:
    """A fit with an average of the network, within the module or beside it."""
    beside = [Beside()] if place == "beside" else []
    model = seeded(Kept if place == "within" else Lit)
    run = fit(tmp_path, model, *beside, pruning, **options)
    return model, (beside[0] if beside else model).mean.module, run


@pytest.mark.parametrize("place", ["within", "beside"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_a_part_is_masked_and_is_nothing_to_prune(tmp_path: Path, kind: str, place: str) -> None:
    fit(tmp_path, seeded(Lit), alone := KINDS[kind](schedule=EVENTS))
    model, mean, _ = averaged(tmp_path, place, pruning := KINDS[kind](schedule=EVENTS))
    assert masked(pruning) > 0
    assert same(dict(pruning.masks), dict(alone.masks))
    weights = {f"net.{name}": value for name, value in mean.named_parameters()}
    assert all(not weights[name][~mask].any() for name, mask in pruning.masks.items())
    assert all(weights[name][mask].all() for name, mask in pruning.masks.items() if name.endswith("weight"))
    frozen = pruning.report.frozen
    assert all(name in frozen for name in dict(model.named_parameters()) if name == "mean.module.4.weight")


@pytest.mark.parametrize("place", ["within", "beside"])
def test_an_average_of_a_part_shrinks_with_the_network(tmp_path: Path, place: str) -> None:
    images = next(iter(digits()))[0]

    def pruning(compact: bool) -> PruningCallback:
        return PruningCallback(0.5, structure=Channels(), schedule=EVENTS, compact=compact)

    _, wide, _ = averaged(tmp_path, place, pruning(compact=False))
    model, mean, run = averaged(tmp_path, place, pruning(compact=True))
    assert [each.shape for each in mean.parameters()] == [each.shape for each in model.net.parameters()]
    assert mean[4].weight.numel() < 4608 / 2
    torch.testing.assert_close(mean.eval()(images), wide.eval()(images))
    run.save_checkpoint(tmp_path / "small.ckpt")
    small = load_compact(read(tmp_path / "small.ckpt"), type(model)())
    assert same(dict(small.state_dict()), dict(model.state_dict()))
    again = fit(
        tmp_path,
        resumed := type(model)(),
        pruning(compact=True),
        ckpt_path=tmp_path / "small.ckpt",
        max_epochs=5,
    )
    assert again.current_epoch == 5
    assert [each.shape for each in resumed.parameters()] == [each.shape for each in model.parameters()]


def test_an_average_that_is_looked_at_in_training_is_nothing_to_prune(tmp_path: Path) -> None:
    class Teaching(Kept):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            teacher = self.mean(batch[0]).detach()
            return super().training_step(batch, batch_idx) + (self(batch[0]) - teacher).square().mean()

    pruning = PruningCallback(0.5, structure=Channels(), schedule=EVENTS, compact=True)
    fit(tmp_path, model := seeded(Teaching), pruning)
    assert all(name.startswith("net.") for name in pruning.masks)
    shapes = [each.shape for each in model.mean.parameters()]
    assert shapes == [each.shape for each in model.net.parameters()]
    assert shapes[0][0] < 8


def test_an_average_of_one_of_two_alike_is_left_alone_and_that_is_said(tmp_path: Path) -> None:
    class Two(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.other = deepcopy(self.net)

        def forward(self, images: Any) -> Any:
            return self.net(images) + self.other(images)

    pruning = PruningCallback(0.5, schedule=EVENTS)
    with pytest.warns(
        UserWarning, match=r"average that mean\.module keeps is not masked: .* several alike"
    ) as all_:
        fit(tmp_path, model := seeded(Two), pruning)
    assert sum("is not masked" in str(each.message) for each in all_) == 1  # and not once an event
    assert sorted(name.split(".")[0] for name in pruning.masks) == 3 * ["net"] + 3 * ["other"]
    assert all(parameter.all() for parameter in model.mean.module.parameters())
    # a copy that does not train, such as a teacher's, is no doubt
    model = seeded(Two)
    model.other.requires_grad_(requires_grad=False)
    fit(tmp_path, model, PruningCallback(0.5, schedule=EVENTS, structure=Unstructured(exclude="other")))
    assert not model.mean.module[4].weight.all()


def test_an_average_within_the_module_goes_back_with_it(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("3ep"), rewind=Rewind("1ep"))
    found: dict[str, Any] = {}

    class Compares(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found[trainer.current_epoch] = {
                name: value.clone() for name, value in pl_module.mean.named_parameters()
            }

    fit(tmp_path, seeded(Kept), pruning, Compares())
    masks = {name.replace("net.", "module."): mask for name, mask in pruning.masks.items()}
    assert masks
    for name, value in found[3].items():
        assert torch.equal(value, found[1][name] * masks.get(name, torch.tensor(1))), name


def test_weights_are_not_drawn_anew_beside_an_average_within_the_module(tmp_path: Path) -> None:
    run = trainer(tmp_path, PruningCallback(0.5, schedule=EVENTS, rewind=Rewind("random")))
    with pytest.raises(ValueError, match=r"to='random' draws weights anew, of which mean\.module would still"):
        run.fit(Kept(), digits(), digits())
    assert run.global_step == 0


@pytest.mark.parametrize("averaging", SAVED)
@pytest.mark.parametrize(
    "part", [{"rewind": Rewind()}, {"guard": Guard("acc", mode="max", max_drop=0.1)}], ids=["rewind", "guard"]
)
def test_weights_that_come_back_are_not_averaged(tmp_path: Path, averaging: str, part: dict[str, Any]) -> None:
    run = trainer(tmp_path, PruningCallback(0.5, schedule=EVENTS, **part), AVERAGING[averaging]())
    with pytest.raises(ValueError, match="rewind and guard bring back weights, which an averaging callback"):
        run.fit(Lit(), digits(), digits())
    assert run.global_step == 0


def test_a_teacher_is_no_average(tmp_path: Path) -> None:
    class Teacher(Callback):
        def __init__(self, module: LightningModule) -> None:
            self.module = module

    teacher = seeded(Lit)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    fit(tmp_path, Lit(), Teacher(teacher), PruningCallback(0.5, schedule=OneShot("1ep")), max_epochs=2)
    assert same(dict(teacher.state_dict()), before)
