"""Time of analysis and compaction, in turn with the graph and the cut of Torch-Pruning.

    pip install torch-pruning transformers
    python recipes/benchmarks/analysis.py

Processor time on one thread, in one process and in single precision, on one image of 224x224 pixels or two
texts of 10 tokens: ``Channels()`` and ``compact`` of half of the channels, one forward pass, and the graph and
cut of Torch-Pruning. Each is the least of several rounds, the first of which warms up. Ours includes the proof
that outputs stay the same; Torch-Pruning makes none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from families import entries
from peer import cut_with_peer
from shared import Table, arguments
from torch import nn

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.core.probes import as_probe

NETWORKS = {
    "classifiers": [
        "mobilenet_v2",
        "resnet18",
        "resnet50",
        "densenet121",
        "efficientnet_b0",
        "vgg16_bn",
        "convnext_tiny",
        "vit_b_16",
    ],
    "encoders": ["BertModel"],
}


def round_of(build: Callable[[], nn.Module], example: Any) -> tuple[float, float, float, float]:
    """Return the seconds of analysis, of compaction, of a forward pass, and of Torch-Pruning."""
    model, probe = build(), as_probe(example)
    begun = time.process_time()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    analysis = time.process_time() - begun
    pruner.prune(1.0)
    begun = time.process_time()
    compact(model, pruner.masks, example)
    compaction = time.process_time() - begun
    begun = time.process_time()
    with torch.no_grad():
        probe(model)
    forward = time.process_time() - begun
    kept = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)][-1:]
    return analysis, compaction, forward, cut_with_peer(build(), probe, kept)


def main() -> None:
    """Print a row for each network as soon as it is done."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--names", nargs="*", default=[name for names in NETWORKS.values() for name in names])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("network", "analysis", "compaction", "a pass", "passes", "Torch-Pruning", "factor")
    for family, names in NETWORKS.items():
        for name in names:
            if name not in options.names:
                continue
            entry = entries(family)[name]
            rounds = [round_of(entry.build, entry.inputs()) for _ in range(options.rounds)]
            analysis, compaction, forward, peer = map(min, zip(*rounds, strict=True))
            table.row(
                name,
                *(f"{seconds:.2f} s" for seconds in (analysis, compaction, forward)),
                f"{analysis / forward:.0f}",
                f"{peer:.2f} s",
                f"{(analysis + compaction) / peer:.1f}",
            )


if __name__ == "__main__":
    main()
