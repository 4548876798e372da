"""All classifiers that torchvision lists."""

from __future__ import annotations

from functools import partial

from torchvision import models

from families.entry import Entry, images

ENTRIES = {
    name: Entry(partial(models.get_model, name, weights=None), images(299 if name == "inception_v3" else 224))
    for name in models.list_models(module=models)
}
