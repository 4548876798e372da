"""Checkpoints that version 0.1.0 has written: they load, report the same, and fits go on from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningModule
from lit import digits, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    ActivationTaylor,
    Channels,
    Cubic,
    Global,
    Guard,
    OneShot,
    OptimalBrainDamage,
    PerLayer,
    PruningCallback,
    Rewind,
    Steps,
    Taylor,
    load_compact,
)
from lightning_prune.export.compacted import masks_in

FOLDER = Path(__file__).parents[1] / "data" / "0.1.0"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
SCHEDULE = Cubic("1ep", "3ep")
KINDS: dict[str, Callable[[], PruningCallback]] = {
    "weights": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=SCHEDULE),
    "channels": lambda: PruningCallback(
        0.4, criterion=Taylor(), structure=Channels(), selector=Global(budget="macs"), schedule=SCHEDULE
    ),
    "compacted": lambda: PruningCallback(0.4, structure=Channels(), schedule=OneShot("1ep"), compact=True),
    "activations": lambda: PruningCallback(
        0.5,
        criterion=ActivationTaylor(every=1),
        structure=Channels(),
        selector=PerLayer(),
        schedule=SCHEDULE,
    ),
    "losses": lambda: PruningCallback(
        0.5, criterion=OptimalBrainDamage(estimator="fisher", batches=1), schedule=SCHEDULE
    ),
    "rewind": lambda: PruningCallback(0.8, schedule=SCHEDULE, rewind=Rewind("2st")),
    "guard": lambda: PruningCallback(
        0.8, schedule=Steps({"1ep": 0.5, "2ep": 0.9, "3ep": 1.0}), guard=Guard("acc", max_drop=0.2)
    ),
}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 8),
            nn.ReLU(),
            nn.Linear(8, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        hits = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("acc", hits, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def timeless(tree: Any) -> Any:
    """Without latency, which differs from run to run."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key != "latency"}
    return [timeless(each) for each in tree] if isinstance(tree, list) else tree


def test_every_kind_has_a_checkpoint() -> None:
    assert {path.stem for path in FOLDER.glob("*.ckpt")} == KINDS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_its_network_and_report_are_those_of_0_1_0(kind: str) -> None:
    checkpoint = torch.load(FOLDER / f"{kind}.ckpt", weights_only=True)
    model = load_compact(checkpoint, Net()).eval()
    report = KINDS[kind]().report_of(model, checkpoint["callbacks"]["PruningCallback"], torch.zeros(1, 1, 8, 8))
    found = timeless(json.loads(report.to_json()))
    assert {key: found[key] for key in EXPECTED[kind]["report"]} == EXPECTED[kind]["report"]
    with torch.no_grad():
        outputs = model(next(iter(digits(2)))[0])
    torch.testing.assert_close(outputs, torch.tensor(EXPECTED[kind]["outputs"]))


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_goes_on_from_it(kind: str, tmp_path: Path) -> None:
    path = FOLDER / f"{kind}.ckpt"
    then = masks_in(torch.load(path, weights_only=True))
    pruning, model = KINDS[kind](), Net()
    data = digits(32, examples=96)
    trainer(tmp_path, pruning, max_epochs=4).fit(model, data, data, ckpt_path=path)
    end = EXPECTED[kind]["end"]
    report = json.loads(pruning.report.to_json())
    for key in ("size", "removed", "monitor", "params"):
        assert report[key] == end[key], key
    events = [[entry[key] for key in ("epoch", "step", "sparsity")] for entry in end["history"]]
    assert [[entry[key] for key in ("epoch", "step", "sparsity")] for entry in report["history"]] == events
    assert len(report["decisions"]) == len(end["decisions"])
    parameters = dict(model.named_parameters())
    assert pruning.masks.keys() == then.keys()
    for name, mask in pruning.masks.items():
        assert not (mask & ~then[name]).any(), "a masked weight has come back"
        assert not parameters[name][~mask].any()
