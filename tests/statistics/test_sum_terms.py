"""A layer whose output goes into a sum fits the sum: its gradient by autograd is 0 there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Reconstruct
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.reconstruction.network_fit import reconstruct_

EXACT = Reconstruct(ridge=0.0, positions=10**6)


class Block(nn.Module):
    """Adds the output of a layer to what comes before it, in a way of its own.

    Args:
        add: Is given the layer's output, its input, and what was there first.
        layer: The layer.
    """

    def __init__(self, add: Callable[[Any, Tensor, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.early = nn.Linear(6, 8), nn.Linear(8, 8)
        self.last, self.add = layer, add

    def forward(self, rows: Tensor) -> Tensor:
        first = self.early(self.stem(rows).relu())
        given = first.tanh()
        return self.add(self.last(given), given, first)


def of_dropout(output: Tensor, given: Tensor, first: Tensor) -> Tensor:
    return F.dropout(output, 0.5, training=False) + first


def in_place(output: Tensor, given: Tensor, first: Tensor) -> Tensor:
    output += first
    return output


ADDITIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "plus": lambda output, given, first: first + output,
    "in place": in_place,
    "by name": lambda output, given, first: torch.add(output, first),
    "after dropout": of_dropout,
    "of three": lambda output, given, first: (output + given) + first,
}


def reconstructed(model: nn.Module, batches: list[Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model as it was, and the masks of what went: a part of each layer's inputs, at random."""
    generator = torch.Generator().manual_seed(1)
    before, masks = copy.deepcopy(model), {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not name.startswith("stem"):
            masks[name] = torch.rand(weight.shape, generator=generator) < 0.6
            weight.data.mul_(masks[name])
    assert reconstruct_(model, before, masks, Calibration.of(batches), EXACT) == {}
    return before, masks


def gradients(model: nn.Module, before: nn.Module, batches: list[Tensor], names: list[str]) -> list[Tensor]:
    """The gradients of the squared error of the sum, relative to what they would be by a change of a tenth."""
    found = []
    for factor in (1.0, 1.1):
        twin = copy.deepcopy(model)
        for name in names:
            twin.get_parameter(name).data.mul_(factor)
        error = sum((twin(each) - before(each).detach()).square().sum() for each in batches)
        found.append(torch.autograd.grad(error, [twin.get_parameter(name) for name in names]))
    return [here / there.abs().max() for here, there in zip(*found, strict=True)]


@pytest.mark.parametrize("how", ADDITIONS)
def test_the_last_layer_of_a_sum_fits_the_sum(how: str) -> None:
    torch.manual_seed(0)
    model = Block(ADDITIONS[how], nn.Linear(8, 8)).double().eval()
    batches = list(torch.randn(120, 6, dtype=torch.float64).split(40))
    before, masks = reconstructed(model, batches)
    assert not torch.allclose(model.early(model.stem(batches[0])), before.early(before.stem(batches[0])))
    weight, bias = gradients(model, before, batches, ["last.weight", "last.bias"])
    assert (weight * masks["last.weight"]).abs().max() < 1e-6
    assert bias.abs().max() < 1e-6


def test_attention_fits_the_sum() -> None:
    torch.manual_seed(0)

    class Attentive(Block):
        def forward(self, rows: Tensor) -> Tensor:
            first = self.early(self.stem(rows).relu())
            return first + self.last(first, first, first)[0]

    model = Attentive(ADDITIONS["plus"], nn.MultiheadAttention(8, 2, batch_first=True)).double().eval()
    batches = list(torch.randn(30, 5, 6, dtype=torch.float64).split(10))
    before, masks = reconstructed(model, batches)
    weight, bias = gradients(model, before, batches, ["last.out_proj.weight", "last.out_proj.bias"])
    assert (weight * masks["last.out_proj.weight"]).abs().max() < 1e-6
    assert bias.abs().max() < 1e-6


class Residual(nn.Module):
    """A block as torchvision has it: the projection of what comes before runs last."""

    alone = False  # to return the projection alone

    def __init__(self, norms: bool, groups: int = 1) -> None:
        super().__init__()
        norm: Any = nn.BatchNorm2d if norms else nn.Identity
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.early = nn.Conv2d(6, 8, 3, padding=1)
        self.one, self.one_norm = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False), norm(6)
        self.two, self.two_norm = nn.Conv2d(6, 4, 3, padding=1, groups=groups, bias=not norms), norm(4)
        self.project, self.project_norm = nn.Conv2d(8, 4, 1, stride=2, bias=not norms), norm(4)
        for each in self.modules():
            if isinstance(each, nn.BatchNorm2d):
                nn.init.uniform_(each.weight, 0.5, 2)
                nn.init.uniform_(each.running_var, 0.5, 2)
                nn.init.normal_(each.running_mean)

    def forward(self, images: Tensor) -> Tensor:
        given = self.early(self.stem(images).relu()).relu()
        found = self.one_norm(self.one(given)).relu()
        found = self.two_norm(self.two(found))
        projected = self.project_norm(self.project(given))
        found += projected
        return projected if self.alone else found


@pytest.mark.parametrize(("norms", "groups"), [(False, 1), (True, 1), (True, 2)])
def test_a_projection_that_runs_later_is_solved_first_and_made_up_for(norms: bool, groups: int) -> None:
    torch.manual_seed(0)
    model = Residual(norms, groups).double().eval()
    batches = list(torch.randn(24, 3, 8, 8, dtype=torch.float64).split(8))
    before, masks = reconstructed(model, batches)
    (two,) = gradients(model, before, batches, ["two.weight"])
    assert (two * masks["two.weight"]).abs().max() < 1e-6
    before.alone = model.alone = True
    (projection,) = gradients(model, before, batches, ["project.weight"])
    assert (projection * masks["project.weight"]).abs().max() < 1e-6


class Mixed(Residual):
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images)


def test_mixed_precision_fits_about_the_same() -> None:
    found = []
    for kind in (Residual, Mixed):
        torch.manual_seed(0)
        model = kind(norms=True).eval()
        reconstructed(model, list(torch.randn(24, 3, 8, 8).split(8)))
        found.append(model.two.weight.data)
    assert not torch.equal(*found)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def both(output: Tensor, given: Tensor, first: Tensor) -> Tensor:
    """The output goes into a sum, and elsewhere."""
    return torch.stack([output + first, output.tanh()])


def written(output: Tensor, given: Tensor, first: Tensor) -> Tensor:
    """The other term changes in between."""
    first[:, 0] = 1
    return output + first


@pytest.mark.parametrize("how", [both, written])
def test_other_sums_are_not_fitted(how: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    batches = list(torch.randn(120, 6, dtype=torch.float64).split(40))
    model = Block(how, nn.Linear(8, 8)).double().eval()
    alone = copy.deepcopy(model)
    alone.add = lambda output, given, first: output
    reconstructed(model, batches)
    reconstructed(alone, batches)
    assert torch.equal(model.last.weight, alone.last.weight)


class Choosing(Block):
    """Runs more functions where an attribute says so."""

    extra = False

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows.sigmoid().logit() if self.extra else rows)


def test_passes_that_run_other_functions_are_fitted_without_the_sum() -> None:
    torch.manual_seed(0)
    batches = list(torch.randn(120, 6, dtype=torch.float64).split(40))
    found = []
    for add, extra in (("plus", True), ("plus", False), (None, False)):
        torch.manual_seed(0)
        how = ADDITIONS[add] if add else lambda output, given, first: output
        model = Choosing(how, nn.Linear(8, 8)).double().eval()
        before = copy.deepcopy(model)
        before.extra = extra
        masks = {"early.weight": torch.rand(8, 8) < 0.6, "last.weight": torch.rand(8, 8) < 0.6}
        for name, mask in masks.items():
            model.get_parameter(name).data.mul_(mask)
        reconstruct_(model, before, masks, Calibration.of(batches), EXACT)
        found.append(model.last.weight.data)
    torch.testing.assert_close(found[0], found[2])
    assert not torch.allclose(found[1], found[2])
