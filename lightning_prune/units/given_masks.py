"""Masks from outside: a mapping, a file of one, or what ``torch.nn.utils.prune`` keeps beside the weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.core import schema
from lightning_prune.core.files import read_file
from lightning_prune.units.masks import joined_masks

MaskSource: TypeAlias = Mapping[str, Any] | nn.Module | str | PathLike[str]


@dataclass(frozen=True, eq=False)
class GivenMasks:
    """Masks as a user gives them.

    Args:
        source: Parameter name to mask, or the path of a file of such a mapping, which is read with
            ``weights_only=True``. A mask has the parameter's shape, and holds True or 1 where the weight is
            kept, else False or 0. Or a network that ``torch.nn.utils.prune`` has pruned, its ``state_dict``, or
            a checkpoint with that: ``x.weight_mask`` is the mask of ``x.weight``.

    Raises:
        ValueError: If it is none of these.
    """

    source: MaskSource

    def __post_init__(self) -> None:
        source = self.source
        named = not isinstance(source, Mapping) or all(isinstance(name, str) for name in source)
        if not isinstance(source, Mapping | nn.Module | str | PathLike) or not named:
            raise ValueError(
                f"masks={schema.summary(source)} must be a mapping of parameter names to masks, the path of"
                " a file of one, or a network that torch.nn.utils.prune has pruned."
            )

    @classmethod
    def of(cls, masks: GivenMasks | MaskSource | None) -> GivenMasks | None:
        """Return masks in this form; ``None`` if there are none."""
        return masks if masks is None or isinstance(masks, GivenMasks) else cls(masks)

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the masks, checked: first name of each parameter of a model that has one, to a bool tensor.

        Raises:
            ValueError: If a mask is of no parameter, of another shape, or holds other values than 0 and 1.
        """
        known = dict(model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, Tensor] = {}
        for given, value in self._masks().items():
            name = given if given in known else given.removesuffix("_mask")
            if name not in known:
                nearest = ", ".join(map(repr, difflib.get_close_matches(name, sorted(known), n=3, cutoff=0)))
                raise ValueError(f"masks[{given!r}] fits no parameter; the nearest names are {nearest}.")
            mask = _as_bool(given, value)
            name = first[id(known[name])]
            found[name] = mask & found[name] if name in found else mask
        return joined_masks(model, found)

    def _masks(self) -> Mapping[str, Any]:
        """Return the entries that are masks, under the names that they are given under."""
        source: Any = self.source
        if isinstance(source, nn.Module):
            source = source.state_dict()
        elif not isinstance(source, Mapping):
            source = read_file(source, "masks")
        source = source.get("state_dict", source)
        beside = {  # the weights, in a state_dict
            name: mask for name, mask in source.items() if f"{name.removesuffix('_mask')}_orig" in source
        }
        return beside or source


def _as_bool(name: str, value: Any) -> Tensor:
    if not torch.is_tensor(value):
        raise ValueError(f"masks[{name!r}] is a {type(value).__name__}, no tensor of bool, or of 0 and 1.")
    other = value[(value != 0) & (value != 1)]
    if other.numel():
        raise ValueError(f"masks[{name!r}] holds {other[0].item()!r}, and must be of bool, or of 0 and 1.")
    return value.bool()
