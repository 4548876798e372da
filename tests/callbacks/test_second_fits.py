"""What a callback carries from one fit to the next: changed arguments, changed weights, states, copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from lightnings import Callback
from lit import Lit, fit, seeded

from lightning_prune import (
    Channels,
    Guard,
    OneShot,
    OptimalBrainDamage,
    Pruner,
    PruningCallback,
    Rewind,
    Steps,
    Taylor,
    Unstructured,
    Wanda,
)

SIZE = 4840  # weights in the matrices of Lit


class Zeros(Callback):
    """Counts the zeros among the covered weights at the end of each epoch."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.seen: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        covered = [pl_module.get_parameter(name) for name in self.pruning.masks]
        self.seen.append(sum(int((each == 0).sum()) for each in covered))


def zeros_by_epoch(folder: Path, model: Lit, pruning: PruningCallback, **options: Any) -> list[int]:
    fit(folder, model, pruning, zeros := Zeros(pruning), **options)
    return zeros.seen


# --- arguments that change


def test_a_second_fit_does_what_the_arguments_say_now(tmp_path: Path) -> None:
    model, pruning = Lit(), PruningCallback(0.5, schedule=OneShot("1ep"))
    assert zeros_by_epoch(tmp_path, model, pruning)[-1] == SIZE // 2
    pruning.target = 0.9
    pruning.schedule = OneShot("2ep")
    later = round(0.9 * SIZE)
    assert zeros_by_epoch(tmp_path, model, pruning) == [SIZE // 2, SIZE // 2, later, later]
    assert pruning.report.sparsity == later / SIZE


def test_arguments_that_change_before_the_first_fit_count(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"))
    pruning.schedule = OneShot("3ep")
    assert zeros_by_epoch(tmp_path, Lit(), pruning) == [0, 0, 0, SIZE // 2]


def test_a_wrong_argument_stops_the_second_fit_before_it_trains(tmp_path: Path) -> None:
    fit(tmp_path, model := Lit(), pruning := PruningCallback(0.5))
    pruning.target = 1.5
    with pytest.raises(ValueError, match=r"target=1\.5"):
        fit(tmp_path, model, pruning)


# --- weights that change


def test_a_model_that_was_changed_since_is_told_and_goes_on(tmp_path: Path) -> None:
    model, pruning = Lit(), PruningCallback(0.5, schedule=OneShot("1ep"))
    fit(tmp_path, model, pruning)
    masks = {name: mask.clone() for name, mask in pruning.masks.items()}
    model.load_state_dict(Lit().state_dict())
    with pytest.warns(UserWarning, match=r"removed are not 0 any more: the model was changed since.*reset\(\)"):
        assert zeros_by_epoch(tmp_path, model, pruning) == [SIZE // 2] * 4
    assert all(torch.equal(mask, masks[name]) for name, mask in pruning.masks.items())


def test_it_is_told_also_where_an_argument_has_changed(tmp_path: Path) -> None:
    model, pruning = Lit(), PruningCallback(0.5, schedule=OneShot("1ep"))
    fit(tmp_path, model, pruning)
    model.load_state_dict(Lit().state_dict())
    pruning.target = 0.75
    with pytest.warns(UserWarning, match="removed are not 0 any more"):
        assert zeros_by_epoch(tmp_path, model, pruning)[-1] == SIZE * 3 // 4


def test_what_is_excluded_later_keeps_its_masks_and_is_not_called_dense(tmp_path: Path) -> None:
    model, pruning = Lit(), PruningCallback(0.5, schedule=OneShot("1ep"))
    fit(tmp_path, model, pruning)
    pruning.structure = Unstructured(exclude="net.6")
    fit(tmp_path, model, pruning)
    assert "net.6.weight" in pruning.masks
    assert "net.6.weight" not in pruning.report.frozen


def test_reset_starts_anew(tmp_path: Path) -> None:
    model, pruning = Lit(), PruningCallback(0.5, schedule=OneShot("2ep"))
    fit(tmp_path, model, pruning)
    model.load_state_dict(Lit().state_dict())
    pruning.reset()
    assert pruning.sparsity == 0
    assert not pruning.masks
    assert zeros_by_epoch(tmp_path, model, pruning) == [0, 0, SIZE // 2, SIZE // 2]


def test_nothing_is_told_of_a_first_network_when_a_second_one_comes(tmp_path: Path) -> None:
    pruning = PruningCallback(0.8)
    run = fit(tmp_path, Lit(), pruning)
    with pytest.warns(UserWarning, match="ended before its first batch"):
        run.fit(other := Lit(), run.train_dataloader)  # the Trainer has no epochs left
    assert pruning.sparsity == 0
    assert not pruning.masks
    assert all(each.all() for each in other.parameters() if each.ndim > 1)


# --- zeros that were there


@pytest.mark.parametrize("structure", ["weights", "channels"])
def test_a_new_callback_can_keep_the_zeros(tmp_path: Path, structure: str) -> None:
    parts = {} if structure == "weights" else {"structure": Channels(include="net.0")}
    model, first = Lit(), PruningCallback(0.5, schedule=OneShot("1ep"), **parts)
    fit(tmp_path, model, first)
    again = PruningCallback(0.75, schedule=OneShot("2ep"), keep_zeros=True, **parts)
    # of a channel: 9 weights and a bias, scale and shift of the norm, 36 positions for 16 neurons
    unit, units = (1, SIZE) if structure == "weights" else (9 + 1 + 2 + 36 * 16, 8)
    now, later = units // 2 * unit, units * 3 // 4 * unit
    assert zeros_by_epoch(tmp_path, model, again) == [now, now, later, later]
    assert again.report.history[0].sparsity == now / again.report.size


def test_a_layer_of_zeros_stays_whole() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    torch.nn.init.zeros_(model[1].weight)
    model[0].weight.data[0] = 0
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.keep_zeros()
    assert {name: int((~mask).sum()) for name, mask in pruner.masks.items()} == {"0.weight": 4, "1.weight": 0}


# --- states and copies


def test_a_state_that_is_loaded_before_a_fit_is_taken_over(tmp_path: Path) -> None:
    first = PruningCallback(0.8)
    fit(tmp_path, Lit(), first)
    second = PruningCallback(0.8)
    second.load_state_dict(first.state_dict())
    assert zeros_by_epoch(tmp_path, Lit(), second) == [round(0.8 * SIZE)] * 4
    assert all(torch.equal(mask, first.masks[name]) for name, mask in second.masks.items())


def test_a_state_that_is_loaded_before_a_validation_waits_for_the_fit(tmp_path: Path) -> None:
    first = PruningCallback(0.8)
    run = fit(tmp_path, Lit(), first)
    second = PruningCallback(0.8)
    second.load_state_dict(first.state_dict())
    run.callbacks = [second]
    run.validate(model := Lit(), run.train_dataloader, verbose=False)
    assert second.sparsity == 0
    assert all(each.all() for each in model.parameters() if each.ndim > 1)
    assert zeros_by_epoch(tmp_path, model, second) == [round(0.8 * SIZE)] * 4


PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compacted": {"structure": Channels(), "compact": True},
    "activations": {"criterion": Wanda()},
    "losses": {"criterion": OptimalBrainDamage()},
    "guarded": {"guard": Guard("acc", "max", max_drop=0.5)},
    "rewound": {"rewind": Rewind("1ep")},
}


class Picklable(Lit):
    """Holds no function that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("parts", PARTS)
def test_callback_trainer_and_report_can_be_pickled_and_copied_after_a_fit(tmp_path: Path, parts: str) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("2ep"), **PARTS[parts])
    run = fit(tmp_path, Picklable(), pruning)
    assert pickle.loads(pickle.dumps(pruning.report)) == pruning.report
    through_trainer = pickle.loads(pickle.dumps(run)).callbacks[0]
    for other in (pickle.loads(pickle.dumps(pruning)), copy.deepcopy(pruning), through_trainer):
        assert other.report == pruning.report
        assert other.masks.keys() == pruning.masks.keys()
        assert all(torch.equal(mask, pruning.masks[name]) for name, mask in other.masks.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_with_the_network_that_came_with_it(tmp_path: Path, kind: str) -> None:
    pruning = KINDS[kind](criterion=Taylor(), schedule=Steps({"1ep": 0.5, "2ep": 1.0}))
    fit(tmp_path, model := seeded(Picklable), pruning)
    other, network = pickle.loads(pickle.dumps((pruning, model)))
    fit(tmp_path, network, other)
    fit(tmp_path, model, pruning)
    assert all(torch.equal(mask, other.masks[name]) for name, mask in pruning.masks.items())
    for name, mask in other.masks.items():
        assert not network.get_parameter(name)[~mask].count_nonzero()
