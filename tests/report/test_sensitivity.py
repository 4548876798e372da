"""Sensitivity: each layer pruned alone, by hand, against torch.nn.utils.prune, and on the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import NAME, LightningDataModule
from lit import Lit, digits, fit, seeded
from quick import with_one_command
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_prune import FPGM, Channels, Magnitude, PruningCallback, Taylor, sensitivity
from lightning_prune.cli import cli_of

BATCH = next(iter(digits()))
RATIOS = (0.25, 0.5, 0.9)


def loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(BATCH[0]), BATCH[1]))


def test_each_layer_alone_is_pruned_as_torch_prunes_it() -> None:
    model = seeded(Lit).net
    found = sensitivity(model, loss, ratios=RATIOS, metric="loss", progress=False)
    assert found.dense == loss(model)
    assert list(found.values) == ["0.weight", "4.weight", "6.weight"]
    for name, line in found.values.items():
        for ratio, value in zip(RATIOS, line, strict=True):
            twin = copy.deepcopy(model)
            prune.l1_unstructured(twin.get_submodule(name.partition(".")[0]), "weight", ratio)
            assert value == loss(twin)


def test_channels_go_with_all_that_is_coupled() -> None:
    model = seeded(Lit).net
    seen: list[int] = []

    def look(model: nn.Module) -> float:
        seen.append(int(model[1].bias.count_nonzero()))
        return float(model[4].weight.count_nonzero())

    model[1].bias.data.fill_(1.0)
    parts = {"criterion": FPGM(), "structure": Channels(), "example": BATCH[0]}
    found = sensitivity(model, look, ratios=[0.5, 0.99], **parts, progress=False)
    assert found.dense == 16 * 288
    assert found.values == {"0": (16 * 144, 16 * 36), "4": (8 * 288, 288)}  # of 16 neurons, one stays
    assert seen == [8, 4, 1, 8, 8]
    assert "is the network's output" in found.frozen["6.weight"]


def test_shares_are_those_that_are_asked_for_whatever_widths_are_rounded_to() -> None:
    model, structure = seeded(Lit).net, Channels(round_to=4, minimum=0.5)

    def left(model: nn.Module) -> Any:
        return model[1].weight.count_nonzero()

    found = sensitivity(model, left, ratios=[0.25, 0.75], structure=structure, example=BATCH[0], progress=False)
    assert found.values["0"] == (6.0, 2.0)
    assert json.loads(found.to_json())["dense"] == 8.0


def test_the_model_is_as_it_was_even_after_an_error() -> None:
    model = seeded(Lit).net
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []

    def fails(model: nn.Module) -> float:
        calls.append(0)
        if len(calls) == 3:
            raise KeyError
        return 1.0

    with pytest.raises(KeyError):
        sensitivity(model, fails, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sensitivity(model, loss, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.0,), (0.5, -0.1), (True,), ("0.5",)])
def test_ratios_are_shares(ratios: Any) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        sensitivity(nn.Linear(2, 2), loss, ratios=ratios)
    assert str(error.value).startswith(f"ratios={ratios!r} ")


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^criterion=Taylor\(\) needs gradients, activations or a loss"):
        sensitivity(nn.Linear(2, 2), loss, criterion=Taylor())
    with pytest.raises(ValueError, match=r"^criterion=<class .*Magnitude'> is no Criterion"):
        sensitivity(nn.Linear(2, 2), loss, criterion=Magnitude)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^FPGM\(\) can prune no layer\. weight: FPGM\(\) needs units"):
        sensitivity(nn.Linear(2, 2), loss, criterion=FPGM())


class Net(Lit):
    """Without an argument."""

    def __init__(self) -> None:
        super().__init__()


class Data(LightningDataModule):
    """The digits."""

    def train_dataloader(self) -> DataLoader[Any]:
        return digits()

    def val_dataloader(self) -> DataLoader[Any]:
        return digits(examples=100)


@pytest.mark.renders
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
@pytest.mark.parametrize("structure", ["Unstructured", "Channels"])
def test_the_command_line_validates_a_checkpoint(
    structure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = seeded(Net)
    run = fit(tmp_path, model, PruningCallback(0.2), max_epochs=4)
    run.save_checkpoint(tmp_path / "last.ckpt")
    (dense,) = run.validate(model, digits(examples=100), verbose=False)
    with_one_command(cli_of(NAME), "sensitivity")(
        Net,
        Data,
        args=[
            *("sensitivity", "--pruning.target", "0.5", "--pruning.structure", structure, "--metric", "acc"),
            *("--ckpt_path", str(tmp_path / "last.ckpt"), "--ratios", "[0.3, 0.9]"),
            *("--path", str(tmp_path / "sweep"), "--trainer.default_root_dir", str(tmp_path)),
        ],
    )
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["dense"] == pytest.approx(dense["acc"])
    assert saved["ratios"] == [0.3, 0.9]
    assert len(saved["values"]) == (3 if structure == "Unstructured" else 2)
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert "90 % removed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    arguments = ["sensitivity", "--seed_everything", "0", "--pruning.target", "0.5", "--metric", "accuracy"]
    arguments += ["--trainer.default_root_dir", str(tmp_path)]
    sweep = with_one_command(cli_of(NAME), "sensitivity")
    with pytest.raises(ValueError, match="metric='accuracy' must be one that validation logs: acc"):
        sweep(Net, Data, args=[*arguments, "--path", str(tmp_path / "sweep")])
