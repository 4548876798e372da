"""Prunes half of the channels of each classifier that torchvision lists, and checks that outputs stay the same.

    pip install torch-pruning
    python recipes/benchmarks/zoo.py --out FILE.json

Weights are random. In each group the half of the units with the least magnitude is masked; then the outputs of
the masked and of the compacted network are compared in double precision, in addition to the check that
compaction itself makes. Each model runs in a new process with one thread. Beside analysis and compaction stands
what Torch-Pruning takes to build its graph and to cut half of the channels, in turn in that process, both in
processor time. Memory (Linux only) is the peak that the analysis adds to the resident memory; beside it
stands, for comparison, the memory of the model's parameters plus the peak that one forward pass adds.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torchvision
from resident import apart, forget_peak, give_back_freed, peak, resident
from shared import Table, arguments, save
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.report.cost import parameters


def names() -> list[str]:
    """Return the names of all classifiers of torchvision."""
    listed: list[str] = torchvision.models.list_models(module=torchvision.models)
    return listed


def build(name: str) -> nn.Module:
    """Return a classifier in evaluation mode, with random parameters and random means in its batch norms.

    Noise is added to all parameters, so that none is exactly 0 or 1.
    """
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
    """Analyse, mask and compact one model, and return its results.

    Returns:
        Among others "analysis", "compaction" and "forward", a forward pass, in seconds of processor time;
        "peer", the seconds of Torch-Pruning, if it can prune the model; "frozen", the share of the parameters
        without a mask; "kept", the share of the parameters that the compacted network has; "difference", the
        largest difference between the outputs of the masked and the compacted network, relative to the largest
        output; "reasons", why groups and parameters are not pruned.
    """
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
    begun = time.process_time()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=images)
    analysis, memory = time.process_time() - begun, peak() - before
    pruner.prune(1.0)
    begun = time.process_time()
    smaller = compact(model, pruner.masks, images)
    compaction = time.process_time() - begun
    begun = time.process_time()
    outputs(model, images)
    one_pass = time.process_time() - begun
    size, kept = parameters(model), parameters(smaller)
    covered = sum(model.get_parameter(each).numel() for each in pruner.masks)
    images = images.double()
    expected, found = outputs(model.double(), images), outputs(smaller.double(), images)
    return {
        "name": name,
        "forward": one_pass,
        "analysis": analysis,
        "compaction": compaction,
        "peer": peer_seconds(name, images.float()),
        "forward bytes": forward,
        "analysis bytes": memory,
        "parameters": size,
        "frozen": 1 - covered / size,
        "kept": kept / size,
        "units": sum(group.size for group in pruner.groups),
        "difference": float((found - expected).abs().max() / expected.abs().max()),
        "reasons": pruner.frozen,
    }


def peer_seconds(name: str, images: Tensor) -> float | None:
    """Return the seconds that Torch-Pruning takes for its graph and its cut; ``None`` if it fails.

    Args:
        name: Name of the classifier.
        images: What it is traced on.
    """
    import torch_pruning

    model = build(name)
    kept = [each for each in model.modules() if isinstance(each, nn.Linear) and each.out_features == 1000]
    heads = {each: each.num_heads for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    begun = time.process_time()
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            images,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=kept,
            num_heads=heads,
        )
        pruner.step()
        outputs(model, images)
    except Exception:  # of another library
        return None
    return time.process_time() - begun


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits."""
    logits: Tensor = model(images)
    return logits


def cells(row: dict[str, Any]) -> list[str]:
    """Return the table row of one model."""
    memory = [f"{row[key] / 2**20:.0f} MiB" for key in ("analysis bytes", "forward bytes")]
    shares = [f"{100 * row[key]:.1f} %" for key in ("frozen", "kept")]
    size = f"{row['parameters'] / 1e6:.1f} M"
    times = row["analysis"], row["compaction"], row["forward"]
    peer, factor = "fails", ""
    if row["peer"] is not None:
        peer, factor = f"{row['peer']:.2f} s", f"{sum(times[:2]) / row['peer']:.0f}"
    seconds = [f"{each:.2f} s" for each in times]
    return [row["name"], *seconds, peer, factor, *memory, size, *shares, f"{row['difference']:.0e}"]


def main() -> None:
    """Print a row for each model as soon as it is done, and write JSON."""
    parser = arguments(__doc__, "zoo.json")
    parser.add_argument("--names", nargs="*", default=names())
    options = parser.parse_args()
    sizes = ("its peak", "model and pass", "parameters", "frozen", "kept", "difference")
    table = Table("model", "analysis", "compaction", "a pass", "Torch-Pruning", "factor", *sizes)
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
