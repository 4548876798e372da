"""The recipes: every YAML runs on the embedded digits, and data are split once and for all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from classifier import Classifier
from data import CIFAR10, Digits, ImageFolder, Images, shift_and_mirror
from networks import NETWORKS
from quick import with_one_command
from torchvision.transforms.functional import to_pil_image

from lightning_prune.cli import PruningCLI

RECIPES = Path(__file__).parents[1] / "recipes"
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
SHARED = Path(__file__).parents[2] / "shared"
# of what takes long, less
LESS = {"particle_filter.yaml": ("--pruning.selector.population", "4", "--pruning.selector.rounds", "2")}


def cli(*arguments: str) -> PruningCLI:
    made = with_one_command(PruningCLI, arguments[0])
    return made(Classifier, Images, subclass_mode_data=True, args=list(arguments))


# few epochs: some ramps are a single event there
@pytest.mark.filterwarnings("ignore:Cubic.* prunes all at once:UserWarning")
@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.filterwarnings("ignore:Reconstruct. .* rows of calibration data:UserWarning")
@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_recipe_runs_on_digits(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cli(
        *("fit", "--config", str(RECIPES / recipe), "--data", "Digits", "--data.batch_size", "32"),
        *("--data.train_size", "64", "--data.val_size", "64", "--trainer.limit_test_batches", "1"),
        *("--model.network", "cifar_cnn", "--trainer.default_root_dir", str(tmp_path)),
        *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        *LESS.get(recipe, ()),
    )
    saved = json.loads((Path(run.trainer.log_dir) / "report.json").read_text())
    assert saved["removed"] > 0
    target, compacted = run.config.fit.pruning.target, saved["dense"] is not None
    assert compacted == run.config.fit.pruning.compact
    if compacted:
        assert saved["macs"] < saved["dense"]["macs"]
        assert saved["params"] == sum(each.numel() for each in run.model.parameters())
    elif saved["decisions"]:  # a guard may leave less
        assert f"{100 * saved['sparsity']:.3g} % removed" in saved["decisions"][-1]
    elif target is not None:
        assert saved["removed"] == round(target * saved["size"])
    assert run.trainer.test(run.model, run.datamodule, verbose=False)[0]["test_acc"] >= 0
    best, settings = run.trainer.checkpoint_callback.best_model_path, next(tmp_path.rglob("config.yaml"))
    capsys.readouterr()
    cli("report", "--config", str(settings), "--ckpt_path", best)
    assert f"{saved['removed']:,} of {saved['size']:,} weights removed" in capsys.readouterr().out


def test_flags_change_everything(tmp_path: Path) -> None:
    run = cli(
        *("fit", "--config", str(RECIPES / "digits.yaml"), "--data.train_size", "128"),
        *("--trainer.max_epochs", "3", "--pruning.target", "0.95", "--pruning.criterion", "Taylor"),
        *("--pruning.selector", "PerLayer", "--pruning.schedule", "OneShot", "--pruning.schedule.at", "1ep"),
        *("--pruning.structure.include", "net.classifier", "--trainer.default_root_dir", str(tmp_path)),
        *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
    )
    saved = json.loads((tmp_path / "report.json").read_text())
    assert {layer["name"]: layer["size"] - layer["kept"] for layer in saved["layers"]} == {
        "net.classifier.1.weight": round(0.95 * 262144),
        "net.classifier.3.weight": round(0.95 * 2560),
    }
    assert repr(run.trainer.callbacks[0].criterion) == "Taylor()"


@pytest.mark.parametrize("recipe", ["li2017.yaml", "taylor_channels.yaml"])
def test_a_plan_of_channels_takes_a_batch_of_data(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli("plan", "--config", str(RECIPES / recipe), "--data", "Digits", "--model.network", "cifar_cnn")
    assert "stays dense: is the network's output" in capsys.readouterr().out


def test_plan_and_report_print_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = str(RECIPES / "digits.yaml")
    cli("plan", "--config", digits)
    assert "288,778 of 320,864 weights removed" in capsys.readouterr().out
    cli(
        *("fit", "--config", digits, "--data.train_size", "128", "--trainer.max_epochs", "2"),
        *("--pruning.schedule", "OneShot", "--pruning.schedule.at", "0%"),
        *("--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"),
    )
    capsys.readouterr()
    (checkpoint,), (saved,) = tmp_path.rglob("*.ckpt"), tmp_path.rglob("config.yaml")
    for config in (digits, str(saved)):
        cli("report", "--config", config, "--ckpt_path", str(checkpoint))
        assert "288,778 of 320,864 weights removed" in capsys.readouterr().out
    packed = tmp_path / "small.pt"
    cli("export", "--config", str(saved), "--ckpt_path", str(checkpoint), "--path", str(packed))
    assert packed.is_file()
    cli("plan", "--config", str(saved), "--ckpt_path", str(checkpoint))
    assert "288,778 of 320,864 weights removed" in capsys.readouterr().out


def test_the_console_script_finds_modules_where_it_is_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom lightning.pytorch import LightningModule\n"
        "class Mine(LightningModule):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = torch.nn.Linear(4, 5)\n"
    )
    script = Path(sys.executable).with_name("lightning-prune")
    command = [script, "plan", "--model", "mine.Mine", "--pruning.target", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "10 of 20 weights removed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruning.target", "1.5"], "target=1.5 must be a number above 0 and below 1"),
        (["--pruning.criterion", "Magnitud"], "has no class 'Magnitud'. Did you mean Magnitude"),
        (
            ["--pruning.targt", "0.5"],
            "unrecognized arguments: --pruning.targt 0.5. Did you mean pruning.target?",
        ),
        (["--nonsense", "0.5"], "unrecognized arguments: --nonsense 0.5\n"),
        (
            ["--config", "pruning: {targt: 0.5}"],
            "does not accept option 'pruning.targt'. Did you mean pruning.target?",
        ),
    ],
)
def test_typos_on_the_command_line_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        cli("plan", "--config", str(RECIPES / "digits.yaml"), *arguments)
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_small_images(name: str) -> None:
    assert NETWORKS[name](10).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_digits_are_split_once() -> None:
    data = Digits()
    data.setup("fit")
    data.setup("test")
    assert [len(each) for each in (data.train, data.val, data.test)] == [1197, 300, 300]
    everything = torch.cat([each.images for each in (data.train, data.val, data.test)])
    pixels = everything.flatten(1).double()
    assert torch.stack([pixels.mean(), pixels.std()]) / 255 == pytest.approx([0.305, 0.376], abs=0.06)


@pytest.mark.parametrize("extra", [-1, 0, 50])
def test_an_impossible_split_is_refused(extra: int) -> None:
    with pytest.raises(ValueError, match="val_size="):
        Digits(val_size=extra if extra <= 0 else 1497 + extra).setup("fit")


def test_folders_are_read_in_order_and_split_by_seed(tmp_path: Path) -> None:
    for half, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / half / label
            folder.mkdir(parents=True)
            for index in range(count):
                shade = 100 * (label == "dog") + 10 * index
                image = torch.full((3, 32, 32), shade, dtype=torch.uint8)
                to_pil_image(image).save(folder / f"{index}.png")
    data = ImageFolder(str(tmp_path), val_size=4)
    data.setup("fit")
    assert not hasattr(data, "test")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shades = torch.tensor([*range(0, 60, 10), *range(100, 160, 10)])
    assert data.train.images[:, 0, 0, 0].tolist() == shades[order[:8]].tolist()
    assert data.val.images[:, 0, 0, 0].tolist() == shades[order[8:]].tolist()
    assert data.train.labels.tolist() == [int(shade >= 100) for shade in data.train.images[:, 0, 0, 0]]


def test_a_missing_network_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(RuntimeError, match="--data Digits, or --data ImageFolder"):
        CIFAR10(str(tmp_path)).prepare_data()


def test_shifting_moves_whole_images() -> None:
    torch.manual_seed(0)
    image = torch.zeros(64, 2, 8, 8)
    image[:, 0, 3:5, 3:5] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    image[:, 1] = image[:, 0] * 10
    moved = shift_and_mirror(image, by=2)
    assert moved.shape == image.shape
    assert torch.equal(moved[:, 1], moved[:, 0] * 10)
    assert torch.equal(moved.sum((2, 3)), image.sum((2, 3)))
    mirrored = [bool(each.nonzero()[0][0] >= 0 and each[each > 0][0] == 2) for each in moved[:, 0]]
    assert 10 < sum(mirrored) < 54


def test_the_shared_checkpoint_starts_a_run() -> None:
    path = SHARED / "models" / "resnet20_cifar10_jpeg75.pt"
    if not path.exists():
        pytest.skip("the dense ResNet-20 is not at hand")
    model = Classifier("resnet20", init_from=str(path))
    assert torch.equal(model.net.conv1.weight, torch.load(path, weights_only=True)["conv1.weight"])
