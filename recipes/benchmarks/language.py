"""Prunes a small language model at once, and reconstructs it without training: loss on held-out text.

    pip install transformers
    python recipes/benchmarks/language.py --model llama.pt --out FILE.json

A Llama of Hugging Face's classes, 4 layers of width 128, learns Python's help on its topics, byte by byte; the
last tenth of the text is held out. It is trained once and saved to ``--model``, or loaded if that file exists.
Each row prunes the trained network anew, on the same batches of training text. Nothing is trained after that.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeAlias

import torch
from shared import Table, arguments, save
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    Channels,
    Magnitude,
    NofM,
    OptimalBrainSurgeon,
    PerLayer,
    Pruner,
    Reconstruct,
    Taylor,
    Unstructured,
    Wanda,
)

Passes: TypeAlias = Sequence[dict[str, Tensor]]

CONTEXT = 128
BATCH = 16

_UNITS: dict[str, Any] = {"target": 0.5, "structure": Channels(include="*.mlp.up_proj"), "selector": PerLayer()}
_PATTERN: dict[str, Any] = {"structure": Unstructured(include="model.layers.*"), "selector": NofM(2, 4)}
ROWS: dict[str, dict[str, Any]] = {
    "half of the FFN units, Magnitude": {"criterion": Magnitude(), **_UNITS},
    "half of the FFN units, Taylor": {"criterion": Taylor(), **_UNITS},
    "half of the FFN units, OptimalBrainSurgeon": {"criterion": OptimalBrainSurgeon(), **_UNITS},
    "2:4, Magnitude": {"criterion": Magnitude(), **_PATTERN},
    "2:4, Wanda": {"criterion": Wanda(), **_PATTERN},
    "2:4, OptimalBrainSurgeon": {"criterion": OptimalBrainSurgeon(), **_PATTERN},
}


def main() -> None:
    """Train or load the network, prune it in each way, and print and save the losses."""
    parser = arguments(__doc__ or "", out="language.json")
    parser.add_argument("--model", type=Path, help="file of the trained weights; written if there is none")
    parser.add_argument("--steps", type=int, default=1200, help="steps of training")
    parser.add_argument("--batches", type=int, default=8, help="batches to prune and to reconstruct on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, held = texts()
    dense = network()
    if options.model is not None and options.model.exists():
        dense.load_state_dict(torch.load(options.model, weights_only=True))
    else:
        fit(dense, train, options.steps)
        if options.model is not None:
            torch.save(dense.state_dict(), options.model)
    dense.eval()
    torch.manual_seed(options.seed)
    batches = [drawn(train) for _ in range(options.batches)]
    whole = [{"input_ids": each} for each in held[: len(held) // CONTEXT * CONTEXT].view(-1, CONTEXT).split(64)]
    start = mean_loss(dense, whole)
    print(f"dense: {start:.3f} nats a byte; on the training batches {mean_loss(dense, batches):.3f}")
    table = Table("pruned at once", "as masked", "reconstructed", "seconds")
    results = []
    for name, parts in ROWS.items():
        masked, better = copy.deepcopy(dense), copy.deepcopy(dense)
        prune(masked, parts, batches, None)
        seconds = prune(better, parts, batches, Reconstruct())
        losses = [mean_loss(each, whole) for each in (masked, better)]
        table.row(name, *(f"{each:.3f}" for each in losses), f"{seconds:.1f}")
        results.append({"name": name, "losses": losses, "seconds": seconds})
    save(options.out, {"dense": start, "rows": results})


def texts() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on, and those of the last tenth of the text."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    count = len(data) * 9 // 10
    return data[:count], data[count:]


def network() -> nn.Module:
    """Return a Llama with random weights.

    Raises:
        SystemExit: If transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise SystemExit("This benchmark needs Hugging Face's models: pip install transformers") from error
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def fit(model: nn.Module, text: Tensor, steps: int) -> None:
    """Train a model on windows of a text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1, cycle_momentum=False)
    model.train()
    for step in range(steps):
        loss = loss_of(model, drawn(text))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f}", flush=True)


def drawn(text: Tensor) -> dict[str, Tensor]:
    """Return random windows of a text, as arguments of the model."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
    return {"input_ids": text[starts + torch.arange(CONTEXT)]}


def loss_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of the next bytes, in nats."""
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Passes) -> float:
    """Return the mean loss of the next bytes over all windows."""
    sums = [float(loss_of(model, each)) * len(each["input_ids"]) for each in batches]
    return sum(sums) / sum(len(each["input_ids"]) for each in batches)


def prune(
    model: nn.Module, parts: Mapping[str, Any], batches: Passes, reconstruct: Reconstruct | None
) -> float:
    """Prune a model at once.

    Args:
        model: The model, in evaluation mode.
        parts: Arguments of the pruner.
        batches: The batches to observe, and to reconstruct on.
        reconstruct: How to reconstruct; ``None`` not to.

    Returns:
        Seconds of the event: selection, masks and reconstruction.
    """
    pruner = Pruner(model, schedule=None, example=batches[0], **parts)
    for batch in batches:
        with pruner.watch():
            model.zero_grad()
            loss_of(model, batch).backward()
        pruner.observe()
    begun = time.perf_counter()
    pruner.prune(1.0, reconstruct=reconstruct, batches=batches)
    seconds = time.perf_counter() - begun
    for name, why in pruner.unreconstructed.items():
        print(f"not reconstructed: {name}: {why}")
    return seconds


if __name__ == "__main__":
    main()
