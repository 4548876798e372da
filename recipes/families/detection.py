"""All detectors that torchvision lists: few classes, proposals and boxes; losses and boxes are followed.

Images have 96x128 pixels, which SSDs scale to their own size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from families.entry import Entry

_FEW: dict[str, dict[str, Any]] = {
    "rcnn": {"rpn_post_nms_top_n_test": 50, "rpn_post_nms_top_n_train": 50, "box_detections_per_img": 10},
    "retinanet": {"topk_candidates": 50, "detections_per_img": 10, "score_thresh": 0.0},
    "fcos": {"topk_candidates": 50, "detections_per_img": 10, "score_thresh": 0.0},
    "ssd": {"topk_candidates": 50, "detections_per_img": 10},
}


def _detector(name: str) -> nn.Module:
    (settings,) = (few for kind, few in _FEW.items() if kind in name)
    if "ssd" not in name:
        settings = settings | {"min_size": 96, "max_size": 128}
    model: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **settings)
    return model


def _targets() -> list[dict[str, Tensor]]:
    """Return one object, with all that any detector asks for."""
    found = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 80.0]]), "labels": torch.tensor([1])}
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 10:80, 10:60] = 1
    return [found | {"masks": masks, "keypoints": torch.rand(1, 17, 3) * 50 + 10}]


def _passes() -> list[Any]:
    """Return what a detector is called with for boxes, and for losses."""
    pictures = [torch.rand(3, 96, 128)]
    return [(pictures,), (pictures, _targets())]


ENTRIES = {
    name: Entry(partial(_detector, name), _passes) for name in models.list_models(module=models.detection)
}
