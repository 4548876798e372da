"""Prunes half of the channels of many models that nobody here wrote, and checks that outputs stay the same.

    pip install timm transformers torch-pruning
    python recipes/benchmarks/zoo.py --out FILE.json > FILE.md

Families are listed in ``recipes/families/``; one whose package is not installed is left out. Weights are
random. In each group the half of the units with the least magnitude is masked; then the outputs of the masked
and of the compacted network are compared in double precision (in single precision where the model's code fixes
it), in addition to the check that compaction itself makes. Each model runs in a new process with one thread,
with limits of processor time and memory. Results that the file has already are not measured again.

Beside it stands what Torch-Pruning makes of the same model by default, if it is installed: half of the
channels, those layers left alone that give outputs. Its output is equal if it is that of a dense copy in which
all that went is 0. Times are processor time. "Peak" is the memory that the analysis adds to the resident one
(Linux only), in shares of that of the model's parameters and of what one forward pass adds.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from typing import Any

import torch
from families import FAMILIES, entries
from families.entry import Entry
from peer import prune_with_peer
from resident import Limits, apart, forget_peak, give_back_freed, peak, resident
from shared import Table, arguments, save
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.core.probes import Probe, as_probe, relative_difference
from lightning_prune.core.tensors import reachable_tensors
from lightning_prune.report.cost import parameters

FIXED = (
    "is the network's output",
    "holds the rows of an embedding",
)  # how the reasons begin for what gives outputs
LIMIT = "takes more than"
SAME = 1e-5  # differences up to this are rounding errors where a model's code computes in single precision
MUCH = 0.05  # shares of the parameters that stay from here on are explained
PRELOADED = ("torchvision", "lightning_prune", "timm", "transformers", "torch_pruning")
COLUMNS = (
    *("model", "parameters", "frozen", "kept", "difference"),
    *("analysis", "compaction", "a pass", "peak", "Torch-Pruning", "its outputs"),
)


def measure(family: str, name: str) -> dict[str, Any]:
    """Analyse, mask and compact one model, and return its results.

    Returns:
        Among others "analysis", "compaction" and "forward", a forward pass, in seconds of processor time;
        "frozen", the share of the parameters without a mask; "kept", the share of the parameters that the
        compacted network has; "difference", the largest difference between outputs of the masked and the
        compacted network, relative to the largest output; "reasons", which share of the parameters stays for
        which reason; "outputs", names of the modules whose outputs are the network's.
    """
    torch.set_num_threads(1)
    give_back_freed()
    entry = entries(family)[name]
    model, example = entry.build(), entry.inputs()
    probe = as_probe(example)
    before = resident()
    forget_peak()
    outputs(model, probe)
    forward = peak() - before + 4 * parameters(model)
    before = resident()
    forget_peak()
    begun = time.process_time()
    pruner = Pruner(
        model,
        0.5,
        structure=Channels(max_seconds=math.inf),
        selector=PerLayer(),
        schedule=None,
        example=example,
    )
    analysis, memory = time.process_time() - begun, peak() - before
    pruner.prune(1.0)
    begun = time.process_time()
    smaller = compact(model, pruner.masks, example)
    compaction = time.process_time() - begun
    begun = time.process_time()
    outputs(model, probe)
    one_pass = time.process_time() - begun
    size = parameters(model)
    covered = sum(model.get_parameter(each).numel() for each in pruner.masks)
    return {
        "forward": one_pass,
        "analysis": analysis,
        "compaction": compaction,
        "forward bytes": forward,
        "analysis bytes": memory,
        "parameters": size,
        "frozen": 1 - covered / size,
        "kept": parameters(smaller) / size,
        "units": sum(group.size for group in pruner.groups),
        "difference": difference(model, smaller, probe),
        "reasons": reasons(model, pruner),
        "outputs": output_layers(model, pruner),
    }


def output_layers(model: nn.Module, pruner: Pruner) -> list[str]:
    """Return the names of the layers that give the network's outputs, by the rows of an embedding, too."""
    parameters = dict(model.named_parameters())
    fixed = {
        id(parameters[each])
        for each, why in pruner.frozen.items()
        if each in parameters and why.startswith(FIXED)
    }
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        and any(id(each) in fixed for each in module.parameters(recurse=False))
    ]


def difference(masked: nn.Module, smaller: nn.Module, probe: Probe) -> float:
    """Return the largest difference between the outputs of two models, relative to the largest output.

    In double precision, or in single precision if the first one does not run in it, or gives nan.
    """
    try:
        expected = outputs(copy.deepcopy(masked).double(), probe.to(torch.float64))
    except RuntimeError:  # of types that its code fixes
        expected = []
    if not expected or relative_difference(expected, expected):
        return relative_difference(outputs(masked, probe), outputs(smaller, probe))
    return relative_difference(expected, outputs(smaller.double(), probe.to(torch.float64)))


def reasons(model: nn.Module, pruner: Pruner) -> dict[str, float]:
    """Return the share of the parameters that stays for each reason, the largest first."""
    shares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        if name not in pruner.masks:
            shares[pruner.frozen.get(name, "goes with nothing")] += parameter.numel() / parameters(model)
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


@torch.no_grad()
def outputs(model: nn.Module, probe: Probe) -> list[Tensor]:
    """Return all tensors that a model gives."""
    return reachable_tensors(probe(model))


def measure_peer(family: str, name: str, kept: list[str]) -> dict[str, Any]:
    """Return what Torch-Pruning makes of a model; modules whose names are in ``kept`` are left alone."""
    torch.set_num_threads(1)
    entry: Entry = entries(family)[name]
    return prune_with_peer(entry.build(), entry.inputs(), kept)


def results(family: str, name: str, limits: Limits, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all results of one model; an error is one, too. What is known is not measured again."""
    row = dict(known or {"family": family, "name": name, **limited(limits, measure, family, name)})
    if "peer" not in row and find_spec("torch_pruning") is not None:
        row["peer"] = limited(limits, measure_peer, family, name, row.get("outputs", []))
    return row


def limited(limits: Limits, function: Any, *args: Any) -> dict[str, Any]:
    """Return what a function returns in a process of its own, or its error."""
    try:
        found: dict[str, Any] = apart(function, *args, limits=limits, preload=PRELOADED)
    except BrokenProcessPool:
        return {"error": f"{LIMIT} {limits.seconds} s"}
    except Exception as error:  # a refusal, or whatever the model's code raises
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the table row of one model."""
    if "error" in row:
        return [
            row["name"],
            row["error"].replace("\n", " ")[:200],
            *[""] * (len(COLUMNS) - 4),
            *peer_cells(row),
        ]
    peak_of_analysis = f"{row['analysis bytes'] / row['forward bytes']:.1f}"
    shares = [f"{100 * row[key]:.1f} %" for key in ("frozen", "kept")]
    seconds = [f"{row[key]:.2f} s" for key in ("analysis", "compaction", "forward")]
    size = f"{row['parameters'] / 1e6:.2f} M"
    return [
        row["name"],
        size,
        *shares,
        f"{row['difference']:.0e}",
        *seconds,
        peak_of_analysis,
        *peer_cells(row),
    ]


def peer_cells(row: Mapping[str, Any]) -> list[str]:
    """Return what Torch-Pruning takes, and whether its outputs are equal."""
    peer = row.get("peer")
    if peer is None:
        return ["", ""]
    if "error" in peer:
        return [peer["error"] if peer["error"].startswith(LIMIT) else "fails", ""]
    if peer["kept"] >= 1:
        return [f"{peer['seconds']:.2f} s", "nothing goes"]
    return [f"{peer['seconds']:.2f} s", "equal" if peer["difference"] <= SAME else "differ"]


def stays(row: Mapping[str, Any]) -> str:
    """Return why parts of a model stay that hold more than a few of its parameters; empty if there are none."""
    large = [f"{100 * share:.0f} %: {why}" for why, share in row.get("reasons", {}).items() if share > MUCH]
    return f"- {row['name']}: {'; '.join(large)}" if large else ""


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return the counts of a family: models, those that run, and those of Torch-Pruning."""
    ran = [row for row in rows if "error" not in row]
    equal = [row for row in ran if row["difference"] <= SAME and row["kept"] < 1]
    peers = [row["peer"] for row in rows if "error" not in row.get("peer", {"error": ""})]
    frozen = sorted(row["frozen"] for row in ran)
    return [
        *map(str, (len(rows), len(ran), len(equal))),
        f"{100 * frozen[len(frozen) // 2]:.1f} %" if frozen else "",
        f"{sum(share <= 0.1 for share in frozen)}",
        f"{len(peers)} of {sum('peer' in row for row in rows)}",
        str(sum(each["difference"] <= SAME and each["kept"] < 1 for each in peers)),
    ]


def main() -> None:
    """Print a row for each model as soon as it is done, and write JSON."""
    parser = arguments(__doc__ or "", "zoo.json")
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--names", nargs="*", help="names of models; by default all of the families")
    parser.add_argument("--seconds", type=int, default=120, help="limit of the processor time of a model")
    parser.add_argument("--gibibytes", type=int, default=8, help="limit of its memory")
    options = parser.parse_args()
    limits = Limits(options.seconds, options.gibibytes)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    known = {(row["family"], row["name"]): row for row in rows}
    for family in options.families:
        print(f"\n## {FAMILIES[family]}\n")
        try:
            listed = [name for name in entries(family) if not options.names or name in options.names]
        except ModuleNotFoundError as missing:
            print(f"Not measured: {missing}.")
            continue
        table = Table(*COLUMNS)
        for name in listed:
            known[family, name] = results(family, name, limits, known.get((family, name)))
            save(options.out, list(known.values()))
            table.row(*cells(known[family, name]))
        print("\n".join(["", *filter(None, (stays(known[family, name]) for name in listed))]))
    print("\n## Summary\n")
    table = Table(
        "family", "models", "run", "equal", "frozen, median", "at most 10 %", "Torch-Pruning runs", "equal"
    )
    for family in options.families:
        table.row(FAMILIES[family], *summary([row for row in known.values() if row["family"] == family]))


if __name__ == "__main__":
    main()
