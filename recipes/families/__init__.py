"""Models by family, for the table of models: one module a family, each with its ``ENTRIES``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from families.entry import Entry

FAMILIES: Mapping[str, str] = {
    "classifiers": "Classifiers of torchvision",
    "detection": "Detection, torchvision",
    "segmentation": "Segmentation, torchvision",
    "video": "Video and optical flow, torchvision",
    "image_models": "Image models of timm",
    "decoders": "Language models of Hugging Face that go on with a text",
    "encoders": "Language models of Hugging Face that read a text, or two",
    "senses": "Vision, speech, time series and several of these, Hugging Face",
    "one_stage": "One-stage detectors written anew, after YOLO",
    "u_nets": "U-Nets written anew",
}


def entries(family: str) -> Mapping[str, Entry]:
    """Return the models of a family by name.

    Raises:
        ModuleNotFoundError: If the package that they are from is not installed.
    """
    found: Mapping[str, Entry] = import_module(f"families.{family}").ENTRIES
    return found
