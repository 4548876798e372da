"""Random small networks that are pruned by channels, compacted, and compared in all ways they can be called.

PYTHONPATH=tests python tests/random_networks.py --count 1000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, Global, PerLayer, Pruner, compact

WIDTHS = (4, 6, 8)


@dataclass
class Output:
    logits: Tensor
    feature: Tensor | None = None


class Store:
    """An object of a class of its own, with slots."""

    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, None),
    "dict": lambda logits: {"logits": logits},
    "dataclass": Output,
    "namespace": lambda logits: SimpleNamespace(inner=[SimpleNamespace(logits=logits)]),
    "slots": Store,
    "closure": lambda logits: lambda: logits,
}


# --- blocks: from (batch, width, length) to the same shape


class Plain(nn.Module):
    """Two convolutions, with a norm, in a residual sum or not."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        inner = draw.choice(WIDTHS)
        norms: list[Callable[[int], nn.Module]] = [
            nn.BatchNorm1d,
            lambda _: nn.Identity(),
            lambda c: nn.GroupNorm(2, c),
        ]
        self.layers = nn.Sequential(
            nn.Conv1d(width, inner, 3, padding=1),
            draw.choice(norms)(inner),
            nn.ReLU(),
            nn.Conv1d(inner, width, 1),
        )
        self.residual, self.dropout = draw.random() < 0.5, draw.choice([0.0, 0.2])
        self.batch_size = draw.choice(WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.layers(x), self.dropout, self.training)
        return x + y if self.residual else y


class Heads(nn.Module):
    """Attention whose sizes are attributes, beside numbers that may equal them."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.heads = draw.choice([1, 2, 4])
        self.head_dim = draw.choice([2, 4, 8])
        self.inner = self.heads * self.head_dim
        self.layer_idx, self.window = draw.choice(WIDTHS), draw.choice([2, 4, 8])
        self.fused, self.way = draw.random() < 0.5, draw.choice(["heads", "head_dim", "both"])
        if self.fused:
            self.qkv = nn.Linear(width, 3 * self.inner)
        else:
            self.q, self.k, self.v = (nn.Linear(width, self.inner) for _ in range(3))
        self.out = nn.Linear(self.inner, width)
        self.mask = draw.choice(["none", "buffer", "window"])
        self.register_buffer("causal", torch.full((24, 24), -torch.inf).triu(1))

    def split(self, x: Tensor) -> Tensor:
        heads = -1 if self.way == "head_dim" else self.heads
        size = -1 if self.way == "heads" else self.head_dim
        return x.view(*x.shape[:2], heads, size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = map(self.split, parts)
        scores = q @ k.transpose(-2, -1) * 0.3
        length = x.shape[1]
        if self.mask == "buffer":
            scores = scores + self.causal[:length, :length].to(scores)
        elif self.mask == "window":
            place = torch.arange(length)
            scores = scores.masked_fill((place[:, None] - place).abs() > self.window, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(y).transpose(1, 2)


class Mixed(nn.Module):
    """Reshapes that mix positions into channels, right at one length only, or at all."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.wide, self.back = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(2 * width, width, 1)
        self.width, self.way = width, draw.choice(["flat", "pairs", "fold"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        if self.way == "flat":  # channels and positions change places: the same for one position only
            y = y.reshape(len(y), -1, 2 * self.width).transpose(1, 2)
        elif self.way == "pairs":
            y = y.unflatten(1, (2, -1)).relu().flatten(1, 2)
        else:
            y = y.view(len(y), self.width, -1).relu().view(y.shape)
        return self.back(y)


class Squeezed(nn.Module):
    """A gate of one number a channel, whose dimensions of size 1 are squeezed."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        inner = draw.choice([2, 4])
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.down(x.mean(-1))[:, :, None].squeeze()
        return x * self.up(gate.relu()).sigmoid()[:, :, None]


class Single(nn.Module):
    """A block that casts to single precision and back."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        inner = draw.choice(WIDTHS)
        self.one, self.two = nn.Conv1d(width, inner, 1), nn.Conv1d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu().float().to(x.dtype))


class Fixed(nn.Module):
    """A block that does not run in double precision."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        inner = draw.choice(WIDTHS)
        self.one, self.two = nn.Conv1d(width, inner, 1), nn.Conv1d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise RuntimeError("not in double precision")
        return self.two(self.one(x).relu())


BLOCKS: tuple[Callable[[random.Random, int], nn.Module], ...] = (
    Plain,
    Plain,
    Heads,
    Heads,
    Mixed,
    Squeezed,
    Single,
    Fixed,
)


class Net(nn.Module):
    """A stem, some blocks, and heads of which some are run only in training, for a task, or by nobody."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        width = draw.choice(WIDTHS)
        self.stem = nn.Conv1d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(draw.choice(BLOCKS)(draw, width) for _ in range(draw.choice([1, 1, 2, 3])))
        self.join = draw.choice(["last", "cat"])
        features = width * (2 if self.join == "cat" else 1)
        self.head = nn.Linear(features, 4)
        self.aux = nn.Linear(width, 4) if draw.random() < 0.3 else None
        self.other = nn.Linear(draw.choice([width, features, 5]), 3) if draw.random() < 0.4 else None
        self.container, self.keeps = draw.choice(list(CONTAINERS)), draw.random() < 0.2
        self.num_steps, self.top_k = draw.choice(WIDTHS), draw.choice(WIDTHS)
        self.kept: Tensor | None = None
        self.hooked: list[Tensor] = []
        if draw.random() < 0.2:
            self.stem.register_forward_hook(lambda module, given, output: self.hooked.append(output))

    def forward(self, x: Tensor, task: str = "main") -> Any:
        self.hooked.clear()
        first = self.stem(x)
        y = first
        for block in self.blocks:
            y = block(y)
        if self.keeps:
            self.kept = y
        y = torch.cat([first, y], 1) if self.join == "cat" else y
        feature = y.relu().mean(-1)
        if task == "other":
            assert self.other is not None
            return self.other(feature if self.other.in_features == feature.shape[1] else first.mean(-1))
        logits = self.head(feature)
        if self.training and self.aux is not None:
            logits = logits + self.aux(first.mean(-1))
        return CONTAINERS[self.container](logits)


# --- the property


def tensors_of(value: Any) -> list[Tensor]:
    """Return the logits in an output, written out for each container: independent of the library's search."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [value[0]]
    if isinstance(value, dict):
        return [value["logits"]]
    if isinstance(value, SimpleNamespace):
        return [value.inner[0].logits]
    return [value() if callable(value) else value.logits]


def calls(net: Net, example: Tensor) -> Iterator[tuple[bool, tuple[Any, ...]]]:
    """Yield modes and arguments: other values, batches and lengths, training mode, the other task."""
    generator = torch.Generator().manual_seed(1)
    for training in (False, True):
        for batch, length in ((2, 8), (3, 8), (1, 8), (2, 5), (2, 16), (4, 11)):
            yield training, (torch.randn(batch, 3, length, generator=generator).to(example),)
    if net.other is not None:
        yield False, (example, "other")


def outputs(net: Net, arguments: tuple[Any, ...], *, training: bool) -> list[Tensor]:
    """Return what a call gives and keeps, with dropout off; in double precision, if the network runs in it."""
    net = copy.deepcopy(net).train(training)
    if not any(isinstance(each, Fixed | Single) for each in net.blocks):
        net, arguments = net.double(), (arguments[0].double(), *arguments[1:])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
        if isinstance(module, Plain):
            module.dropout = 0.0
    with torch.no_grad():
        found = tensors_of(net(*arguments))
    return found + ([] if net.kept is None else [net.kept])


def check(seed: int) -> str:
    """Prune and compact one random network, and compare it with the masked one; return what became of it.

    Raises:
        AssertionError: If it differs, does not go on training, or was changed although it was refused.
        CompactionError: If compaction refuses what the analysis has allowed.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    net = Net(draw).to(dtype)
    example = torch.randn(2, 3, 8, dtype=dtype)
    shown = draw.random() < 0.5 and net.other is not None
    given: Any = [example, (example, "other")] if shown else example
    selector = draw.choice([PerLayer(), Global()])
    before = copy.deepcopy(net.state_dict())
    try:
        pruner = Pruner(
            net,
            draw.choice([0.3, 0.6, 0.9]),
            structure=Channels(),
            selector=selector,
            schedule=None,
            example=given,
        )
    except ValueError as error:
        if "finds nothing to prune" not in str(error) and "cannot run on the example" not in str(error):
            raise
        assert all(torch.equal(before[name], each) for name, each in net.state_dict().items())
        return "refused"
    pruner.prune(1.0)
    small = compact(net, pruner.masks, given)
    compared = 0
    for training, arguments in calls(net, example):
        try:
            expected = outputs(net, arguments, training=training)
        except Exception:  # the masked network does not run on this
            continue
        found = outputs(small, arguments, training=training)
        for one, other in zip(expected, found, strict=True):
            assert one.shape == other.shape, f"{arguments[1:]}: {tuple(one.shape)} and {tuple(other.shape)}"
            difference = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
            assert difference < (1e-9 if one.dtype is torch.float64 else 1e-3), f"differ by {difference:.1e}"
            compared += 1
    assert compared
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    small.train()
    tensors_of(small(example))[0].sum().backward()
    optimizer.step()
    return (
        "smaller"
        if sum(map(Tensor.numel, small.parameters())) < sum(map(Tensor.numel, net.parameters()))
        else "same"
    )


def main() -> None:
    """Check many networks, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(dict(Counter(map(result, range(arguments.seed, arguments.seed + arguments.count)))))


def result(seed: int) -> str:
    """Return what became of one network, and print why if it failed."""
    try:
        return check(seed)
    except Exception as error:
        print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        return "failed"


if __name__ == "__main__":
    main()
