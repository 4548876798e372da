"""Kinds of modules in place of patterns: classes, and their dotted paths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import Blocks, Channels, Heads, Pruner, Structure, Unstructured

IMAGES = torch.ones(2, 1, 8, 8)


class Wide(nn.Conv2d):
    """A convolution of the user's own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Wide(4, 8, 3), nn.ReLU())
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU())
        self.head = nn.Linear(12, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images)))


def covered(structure: Structure, model: nn.Module | None = None) -> list[str]:
    pruner = Pruner(model or Net(), 0.5, structure=structure, schedule=None, example=IMAGES)
    return [part.name for group in pruner.groups for part in group.slices if part.weight.ndim > 1]


CONVS, ALL = (
    ["stem.0.weight", "stem.2.weight"],
    ["stem.0.weight", "stem.2.weight", "body.1.weight", "head.weight"],
)


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (nn.Conv2d, CONVS),
        (Wide, CONVS[1:]),  # the kind of all of them would be its base class
        ([nn.Conv2d, "head*"], [*CONVS, "head.weight"]),
        ((nn.Linear,), ALL[2:]),
        (nn.Sequential, ALL[:3]),  # what it holds
        (Net, ALL),
        (nn.Module, ALL),
        ("torch.nn.Conv2d", CONVS),
        ("torch.nn.modules.conv.Conv2d", CONVS),
        (["torch.nn.Conv2d", "head*"], [*CONVS, "head.weight"]),
        (f"{__name__}.Wide", CONVS[1:]),
    ],
)
def test_a_kind_stands_for_the_names_of_its_modules(include: Any, names: list[str]) -> None:
    assert covered(Unstructured(include=include)) == names
    assert (
        covered(Unstructured(exclude=[include] if isinstance(include, type) else include))
        == [name for name in ALL if name not in names]
        if names != ALL
        else True
    )
    assert covered(Blocks(1, 1, include=include)) == names


def test_channels_are_of_the_kind_of_the_modules_that_make_them() -> None:
    assert covered(Channels(include=nn.Conv2d)) == CONVS
    assert covered(Channels(exclude=Wide)) == ["stem.0.weight", "body.1.weight"]
    assert covered(Channels(include="torch.nn.Linear")) == ["body.1.weight"]


def test_heads_of_a_kind() -> None:
    model = nn.TransformerEncoderLayer(8, 4, 8, dropout=0.0, batch_first=True)
    example = torch.randn(2, 3, 8)
    heads = Heads(include=nn.MultiheadAttention)
    assert heads.units(model, example).groups
    with pytest.raises(ValueError, match="finds nothing to prune"):
        Heads(exclude=nn.MultiheadAttention).units(model, example)


def test_by_kind_what_does_not_train_is_pruned() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    assert covered(Unstructured(), model) == ALL[2:]
    assert covered(Unstructured(include=nn.Conv2d), model) == CONVS


def test_a_frozen_copy_that_is_excluded_by_its_kind_is_no_moving_copy() -> None:
    class Teacher(nn.Sequential):
        """Started as a copy."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
            self.teacher = Teacher(*copy.deepcopy(self.net)).requires_grad_(False)

    for exclude in ("teacher", Teacher):
        pruner = Pruner(Student(), 0.5, structure=Unstructured(exclude=exclude), schedule=None)
        assert pruner.frozen["teacher.0.weight"] == "exclude names it"


def test_targets_by_kind() -> None:
    pruner = Pruner(Net(), {"torch.nn.Conv2d": 0.25, "*": 0.5}, schedule=None)
    pruner.prune(1.0)
    gone = [int((~mask).sum()) for mask in pruner.masks.values()]
    assert (sum(gone[:2]), sum(gone[2:])) == (81, 792)


# --- what is wrong, and how it is written


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("kind", [nn.Conv3d, "torch.nn.Conv3d"])
def test_a_kind_that_is_nowhere_is_refused_with_those_that_are(argument: str, kind: Any) -> None:
    kinds = rf"{argument}=torch\.nn\.modules\.conv\.Conv3d .* are {__name__}\.Net, {__name__}\.Wide, torch\.nn"
    for make in (Unstructured, Channels):
        with pytest.raises(ValueError, match=kinds):
            Pruner(Net(), 0.5, structure=make(**{argument: kind}), example=IMAGES)


def test_a_path_of_no_class_of_modules_is_a_pattern() -> None:
    assert covered(Unstructured(include="stem.0")) == CONVS[:1]
    for path in ("torch.nn.Conv2D", "torch.nn.functional", "torch.optim.SGD", "nowhere.Net"):
        with pytest.raises(ValueError, match=f"include='{path}' matches no parameter or module"):
            covered(Unstructured(include=path))


@pytest.mark.parametrize("wrong", [int, 3, [nn.Linear, 3], [None], nn.ReLU(), torch.optim.SGD])
def test_what_is_no_kind_of_modules_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"include=.* must be a pattern or a list of them"):
        Unstructured(include=wrong)


def test_a_structure_by_kind_prints_as_the_call_that_rebuilds_it() -> None:
    for structure in (Unstructured(include=nn.Conv2d), Channels(exclude=[nn.Linear, "head*"])):
        assert " at 0x" not in repr(structure)
        assert eval(repr(structure), {**vars(lightning_prune), "torch": torch}) == structure
        assert copy.deepcopy(structure) == structure
