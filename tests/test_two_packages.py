"""Lightning comes in two packages: what works with one works with the other, and with one alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Channels, OneShot, PrunedCheckpoint, PrunedEarlyStopping, PruningCallback, Taylor
from lightning_prune.cli import _package_of_model, cli_of
from lightning_prune.training.lightning_packages import PACKAGES

both = pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
DATA = DataLoader(TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))), 8)
WEIGHTS = 8 * 16 + 16 * 4


def module_of(package: str, *, manual: bool = False) -> Any:
    """A LightningModule of a package."""
    parent: Any = import_module(package).LightningModule

    class Net(parent):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            self.automatic_optimization = not manual

        def forward(self, rows: Any) -> Any:
            return self.net(rows)

        def training_step(self, batch: Any, number: int) -> Any:
            loss = self(batch[0]).square().mean()
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("score", self(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Net()


def fit(package: str, folder: Path, model: Any, *callbacks: Any, **options: Any) -> Any:
    trainer = import_module(package).Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        default_root_dir=folder,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 4} | options,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DATA, DATA)
    return trainer


def zeros(model: nn.Module) -> int:
    return sum(int((each == 0).sum()) for each in model.parameters() if each.ndim > 1)


@both
@pytest.mark.parametrize("manual", [False, True])
def test_channels_go_in_a_fit(tmp_path: Path, package: str, manual: bool) -> None:
    parts = {"structure": Channels(), "criterion": Taylor(), "compact": True}
    pruning = PruningCallback(0.5, schedule=OneShot("2ep"), **parts)
    fit(package, tmp_path, model := module_of(package, manual=manual), pruning)
    assert model.net[0].out_features == 8


@both
@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_have_the_zeros(tmp_path: Path, package: str, average: str) -> None:
    arguments = {"EMAWeightAveraging": {"decay": 0.5}, "StochasticWeightAveraging": {"swa_lrs": 0.1}}[average]
    kind = getattr(import_module(f"{package}.callbacks"), average, None)
    if kind is None:
        pytest.skip(f"{package} has no {average}")
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    fit(package, tmp_path, model := module_of(package), pruning, kind(**arguments), max_epochs=6)
    assert zeros(model) == WEIGHTS // 2


@both
def test_monitors_are_known_as_what_they_are(tmp_path: Path, package: str) -> None:
    keep = PrunedCheckpoint(tmp_path, "best-{epoch}", monitor="score")
    stop = PrunedEarlyStopping("score", patience=9)
    pruning = PruningCallback(0.5, schedule=OneShot("2ep"))
    run = fit(package, tmp_path, module_of(package), keep, stop, pruning, enable_checkpointing=True)
    assert run.checkpoint_callbacks == [keep]
    assert run.early_stopping_callbacks == [stop]
    assert run.callbacks[-1] is keep
    saved = torch.load(keep.best_model_path, weights_only=True)
    assert sum(int((each == 0).sum()) for each in saved["state_dict"].values() if each.ndim > 1) == WEIGHTS // 2


def test_their_classes_have_the_arguments_of_the_first_package() -> None:
    assert PrunedEarlyStopping("loss").monitor == "loss"
    assert PrunedCheckpoint(monitor="loss", save_top_k=3).save_top_k == 3


SOURCE = """
import torch
from {package} import LightningModule
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 5)
"""


@both
@pytest.mark.parametrize("how", ["argument", "class path", "file"])
def test_the_command_line_takes_the_package_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, how: str
) -> None:
    name = f"mine_{package.partition('.')[0]}_{how.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(package=package))
    (tmp_path / "config.yaml").write_text(f"fit:\n  model:\n    class_path: {name}.Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {
        "argument": ["plan", f"--model={name}.Mine"],
        "class path": ["plan", "--model.class_path", f"{name}.Mine"],
        "file": ["--config", str(tmp_path / "config.yaml"), "fit"],
    }[how]
    assert _package_of_model(arguments) == package


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
@both
def test_the_command_line_plans(tmp_path: Path, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli_of(package)(
        type(module_of(package)),
        args=[
            *("plan", "--pruning.target", "0.5", "--trainer.logger", "false", "--trainer.accelerator", "cpu"),
            *("--seed_everything", "0"),
            *("--trainer.default_root_dir", str(tmp_path)),
        ],
    )
    assert f"{WEIGHTS // 2} of {WEIGHTS} weights removed" in capsys.readouterr().out


def test_a_model_that_is_not_found_is_left_to_the_command_line() -> None:
    assert _package_of_model(["fit", "--model", "no.such.Model", "--config", "no/such/file"]) == PACKAGES[0]


ALONE = """
import sys
sys.modules["{other}"] = None  # as if it were not installed
import lightning_prune
from lightning_prune.training.lightning_packages import PACKAGES
assert PACKAGES == ("{package}",), PACKAGES
assert not any(name.startswith("{other}.") for name in sys.modules)
lightning_prune.PrunedEarlyStopping("loss")
lightning_prune.PrunedCheckpoint(monitor="loss")
import {package} as one
one.Trainer(callbacks=[lightning_prune.PruningCallback(0.5)], accelerator="cpu", logger=False)
"""


@pytest.mark.parametrize(
    ("package", "other"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning")]
)
def test_one_package_alone_is_enough(tmp_path: Path, package: str, other: str) -> None:
    run_alone(tmp_path, ALONE.format(package=package, other=other))


def run_alone(folder: Path, script: str) -> None:
    """Run a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


BROKEN = """
import importlib, pathlib, sys, warnings
sys.path.insert(0, "")
def found(content):
    pathlib.Path("pytorch_lightning.py").write_text(content)
    importlib.invalidate_caches()
    sys.modules.pop("pytorch_lightning", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from lightning_prune.training import lightning_packages
        packages = lightning_packages._import_packages()
    assert any("pytorch_lightning cannot be used" in str(each.message) for each in caught), caught
    return {packages, lightning_packages.PACKAGES}
assert found("raise RuntimeError('broken')") == {("lightning.pytorch",)}
assert found("__version__ = '1.9.0'") == {("lightning.pytorch",)}
"""


def test_a_package_that_does_not_work_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    run_alone(tmp_path, BROKEN)


IMPORTED_FIRST = """
import {package}
import lightning_prune, lightning.pytorch, pytorch_lightning
from lightning_utilities.core import rank_zero
assert rank_zero.log.name.startswith("{package}"), rank_zero.log.name
from {package} import LightningModule
from {package}.cli import LightningCLI
class Mine(LightningModule):
    pass
def named(name, *arguments):
    quiet = "--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=true"
    args = [*quiet, "--trainer.callbacks+=" + name, *arguments]
    return {{type(each) for each in LightningCLI(Mine, run=False, args=args).trainer.callbacks}}
from {package} import callbacks
monitor = "--trainer.callbacks.monitor=loss"
assert callbacks.ModelCheckpoint in named("ModelCheckpoint")
assert callbacks.EarlyStopping in named("EarlyStopping", monitor)
assert lightning_prune.PrunedCheckpoint in named("PrunedCheckpoint")
assert lightning_prune.PrunedEarlyStopping in named("PrunedEarlyStopping", monitor)
assert lightning_prune.PruningCallback in named("PruningCallback", "--trainer.callbacks.target=0.5")
"""


@both
def test_messages_and_short_names_stay_those_of_the_package_that_was_imported_first(
    tmp_path: Path, package: str
) -> None:
    """Its logger stays, and its plain command line takes callbacks by their short names."""
    run_alone(tmp_path, IMPORTED_FIRST.format(package=package))


@both
def test_monitors_are_lightnings_own_and_keep_their_names(package: str) -> None:
    callbacks = import_module(f"{package}.callbacks")
    keep, stop = PrunedCheckpoint(monitor="loss"), PrunedEarlyStopping("loss")
    assert isinstance(keep, callbacks.ModelCheckpoint)
    assert isinstance(stop, callbacks.EarlyStopping)
    assert isinstance(PruningCallback(0.5), callbacks.Callback)
    for each, name in ((keep, "PrunedCheckpoint"), (stop, "PrunedEarlyStopping")):
        again = pickle.loads(pickle.dumps(each))
        assert type(again) is type(each)
        assert again.state_key == each.state_key
        assert each.state_key.startswith(f"{name}{{'monitor': 'loss'")
