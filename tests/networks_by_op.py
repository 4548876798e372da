"""Small networks around one op each, by the row of the table in docs/channels.md that says what goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from networks_by_coupling import IMAGES, TOKENS, Net, conv, head
from torch import Tensor, nn
from torch.nn import functional as F

VOLUMES = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
Run = Callable[[Any, Tensor], Tensor]


class Case(NamedTuple):
    """A network with an op.

    Attributes:
        row: What the op belongs to, as the table in docs/channels.md calls it.
        name: Name of the op.
        make: Makes the network.
        example: An input.
        sizes: The number of units of each group, in order.
    """

    row: str
    name: str
    make: Callable[[], nn.Module]
    example: Tensor
    sizes: list[int]


class Fixed(nn.Module):
    """Holds a tensor that does not train."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)


def of_images(op: Run, after: int = 8, *, width: int = 8, **layers: nn.Module) -> nn.Module:
    """Two convolutions, with ``op`` between them that makes ``after`` channels of ``width``."""
    return Net(
        lambda m, x: m.head(m.two(op(m, m.one(x).relu())).relu()),
        one=conv(3, width),
        two=conv(after, 6),
        head=head(6),
        **layers,
    )


def of_tokens(op: Run, after: int = 8, **layers: nn.Module) -> nn.Module:
    return Net(
        lambda m, x: m.out(m.two(op(m, m.one(x).relu())).relu()),
        one=nn.Linear(6, 8),
        two=nn.Linear(after, 7),
        out=nn.Linear(7, 3),
        **layers,
    )


def of_volumes(op: Run) -> nn.Module:
    return Net(
        lambda m, x: m.out(m.two(op(m, m.one(x).relu())).relu().mean((2, 3, 4))),
        one=nn.Conv3d(3, 8, 3, padding=1),
        two=nn.Conv3d(8, 7, 3, padding=1),
        out=nn.Linear(7, 3),
    )


def images(row: str, name: str, op: Run, after: int = 8, sizes: Any = (8, 6), **layers: Any) -> Case:
    def make() -> nn.Module:
        return of_images(op, after, **{key: layer() for key, layer in layers.items()})

    return Case(row, name, make, IMAGES, list(sizes))


def tokens(row: str, name: str, op: Run, sizes: Any = (8, 7), **layers: Any) -> Case:
    def make() -> nn.Module:
        return of_tokens(op, **{key: layer() for key, layer in layers.items()})

    return Case(row, name, make, TOKENS, list(sizes))


def volumes(row: str, name: str, op: Run) -> Case:
    return Case(row, name, lambda: of_volumes(op), VOLUMES, [8, 7])


# --- splits in unequal parts


def split_off(m: Any, y: Tensor) -> Tensor:
    first, rest = torch.split(y, [m.part.in_channels, y.shape[1] - m.part.in_channels], 1)
    return torch.cat([m.part(first), rest], 1)


def cut_off(m: Any, y: Tensor) -> Tensor:
    return torch.cat([m.part(y[:, : m.part.in_channels]), y[:, m.part.in_channels :]], 1)


class State(nn.Module):
    """A state and what it is computed from, of one convolution, as in RAFT."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.context = 6, 5
        self.both, self.next, self.head = conv(3, 11), conv(11, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        state, context = torch.split(self.both(x), [self.hidden, self.context], 1)
        for _ in range(2):
            state = self.next(torch.cat([state.tanh(), context.relu()], 1))
        result: Tensor = self.head(state)
        return result


class Partial(nn.Module):
    """A block that convolves some of its channels and passes the others, as in FasterNet."""

    def __init__(self, some: int = 3) -> None:
        super().__init__()
        self.some, self.others = some, 8 - some
        self.spatial, self.wide, self.narrow = conv(some, some), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def sizes(self) -> Sequence[int]:
        return self.some, self.others

    def forward(self, x: Tensor) -> Tensor:
        some, others = torch.split(x, self.sizes(), 1)
        result: Tensor = x + self.narrow(self.wide(torch.cat([self.spatial(some), others], 1)).relu())
        return result


class Listed(Partial):
    """Keeps the sizes in one attribute, as Inception-NeXt does."""

    def __init__(self, kind: type[list[int]] | type[tuple[int, ...]]) -> None:
        super().__init__()
        self.both = kind((self.some, self.others))
        del self.some, self.others

    def sizes(self) -> Sequence[int]:
        return self.both


def partial_blocks(count: int, block: Callable[[], nn.Module] = Partial) -> nn.Module:
    return nn.Sequential(conv(3, 8), *(block() for _ in range(count)), head(8))


# --- zeros and the like


class Cell(nn.Module):
    """A ConvLSTM whose first state is 0."""

    def __init__(self, zeros: Callable[..., Tensor]) -> None:
        super().__init__()
        self.zeros, self.width = zeros, 7
        self.stem, self.gates, self.head = conv(3, 5), conv(5 + 7, 4 * 7), head(7)

    def forward(self, x: Tensor) -> Tensor:
        feature = self.stem(x).relu()
        state = memory = self.zeros(feature, (len(x), self.width, *x.shape[2:]))
        for _ in range(2):
            i, f, o, new = self.gates(torch.cat([feature, state], 1)).chunk(4, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * new.tanh()
            state = o.sigmoid() * memory.tanh()
        result: Tensor = self.head(state)
        return result


def gated_cell(m: Any, x: Tensor) -> Tensor:
    states = x.new_zeros(*x.shape[:2], m.new.out_features)
    state = x.new_zeros(len(x), m.new.out_features)
    for place, token in enumerate(x.unbind(1)):
        update, reset = m.gates(torch.cat([token, state], 1)).sigmoid().chunk(2, 1)
        new = m.new(torch.cat([token, reset * state], 1)).tanh()
        state = (1 - update) * new + update * state
        states[:, place] = state
    result: Tensor = m.head(states)
    return result


def make_gated_cell() -> nn.Module:
    return Net(gated_cell, gates=nn.Linear(14, 16), new=nn.Linear(14, 8), head=nn.Linear(8, 3))


def framed(m: Any, y: Tensor) -> Tensor:
    wide = y.new_zeros(*y.shape[:2], y.shape[2] + 2, y.shape[3] + 2)
    wide[:, :, 1:-1, 1:-1] = y
    return wide


class Spectral(nn.Module):
    """Low frequencies among zeros, each with a weight of its own, as in a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 7
        self.low, self.high = (nn.Parameter(torch.randn(8, 7, 2, 2, 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft2(x)
        mixed = torch.zeros(len(x), self.out_channels, *found.shape[2:], dtype=found.dtype)
        for weight, rows in ((self.low, slice(0, 2)), (self.high, slice(-2, None))):
            part, complex_weight = found[:, :, rows, :2], torch.view_as_complex(weight)
            mixed[:, :, rows, :2] = torch.einsum("bixy,ioxy->boxy", part, complex_weight)
        return torch.fft.irfft2(mixed, s=x.shape[2:])


def shortcut(widen: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A residual block whose shortcut gets as many zeros as it has channels, as in ResNets for CIFAR."""
    return lambda: Net(
        lambda m, x: m.head((widen(y := m.one(x).relu()) + m.three(m.two(y).relu())).relu()),
        one=conv(3, 8),
        two=conv(8, 7),
        three=conv(7, 16),
        head=head(16),
    )


# --- fixed filters


def blur() -> Fixed:
    line = torch.tensor([1.0, 2.0, 1.0])
    return Fixed((line[:, None] * line / 16)[None, None])


class Blur(Fixed):
    """Takes the number of channels from an attribute, as timm's and kornia's layers do.

    Args:
        channels: The number.
        spread: Makes of one filter those of all channels, in a buffer or for each pass.
    """

    def __init__(self, channels: int, spread: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__(blur().values if spread else blur().values.repeat(channels, 1, 1, 1))
        self.channels, self.spread = channels, spread or (lambda filters, count: filters)

    def forward(self, y: Tensor) -> Tensor:
        filters = self.spread(self.values, self.channels)
        return F.conv2d(y, filters, stride=2, padding=1, groups=self.channels)


def boxes(one: Tensor, count: int) -> Tensor:
    """Filters of a constant in the code, in place of those of a buffer."""
    return torch.tensor([[1.0, 2.0, 1.0]]).to(one).expand(count, 1, 1, 3)


def blurred(m: Any, y: Tensor, spread: Callable[[Tensor, int], Tensor]) -> Tensor:
    return F.conv2d(y, spread(m.blur.values, y.shape[1]), stride=2, padding=1, groups=y.shape[1])


# --- positions


def unpooled(m: Any, y: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(pooled, places, 2)


def averaged_windows(m: Any, y: Tensor) -> Tensor:
    return F.unfold(y, 3, padding=1).view(*y.shape[:2], 9, *y.shape[2:]).mean(2)


def embedded_patches() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.patches(F.unfold(m.one(x).relu(), 2, stride=2).transpose(1, 2)).relu()),
        one=conv(3, 8),
        patches=nn.Linear(32, 7),
        out=nn.Linear(7, 3),
    )


def warped(m: Any, y: Tensor) -> Tensor:
    return F.grid_sample(y, m.flow(y).permute(0, 2, 3, 1).tanh(), align_corners=False)


def gathered(m: Any, y: Tensor) -> Tensor:
    order = torch.arange(y.shape[1]).flip(0)[None, :, None].repeat(len(y), 1, y.shape[2])
    return torch.gather(y, 1, order)


def assigned(m: Any, y: Tensor) -> Tensor:
    y = y.clone()
    y[:, torch.tensor([0, 2])] = y[:, :2] * 2
    y[torch.zeros(y.shape[:2], dtype=torch.bool)] = 0.5
    return y


def embedded(count: int) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(count, 4)


def placed(m: Any, y: Tensor) -> Tensor:
    """Add a position embedding, half of which is for rows and half for columns."""
    columns, rows = m.columns.weight.repeat(2, 1, 1), m.rows.weight[:, None].repeat(1, 3, 1)
    return y + torch.cat([columns, rows], -1).flatten(0, 1)[: y.shape[1]]


def clipped(m: Any, y: Tensor) -> Tensor:
    """Write one number where a mask of all elements says so."""
    y = y.clone()
    y[y < 0.1] = 0.1
    return y


def by_rows(m: Any, y: Tensor) -> Tensor:
    """Fill zeros row by row, as where each level of a pyramid pools the regions of its size."""
    rows = y.flatten(0, 1)
    filled = torch.zeros(rows.shape, dtype=y.dtype)
    for first in (0, 1):
        numbers = torch.arange(first, len(rows), 2)
        filled[numbers] = rows[numbers] * (first + 1)
    return filled.view_as(y)


# --- weights that are computed, and products


class StandardisedConv(nn.Conv2d):
    """Scales the weight of each output to mean 0 and variance 1, as in NFNets."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__(inward, outward, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(outward, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(rows, None, None, self.gain.view(-1) * 0.1, training=True, momentum=0.0)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias, padding=1)


def standardised() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), StandardisedConv(8, 7), nn.ReLU(), conv(7, 6), nn.ReLU(), head(6)
    )


def bilinear() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.both(m.one(x).relu(), m.two(x).relu()).relu()),
        one=nn.Linear(6, 8),
        two=nn.Linear(6, 7),
        both=nn.Bilinear(8, 7, 5),
        out=nn.Linear(5, 3),
    )


def distances() -> nn.Module:
    """Of each token to itself, and to the token before it."""
    return Net(
        lambda m, x: m.out(
            torch.cdist(m.one(x).relu(), m.two(x.roll(1, 1)).relu()).diagonal(0, 1, 2)[..., None] * m.gain(x)
        ),
        one=nn.Linear(6, 8),
        two=nn.Linear(6, 8),
        gain=nn.Linear(6, 7),
        out=nn.Linear(7, 3),
    )


def numbers(x: Tensor) -> Tensor:
    """Return whole numbers below 10, in place of those of words."""
    return (x * 3).abs().long().clamp(max=9)


def bags() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        rows = x.flatten(1)
        result: Tensor = m.out((m.bags(numbers(rows)) + m.one(rows)).relu())
        return result

    return Net(run, bags=nn.EmbeddingBag(10, 8), one=nn.Linear(30, 8), out=nn.Linear(8, 3))


def words_alone(
    words: Callable[[int, int], nn.Module] = nn.Embedding,
    reader: Callable[[int, int], nn.Module] = nn.Linear,
    read: Run = lambda m, y: m.reader(y),
) -> Callable[[], nn.Module]:
    """A network in which nothing but an embedding makes the width that a layer reads."""
    return lambda: Net(
        lambda m, x: m.out(read(m, m.words(numbers(x[..., 0]))).relu()),
        words=words(10, 8),
        reader=reader(8, 7),
        out=nn.Linear(7, 3),
    )


def predicted_words() -> nn.Module:
    """The mean of a text's words, compared with each word."""
    return Net(lambda m, x: m.words(numbers(x[..., 0])).mean(1) @ m.words.weight.T, words=nn.Embedding(10, 8))


def joined_words() -> nn.Module:
    return Net(
        lambda m, x: m.out(
            m.two(torch.cat([m.words(numbers(x[..., 0])), m.kinds(numbers(x[..., 1]))], -1)).relu()
        ),
        words=nn.Embedding(10, 8),
        kinds=nn.Embedding(10, 4),
        two=nn.Linear(12, 7),
        out=nn.Linear(7, 3),
    )


# --- complex numbers


def turned(x: Tensor) -> Tensor:
    """Turn pairs of numbers by angles that grow with the position, as LLaMA does."""
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def rotary(m: Any, x: Tensor) -> Tensor:
    query, key, value = (layer(x).view(*x.shape[:2], -1, 4) for layer in (m.query, m.key, m.value))
    query, key, value = (each.transpose(1, 2) for each in (turned(query), turned(key), value))
    mixed = (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value
    result: Tensor = m.out(mixed.transpose(1, 2).flatten(2))
    return result


def make_rotary() -> nn.Module:
    layers = {name: nn.Linear(6, 12) for name in ("query", "key", "value")}
    return Net(rotary, **layers, out=nn.Linear(12, 6))


def correlated_with_itself(m: Any, y: Tensor) -> Tensor:
    """Correlate each channel with itself, as Autoformer does with queries and keys."""
    spectrum = torch.fft.rfft(y, dim=1)
    return torch.fft.irfft(spectrum * torch.conj(spectrum), n=y.shape[1], dim=1)


def filtered(m: Any, y: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(y) * 2, s=y.shape[-2:])


# --- graphs by hand

FROM, TO = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([1, 0, 2, 1, 4, 3])


def nodes(run: Run, **layers: nn.Module) -> Callable[[], nn.Module]:
    """A network on five nodes with six edges."""
    return lambda: Net(lambda m, x: run(m, x.flatten(0, 1)[:5]), **layers)


def summed(rows: Tensor) -> Tensor:
    index = TO.view(-1, *[1] * (rows.ndim - 1)).expand_as(rows)
    return rows.new_zeros(5, *rows.shape[1:]).scatter_add_(0, index, rows)


def graph_convolution(m: Any, x: Tensor) -> Tensor:
    for layer in (m.one, m.two):
        x = layer(x.relu())
        x = torch.zeros_like(x).index_add_(0, TO, x.index_select(0, FROM) * 0.7)
    return x


def pooled_neighbours(m: Any, x: Tensor, reduce: str) -> Tensor:
    x = m.one(x).relu()
    index = TO[:, None].expand(-1, x.shape[1])
    result: Tensor = m.two(x.new_zeros(x.shape).scatter_reduce_(0, index, x[FROM], reduce, include_self=False))
    return result


def with_loops(m: Any, x: Tensor) -> Tensor:
    """Edges with those of each node to itself, in which node numbers are joined with expanded ones."""
    loops = torch.arange(5)[None].expand(2, -1)
    start, end = torch.cat([torch.stack([FROM, TO]), loops], 1)
    hidden = m.one(x).relu()
    result: Tensor = m.two(torch.zeros_like(hidden).index_add_(0, end, hidden[start]))
    return result


class GraphAttention(nn.Module):
    """Attention of each node to its neighbours, of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.lift, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.score = nn.Parameter(torch.randn(1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lift(x.flatten(0, 1)[:5]).view(-1, 2, self.width)
        scores = (hidden * self.score).sum(-1)
        scores = F.leaky_relu(scores[FROM] + scores[TO], 0.2)
        index = TO[:, None].expand_as(scores)
        largest = scores.new_zeros(5, 2).scatter_reduce_(0, index, scores, "amax", include_self=False)
        weights = (scores - largest[TO]).exp()
        weights = weights / summed(weights)[TO]
        result: Tensor = self.out(summed(hidden[FROM] * weights[..., None]).flatten(1).relu())
        return result


def sparse(m: Any, x: Tensor) -> Tensor:
    edges = torch.sparse_coo_tensor(
        torch.stack([TO, FROM]), torch.ones(6, dtype=x.dtype), (5, 5), check_invariants=True
    )
    return torch.sparse.mm(edges, m.two((edges @ m.one(x)).relu()))


def two_linear() -> dict[str, nn.Module]:
    return {"one": nn.Linear(6, 8), "two": nn.Linear(8, 3)}


CASES = [
    images("splits in unequal parts", "split", split_off, sizes=(2, 6, 6, 2), part=partial(conv, 2, 2)),
    images("splits in unequal parts", "slices", cut_off, sizes=(2, 6, 6, 2), part=partial(conv, 2, 2)),
    Case("splits in unequal parts", "state", State, IMAGES, [6, 5]),
    Case("splits in unequal parts", "partial", partial(partial_blocks, 1), IMAGES, [3, 5, 3, 12]),
    Case("splits in unequal parts", "stage", partial(partial_blocks, 2), IMAGES, [3, 5, 3, 12, 3, 12]),
    Case(
        "splits in unequal parts",
        "one of them a third of the other",
        partial(partial_blocks, 2, partial(Partial, 6)),
        IMAGES,
        [6, 2, 6, 12, 6, 12],
    ),
    *(
        Case(
            "splits in unequal parts",
            f"{kind.__name__} of sizes",
            partial(partial_blocks, 2, partial(Listed, kind)),
            IMAGES,
            [3, 5, 3, 12, 3, 12],
        )
        for kind in (tuple, list)
    ),
    images("slices", "first", lambda m, y: torch.cat([y, y[:, :3].tanh()], 1), 11, (5, 6)),
    images("slices", "middle", lambda m, y: torch.cat([y, y[:, 2:5].tanh()], 1), 11, (3, 6)),
    images("slices", "one", lambda m, y: y * y[:, 2, None].sigmoid(), sizes=(5, 6)),
    images("slices", "last", lambda m, y: y[:, :-2] * y[:, -1, None].sigmoid(), 6, (6, 6)),
    images("slices", "list of one", lambda m, y: y[:, :-2] * y[:, [-2]].sigmoid(), 6, (6, 6)),
    images("slices", "even and odd", lambda m, y: y[:, ::2] * y[:, 1::2], 4, (4, 6)),
    images("zeros and the like", "new_full", lambda m, y: y + y.new_full(y.shape, 2.0)),
    images("zeros and the like", "new_empty", lambda m, y: y + y.new_empty(1).fill_(2.0)),
    images("zeros and the like", "written into", framed),
    images("zeros and the like", "of a part", lambda m, y: m.mix(y), 7, (8, 6, 7), mix=Spectral),
    images("zeros and the like", "joined", lambda m, y: torch.cat([y, torch.zeros_like(y)], 1), 16),
    images("zeros and the like", "joined, as many", lambda m, y: torch.cat([y, y.new_zeros(y.shape)], 1), 16),
    images(
        "zeros and the like",
        "joined, as many by chance",
        lambda m, y: torch.cat([y, y.new_zeros(len(y), 8, *y.shape[2:])], 1),
        16,
    ),
    *(
        Case("zeros and the like", f"shortcut by {name}", shortcut(widen), IMAGES, [8, 7])
        for name, widen in (
            ("pad", lambda y: F.pad(y, (0, 0, 0, 0, 4, 4))),
            ("cat", lambda y: torch.cat([y, torch.zeros(y.shape).to(y)], 1)),
            ("zeros_like", lambda y: torch.cat([torch.zeros_like(y), y], 1)),
        )
    ),
    Case("zeros and the like", "zeros", lambda: Cell(lambda y, size: torch.zeros(size).to(y)), IMAGES, [5, 7]),
    Case("zeros and the like", "new_zeros", lambda: Cell(lambda y, size: y.new_zeros(size)), IMAGES, [5, 7]),
    Case("zeros and the like", "gated cell", make_gated_cell, TOKENS, [8]),
    images(
        "one filter for all channels",
        "expand",
        partial(blurred, spread=lambda one, count: one.expand(count, -1, -1, -1)),
        blur=blur,
    ),
    images(
        "one filter for all channels",
        "repeat",
        partial(blurred, spread=lambda one, count: one.repeat(count, 1, 1, 1)),
        blur=blur,
    ),
    *(
        images(
            "one filter for all channels",
            f"{name}, by an attribute",
            lambda m, y: m.again(m.blur(y).tanh()),
            blur=partial(Blur, 8, spread),
            again=partial(Blur, 8, spread),
        )
        for name, spread in (
            ("in a buffer", None),
            ("expanded", lambda one, count: one.expand(count, -1, -1, -1)),
            ("a constant", boxes),
        )
    ),
    images("channels to positions", "pixel_unshuffle", lambda m, y: F.pixel_unshuffle(y, 2), 32),
    images("channels to positions", "pixel_shuffle", lambda m, y: F.pixel_shuffle(y, 2), 2, (2, 6)),
    images("channels to positions", "channel_shuffle", lambda m, y: F.channel_shuffle(y, 2), 8, (4, 6)),
    images("windows", "unfold", averaged_windows),
    images("windows", "fold", lambda m, y: F.fold(F.unfold(y, 2, stride=2), y.shape[2:], 2, stride=2)),
    images("windows", "Tensor.unfold", lambda m, y: y.unfold(2, 2, 2).mean(-1)),
    Case("windows", "patches", embedded_patches, IMAGES, [8, 7]),
    images("padding and pooling", "circular", lambda m, y: F.pad(y, (1, 2, 2, 1), "circular")),
    volumes("padding and pooling", "reflect", lambda m, y: F.pad(y, (1,) * 6, "reflect")),
    volumes("padding and pooling", "replicate", lambda m, y: F.pad(y, (1, 0) * 3, "replicate")),
    volumes("padding and pooling", "adaptive_max_pool3d", lambda m, y: F.adaptive_max_pool3d(y, 2)),
    images("padding and pooling", "max_unpool2d", unpooled),
    images("padding and pooling", "tril", lambda m, y: y.tril()),
    images("reads at positions", "grid_sample", warped, flow=partial(conv, 8, 2)),
    tokens("reads at positions", "gather", gathered),
    tokens("reads at positions", "sorted", lambda m, y: y.gather(1, y.argsort(1))),
    tokens("reads at positions", "index_put", assigned),
    tokens("reads at positions", "index_put of rows", by_rows),
    tokens("reads at positions", "index_put of a number", clipped),
    images(
        "sums, order and spectra of other dimensions", "logsumexp", lambda m, y: y.logsumexp(2, keepdim=True)
    ),
    tokens("sums, order and spectra of other dimensions", "sort", lambda m, y: y.sort(1)[0]),
    tokens("sums, order and spectra of other dimensions", "topk", lambda m, y: y.topk(2, 1)[0]),
    tokens("sums, order and spectra of other dimensions", "median", lambda m, y: y.median(1, keepdim=True)[0]),
    tokens("sums, order and spectra of other dimensions", "kthvalue", lambda m, y: y.kthvalue(2, 1, True)[0]),
    tokens("sums, order and spectra of other dimensions", "cummax", lambda m, y: y.cummax(1)[0]),
    tokens("sums, order and spectra of other dimensions", "fft", lambda m, y: torch.fft.fft(y, dim=1).real),
    images("sums, order and spectra of other dimensions", "rfft2", filtered),
    tokens("sums, order and spectra of other dimensions", "conj", correlated_with_itself),
    Case("weights standardised over their inputs", "sub", standardised, IMAGES, [8, 7, 6]),
    Case("products and distances of two layers", "Bilinear", bilinear, TOKENS, [8, 7, 5]),
    Case("products and distances of two layers", "cdist", distances, TOKENS, [8, 7]),
    Case("products and distances of two layers", "cdist of many", distances, TOKENS.repeat(1, 8, 1), [8, 7]),
    Case("embeddings", "EmbeddingBag", bags, TOKENS, [8]),
    Case("embeddings", "Linear reads", words_alone(), TOKENS, [8, 7]),
    Case("embeddings", "of a bag", words_alone(nn.EmbeddingBag), TOKENS, [8, 7]),
    Case(
        "embeddings",
        "LSTM reads",
        words_alone(reader=nn.LSTM, read=lambda m, y: m.reader(y)[0]),
        TOKENS,
        [8, 7],
    ),
    Case("embeddings", "joined", joined_words, TOKENS, [8, 4, 7]),
    Case("embeddings", "tied", predicted_words, TOKENS, [8]),
    tokens("embeddings", "halves", placed, [4, 4, 7], columns=embedded(3), rows=embedded(2)),
    Case("rotary embeddings", "view_as_complex", make_rotary, TOKENS, [3]),
    Case("graph layers by hand", "index_add", nodes(graph_convolution, **two_linear()), TOKENS, [8]),
    *(
        Case(
            "graph layers by hand",
            reduce,
            nodes(partial(pooled_neighbours, reduce=reduce), **two_linear()),
            TOKENS,
            [8],
        )
        for reduce in ("mean", "amax")
    ),
    Case("graph layers by hand", "edges to themselves", nodes(with_loops, **two_linear()), TOKENS, [8]),
    Case("graph layers by hand", "attention", GraphAttention, TOKENS, [4]),
    Case("graph layers by hand", "sparse", nodes(sparse, **two_linear()), TOKENS, [8]),
]

# the other rows of the table, and the networks of networks_by_coupling.py that show them
ROWS_OF_NETS = {
    "convolutions and linear layers": "plain depthwise grouped flat functional transposed one_dimension"
    " own_linear",
    "residual sums, products and gates": "residual gate tied gated_linear swiglu slopes for_nothing directions",
    "concatenation and shuffling": "dense shuffle",
    "norms": "instance group_norm",
    "computed weights and buffers": "buffers spectral computed filled",
    "recurrent cells and attention by hand": "einsum cell scan recurrent_images neighbours",
}
