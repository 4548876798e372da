"""What no pass runs: passes in training mode for each example, copies that are excluded, advice that works."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Blocks, Channels, Global, Pruner, Unstructured, compact, sensitivity

ROWS, TARGETS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 3)


def pruned(model: nn.Module, example: Any, **arguments: Any) -> Pruner:
    pruner = Pruner(model, 0.5, structure=Channels(**arguments), schedule=None, example=example)
    pruner.prune(1.0)
    return pruner


class Helped(nn.Module):
    """A network with a second head, which only training uses, and which needs a target."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.second = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, rows: Tensor, target: Tensor | None = None) -> Tensor:
        hidden = self.one(rows).relu()
        if not self.training:
            return self.two(hidden)
        assert target is not None
        return F.mse_loss(self.two(hidden), target) + F.mse_loss(self.second(hidden), target)


@pytest.mark.parametrize("examples", [[ROWS, (ROWS, TARGETS)], [(ROWS, TARGETS), ROWS]], ids=["last", "first"])
def test_the_first_example_that_runs_in_training_mode_is_followed(examples: list[Any]) -> None:
    model = Helped()
    pruner = pruned(model, examples)
    small = compact(model, pruner.masks, examples)
    assert (small.one.out_features, small.second.in_features) == (4, 4)
    torch.testing.assert_close(small.train()(ROWS, TARGETS), model.train()(ROWS, TARGETS))


def test_a_second_head_that_is_excluded_still_keeps_what_it_reads() -> None:
    for frozen in (False, True):
        (model := Helped()).second.requires_grad_(not frozen)
        with pytest.raises(
            ValueError, match="one: may be read by second, which the example does not run: give"
        ):
            pruned(model, ROWS, exclude="second")


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Taught(nn.Module):
    """A network and a frozen teacher of the same architecture, which ``forward`` does not run."""

    def __init__(self, *, copied: bool) -> None:
        super().__init__()
        self.student = chain()
        self.teacher = (copy.deepcopy(self.student) if copied else chain()).requires_grad_(requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.student(rows)


@pytest.mark.parametrize("copied", [False, True])
def test_a_teacher_that_is_excluded_keeps_nothing(copied: bool) -> None:
    model = Taught(copied=copied)
    before = copy.deepcopy(model.teacher)
    if not copied:
        advice = "exclude teacher if it is a copy that reads its own layers only"
        with pytest.raises(ValueError, match=rf"may be read by teacher\.0, which the example.*, {advice}"):
            pruned(model, ROWS)
    pruner = pruned(model, ROWS, exclude="teacher")
    assert {group.name for group in pruner.groups} == {"student.0", "student.2"}
    small = compact(model, pruner.masks, ROWS)
    assert sum(each.numel() for each in small.student.parameters()) < sum(
        each.numel() for each in model.student.parameters()
    )
    torch.testing.assert_close(small(ROWS), model(ROWS))
    assert torch.equal(small.teacher(ROWS), before(ROWS))
    found = sensitivity(
        Taught(copied=copied),
        lambda _: 1.0,
        ratios=[0.5],
        structure=Channels(exclude="teacher"),
        example=ROWS,
        progress=False,
    )
    assert set(found.values) == {"student.0", "student.2"}


class Headed(nn.Module):
    """A trunk with a head, and a frozen head that is excluded: it reads the trunk in other calls."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.head, self.other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), nn.Identity()
        self.other = copy.deepcopy(self.head).requires_grad_(requires_grad=False)

    def forward(self, rows: Tensor, *, other: bool = False) -> Tensor:
        return (self.other if other else self.head)(self.trunk(rows).relu())


def test_a_copied_head_keeps_the_trunk_that_it_reads() -> None:
    model = Headed()
    pruner = pruned(model, ROWS, exclude="other")
    assert {group.name for group in pruner.groups} == {"head.0"}
    assert pruner.frozen["trunk"].startswith("may be read by other.0, which the example does not run: give")
    assert compact(model, pruner.masks, ROWS)(ROWS, other=True).shape == (4, 3)


class Own(nn.Module):
    """A scale that one way through the network uses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))

    def forward(self, rows: Tensor, *, scaled: bool = False) -> Tensor:
        hidden = self.one(rows).relu()
        return self.two(hidden * self.scale if scaled else hidden)


def test_a_tensor_of_a_module_that_runs_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"one: may meet scale, which the example does not use: give an example"
    ):
        pruned(Own(), ROWS)
    assert {group.name for group in pruned(Own(), [ROWS, {"rows": ROWS, "scaled": True}]).groups} == {"one"}


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.lock = nn.Linear(6, 8), nn.Linear(8, 3), threading.Lock()

    def forward(self, rows: Tensor) -> Tensor:
        return self.two(self.one(rows).relu())


class Shared:
    """Takes the advice in the error: a copy of it is the same object."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class Wrapped(Locked):
    """Takes the advice in the error."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Shared()


class LeftOut(Locked):
    """Takes the advice in the error."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_what_cannot_be_copied_is_told_with_advice_that_works() -> None:
    advice = (
        r"its own class a __deepcopy__, .* __getstate__ that leaves it out, and a __setstate__ that makes it"
    )
    with pytest.raises(ValueError, match=rf"^Locked cannot be copied .*{advice}"):
        pruned(Locked(), ROWS)
    for model in (LeftOut(), Wrapped()):
        assert compact(model, pruned(model, ROWS).masks, ROWS).one.out_features == 4


class Fickle(nn.Module):
    """Runs with the weights that it was made with, or takes another way with others."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.one, self.two, self.fails = nn.Linear(6, 8), nn.Linear(8, 3), fails
        self.first = float(self.one.weight.detach()[0, 0])

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.one(rows)
        if float(self.one.weight.detach()[0, 0]) != self.first:
            assert not self.fails
            return self.two(hidden.sigmoid().relu())
        return self.two(hidden.relu())


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_left_to_do_is_true_whatever_the_masks_are_of(fails: bool) -> None:
    what = (
        "does not run when its weights" if fails else "runs other ops, or makes tensors of other shapes, when"
    )
    advice = r"nothing can be cut out of it as a whole\. .*; Unstructured and Blocks set .* blocks to 0\.$"
    with pytest.raises(ValueError, match=rf"^Fickle {what}.* {advice}"):
        pruned(Fickle(fails=fails), ROWS)
    for structure in (Unstructured(exclude="two"), Blocks(2, 2, exclude="two")):
        model = Fickle(fails=fails)
        pruner = Pruner(model, 0.5, structure=structure, schedule=None)
        pruner.prune(1.0)
        model.first = float(model.one.weight.detach()[0, 0])
        with pytest.raises(ValueError, match=rf"^Fickle {what}.* {advice}"):
            compact(model, pruner.masks, ROWS)


class Rotated(nn.Module):
    """Keeps its first frequencies beside those in use, as many as another layer is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 4), nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("rates", torch.rand(4))
        self.register_buffer("first_rates", self.rates.clone())

    def forward(self, rows: Tensor) -> Tensor:
        angles = (rows[:, :1] * self.rates).repeat(1, 2)
        return self.three(self.two(self.one(rows).relu()) * angles.cos())


def test_a_double_of_a_buffer_meets_what_that_one_does() -> None:
    found = pruned(Rotated(), ROWS)
    assert {group.name: group.size for group in found.groups} == {"one": 4}
    assert found.frozen["two"].startswith("may meet first_rates")
    (other := Rotated()).first_rates.add_(1)
    found = pruned(other, ROWS)
    assert {group.name: group.size for group in found.groups} == {"two": 4}
    assert found.frozen["one"].startswith("may meet first_rates")


class Sorting(nn.Module):
    """Sends each row to one of four matrices: all to the first one, until weights change."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4, bias=False), nn.Parameter(torch.randn(4, 3, 6))
        nn.init.zeros_(self.router.weight)

    def forward(self, rows: Tensor) -> Tensor:
        chosen, result = self.router(rows).argmax(-1), rows.new_zeros(len(rows), 3)
        for number in chosen.unique().tolist():
            place = torch.where(chosen == number)[0]
            result = result.index_add(0, place, rows[place] @ self.experts[number].T)
        return result


def test_where_values_choose_what_runs_a_larger_example_is_advised() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"where values choose what runs, .* give an example so large"):
        pruned(Sorting(), ROWS)


class Lit(LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.net = chain()
        self.example_input_array = example

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def test_the_example_of_a_lightning_module_is_taken() -> None:
    with pytest.raises(
        ValueError, match=r"^example=None: .* a tuple .* mapping .* list .*example_input_array\.$"
    ):
        Pruner(Lit(), 0.5, structure=Channels())
    found = {"net.0", "net.2"}
    assert {group.name for group in Pruner(Lit(ROWS), 0.5, structure=Channels()).groups} == found
    assert {group.name for group in Channels().units(Lit(ROWS.double())).groups} == found
    values = sensitivity(Lit(ROWS), lambda _: 1.0, ratios=[0.5], structure=Channels(), progress=False).values
    assert set(values) == found


def test_multiply_adds_need_an_example() -> None:
    with pytest.raises(
        ValueError, match=r"^budget='macs' needs example=\.\.\., what forward is called with\.$"
    ):
        Pruner(chain(), 0.5, selector=Global(budget="macs"))
    assert Pruner(Lit(ROWS), 0.5, selector=Global(budget="macs")).groups


class RelativePositions(nn.Module):
    """Attention to positions: a row of a table for each step, up to the longest sequence there may be."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 6))
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, steps: Tensor) -> Tensor:
        scores = self.query(steps) @ self.key(self.table[: steps.shape[1]]).T
        result: Tensor = self.out(scores.softmax(-1) @ self.value(steps))
        return result


def test_rows_of_a_weight_that_no_example_takes_stay() -> None:
    model, steps = RelativePositions(), torch.randn(2, 9, 6)
    pruner = pruned(model, steps)
    assert {group.size for group in pruner.groups} == {8, 7}
    assert pruner.frozen["table"] == "feeds softmax, which mixes all channels"
    longer = torch.randn(2, 20, 6, dtype=torch.float64)
    smaller = compact(model, pruner.masks, steps).double()
    torch.testing.assert_close(smaller(longer), copy.deepcopy(model).double()(longer))
