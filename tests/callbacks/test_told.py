"""What users are told and asked for: by errors beside other callbacks, in reports, logs, and of checkpoints."""

from __future__ import annotations

import csv
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import CSVLogger, ModelPruning
from lit import Lit, digits, fit, trainer
from torch import nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_prune import (
    Channels,
    Guard,
    OneShot,
    PruningCallback,
    Rewind,
    Steps,
    Unstructured,
    compact,
    load_compact,
    measure,
)
from lightning_prune.training import slow_work

SIZE = 4840


# --- beside other callbacks


@pytest.mark.parametrize("first", [True, False])
def test_a_second_way_to_mask_is_refused_before_training(tmp_path: Path, first: bool) -> None:
    other, ours = ModelPruning("l1_unstructured", amount=0.5), PruningCallback(0.5)
    with pytest.raises(ValueError, match=r"ModelPruning replaces weights.*leave one of the two out"):
        fit(tmp_path, model := Lit(), *((other, ours) if first else (ours, other)))
    assert all(each.all() for each in model.parameters() if each.ndim > 1)


def test_two_callbacks_without_a_name_are_told_what_to_do(tmp_path: Path) -> None:
    sweep = [PruningCallback(target) for target in (0.25, 0.5)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Two PruningCallbacks")
        for each in sweep:
            fit(tmp_path, Lit(), each)
    with (
        pytest.warns(UserWarning, match=r"Two PruningCallbacks have no name: in one Trainer give each its own"),
        pytest.raises(RuntimeError, match="more than one stateful callback"),
    ):
        trainer(tmp_path, PruningCallback(0.5), PruningCallback(0.6))
    trainer(tmp_path, PruningCallback(0.5, name="one"), PruningCallback(0.6, name="other"))
    assert [each.sparsity for each in sweep] == [0.25, 0.5]


def test_each_named_callback_logs_a_metric_of_its_own(tmp_path: Path) -> None:
    one = PruningCallback(0.25, name="one", structure=Unstructured(include="net.4"), schedule=OneShot("1ep"))
    two = PruningCallback(0.5, structure=Unstructured(exclude="net.4"), schedule=OneShot("1ep"))
    logger = CSVLogger(tmp_path)
    run = fit(tmp_path, Lit(), one, two, logger=logger)
    shown = run.callback_metrics
    assert float(shown["prune/one/sparsity"]) == 0.25
    assert float(shown["prune/sparsity"]) == 0.5
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {float(row["prune/one/sparsity/net.4.weight"]) for row in rows if row["prune/one/sparsity"]} == {
        0.25
    }


def test_work_that_takes_long_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(
                tmp_path,
                Lit(),
                PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"), compact=True),
                max_epochs=2,
            )
        return [each.getMessage() for each in caplog.records if "takes more than" in each.getMessage()]

    assert not told()
    monkeypatch.setattr(slow_work, "SECONDS", 1e-3)
    finding, compacting = told()
    assert finding.startswith("Finding what Channels can remove, once before training, takes more than")
    assert compacting.startswith("Compaction, with the proof that outputs stay the same, takes more than")


def test_the_advice_for_several_callbacks_works(tmp_path: Path) -> None:
    def callbacks(**options: Any) -> list[PruningCallback]:
        return [
            PruningCallback(
                0.5, name=name, structure=Channels(include=name), schedule=OneShot("1ep"), **options
            )
            for name in ("net.0", "net.4")
        ]

    with pytest.raises(ValueError, match=r"call compact\(model, \[one\.masks, other\.masks\], example\)"):
        fit(tmp_path, Lit(), *callbacks(compact=True))
    one, other = callbacks()
    fit(tmp_path, model := Lit(), one, other)
    images = next(iter(digits()))[0]
    small = compact(model, [one.masks, other.masks], images[:2])
    assert (small.net[0].out_channels, small.net[4].out_features) == (4, 8)
    torch.testing.assert_close(small.eval()(images), model.eval()(images))


@pytest.mark.parametrize("part", [{"rewind": Rewind("1st")}, {"guard": Guard("acc", max_drop=1.0)}])
def test_the_advice_for_several_callbacks_that_bring_back_weights_works(
    tmp_path: Path, part: dict[str, Any]
) -> None:
    def callback(name: str, structure: Any, target: Any = 0.5, **options: Any) -> PruningCallback:
        return PruningCallback(target, name=name, structure=structure, schedule=OneShot("1ep"), **options)

    def pruned(model: Lit) -> tuple[int, int]:
        channels = int((model.net[0].weight.flatten(1) == 0).all(1).sum())
        return channels, int((model.net[6].weight == 0).sum())

    one, two = Channels(include="net.0"), Unstructured(include="net.6")
    advice = r"one fit after the other, in the second with masks=one\.masks"
    for pair in ((part, {}), ({}, part)):
        with pytest.raises(ValueError, match=advice):
            fit(tmp_path, model := Lit(), callback("a", one, **pair[0]), callback("b", two, **pair[1]))
        assert pruned(model) == (0, 0)
    first = callback("a", one, **part)
    fit(tmp_path, model := Lit(), first, max_epochs=2)
    assert pruned(model) == (4, 0)
    fit(tmp_path, model, callback("b", two, masks=first.masks, **part), max_epochs=2)
    assert pruned(model) == (4, 80)
    target = {"net.0*": 0.5, "net.6*": 0.25}
    fit(tmp_path, model := Lit(), callback("c", Unstructured(), target, **part), max_epochs=2)
    assert pruned(model)[1] == 40


# --- schedules that watch a metric


class Plateau(Lit):
    """Its metric is worse from the third epoch on, in which the event is."""

    wrapped = False

    def on_validation_epoch_end(self) -> None:
        self.log("score", float(self.current_epoch < 2))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler: Any = ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=1)
        if self.wrapped:
            scheduler = Wrapped(scheduler)
        config = {"scheduler": scheduler, "monitor": "score", "reduce_on_plateau": True}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Wrapped:
    """A schedule that holds another one, as timm's PlateauLRScheduler."""

    def __init__(self, inner: ReduceLROnPlateau) -> None:
        self.inner, self.optimizer = inner, inner.optimizer

    def step(self, metric: Any) -> None:
        self.inner.step(metric)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class Hooked(Plateau):
    wrapped = True

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(metric)


@pytest.mark.parametrize("make", [Plateau, Hooked])
def test_the_dip_after_an_event_is_no_plateau(tmp_path: Path, make: type[Lit]) -> None:
    run = fit(tmp_path, make(), PruningCallback(0.5, schedule=OneShot("2ep")), max_epochs=4)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1  # two epochs: the new best, and one that is no better
    run = fit(tmp_path, make(), PruningCallback(0.5, schedule=OneShot("2ep")), max_epochs=5)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)  # and then it is one
    run = fit(tmp_path, make(), max_epochs=4)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


class Unknown(Wrapped):
    def __init__(self, inner: ReduceLROnPlateau) -> None:
        self.inners, self.optimizer = [inner], inner.optimizer

    def step(self, metric: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}


class Odd(Hooked):
    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["lr_scheduler"]["scheduler"] = Unknown(found["lr_scheduler"]["scheduler"].inner)
        return found


def test_a_schedule_of_an_unknown_kind_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Unknown watches a metric, and may take the dip"):
        fit(tmp_path, Odd(), PruningCallback(0.5, schedule=OneShot("2ep")))


# --- reports


def test_nothing_lands_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(Path(), Lit(), callback := PruningCallback(0.5))
    assert os.listdir(tmp_path) == []
    assert callback.report.sparsity == 0.5


@pytest.mark.parametrize("wanted", [True, False, "asked"])
def test_a_report_lies_where_it_is_asked_for(
    tmp_path: Path, wanted: bool | str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(tmp_path / wanted) if isinstance(wanted, str) else wanted
    fit(tmp_path / "root", Lit(), PruningCallback(0.5, write_report=where))
    found = [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("report.json")]
    assert found == {True: ["root"], False: [], "asked": ["asked"]}[wanted]
    assert ("weights removed" in capsys.readouterr().out) == bool(wanted)


def test_a_report_that_is_not_written_is_measured_all_the_same(tmp_path: Path) -> None:
    fit(tmp_path, Lit(), quiet := PruningCallback(0.5, write_report=False))
    assert set(quiet.report.latency) == {1, 64}
    fit(tmp_path, Lit(), PruningCallback(0.5, write_report=tmp_path / "path"))
    assert (tmp_path / "path" / "report.json").is_file()


def test_a_table_says_which_share_is_covered_and_groups_reasons() -> None:
    model = nn.Sequential(*(nn.Embedding(4, 2) for _ in range(6)), nn.Linear(2, 4, bias=False))
    lines = PruningCallback(0.5).plan(model).table().splitlines()
    assert "these 8 are 14.3% of the network's 56 parameters" in lines
    assert "0.weight, 1.weight, 2.weight, 3.weight and 2 more stay dense: Embedding uses it" in lines
    assert "these 0 are 0.0% of the network's 56 parameters" in measure(model).table()


# --- checkpoints


def test_a_checkpoint_of_model_pruning_says_what_to_do_and_that_works(tmp_path: Path) -> None:
    model, path = Lit(), tmp_path / "masked.ckpt"
    other = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=False)
    run = fit(tmp_path, model, other, max_epochs=1)
    run.save_checkpoint(path, weights_only=True)
    advice = (
        r"'net\.0\.weight_orig' and 'net\.0\.weight_mask'.*torch\.nn\.utils\.prune\.remove.*keep_zeros=True"
    )
    with pytest.raises(ValueError, match=advice):
        load_compact(path, Lit())
    with pytest.raises(ValueError, match=advice):
        trainer(tmp_path, PruningCallback(0.9)).fit(Lit(), digits(), ckpt_path=path)
    for module in model.modules():
        for name in ("weight", "bias"):
            if prune.is_pruned(module) and hasattr(module, f"{name}_orig"):
                prune.remove(module, name)
    torch.save({"state_dict": model.state_dict()}, path)
    plain = load_compact(path, Lit())
    zeros = sum(int((each == 0).sum()) for each in plain.parameters() if each.ndim > 1)
    callback = PruningCallback(0.9, schedule=Steps({"3ep": 1.0}), keep_zeros=True)
    fit(tmp_path, plain, callback)
    assert [round(entry.sparsity * SIZE) for entry in callback.report.history][:1] == [zeros]


@dataclass
class Width:
    width: int = 8


class Configured(Lit):
    """Has an object in its hyperparameters, and a buffer that grows and is resized when it is loaded."""

    def __init__(self, config: Width | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("bank", torch.zeros(0, 10))

    def on_train_batch_end(self, *_: Any) -> None:
        self.bank = torch.cat([self.bank, torch.ones(1, 10)])

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        self.bank = torch.zeros_like(state[f"{prefix}bank"])
        super()._load_from_state_dict(state, prefix, *others)


PARTS: dict[str, dict[str, Any]] = {"weights": {}, "compacted": {"structure": Channels(), "compact": True}}


@pytest.mark.parametrize("parts", PARTS)
def test_what_loads_without_the_callback_loads_with_it(tmp_path: Path, parts: str) -> None:
    path = tmp_path / "configured.ckpt"
    callback = PruningCallback(0.5, schedule=OneShot("1ep"), **PARTS[parts])
    fit(tmp_path, Configured(Width()), callback).save_checkpoint(path)
    with pytest.raises(
        ValueError, match=r"holds objects besides tensors.*add_safe_globals.*weights_only=False"
    ):
        load_compact(path, Configured())
    loaded = load_compact(torch.load(path, weights_only=False), Configured())
    assert loaded.bank.shape == (20, 10)
    with torch.serialization.safe_globals([Width]):
        assert load_compact(path, Configured()).bank.shape == (20, 10)
        again = PruningCallback(0.5, schedule=OneShot("1ep"), **PARTS[parts])
        fit(tmp_path, model := Configured(), again, ckpt_path=path, max_epochs=5)
    assert model.bank.shape == (25, 10)
