"""What the families of Hugging Face share: how an entry is made of the settings of a small configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families.entry import Entry

WORDS = 64  # tokens of the vocabulary

# widths as most configurations call them
SIZES: Mapping[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# those that take other names for them
ENCODER_DECODER: Mapping[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
BART: Mapping[str, Any] = {**ENCODER_DECODER, "vocab_size": WORDS, "max_position_embeddings": 64}
T5: Mapping[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
# the tokens that mean something to a model lie in the vocabulary
SPECIAL: Mapping[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_of(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """Return a model with random weights, by the name of its class."""
    kind = getattr(transformers, name)
    config = kind.config_class(**settings)
    found: nn.Module = kind._from_config(config)
    return found


def entry(name: str, example: Callable[[], Any], *settings: Mapping[str, Any], **more: Any) -> Entry:
    """Return an entry of a class of models.

    Args:
        name: The name of the class.
        example: Returns the keyword arguments of its ``forward``.
        settings: Entries of its configuration; later ones win.
        more: Further ones.
    """
    merged = {key: value for each in (*settings, more) for key, value in each.items()}
    return Entry(lambda: model_of(name, merged), example)


def tokens(count: int = 2, length: int = 10) -> Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(5, WORDS, (count, length))


def text(count: int = 2, length: int = 10, **more: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that returns some texts, the second one padded, with further arguments."""

    def example() -> dict[str, Any]:
        ids = tokens(count, length)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask, **more}

    return example


def text_to_text(count: int = 2) -> dict[str, Any]:
    """Return some texts, one of them padded, with the beginning of another text for each."""
    return text(count, decoder_input_ids=tokens(count, 6), use_cache=False)()


def pixels(size: int = 32, **more: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that returns a pair of images, with further arguments."""
    return lambda: {"pixel_values": torch.randn(2, 3, size, size), **more}
