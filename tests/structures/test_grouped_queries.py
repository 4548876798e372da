"""Attention in which several queries share a key and a value: whole groups go, however the code counts them.

Where all queries share them, queries go.
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Heads, Pruner, compact, load_packed, save_packed
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.core.probes import as_probe

WIDTH, QUERIES, KEYS, SIZE = 12, 6, 3, 4
TOKENS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()


class Grouped(nn.Module):
    """Causal attention; ``way`` says which numbers the code needs, and how keys and values are repeated."""

    def __init__(self, way: str, config: SimpleNamespace | None = None) -> None:
        super().__init__()
        self.way, self.head_dim, self.repeats = way, SIZE, QUERIES // KEYS
        if way == "sizes":
            self.query_size, self.key_size = QUERIES * SIZE, KEYS * SIZE
        elif way in ("heads", "kernel", "slices"):
            self.query_heads, self.key_heads = QUERIES, KEYS
        elif way == "configuration":
            self.config = config or SimpleNamespace(query_heads=QUERIES, key_heads=KEYS, name="small")
        if way in ("expand", "repeat"):
            self.query = nn.Linear(WIDTH, QUERIES * SIZE)
            self.key, self.value = (nn.Linear(WIDTH, KEYS * SIZE) for _ in range(2))
        else:
            self.all = nn.Linear(WIDTH, (QUERIES + 2 * KEYS) * SIZE)
        self.out, self.head = nn.Linear(QUERIES * SIZE, WIDTH), nn.Linear(WIDTH, 3)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.way in ("expand", "repeat"):
            return self.query(x), self.key(x), self.value(x)
        if self.way == "sizes":
            return self.all(x).split([self.query_size, self.key_size, self.key_size], -1)
        numbers = self.config if self.way == "configuration" else self
        query, key = numbers.query_heads * self.head_dim, numbers.key_heads * self.head_dim
        if self.way == "slices":
            made = self.all(x)
            return made[..., :query], made[..., query : query + key], made[..., query + key :]
        return self.all(x).split([query, key, key], -1)

    def repeat(self, tensor: Tensor) -> Tensor:
        if self.way == "expand":
            return tensor[:, :, None].expand(-1, -1, self.repeats, -1, -1).flatten(1, 2)
        return tensor.repeat_interleave(self.repeats, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in self.project(x))
        if self.way == "kernel":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), is_causal=True)
        result: Tensor = self.head(x + self.out(y.transpose(1, 2).flatten(2)))
        return result


NUMBERS = {
    "expand": set(),
    "repeat": set(),
    "sizes": {"query_size", "key_size"},
    "heads": {"query_heads", "key_heads"},
    "kernel": {"query_heads", "key_heads"},
    "slices": {"query_heads", "key_heads"},
    "configuration": {"config.query_heads", "config.key_heads"},
}


@pytest.mark.parametrize(("way", "numbers"), NUMBERS.items())
def test_a_key_goes_with_all_queries_that_share_it(way: str, numbers: set[str]) -> None:
    torch.manual_seed(0)
    model = Grouped(way).double().eval()
    pruner = Pruner(model, 1 / 3, structure=Heads(), schedule=None, example=TOKENS)
    (group,) = pruner.groups
    assert (group.size, {key for _, key in group.attributes}) == (KEYS, numbers)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    assert smaller.out.in_features == 4 * SIZE
    assert smaller.repeats == QUERIES // KEYS
    for name in numbers:
        assert attrgetter(name)(smaller) * 3 == attrgetter(name)(model) * 2


def test_modules_that_share_a_configuration_have_numbers_of_their_own_after_a_cut() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(query_heads=QUERIES, key_heads=KEYS, name="small")
    blocks = [Grouped("configuration", config) for _ in range(2)]
    for block in blocks:
        block.head = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(*blocks).double().eval()
    structure = Heads(include="1*")
    pruner = Pruner(model, 1 / 3, structure=structure, schedule=None, example=TOKENS)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    first, second = (block.config for block in smaller)
    assert vars(first) == vars(config) == {"query_heads": 6, "key_heads": 3, "name": "small"}
    assert vars(second) == {"query_heads": 4, "key_heads": 2, "name": "small"}


class Single(SimpleNamespace):
    """There is one for all modules, also in copies of them."""

    def __copy__(self) -> Single:
        return self

    def __deepcopy__(self, memo: object) -> Single:
        return self


class Lazy:
    """Has no attributes, and fails where they are looked for."""

    __slots__ = ()

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name) if name == "__dict__" else AttributeError(name)


def test_a_configuration_that_cannot_be_copied_stays_as_it_is() -> None:
    block = Grouped("configuration", Single(query_heads=QUERIES, key_heads=KEYS)).double()
    block.lazy = Lazy()
    with pytest.raises(ValueError, match=r"Heads.* finds nothing to prune"):
        Heads().units(block, TOKENS)
    assert vars(block.config) == {"query_heads": QUERIES, "key_heads": KEYS}


def test_numbers_of_a_configuration_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Grouped("configuration").double().eval()
    pruner = Pruner(model, 1 / 3, structure=Heads(), schedule=None, example=TOKENS)
    pruner.prune(1.0)
    done = compact_(model, pruner.masks, pruner.groups, as_probe(TOKENS))
    save_packed(model, done.masks, tmp_path / "small.pt", plans=[done.plan])
    fresh = Grouped("configuration").double().eval()
    fresh.config.folder = tmp_path  # no plain value
    load_packed(tmp_path / "small.pt", fresh)
    assert (fresh.config.query_heads, fresh.config.key_heads) == (4, 2)
    assert torch.equal(fresh(TOKENS), model(TOKENS))


class Shared(nn.Module):
    """One layer makes all queries, the key and the value, as in Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = QUERIES, SIZE
        self.all = nn.Linear(WIDTH, (QUERIES + 2) * SIZE)
        self.out, self.head = nn.Linear(QUERIES * SIZE, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.all(x).view(*x.shape[:2], self.heads + 2, self.size)
        q, k, v = (each.transpose(1, 2) for each in (made[..., :-2, :], made[..., [-2], :], made[..., [-1], :]))
        y = (q @ k.mT * self.size**-0.5).softmax(-1) @ v
        result: Tensor = self.head(x + self.out(y.transpose(1, 2).flatten(2)))
        return result


def test_queries_go_alone_where_all_share_one_key() -> None:
    torch.manual_seed(0)
    model = Shared().double().eval()
    pruner = Pruner(model, 1 / 3, structure=Heads(), schedule=None, example=TOKENS)
    (group,) = pruner.groups
    assert (group.size, group.attributes) == (QUERIES, (("", "heads"),))
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    assert (smaller.heads, smaller.all.out_features, smaller.out.in_features) == (4, 6 * SIZE, 4 * SIZE)
    assert torch.equal(smaller.all.weight[-2 * SIZE :], model.all.weight[-2 * SIZE :])
