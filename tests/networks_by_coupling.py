"""Small networks whose channels are coupled in many ways, with examples and the sizes of their unit groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inward: int, outward: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, 3, padding=1, **options)


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def plain() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.Sigmoid(), head(6))


def residual() -> nn.Module:
    return Net(
        lambda m, x: m.head((y := m.stem(x).relu_()) + m.two(m.one(y).tanh())),
        stem=conv(3, 8),
        one=conv(8, 6),
        two=conv(6, 8),
        head=head(8),
    )


def dense() -> nn.Module:
    return Net(
        lambda m, x: m.head(torch.cat([y := m.one(x).relu(), m.two(y).relu()], 1)),
        one=conv(3, 4),
        two=conv(4, 6),
        head=head(10),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 8),
        nn.ReLU6(inplace=True),
        conv(8, 8, groups=8),
        nn.Hardswish(inplace=True),
        conv(8, 6),
        head(6),
    )


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.BatchNorm2d(12), nn.GELU(), head(12))


def gate() -> nn.Module:
    return Net(
        lambda m, x: m.head(
            (y := m.stem(x).relu()) * m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        ),
        stem=conv(3, 8),
        down=nn.Conv2d(8, 4, 1),
        up=nn.Conv2d(4, 8, 1),
        head=head(8),
    )


def shuffle() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.one(x).relu()
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        return m.head(m.two(y))

    return Net(run, one=conv(3, 8), two=conv(8, 6), head=head(6))


def flat() -> nn.Module:
    return nn.Sequential(
        conv(3, 4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def tied() -> nn.Module:
    twice = conv(6, 6)
    return nn.Sequential(conv(3, 6), twice, nn.ReLU(), twice, nn.BatchNorm2d(6), head(6))


def functional() -> nn.Module:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(7, 3, 3, 3) / 3)
            self.matrix = nn.Parameter(torch.randn(4, 7))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.conv2d(x, self.kernel).relu().mean((2, 3)), self.matrix)

    return Functional()


def transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU(), head(6)
    )


def instance() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.SiLU(), head(8))


def group_norm() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), head(12))


def gated_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GLU(), nn.Linear(6, 3))


def swiglu() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        one, two = m.up(x).chunk(2, dim=-1)
        return x + m.down(F.silu(one) * two)

    return Net(run, up=nn.Linear(6, 20), down=nn.Linear(10, 6))


def slopes() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), nn.Upsample(scale_factor=2), conv(8, 6), nn.Mish(), head(6))


def one_dimension() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(16, 3)
    )


class Wasteful(nn.Module):
    """A residual sum that comes to nothing, as the last one in WaveNet does, has to run all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dead, self.head = conv(3, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        result: Tensor = self.head(x)
        x = x + self.dead(x)
        return result


def for_nothing() -> nn.Module:
    return Wasteful()


class Filtered(nn.Module):
    """Multiplies images, convolves them with a buffer, and projects on another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(8, 3, 3, 3))
        self.register_buffer("projection", torch.randn(6, 9))
        self.one, self.two, self.head = conv(8, 5), nn.Linear(5, 6), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ x.transpose(-1, -2)
        x = self.one(F.conv2d(x, self.kernel).relu()).relu().mean((2, 3))
        result: Tensor = self.head((self.two(x) @ self.projection).cos())
        return result


def buffers() -> nn.Module:
    return Filtered()


class Transposed(nn.Module):
    """A linear layer of its own, as in GPT-2: inputs first, and its width kept in an attribute."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.width = outward
        self.weight = nn.Parameter(torch.randn(inward, outward) / inward**0.5)
        self.bias = nn.Parameter(torch.randn(outward))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.width)


def own_linear() -> nn.Module:
    return nn.Sequential(Transposed(6, 10), nn.GELU(), Transposed(10, 7), nn.GELU(), nn.Linear(7, 2))


def spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(conv(3, 8)), nn.ReLU(), norm(conv(8, 6)), nn.ReLU(), conv(6, 5), head(5))


def filled() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        y[:, :, :1] = 0.5
        result: Tensor = m.head(y)
        return result

    return Net(run, one=conv(3, 8), head=head(8))


class Einsum(nn.Module):
    """Attention in einsums, with parameters of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(6, 4, 4) / 2) for _ in range(2))
        self.v, self.o = nn.Parameter(torch.randn(6, 4, 6) / 2), nn.Parameter(torch.randn(4, 6, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        return torch.einsum("bhnm,bhmd,hdc->bnc", scores, v, self.o)


def einsum() -> nn.Module:
    return Einsum()


class Computed(nn.Module):
    """A kernel of low rank, then one for each image, mixed from a bank."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(12, 4) / 3), nn.Parameter(torch.randn(4, 3) / 3)
        self.bank, self.mix = nn.Parameter(torch.randn(3, 8, 12, 1, 1) / 4), nn.Linear(12, 3)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, (self.left @ self.right)[..., None, None]).relu()
        shares = self.mix(x.mean((2, 3))).softmax(1)
        kernels = torch.einsum("bk,koihw->boihw", shares, self.bank).flatten(0, 1)
        images = x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(images, kernels, groups=len(x)).view(len(x), -1, *x.shape[2:])
        result: Tensor = self.head(y.relu())
        return result


def computed() -> nn.Module:
    return Computed()


def cell() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), m.again.in_features)
        for token in x.unbind(1):
            state = (m.token(token) + m.again(state)).tanh() + torch.ones_like(state) * 0
        result: Tensor = m.head(state)
        return result

    return Net(run, token=nn.Linear(6, 8), again=nn.Linear(8, 8), head=nn.Linear(8, 3))


def scan() -> nn.Module:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.decay, self.out = nn.Linear(6, 8), nn.Parameter(torch.rand(8, 4)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inward(x)
            state = torch.zeros(len(x), x.shape[2], 4).to(x)
            for place in range(x.shape[1]):
                state = state * self.decay + x[:, place, :, None]
            result: Tensor = self.out(state.sum(-1))
            return result

    return Scan()


def recurrent_images() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), m.again.in_channels, *x.shape[2:]).to(x)
        for _ in range(2):
            state = (m.image(x) + m.again(state)).tanh()
        result: Tensor = m.head(state)
        return result

    return Net(run, image=conv(3, 6), again=conv(6, 6), head=head(6))


def neighbours() -> nn.Module:
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.one(x.flatten(0, 1)[:5]).relu()
        x = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        y = m.two(x)[edges[0]]
        total = torch.zeros(len(x), y.shape[1]).to(y)
        y = total.scatter_add_(0, edges[1][:, None].expand_as(y), y)
        result: Tensor = m.three(y.relu())
        return result

    return Net(run, one=nn.Linear(6, 8), two=nn.Linear(8, 7), three=nn.Linear(7, 3))


def directions() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = F.normalize(m.left(x), dim=-1), F.normalize(m.right(x), dim=-1)
        result: Tensor = m.out(left) + (left * right).sum(-1, keepdim=True)
        return result

    return Net(run, left=nn.Linear(6, 8), right=nn.Linear(6, 8), out=nn.Linear(8, 3))


# factory, example, and the number of units of each group, in order
NETS: list[tuple[Callable[[], nn.Module], Tensor, list[int]]] = [
    (plain, IMAGES, [8, 6]),
    (residual, IMAGES, [8, 6]),
    (dense, IMAGES, [4, 6]),
    (depthwise, IMAGES, [8, 6]),
    (grouped, IMAGES, [4, 6]),
    (gate, IMAGES, [8, 4]),
    (shuffle, IMAGES, [4, 6]),
    (flat, IMAGES, [4, 10]),
    (tied, IMAGES, [6]),
    (functional, IMAGES, [7]),
    (transposed, IMAGES, [8, 6]),
    (instance, IMAGES, [8]),
    (group_norm, IMAGES, [4]),
    (gated_linear, TOKENS, [6]),
    (swiglu, TOKENS, [10]),
    (slopes, IMAGES, [8, 6]),
    (one_dimension, TOKENS, [8]),
    (for_nothing, IMAGES, [8]),
    (buffers, IMAGES, [5, 6]),
    (own_linear, TOKENS, [10, 7]),
    (spectral, IMAGES, [8, 6, 5]),
    (filled, IMAGES, [8]),
    (einsum, TOKENS, [4, 4, 6]),
    (computed, IMAGES, [12, 8]),
    (cell, TOKENS, [8]),
    (scan, TOKENS, [8]),
    (recurrent_images, IMAGES, [6]),
    (neighbours, TOKENS, [8, 7]),
    (directions, TOKENS, [8]),
]
ALL = pytest.mark.parametrize(("make", "example", "sizes"), NETS, ids=[make.__name__ for make, *_ in NETS])
