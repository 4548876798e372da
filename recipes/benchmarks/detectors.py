"""Prunes half of the channels of each detector of torchvision, and checks that boxes stay the same.

    python recipes/benchmarks/detectors.py --out FILE.json

Weights are random, images small (96x128 pixels, which SSDs scale to their own size), and each network
proposes at most 50 boxes and returns at most 10, so that it takes minutes. Evaluation and training pass are
followed. What the masked and the compacted network return is compared in double precision, in addition to the
check that compaction itself makes. Each model runs in a new process with one thread.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torchvision
from resident import apart
from shared import Table, arguments, save
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.core.probes import relative_difference
from lightning_prune.core.tensors import reachable_tensors
from lightning_prune.report.cost import parameters

_FEW: dict[str, dict[str, Any]] = {
    "rcnn": {"rpn_post_nms_top_n_test": 50, "rpn_post_nms_top_n_train": 50, "box_detections_per_img": 10},
    "retinanet": {"topk_candidates": 50, "detections_per_img": 10, "score_thresh": 0.0},
    "fcos": {"topk_candidates": 50, "detections_per_img": 10, "score_thresh": 0.0},
    "ssd": {"topk_candidates": 50, "detections_per_img": 10},
}


def names() -> list[str]:
    """Return the names of all detectors of torchvision."""
    listed: list[str] = torchvision.models.list_models(module=torchvision.models.detection)
    return listed


def build(name: str) -> nn.Module:
    """Return a detector of 4 classes in evaluation mode, with random weights."""
    torch.manual_seed(0)
    (settings,) = (few for kind, few in _FEW.items() if kind in name)
    if "ssd" not in name:
        settings = settings | {"min_size": 96, "max_size": 128}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=4, **settings
    )
    return model.eval()


def targets() -> list[dict[str, Tensor]]:
    """Return one object, with all that any detector asks for."""
    found = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 80.0]]), "labels": torch.tensor([1])}
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 10:80, 10:60] = 1
    return [found | {"masks": masks, "keypoints": torch.rand(1, 17, 3) * 50 + 10}]


def measure(name: str) -> dict[str, Any]:
    """Analyse, mask and compact one model, and return its results.

    Returns:
        As in ``zoo.py``; "boxes" is how many boxes were compared.
    """
    torch.set_num_threads(1)
    model, images = build(name), [torch.rand(3, 96, 128)]
    example = [(images,), (images, targets())]
    begun = time.perf_counter()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    seconds = time.perf_counter() - begun
    pruner.prune(1.0)
    smaller = compact(copy.deepcopy(model), pruner.masks, example)
    covered = sum(model.get_parameter(each).numel() for each in pruner.masks)
    exact = [each.double() for each in images]
    with torch.no_grad():
        expected, found = (reachable_tensors(each.double()(exact)) for each in (model, smaller))
    return {
        "name": name,
        "seconds": seconds,
        "parameters": parameters(model),
        "frozen": 1 - covered / parameters(model),
        "kept": parameters(smaller) / parameters(model),
        "boxes": len(expected[0]),
        "difference": relative_difference(expected, found),
        "reasons": pruner.frozen,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """Return the table row of one model."""
    shares = [f"{100 * row[key]:.1f} %" for key in ("frozen", "kept")]
    size = f"{row['parameters'] / 1e6:.1f} M"
    return [row["name"], f"{row['seconds']:.0f} s", size, *shares, row["boxes"], f"{row['difference']:.0e}"]


def main() -> None:
    """Print a row for each model as soon as it is done, and write JSON."""
    parser = arguments(__doc__ or "", "detectors.json")
    parser.add_argument("--names", nargs="*", default=names())
    options = parser.parse_args()
    table = Table("model", "analysis", "parameters", "frozen", "kept", "boxes", "difference")
    rows = []
    for name in options.names:
        rows.append(apart(measure, name))
        table.row(*cells(rows[-1]))
        save(options.out, rows)


if __name__ == "__main__":
    main()
