"""Configs of compacted models: their class makes them anew, or the error names what no size says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner, compact, update_config

TOKENS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Inner:
    """A config within a config."""

    def __init__(self, inner: int = 12) -> None:
        self.inner = inner

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class Config:
    """Sizes as configs have them: plain, worked out unless given, in a list, in another config."""

    def __init__(self, heads: int = 4, size: int | None = None, inner: int = 12, last: int = 6) -> None:
        self.width, self.heads, self.size = 8, heads, size
        self.wide = Inner(inner)
        self.lasts = [last, 3]
        self.layers = 2


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.size = config.size or config.width // config.heads
        self.queries = nn.Linear(config.width, self.heads * self.size)
        self.wide = nn.Linear(self.heads * self.size, config.wide.inner)
        self.narrow = nn.Linear(config.wide.inner, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.queries(tokens).unflatten(-1, (self.heads, self.size))
        mixed = torch.softmax(queries @ queries.mT / self.size, -1) @ queries
        return tokens + self.narrow(self.wide(mixed.flatten(-2)).relu())


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        first, last = config.lasts
        self.head = nn.Sequential(nn.Linear(config.width, first), nn.ReLU(), nn.Linear(first, last))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"result": self.head(self.blocks(tokens))}


def cut(**sizes: int) -> Model:
    """A model of these sizes, with the config of the dense one, as after compaction."""
    torch.manual_seed(0)
    model = Model(Config(**sizes))
    model.config = Config()
    return model


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (cut(), {}),
        (cut(inner=5), {"wide.inner": (12, 5)}),
        (cut(last=4), {"lasts.0": (6, 4)}),
        # two heads of two, and neither one of four nor four of one
        (cut(heads=2, size=2), {"heads": (4, 2), "size": (None, 2)}),
        (cut(heads=4, size=1), {"size": (None, 1)}),
        (
            cut(heads=1, size=2, inner=8, last=3),
            {"heads": (4, 1), "size": (None, 2), "wide.inner": (12, 8), "lasts.0": (6, 3)},
        ),
    ],
    ids=["dense", "within", "list", "heads", "size", "all"],
)
def test_the_class_makes_the_model_anew(model: Model, changes: dict[str, Any]) -> None:
    assert update_config(model, TOKENS) == changes
    made = Model(model.config)
    made.load_state_dict(model.state_dict())
    assert torch.equal(made(TOKENS)["result"], model(TOKENS)["result"])


def test_what_no_size_says_is_named() -> None:
    model = cut(inner=5)
    model.blocks[1].wide, model.blocks[1].narrow = nn.Linear(8, 7), nn.Linear(7, 8)
    before = copy.deepcopy(vars(model.config))
    with pytest.raises(ValueError, match=r"With wide.inner=5, blocks.1.wide.weight would have shape \(5, 8\)"):
        update_config(model, TOKENS)
    assert vars(model.config).keys() == before.keys()
    assert model.config.wide.inner == 12


def test_equal_shapes_are_not_enough() -> None:
    model = cut(inner=5)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"With wide.inner=5, outputs differ by"):
        update_config(model, TOKENS)


def test_an_example_that_does_not_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Model cannot run on the example: RuntimeError"):
        update_config(cut(inner=5), torch.ones(2, 3, 7))


def test_random_numbers_go_on_as_before() -> None:
    model = cut(inner=5)
    state = torch.get_rng_state()
    update_config(model, TOKENS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", [None, object()])
def test_a_model_that_no_config_makes_is_refused(config: Any) -> None:
    model = nn.Linear(8, 8)
    model.config = config
    with pytest.raises(ValueError, match=r"type\(model\)\(config\) makes"):
        update_config(model, TOKENS)


def test_hugging_face_loads_what_was_compacted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = {"input_ids": torch.randint(0, 20, (2, 5))}
    structure = Channels(exclude="*norm*")
    pruner = Pruner(model, 0.5, structure=structure, selector=PerLayer(), schedule=None, example=tokens)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, tokens)
    assert update_config(smaller, tokens) == {
        "intermediate_size": (24, 12),
        "num_attention_heads": (4, 2),
        "num_key_value_heads": (2, 1),
    }
    smaller.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**tokens).logits, smaller(**tokens).logits)
