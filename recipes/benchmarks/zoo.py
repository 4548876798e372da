"""Half of the channels of every classifier that torchvision lists: analysed, masked, cut out and compared.

    python recipes/benchmarks/zoo.py --out FILE.json

Weights are random. Half of each group's units go by magnitude; then outputs of the masked and the compacted
network are compared in double precision, apart from the proof that compaction makes. Each model has a process
of its own and one thread. Memory (Linux only): what analysis adds at its peak to what is resident before, and,
to compare, the model and what one pass adds to it.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torchvision
from resident import apart, forget_peak, give_back_freed, peak, resident
from shared import Table, arguments, save
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.core.probes import as_probe
from lightning_prune.report.cost import parameters


def names() -> list[str]:
    """Every classifier."""
    listed: list[str] = torchvision.models.list_models(module=torchvision.models)
    return listed


def build(name: str) -> nn.Module:
    """A classifier with random weights, none of them 0 or 1, and with random statistics."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for leaf, buffer in model.named_buffers():
            if leaf.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return model


def measure(name: str) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    give_back_freed()
    model = build(name)
    images = torch.randn(1, 3, *(299 if name == "inception_v3" else 224,) * 2)
    before = resident()
    forget_peak()
    outputs(model, images)
    forward = peak() - before + 4 * parameters(model)
    before = resident()
    forget_peak()
    begun = time.perf_counter()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=images)
    seconds, memory = time.perf_counter() - begun, peak() - before
    pruner.prune(1.0)
    smaller = copy.deepcopy(model)
    compact_(smaller, pruner.masks, pruner.groups, as_probe(images))
    size, kept = parameters(model), parameters(smaller)
    covered = sum(model.get_parameter(each).numel() for each in pruner.masks)
    images = images.double()
    expected, found = outputs(model.double(), images), outputs(smaller.double(), images)
    return {
        "name": name,
        "seconds": seconds,
        "forward bytes": forward,
        "analysis bytes": memory,
        "parameters": size,
        "frozen": 1 - covered / size,
        "kept": kept / size,
        "units": sum(group.size for group in pruner.groups),
        "difference": float((found - expected).abs().max() / expected.abs().max()),
        "reasons": pruner.frozen,
    }


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits."""
    logits: Tensor = model(images)
    return logits


def cells(row: dict[str, Any]) -> list[str]:
    """Return the row of one model."""
    memory = [f"{row[key] / 2**20:.0f} MiB" for key in ("analysis bytes", "forward bytes")]
    shares = [f"{100 * row[key]:.1f} %" for key in ("frozen", "kept")]
    size = f"{row['parameters'] / 1e6:.1f} M"
    return [row["name"], f"{row['seconds']:.1f} s", *memory, size, *shares, f"{row['difference']:.0e}"]


def main() -> None:
    """Prints a row for each model as it comes, and writes JSON."""
    parser = arguments(__doc__, "zoo.json")
    parser.add_argument("--names", nargs="*", default=names())
    options = parser.parse_args()
    columns = ("model", "analysis", "its peak", "model and pass", "parameters", "frozen", "kept", "difference")
    table = Table(*columns)
    rows = []
    for name in options.names:
        try:
            row = apart(measure, name)
        except Exception as error:
            row = {"name": name, "error": repr(error)}
            table.row(name, repr(error))
        else:
            table.row(*cells(row))
        rows.append(row)
        save(options.out, rows)
    failed = [row["name"] for row in rows if row.get("difference", 1.0) > 1e-9 or row["kept"] >= 1]
    print(f"{len(rows) - len(failed)} of {len(rows)} models" + (f"; not {failed}" if failed else ""))


if __name__ == "__main__":
    main()
