"""Norms of users' code are known by what they give, and count what was cut out of them."""

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
from lightning_prune.channels.compaction.norm_forms import group_norm, layer_norm, response_norm, rms_norm
from lightning_prune.channels.compaction.own_norms import own_norm
from lightning_prune.channels.compaction.replay import expand_, replay_
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.core.probes import as_probe

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Norm2d(nn.LayerNorm):
    """As in torchvision's ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """As in the first ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(1, keepdim=True)
        x = apart / torch.sqrt(apart.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Root2d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.epsilon, self.gain = width, 0.03, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.movedim(1, -1), (self.width,), self.gain, self.epsilon).movedim(-1, 1)


class Response(nn.Module):
    """As in ConvNeXt-V2, of images with channels first or last."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        shape = (1, width, 1, 1) if first else (1, 1, 1, width)
        self.gamma, self.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.channels, self.positions = (1, (2, 3)) if first else (-1, (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=self.positions, keepdim=True)
        share = size / (size.mean(self.channels, keepdim=True) + 1e-6)
        return self.gamma * (x * share) + self.beta + x


class Last(nn.Sequential):
    """Runs its modules on images with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def unshifted() -> nn.Module:
    """As in timm's MetaFormer."""
    norm = nn.GroupNorm(1, 8, 0.3)
    norm.register_parameter("bias", None)
    return norm


def network(norm: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(),
        nn.GELU(),
        nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    return model.double()


def pruned(model: nn.Module) -> Pruner:
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=IMAGES)
    pruner.prune(1.0)
    return pruner


NORMS = {
    "a subclass of LayerNorm": (lambda: Norm2d(8), layer_norm, 1),
    "without a shift": (lambda: Norm2d(8, bias=False), layer_norm, 1),
    "with an epsilon": (lambda: Norm2d(8, eps=0.3), layer_norm, 1),
    "by hand": (lambda: ByHand(8), layer_norm, 1),
    "a root mean square": (lambda: Root2d(8), rms_norm, 1),
    "one group": (lambda: nn.GroupNorm(1, 8, 0.3), group_norm, 1),
    "one group without a shift": (unshifted, group_norm, 1),
    "responses, channels first": (lambda: Response(8, True), response_norm, 1),
    "responses, channels last": (lambda: Last(Response(8, False)), response_norm, -1),
}


@pytest.mark.parametrize(("norm", "formula", "dim"), NORMS.values(), ids=NORMS)
def test_a_norm_is_known_and_channels_that_went_count_in_it(
    norm: Callable[[], nn.Module], formula: Callable[..., Tensor], dim: int
) -> None:
    model = network(norm)
    whole = next(module for module in model[1].modules() if not isinstance(module, Last))
    form = own_norm(whole)
    assert form is not None
    assert (form.formula, form.dim, form.width) == (formula, dim, 8)
    pruner = pruned(model)
    assert [(group.name, group.size) for group in pruner.groups] == [("0", 8), ("3", 6)]
    small = compact(model, pruner.masks, IMAGES)
    assert {each.numel() for each in small[1].parameters()} == {4}
    expected = model(IMAGES)
    torch.testing.assert_close(small(IMAGES), expected, rtol=1e-12, atol=1e-12)
    stored = io.BytesIO()
    torch.save(small, stored)
    stored.seek(0)
    exported = torch.export.export(small, (IMAGES,)).module()
    for again in (copy.deepcopy(small), torch.load(stored, weights_only=False), exported):
        torch.testing.assert_close(again(IMAGES), expected, rtol=1e-12, atol=1e-12)
    least = compact(small, pruned(small).masks, IMAGES)
    assert {each.numel() for each in least[1].parameters()} == {2}


def test_the_class_of_a_norm_comes_back_with_its_shapes() -> None:
    model = network(lambda: Norm2d(8))
    pruner, small = pruned(model), copy.deepcopy(model)
    plan = compact_(small, pruner.masks, None, as_probe(IMAGES)).plan
    assert repr(small[1]) == "NarrowNorm(4 of 8, Norm2d)"
    expand_(small, plan)
    assert type(small[1]) is Norm2d
    assert torch.equal(small(IMAGES), model(IMAGES))
    assert vars(small[1]).keys() == vars(model[1]).keys()
    fresh = network(lambda: Norm2d(8))
    replay_(fresh, plan)
    assert fresh[1].form.width == 8


def test_the_numbers_of_a_group_norm_come_back_with_its_shapes() -> None:
    model = network(lambda: nn.GroupNorm(1, 8))
    pruner, small = pruned(model), copy.deepcopy(model)
    plan = compact_(small, pruner.masks, None, as_probe(IMAGES)).plan
    assert plan.attributes["1"] == {"num_channels": (8, 4)}
    expand_(small, plan)
    assert repr(small[1]) == repr(model[1])
    assert torch.equal(small(IMAGES), model(IMAGES))


class Turned(nn.LayerNorm):
    """As in SqueezeBERT: the norm of PyTorch, on sequences with channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.LayerNorm.forward(self, x.permute(0, 2, 1)).permute(0, 2, 1)


def test_a_norm_of_sequences_with_channels_first_is_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 1), Turned(8, eps=1e-12), nn.GELU(), nn.Conv1d(8, 6, 1), nn.GELU(), nn.Conv1d(6, 4, 1)
    ).double()
    form = own_norm(model[1])
    assert form is not None
    assert (form.formula, form.dim, form.width, form.eps) == (layer_norm, 1, 8, 1e-12)
    words = torch.randn(2, 3, 5, dtype=torch.float64)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=words)
    assert [(group.name, group.size) for group in pruner.groups] == [("0", 8), ("3", 6)]
    pruner.prune(1.0)
    small = compact(model, pruner.masks, words)
    assert small[1].weight.shape == (4,)
    torch.testing.assert_close(small(words), model(words), rtol=1e-12, atol=1e-12)


class ByType(ByHand):
    """As in diffusion models: epsilon is another one in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-6
        variance, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        return self.weight[:, None, None] * (x - mean) * (variance + eps).rsqrt() + self.bias[:, None, None]


def test_a_constant_has_to_be_that_of_the_type_of_the_norm() -> None:
    assert own_norm(ByType(8).float()) is None
    form = own_norm(ByType(8).double())
    assert form is not None
    assert form.eps == 1e-6


class Shifted(Norm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Noisy(Norm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Centred(nn.Module):
    """No norm, but a mean over all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) * self.weight[:, None, None]


@pytest.mark.parametrize("norm", [partial(Shifted, 8), partial(Noisy, 8), Centred])
def test_what_computes_something_else_is_no_norm_and_keeps_its_width(norm: Callable[[], nn.Module]) -> None:
    model = network(norm)
    assert own_norm(model[1]) is None
    units = Channels().units(model, IMAGES)
    assert [(group.name, group.size) for group in units.groups] == [("3", 6)]
    assert units.frozen["0.weight"].endswith("which mixes all channels (in 1)")


class Told(nn.Module):
    """Puts a learned token before others."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.token.expand(len(x), 1, 8), x.flatten(1, -2)], 1)


class Pair(Told):
    def forward(self, x: Tensor) -> Any:
        return x * self.token, x


class Single(Told):
    def forward(self, x: Tensor) -> Any:
        return (x * self.token).float()


@pytest.mark.parametrize("kind", [Told, Pair, Single])
def test_what_gives_another_shape_or_type_is_no_norm(kind: Callable[[], nn.Module]) -> None:
    assert own_norm(kind()) is None
