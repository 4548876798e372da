"""``lightning-prune report`` and ``export`` on checkpoints of masked and compacted networks."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import NAME, LightningCLI, LightningDataModule, LightningModule
from lit import Lit, digits, fit, seeded
from quick import with_one_command
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Channels,
    PruningCallback,
    Report,
    Steps,
    Taylor,
    Unstructured,
    load_compact,
    load_packed,
)
from lightning_prune.cli import cli_of, main
from lightning_prune.export.compacted import masks_in

IMAGES = next(iter(digits()))[0]
PARTS: dict[str, dict[str, Any]] = {
    "unstructured": {"structure": Unstructured()},
    "channels": {"structure": Channels()},
    "compacted": {"structure": Channels(), "compact": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


class Net(Lit):
    """Without an argument."""

    def __init__(self) -> None:
        super().__init__()


class Own(Net):
    """Its own example."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 8, 8)


class Data(LightningDataModule):
    """The digits as bytes, which become numbers on the device."""

    def setup(self, stage: str) -> None:
        images, labels = next(iter(digits()))
        self.images = TensorDataset((images * 16).byte(), labels)

    def train_dataloader(self) -> Any:
        return DataLoader(self.images, 4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 16, batch[1]


class Nothing(LightningDataModule):
    """No data."""


class Apart(Net):
    """Does not call its ``forward`` in a step."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).sum()


def cli(*arguments: str, model: type[Lit] = Net, data: type[LightningDataModule] = Data) -> None:
    quiet = ("--trainer.logger", "false", "--trainer.accelerator", "cpu", "--pruning.target", "0.5")
    command = arguments[0]
    with_one_command(cli_of(NAME), command)(model, data, args=[command, *quiet, *arguments[1:]])


@pytest.fixture(scope="module", params=PARTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lit, Report]:
    """The checkpoint of a fit, its network and its report."""
    folder = tmp_path_factory.mktemp(request.param)
    model = seeded(Net)
    callback = PruningCallback(
        0.5, criterion=Taylor(), schedule=Steps({"1ep": 0.4, "2ep": 1.0}), **PARTS[request.param]
    )
    fit(folder, model, callback, max_epochs=3).save_checkpoint(folder / "net.ckpt")
    return folder / "net.ckpt", model, callback.report


def test_report_says_what_the_fit_did(
    run: tuple[Path, Lit, Report], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, report = run
    cli("report", "--ckpt_path", str(path), model=Own)
    shown = capsys.readouterr().out.splitlines()
    # but for what was measured again, on another example
    expected = [line for line in report.table().splitlines() if not line.startswith(("latency", "multiply"))]
    assert [line for line in expected if line not in shown] == []
    assert any(line.startswith("multiply-adds") for line in shown)
    assert f"{report.removed:,} of {report.size:,} weights removed" in "\n".join(shown)


def test_report_refuses_what_is_not_there(run: tuple[Path, Lit, Report]) -> None:
    path, _, _ = run
    with pytest.raises(ValueError, match=r"no state of PruningCallback\[other\]\. It holds PruningCallback: "):
        cli("report", "--ckpt_path", str(path), "--pruning.name", "other")


def test_a_fit_cuts_the_network_at_each_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 4 and 20 of 32; a checkpoint after step 16."""
    cli(
        *("fit", "--seed_everything", "0", "--trainer.max_epochs", "2"),
        *("--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"),
        *("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_top_k", "-1"),
        *("--pruning.compact", "each", "--pruning.structure", "Channels", "--pruning.schedule", "Steps"),
        *("--pruning.schedule.shares", '{"4st": 0.5, "20st": 1.0}'),
    )
    assert "times fewer" in capsys.readouterr().out
    between, end = sorted(tmp_path.rglob("*.ckpt"))
    small, smaller = (load_compact(path, Net()) for path in (between, end))
    assert small.net[0].out_channels + small.net[4].out_features == 24 - 6
    assert smaller.net[0].out_channels + smaller.net[4].out_features == 24 - 12
    cli("report", "--ckpt_path", str(between))
    shown = capsys.readouterr().out
    assert f"parameters: dense 4,890, compacted {sum(each.numel() for each in small.parameters()):,}" in shown
    cli("export", "--ckpt_path", str(between), "--path", str(tmp_path / "net.packed"))
    again = load_packed(tmp_path / "net.packed", Net())
    assert all(
        torch.equal(one, other) for one, other in zip(again.parameters(), small.parameters(), strict=True)
    )


@pytest.mark.parametrize("way", ["command line", "configuration file"])
def test_targets_by_pattern(tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--pruning.target", '{"net.0*": 0.25, "*": 0.5}')
    if way == "configuration file":
        path = tmp_path / "fit.yaml"
        path.write_text('pruning:\n  target:\n    "net.0*": 0.25\n    "*": 0.5\n  selector: PerLayer\n')
        given = ("--config", str(path))
    cli("plan", "--seed_everything", "0", "--pruning.selector", "PerLayer", *given)
    shown = capsys.readouterr().out
    for layer, kept in (("0", "54"), ("4", "2,304"), ("6", "80")):
        assert re.search(rf"net\.{layer}\.weight .* {kept} ", shown)


@pytest.mark.parametrize("way", ["command line", "configuration file"])
def test_kinds_of_modules_by_their_path(tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--pruning.structure", "Unstructured", "--pruning.structure.include", "torch.nn.Linear")
    covered = {"net.4.weight", "net.6.weight"}
    if way == "configuration file":
        path = tmp_path / "fit.yaml"
        arguments = "{include: [torch.nn.Linear, net.0*], exclude: net.6}"
        path.write_text(f"pruning: {{structure: {{class_path: Unstructured, init_args: {arguments}}}}}")
        given, covered = ("--config", str(path)), {"net.0.weight", "net.4.weight"}
    cli("plan", "--seed_everything", "0", *given)
    assert set(re.findall(r"│ (net\S+) ", capsys.readouterr().out)) == covered


def test_masks_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = torch.ones(16, 288)
    mask[:, ::2] = 0
    torch.save({"net.4.weight": mask}, tmp_path / "masks.pt")
    quiet = ("--trainer.logger", "false", "--trainer.accelerator", "cpu", "--seed_everything", "0")
    with_one_command(cli_of(NAME), "plan")(
        Net, Data, args=["plan", *quiet, "--pruning.masks", str(tmp_path / "masks.pt")]
    )
    assert "2,304 of 4,840 weights removed" in capsys.readouterr().out


def test_export_packs_what_is_left(
    tmp_path: Path, run: tuple[Path, Lit, Report], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model, report = run
    path = tmp_path / "new" / "net.packed"
    cli("export", "--ckpt_path", str(checkpoint), "--path", str(path))
    size = path.stat().st_size
    assert f"{path}: packed, {size:,} bytes; parameters and buffers of the network: {report.bytes:,}" in (
        capsys.readouterr().out
    )
    assert 0 < size - report.bytes_packed < 8000
    other = load_packed(path, Net())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert other.net[4].out_features == model.net[4].out_features


@needs_onnx
@pytest.mark.parametrize("own", [False, True], ids=["on a batch of data", "on its own example"])
def test_export_writes_what_onnxruntime_runs(
    tmp_path: Path, run: tuple[Path, Lit, Report], own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    checkpoint, model, _ = run
    path = tmp_path / "net.onnx"
    chosen: dict[str, Any] = {"model": Own, "data": Nothing} if own else {}
    cli("export", "--ckpt_path", str(checkpoint), "--path", str(path), **chosen)
    assert f"{path}: ONNX, {path.stat().st_size:,} bytes" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(IMAGES[:7])
    (found,) = session.run(None, {"images": IMAGES[:7].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("run", ["channels"], indirect=True)
def test_export_compacts_what_was_saved_before_the_end_of_the_fit(
    tmp_path: Path, run: tuple[Path, Lit, Report]
) -> None:
    import onnxruntime

    checkpoint, model, report = run
    path, masked = tmp_path / "net.onnx", tmp_path / "masked.onnx"
    for place, setting in ((path, "true"), (masked, "false")):
        arguments = ("--path", str(place), "--pruning.compact", setting)
        cli("export", "--ckpt_path", str(checkpoint), *arguments, model=Own)
    assert masked.stat().st_size - path.stat().st_size > 3 * report.removed
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(IMAGES)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"data": Nothing}, "Nothing and Net: there is no batch of data"),
        (
            {"model": Apart},
            r"Apart\.training_step does not show what forward is called with \(it does not call",
        ),
    ],
)
def test_export_says_what_an_example_is_wanted_for(
    tmp_path: Path, chosen: dict[str, Any], message: str
) -> None:
    fit(tmp_path, seeded(Net), max_epochs=1).save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match=message):
        cli("export", "--ckpt_path", str(tmp_path / "net.ckpt"), "--path", str(tmp_path / "net.onnx"), **chosen)
    assert not (tmp_path / "net.onnx").exists()


def test_export_packs_no_dense_network(tmp_path: Path) -> None:
    fit(tmp_path, seeded(Net), max_epochs=1).save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match="holds no masks: there is nothing to pack"):
        cli("export", "--ckpt_path", str(tmp_path / "net.ckpt"), "--path", str(tmp_path / "net.packed"))
    assert not (tmp_path / "net.packed").exists()


class Validated(Data):
    """With validation data, too."""

    val_dataloader = Data.train_dataloader


@pytest.mark.filterwarnings("ignore:Reconstruct. .* rows of calibration data:UserWarning")
def test_oneshot_prunes_validates_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, path = tmp_path / "dense.ckpt", tmp_path / "pruned.ckpt"
    model = seeded(Net)
    fit(tmp_path, model, max_epochs=3).save_checkpoint(dense)
    cli(
        *("oneshot", "--ckpt_path", str(dense), "--path", str(path), "--batches", "16"),
        *("--trainer.default_root_dir", str(tmp_path)),
        data=Validated,
    )
    shown = capsys.readouterr().out
    assert "sparsity 50.00%" in shown
    assert re.search(r"acc: dense [01].*, pruned [01]", shown)
    assert f"{path}: written" in shown
    again = load_compact(path, Net())
    for name, mask in masks_in(torch.load(path, weights_only=True)).items():
        assert not again.get_parameter(name)[~mask].any()
        assert not torch.equal(again.get_parameter(name)[mask], model.get_parameter(name)[mask])


# --- configurations of other command lines


class Wide(Net):
    """With arguments."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


class Sized(Data):
    """With an argument."""

    def __init__(self, size: int = 8, classes: int = 10) -> None:
        super().__init__()


class OwnCLI(LightningCLI):
    """A project's own: with an optimizer, an argument and links."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_optimizer_args(SGD)
        parser.add_lr_scheduler_args(ExponentialLR)
        parser.add_argument("--project", default="ours")
        kind = ".init_args" if self.subclass_mode_model else ""
        parser.link_arguments(f"data{kind}.classes", f"model{kind}.classes")


OWN = """
seed_everything: 0
trainer:
  max_epochs: 1
  limit_train_batches: 6
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    class_path: PruningCallback
    init_args:
      target: 0.5
      name: own
      schedule: {class_path: OneShot, init_args: {at: 2st}}
"""


@pytest.mark.parametrize("one_class", [True, False], ids=["one class", "any class"])
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden:UserWarning")
def test_the_configuration_of_a_command_line_of_another_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_class: bool
) -> None:
    def run(command: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["lightning-prune", command, "--config", str(saved), *arguments])
        main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(OWN)
    names = () if one_class else ("--model", f"{__name__}.Wide", "--data", f"{__name__}.Sized")
    bases = (Wide, Sized) if one_class else (LightningModule, LightningDataModule)
    width = "--model.width" if one_class else "--model.init_args.width"
    OwnCLI(
        *bases,
        subclass_mode_model=not one_class,
        subclass_mode_data=not one_class,
        args=[
            "fit",
            "--config",
            "own.yaml",
            *names,
            width,
            "12",
            "--optimizer.lr",
            "0.1",
            "--lr_scheduler.gamma",
            "1",
        ],
    )
    (saved,) = tmp_path.rglob("config.yaml")
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    model = ("--model", f"{__name__}.Wide")
    if one_class:
        with pytest.raises(ValueError, match=r"arguments of the model and no class that .* --model mine\.Net"):
            run("report", "--ckpt_path", str(checkpoint))
        capsys.readouterr()
    named = model if one_class else ()
    shown = run("report", "--ckpt_path", str(checkpoint), *named)
    assert "444 of 888 weights removed" in shown
    assert f"{saved}: report does not use project, optimizer, lr_scheduler" in shown
    if one_class:
        run("export", "--ckpt_path", str(checkpoint), "--path", "net.packed", *named)
        assert sum(int((each == 0).sum()) for each in load_packed("net.packed", Wide(12)).parameters()) == 444
    else:
        assert "444 of 888" in run("plan", *named)
