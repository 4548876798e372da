"""What the report measures at the end of a fit: how large the passes are, how many, and when."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback
from lit import Lit, digits, trainer
from torch import Tensor, nn

from lightning_prune import Channels, OneShot, PruningCallback, measure
from lightning_prune.report.cost import latency


class Watched(Lit):
    """Notes the batch size and the device of each pass in evaluation mode; may be slow in it."""

    def __init__(self, own: int | None = None, pause: float = 0.0) -> None:
        super().__init__()
        if own is not None:
            self.example_input_array = torch.rand(own, 1, 8, 8)
        self.passes: list[tuple[int, str]] = []
        self.pause = pause

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            self.passes.append((len(images), images.device.type))
            time.sleep(self.pause)
        return super().forward(images)

    @property
    def sizes(self) -> list[int]:
        return [size for size, _ in self.passes]


class AtTrainEnd(Callback):
    """Notes at the end of training whether a report lies in a folder, and how many passes there were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: tuple[bool, int] | None = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen = (self.folder / "report.json").exists(), len(pl_module.passes)


def run(folder: Path, model: Lit, *others: Callback, batch: int = 16, **options: Any) -> PruningCallback:
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"), **options)
    trainer(folder, pruning, *others, max_epochs=2).fit(model, digits(batch, 64))
    return pruning


# an example of the module's own is of one image or of more than the fit has in a batch
@pytest.mark.parametrize(("own", "counted"), [(None, [1]), (1, [1]), (3, [1, 2]), (64, [1, 2])])
def test_no_pass_is_larger_than_a_batch_of_the_fit(tmp_path: Path, own: int | None, counted: list[int]) -> None:
    pruning = run(tmp_path, model := Watched(own))
    assert model.sizes == [*counted, *[1] * 4, *[16] * 4]
    assert list(pruning.report.latency) == [1, 16]
    assert pruning.report.macs == 72 * 36 + 4608 + 160


def test_a_batch_of_one_is_measured_once(tmp_path: Path) -> None:
    pruning = run(tmp_path, model := Watched(64), batch=1)
    assert model.sizes == [1] * 5
    assert list(pruning.report.latency) == [1]


def test_both_networks_are_measured_on_a_batch_of_the_fit(tmp_path: Path) -> None:
    report = run(tmp_path, Watched(64), structure=Channels(), compact=True).report
    assert report.dense is not None
    assert list(report.latency) == list(report.dense.latency) == [1, 16]
    assert "latency of a batch of 16: dense" in report.table()


@pytest.mark.parametrize("options", [{}, {"structure": Channels(), "compact": True}])
def test_nothing_is_measured_before_training_has_ended_for_all(tmp_path: Path, options: dict[str, Any]) -> None:
    tried: list[int] = []
    for limit in (0.0, 9.0):
        model, last = Watched(), AtTrainEnd(tmp_path / str(limit))
        run(tmp_path / str(limit), model, last, measure_seconds=limit, **options)
        assert last.seen is not None
        assert not last.seen[0]
        assert (tmp_path / str(limit) / "report.json").exists()
        tried.append(last.seen[1])
    assert tried[0] == tried[1]
    if not options:
        assert tried[0] == 0


def test_a_slow_pass_runs_as_often_as_the_limit_allows(tmp_path: Path) -> None:
    pruning = run(tmp_path, model := Watched(pause=0.3), measure_seconds=0.5)
    assert model.sizes == [1, 1]  # one is counted, one is timed, and a larger one would not fit
    assert list(pruning.report.latency) == [1]
    assert pruning.report.latency[1] >= 0.3


def test_no_latency_is_measured_in_no_time(tmp_path: Path) -> None:
    pruning = run(tmp_path, model := Watched(), measure_seconds=0)
    assert model.sizes == [1]
    assert pruning.report.latency == {}
    assert pruning.report.macs == 72 * 36 + 4608 + 160
    compacted = run(tmp_path, Watched(), measure_seconds=0, structure=Channels(), compact=True).report
    assert compacted.dense is not None
    assert compacted.latency == compacted.dense.latency == {}
    assert "latency" not in compacted.table()


def test_latency_is_measured_once(tmp_path: Path) -> None:
    pruning = run(tmp_path, model := Watched())
    passes, first = len(model.passes), pruning.report.latency
    assert first
    assert pruning.report.latency == first
    assert model.sizes[passes:] == [1, 1]  # of each look the count


@pytest.mark.parametrize(("limit", "rounds"), [(0.0, 1), (0.1, 1), (0.5, 2), (60.0, 4)])
def test_a_round_starts_if_another_one_fits(limit: float, rounds: int) -> None:
    model = Watched(pause=0.2).eval()
    latency([model], torch.ones(2, 1, 8, 8), 0.0, limit=limit)
    assert model.sizes == [2] * rounds


class Pairs(nn.Module):
    """Compares the first half of a batch with the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.lift(images).view(2, -1, 4)
        if not len(first) % 2:
            return first - second
        raise ValueError("an odd number")


def test_what_does_not_run_on_one_example_is_measured_on_what_it_runs_on() -> None:
    report = measure(Pairs(), example=torch.ones(8, 8))
    assert report.macs == 32
    assert list(report.latency) == [8]
    assert measure(Pairs(), example=torch.ones(4, 8)).macs == 4 * 32  # 2 do not run


def test_measure_takes_a_limit() -> None:
    example = torch.ones(4, 8)
    assert list(measure(nn.Linear(8, 4), example=example).latency) == [1, 4]
    assert measure(nn.Linear(8, 4), example=example, seconds=0).latency == {}


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "2", None, True])
def test_a_wrong_limit_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^measure_seconds=.* must be a finite number of seconds, at least 0"):
        PruningCallback(0.5, measure_seconds=value)
    with pytest.raises(ValueError, match=r"^seconds=.* must be a finite number of seconds, at least 0"):
        measure(nn.Linear(2, 2), seconds=value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"structure": Channels(), "compact": True}])
def test_models_are_measured_on_the_device_of_the_fit(tmp_path: Path, options: dict[str, Any]) -> None:
    model, pruning = Watched(), PruningCallback(0.5, schedule=OneShot("1ep"), **options)
    trainer(tmp_path, pruning, max_epochs=2, accelerator="gpu").fit(model, digits(16, 64))
    assert list(pruning.report.latency) == [1, 16]
    assert (16, "cuda") in model.passes
    assert {each.device.type for each in model.parameters()} == {"cpu"}
