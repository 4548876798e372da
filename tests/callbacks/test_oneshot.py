"""Pruning without training, as a function and as a command: what it removes, restores, validates and saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Trainer
from lit import Lit, Manual, digits, seeded, trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_prune import (
    ActivationTaylor,
    APoZ,
    Channels,
    Global,
    Guard,
    NofM,
    OneShot,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    PerLayer,
    PruningCallback,
    Reconstruct,
    Rewind,
    Taylor,
    Wanda,
    load_compact,
    oneshot,
)
from lightning_prune.callbacks import oneshot as place
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.training.batch_norms import renew_statistics_


class Data(Lit):
    """With loaders of its own."""

    def train_dataloader(self) -> DataLoader[Any]:
        return digits()

    def val_dataloader(self) -> DataLoader[Any]:
        return digits(examples=200)


class ManualData(Manual):
    def train_dataloader(self) -> DataLoader[Any]:
        return digits()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("dense")
    model = seeded(Data)
    trainer(folder, max_epochs=6).fit(model)
    return copy.deepcopy(model.state_dict())


def of(state: dict[str, Tensor], make: Any = Data) -> Any:
    model = seeded(make)
    model.load_state_dict(state)
    return model


PARTS: dict[str, dict[str, Any]] = {
    "weights": {"target": 0.8},
    "2:4": {"criterion": OptimalBrainSurgeon(), "selector": NofM(2, 4)},
    "gradients": {"target": 0.5, "criterion": Taylor(), "structure": Channels(), "compact": True},
    "inputs": {"target": 0.5, "criterion": Wanda(), "selector": PerLayer()},
    "zeros": {"target": 0.4, "criterion": APoZ(), "structure": Channels()},
    "inputs and gradients": {"target": 0.4, "criterion": ActivationTaylor(), "structure": Channels()},
    "losses": {"target": 0.4, "criterion": OptimalBrainDamage(batches=1), "structure": Channels()},
    "budget": {"target": 0.4, "structure": Channels(), "selector": Global(budget="macs")},
}


@pytest.mark.parametrize("name", PARTS)
def test_it_prunes_to_the_target_and_comes_near_the_dense_network(
    name: str, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    model, callback = of(trained), PruningCallback(**PARTS[name])
    found = oneshot(trainer(tmp_path, callback), model, batches=5)
    assert found.report.sparsity > 0.2 or found.report.dense is not None
    assert found.report.macs is not None
    assert found.dense["acc"] > 0.9
    assert found.pruned["acc"] > found.dense["acc"] - 0.25
    if not callback.compact:
        masks = callback.state_dict()["pruner"]["masks"]
        assert masks
        removed = sum(int((model.get_parameter(name) == 0).sum()) for name in masks)
        assert removed >= found.report.removed > 0


def test_without_reconstruction_the_network_is_worse(trained: dict[str, Tensor], tmp_path: Path) -> None:
    model, callback = of(trained), PruningCallback(0.9, reconstruct=Reconstruct(batches=5))
    found = oneshot(trainer(tmp_path, callback), model)
    masked = of(trained)
    with torch.no_grad():
        for name in callback.state_dict()["pruner"]["masks"]:
            masked.get_parameter(name).mul_(model.get_parameter(name) != 0)
    (alone,) = trainer(tmp_path).validate(masked, verbose=False)
    assert found.pruned["acc"] > alone["acc"] + 0.1


def test_the_checkpoint_loads_and_a_fit_goes_on_from_it(trained: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "pruned.ckpt"
    model = of(trained)
    callback = PruningCallback(0.4, structure=Channels(), compact=True)
    oneshot(trainer(tmp_path, callback), model, batches=5, path=path)
    again = load_compact(path, seeded(Data))
    images = torch.cat([batch[0] for batch in digits(examples=100)])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), model.eval()(images))
    assert again.net[4].weight.shape[0] < 16

    masked, kept = of(trained), PruningCallback(0.8, schedule=OneShot("1ep"))
    run = trainer(tmp_path, kept, max_epochs=2)
    found = oneshot(run, masked, batches=5)
    assert kept.sparsity == kept.report.sparsity == found.report.sparsity == pytest.approx(0.8, abs=1e-3)
    assert kept.masks.keys() == {layer.name for layer in found.report.layers}
    before = {name: each == 0 for name, each in masked.named_parameters() if each.ndim > 1}
    run.fit(masked)
    assert kept.sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(not masked.get_parameter(name)[gone].any() for name, gone in before.items())


def test_a_step_by_hand_and_no_validation_are_no_problem(trained: dict[str, Tensor], tmp_path: Path) -> None:
    model, callback = of(trained, ManualData), PruningCallback(0.8, criterion=Taylor())
    path = tmp_path / "pruned.ckpt"
    found = oneshot(trainer(tmp_path, callback), model, batches=5, path=path)
    assert (found.dense, found.pruned) == ({}, {})
    again = load_compact(path, seeded(ManualData))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert found.report.sparsity == pytest.approx(0.8, abs=1e-3)


def loss_on_batches(model: Data) -> float:
    with torch.no_grad():
        return sum(float(model.eval().loss(batch)) for batch in digits())


def test_statistics_are_taken_anew_only_where_that_helps(
    trained: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = copy.deepcopy(trained)
    shifted["net.1.running_mean"] += 3.0
    model = of(shifted)
    assert oneshot(trainer(tmp_path, PruningCallback(0.1)), model, batches=5).renewed
    with torch.no_grad():
        outputs = torch.cat([model.net[0](batch[0]) for batch in digits()])
    torch.testing.assert_close(model.net[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)

    def spoil(network: Any, passes: Any) -> None:
        network.net[1].running_mean += 3.0

    as_it_is = of(trained)
    monkeypatch.setattr(place, "renew_statistics_", spoil)
    assert not oneshot(trainer(tmp_path, PruningCallback(0.1)), as_it_is, batches=5).renewed
    monkeypatch.undo()
    better = of(trained)
    oneshot(trainer(tmp_path, PruningCallback(0.1)), better, batches=5)
    assert loss_on_batches(better) <= loss_on_batches(as_it_is)


def test_new_statistics_are_means_over_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.5)).eval()
    rows = torch.randn(40, 4)
    renew_statistics_(model, Calibration.of(rows.split(20)).passes)
    torch.testing.assert_close(model[1].running_mean, model[0](rows).mean(0))
    assert model[1].momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_an_error_leaves_the_module_alone(
    trained: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(trained)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "renew_statistics_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        oneshot(trainer(tmp_path, PruningCallback(0.5)), model, batches=5)
    assert all(map(torch.equal, trained.values(), model.state_dict().values()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ((), {}, "oneshot needs a Trainer with one PruningCallback, and this one has 0"),
        ((0.5,), {"batches": 0}, "batches=0 must be a whole number of at least 1"),
        ((2.0,), {}, "target=2.0 must be"),
    ],
)
def test_bad_arguments_are_named(
    callbacks: tuple[float, ...], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        oneshot(trainer(tmp_path, *map(PruningCallback, callbacks)), Data(), **options)


class Averaging(Data):
    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.net)


class StepCounting(Data):
    """Counts its steps in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)


def test_what_steps_write_to_is_as_before(tmp_path: Path) -> None:
    model = StepCounting()
    oneshot(trainer(tmp_path, PruningCallback(0.5, criterion=Taylor())), model, batches=5)
    assert int(model.steps) == 0


def test_rewind_and_guard_are_left_aside(trained: dict[str, Tensor], tmp_path: Path) -> None:
    callback = PruningCallback(0.5, rewind=Rewind(), guard=Guard("acc"))
    assert oneshot(trainer(tmp_path, callback), of(trained), batches=5).report.sparsity == 0.5


def test_what_cannot_be_followed_is_refused(trained: dict[str, Tensor], tmp_path: Path) -> None:
    path, callback = tmp_path / "small.ckpt", PruningCallback(0.4, structure=Channels(), compact=True)
    model = of(trained)
    oneshot(trainer(tmp_path, callback), model, batches=5, path=path)
    with pytest.raises(ValueError, match="has compacted this network already"):
        oneshot(trainer(tmp_path, callback), model)
    with pytest.raises(ValueError, match=r"ckpt_path=.*is of a compacted network"):
        oneshot(trainer(tmp_path, PruningCallback(0.4)), of(trained), ckpt_path=path)
    with pytest.raises(ValueError, match=r"average\.module averages weights, which would stay"):
        oneshot(trainer(tmp_path, PruningCallback(0.4)), Averaging())
    with pytest.raises(ValueError, match="model=Linear must be a LightningModule"):
        oneshot(trainer(tmp_path, PruningCallback(0.4)), nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_batch_of_one_example_takes_no_statistics(trained: dict[str, Tensor], tmp_path: Path) -> None:
    class Uneven(Data):
        def train_dataloader(self) -> DataLoader[Any]:
            return digits(80, 321)

    oneshot(trainer(tmp_path, PruningCallback(0.5)), of(trained, Uneven), batches=5)
    model = of(trained, Uneven)
    (last,) = [batch for batch in model.train_dataloader() if len(batch[1]) == 1]
    with pytest.raises(ValueError, match="more than 1 value"):
        renew_statistics_(
            nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)).eval(), Calibration.of([last[0]]).passes
        )


def test_several_processes_are_refused() -> None:
    run = Trainer(accelerator="cpu", devices=2, callbacks=[PruningCallback(0.5)], logger=False)
    with pytest.raises(ValueError, match="oneshot works in one process, and the Trainer has 2"):
        oneshot(run, Data())
