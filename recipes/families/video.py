"""All video models and models of optical flow that torchvision lists."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision import models

from families.entry import Entry, images

# frames and pixels that a model asks for; others take 8 frames of 64 pixels
_SIZES = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}


def _flow() -> tuple[Tensor, Tensor]:
    """Return two images for RAFT, the smallest that it takes, and few updates."""
    return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)


ENTRIES = {
    **{
        name: Entry(partial(models.get_model, name, weights=None), images(size, frames=frames))
        for name in models.list_models(module=models.video)
        for frames, size in [_SIZES.get(name, (8, 64))]
    },
    **{
        name: Entry(partial(models.get_model, name, weights=None), _flow)
        for name in models.list_models(module=models.optical_flow)
    },
}
