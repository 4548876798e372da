"""Layers that standardise their weight are known by what they give, and count the inputs that were cut."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.channels.compaction.own_norms import own_norm
from lightning_prune.channels.compaction.replay import expand_, replay_
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.channels.compaction.standardised import Standardised, by_deviation, by_variance
from lightning_prune.core.probes import as_probe

IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Scaled(nn.Conv2d):
    """As in NFNets."""

    def __init__(self, inward: int, outward: int, **settings: Any) -> None:
        super().__init__(inward, outward, 3, padding=1, **settings)
        self.scale, self.eps = 1.7 * self.weight[0].numel() ** -0.5, 1e-6
        self.gain = nn.Parameter(torch.ones(outward, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        rows = F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=self.eps)
        return self._conv_forward(x, rows.reshape_as(self.weight), self.bias)


class Same(nn.Conv2d):
    """As in BiT's, with a padding that depends on the size of the input."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__(inward, outward, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        rows, columns = (max(0, (-(-size // 2) - 1) * 2 + 3 - size) for size in x.shape[2:])
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return F.conv2d(x, weight, None, self.stride)


class Deviation(nn.Conv2d):
    """As in the first weight standardisation."""

    def __init__(self, inward: int, outward: int, groups: int = 1) -> None:
        super().__init__(inward, outward, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class Rows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-6)
        return F.linear(x, weight, self.bias)


def images(layer: Callable[[int, int], nn.Module], outward: int = 6) -> nn.Module:
    return uneven(
        nn.Conv2d(3, 8, 3),
        nn.GELU(),
        layer(8, outward),
        nn.GELU(),
        nn.Conv2d(outward, 5, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def rows(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    return uneven(
        nn.Linear(3, 8), nn.GELU(), layer(8, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)
    )


def uneven(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    return model.double()


def pruned(model: nn.Module, example: Tensor) -> Pruner:
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    return pruner


LAYERS = {
    "scaled": (lambda: images(Scaled), IMAGES, by_variance, 1e-6, False),
    "circular": (lambda: images(partial(Scaled, padding_mode="circular")), IMAGES, by_variance, 1e-6, False),
    "same": (lambda: images(Same), IMAGES, by_variance, 1e-10, True),
    "by deviation": (lambda: images(Deviation), IMAGES, by_deviation, 1e-5, False),
    "linear": (lambda: rows(Rows), ROWS, by_variance, 1e-6, False),
}


@pytest.mark.parametrize(("make", "example", "formula", "eps", "same"), LAYERS.values(), ids=LAYERS)
def test_a_layer_is_known_and_inputs_that_went_count_in_it(
    make: Callable[[], nn.Module], example: Tensor, formula: Callable[..., Tensor], eps: float, same: bool
) -> None:
    model = make()
    form = own_norm(model[2])
    assert isinstance(form, Standardised)
    assert (form.formula, form.eps, form.same, form.width) == (formula, eps, same, 8)
    pruner = pruned(model, example)
    assert [(group.name, group.size) for group in pruner.groups] == [("0", 8), ("2", 6), ("4", 5)]
    small = compact(model, pruner.masks, example)
    assert small[2].weight.shape[:2] == (3, 4)
    expected = model(example)
    torch.testing.assert_close(small(example), expected, rtol=1e-12, atol=1e-12)
    stored = io.BytesIO()
    torch.save(small, stored)
    stored.seek(0)
    exported = torch.export.export(small, (example,)).module()
    for again in (copy.deepcopy(small), torch.load(stored, weights_only=False), exported):
        torch.testing.assert_close(again(example), expected, rtol=1e-12, atol=1e-12)
    least = compact(small, pruned(small, example).masks, example)
    assert least[2].weight.shape[1] == 2
    assert least[2].form.width == 8


def test_of_groups_of_inputs_equally_many_go() -> None:
    model = images(partial(Deviation, groups=2))
    form = own_norm(model[2])
    assert isinstance(form, Standardised)
    assert form.width == 4
    pruner = pruned(model, IMAGES)
    small = compact(model, pruner.masks, IMAGES)
    assert small[2].weight.shape[:2] == (2, 2)
    assert (small[2].in_channels, small[2].groups) == (4, 2)
    torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-12, atol=1e-12)


def test_the_class_of_a_layer_comes_back_with_its_shapes() -> None:
    model = images(Scaled)
    pruner, small = pruned(model, IMAGES), copy.deepcopy(model)
    plan = compact_(small, pruner.masks, None, as_probe(IMAGES)).plan
    assert repr(small[2]) == (
        "NarrowConv2d(4, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), inputs=4 of 8, Scaled)"
    )
    expand_(small, plan)
    assert type(small[2]) is Scaled
    assert torch.equal(small(IMAGES), model(IMAGES))
    assert vars(small[2]).keys() == vars(model[2]).keys()
    fresh = images(Scaled)
    replay_(fresh, plan)
    assert fresh[2].form.width == 8


def test_a_smaller_network_learns_as_the_masked_one() -> None:
    model = images(Scaled)
    pruner = pruned(model, IMAGES)
    small = compact(model, pruner.masks, IMAGES)
    for each in (model, small):
        each(IMAGES).square().sum().backward()
    inward, outward = pruner.masks["2.weight"].any(0)[:, 0, 0], pruner.masks["2.weight"].flatten(1).any(1)
    for name in ("weight", "gain", "bias"):
        expected = getattr(model[2], name).grad[outward]
        expected = expected[:, inward] if name == "weight" else expected
        torch.testing.assert_close(getattr(small[2], name).grad, expected, rtol=1e-11, atol=1e-12)


def test_an_input_that_nothing_reads_any_more_counts_and_stays() -> None:
    model = images(Scaled)
    mask = torch.ones_like(model[2].weight, dtype=torch.bool)
    mask[:, 3] = False
    with torch.no_grad():
        model[2].weight.mul_(mask)
    # the weight that the layer multiplies by is not 0 there
    assert compact(model, {"2.weight": mask}, IMAGES)[2].weight.shape == (6, 8, 3, 3)
    masks = {
        "2.weight": mask,
        "0.weight": mask[0, :, :1, :1, None].expand(8, 3, 3, 3),
        "0.bias": mask[0, :, 0, 0],
    }
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 0
    assert compact(model, masks, IMAGES)[2].weight.shape == (6, 7, 3, 3)


class Shifted(Scaled):
    """Adds to the weight what is not 0 where a formula is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, self.weight, None, padding=1)


class Noisy(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class ByType(nn.Conv2d):
    """As in diffusion models: epsilon is another one in double precision."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        return self._conv_forward(x, (self.weight - mean) * (variance + eps).rsqrt(), self.bias)


def test_what_computes_something_else_keeps_its_inputs() -> None:
    for layer in (Shifted, Noisy):
        model = images(layer)
        assert own_norm(model[2]) is None
        units = Channels().units(model, IMAGES)
        assert [(group.name, group.size) for group in units.groups] == [("2", 6), ("4", 5)]
        assert units.frozen["0.weight"] == (
            "is read by a weight that is standardised over all its inputs, those that are 0 as well (in 2)"
        )


def test_a_constant_that_depends_on_the_type_is_not_known() -> None:
    layer = ByType(8, 6, 3)
    assert own_norm(layer.float()) is None
    assert own_norm(nn.Conv2d(8, 6, 3)) is None
