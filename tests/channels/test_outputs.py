"""Outputs of a network: whatever outlives its forward pass is not cut, and is compared when units go."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightnings import LightningModule
from lit import trainer
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Channels, OneShot, PerLayer, Pruner, PruningCallback, compact

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KEPT: list[Any] = []


@dataclass
class Output:
    features: Tensor


class Mapping(dict[str, Tensor]):
    pass


class Ordered(OrderedDict[str, Tensor]):
    pass


def closure(features: Tensor) -> Callable[[], Tensor]:
    return lambda: features


def cycle(features: Tensor) -> list[Any]:
    """A tensor that nothing but a reference cycle holds."""
    held: list[Any] = [features]
    held.append(held)
    return [features.sum((1, 2, 3))]


class Net(nn.Module):
    """Two convolutions, the features of the first of which go out in some way beside the logits."""

    def __init__(self, out: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)
        self.out = out

    def forward(self, images: Tensor) -> Any:
        features = self.first(images).relu()
        logits = self.head(self.second(features).relu().mean((2, 3)))
        return logits, self.out(features)


class Attribute(Net):
    def forward(self, images: Tensor) -> Any:
        logits, self.seen = super().forward(images)
        return SimpleNamespace(logits=logits)


def pruned(model: nn.Module) -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=IMAGES)
    pruner.prune(1.0)
    return compact(model, pruner.masks, IMAGES), pruner


OUT: dict[str, Callable[[Tensor], Any]] = {
    "a dataclass": Output,
    "a distribution": lambda features: Normal(features, 1.0, validate_args=False),
    "a namespace": lambda features: SimpleNamespace(features=features),
    "a dict": lambda features: {"features": features},
    "a subclass of dict": lambda features: Mapping(features=features),
    "an ordered dict": lambda features: Ordered(features=features),
    "a closure": closure,
    "a list that outlives the network": KEPT.append,
    "its data": lambda features: SimpleNamespace(features=features.data),
    "an array": lambda features: features.numpy(),
    "a view": lambda features: SimpleNamespace(features=features.flatten(1)),
}


@pytest.mark.parametrize("make", [Net, Attribute])
@pytest.mark.parametrize("out", OUT)
def test_what_outlives_the_pass_is_not_cut(make: type[Net], out: str) -> None:
    model = make(OUT[out])
    smaller, pruner = pruned(model)
    assert smaller.first.out_channels == 8
    assert smaller.second.out_channels == 3
    assert "output" in pruner.frozen["first.weight"]
    KEPT.clear()


@pytest.mark.parametrize("out", [lambda features: None, cycle, lambda features: float(features.sum())])
def test_what_does_not_is_cut(out: Callable[[Tensor], Any]) -> None:
    smaller, pruner = pruned(Net(out))
    assert (smaller.first.out_channels, smaller.second.out_channels) == (4, 3)
    assert pruner.frozen == {"head.weight": "is the network's output"}


def test_a_hook_that_keeps_features_keeps_them_whole() -> None:
    model = Net(lambda features: None)
    kept: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: kept.append(output))
    smaller, pruner = pruned(model)
    assert (smaller.first.out_channels, smaller.second.out_channels) == (8, 3)
    assert pruner.frozen["first.weight"] == "is kept after the forward pass, as an output is"


def test_a_part_of_zeros_that_is_written_is_an_output() -> None:
    def written(features: Tensor) -> Tensor:
        filled = torch.zeros(2)
        filled[:1] = features.mean().reshape(1)
        return filled

    smaller, pruner = pruned(Attribute(written))
    assert (smaller.first.out_channels, smaller.second.out_channels) == (8, 3)
    assert pruner.frozen["first.weight"] == "feeds mean, which mixes all channels"


def test_integers_are_compared() -> None:
    class Ranking(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).argsort(-1)

    model = Ranking(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    smaller, _ = pruned(model)
    assert smaller[0].out_channels == 4
    assert torch.equal(smaller(IMAGES), model(IMAGES))


def test_a_model_that_gives_nothing_is_refused() -> None:
    class Silent(nn.Sequential):
        def forward(self, images: Tensor) -> None:
            super().forward(images)

    model = Silent(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ValueError, match="Silent gives no tensor to compare: let forward return its outputs"):
        Pruner(model, 0.5, structure=Channels(), schedule=None, example=IMAGES)


def test_passes_leave_nothing_behind() -> None:
    model = Net(OUT["a dataclass"])
    pruned(model)
    gc.collect()
    before = sum(type(each) in (Tensor, nn.Parameter) for each in gc.get_objects())
    pruned(model)
    gc.collect()
    assert sum(type(each) in (Tensor, nn.Parameter) for each in gc.get_objects()) <= before


def test_a_fit_keeps_what_the_loss_does_not_see(tmp_path: Any) -> None:
    class Retrieval(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6))
            self.label = nn.Linear(6, 4)

        def forward(self, images: Tensor) -> Any:
            embedding = self.body(images)
            return SimpleNamespace(logits=self.label(embedding.relu()), embedding=embedding)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]).logits, batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    model = Retrieval()
    pruning = PruningCallback(
        0.5, structure=Channels(), selector=PerLayer(), schedule=OneShot("1ep"), compact=True
    )
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4), 4)
    trainer(tmp_path, pruning, max_epochs=2).fit(model, data)
    assert model.body[0].out_channels == 4
    found = model(IMAGES)
    assert (found.logits.shape, found.embedding.shape) == ((2, 4), (2, 6))


class Placed(nn.Module):
    """Adds rows of a table to a result that is the network's output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, rows: Tensor) -> Tensor:
        placed = rows + self.table[torch.arange(len(rows)) % 4]
        return placed + self.two(self.one(placed).relu())


def test_a_table_that_stays_has_the_reason_of_its_elements() -> None:
    pruner = Pruner(Placed(), 0.5, structure=Channels(), schedule=None, example=torch.randn(5, 6))
    assert {group.name: group.size for group in pruner.groups} == {"one": 8}
    assert pruner.frozen["table"].startswith("feeds index, which addresses channels by position")
