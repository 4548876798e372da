"""All segmentation models that torchvision lists, with their auxiliary classifiers, on images of 64 pixels."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchvision import models

from families.entry import Entry, images

_KEYWORDS: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}

ENTRIES = {
    name: Entry(
        partial(models.get_model, name, **_KEYWORDS, **({} if "lraspp" in name else {"aux_loss": True})),
        images(64),
    )
    for name in models.list_models(module=models.segmentation)
}
