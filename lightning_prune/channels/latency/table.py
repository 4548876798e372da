"""The table of measured times: the seconds of each layer by the widths that it was timed at, and the device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_prune.core import schema
from lightning_prune.core.files import atomic_write
from lightning_prune.units.groups import UnitGroup

VERSION = 1
TRUSTED = 0.05  # the largest error of a table, as a share of the time, that is no cause for a warning


@dataclass(frozen=True)
class LayerTimes:
    """The measured times of one layer: a module, without the modules in it.

    Args:
        layer: Name of the module.
        axes: The dimensions of the layer's tensors that units shorten, each as group name to the share of the
            dimension that all units of the group make up. The dimension keeps, of 1, all but that share times
            the removed share of the group.
        knots: The kept shares of the two axes at which the layer was timed, in ascending order. Unless there
            are two axes, the first has one entry, and the second is for the geometric mean of all axes.
        seconds: The times, one row for each entry of the first of ``knots``.
    """

    layer: str
    axes: tuple[Mapping[str, float], ...]
    knots: tuple[tuple[float, ...], tuple[float, ...]]
    seconds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of a network by layer and width, in evaluation mode, on one device.

    :func:`measure_latency` and ``lightning-prune latency`` make it; ``Global(budget="latency", table=...)``
    takes it, or the path of its file.

    Args:
        machine: The device, the number of threads if it is a CPU, and the version of PyTorch.
        dtype: Data type of the network's parameters.
        batch: Batch size.
        inputs: Shapes of the input tensors.
        groups: Unit group to its number of units.
        dense: Seconds of a forward pass of the dense network, the median of several.
        factor: What the sum of the layers' times is multiplied by.
        rest: Seconds that are added to that, whatever the widths.
        error: How far the table is from the times of the whole networks that it was measured on: median
            difference, as a share.
        spread: How far single passes of one network are from each other: median difference, as a share.
        layers: The times of the layers.
    """

    machine: str
    dtype: str
    batch: int
    inputs: tuple[tuple[int, ...], ...]
    groups: Mapping[str, int]
    dense: float
    factor: float
    rest: float
    error: float
    spread: float
    layers: tuple[LayerTimes, ...]

    def __repr__(self) -> str:
        return f"<latency table of {self.machine}, batch of {self.batch}>"

    @property
    def noise(self) -> str | None:
        """Why the table is not to be trusted, and what to do; ``None`` if it is."""
        if self.error <= TRUSTED:
            return None
        return (
            f"timing was too noisy: the layers' times are {self.error:.1%} (median) from those of whole"
            f" networks, which spread by {self.spread:.1%}; measure again with nothing else running, with fixed"
            " clocks, or with a larger batch"
        )

    def check(self, groups: Iterable[UnitGroup], inputs: Iterable[tuple[int, ...]]) -> None:
        """Check that the table is of a network with these units and inputs.

        Args:
            groups: Unit groups of the network.
            inputs: Shapes of its input tensors.

        Raises:
            ValueError: If it is not; the message names what differs.
        """
        other = [
            f"{group.name} has {group.size} units and there {self.groups.get(group.name, 'none')}"
            for group in groups
            if self.groups.get(group.name) != group.size
        ]
        if other:
            raise ValueError(
                f"table={self!r} is of another network, or of another structure: {'; '.join(other)}. It has"
                f" {', '.join(self.groups) or 'no units'}."
            )
        given = tuple(inputs)
        if given != self.inputs:
            raise ValueError(
                f"table={self!r} was measured with inputs of shapes {_shapes(self.inputs)}, and this network's"
                f" are {_shapes(given)}: measure it with inputs of the same size."
            )

    def to_state(self) -> dict[str, Any]:
        """Return the table as plain values, for JSON and checkpoints; ``TABLE`` reads them."""
        return asdict(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table to a JSON file."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"version": VERSION} | self.to_state()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LatencyTable:
        """Return the table of a file that :meth:`save` has written.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no table.
        """
        name = f"table={os.fspath(path)!r}"
        try:
            content = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        versioned = schema.satisfying(schema.anything, lambda value: isinstance(value, dict), "a dict")
        found = schema.read_versioned(schema.read(content, versioned, name), _FILE, VERSION, name)
        return schema.read({key: value for key, value in found.items() if key != "version"}, TABLE, name)


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "()" for shape in shapes)


_SECONDS = schema.number("a number of seconds", lambda value: 0 <= value < float("inf"))
_POSITIVE = schema.number("a number above 0", lambda value: 0 < value < float("inf"))
_KNOTS = schema.satisfying(
    schema.sequence(schema.fraction),
    lambda value: len(value) > 0 and all(one <= other for one, other in pairwise(value)),
    "at least one share, in ascending order",
)
_LAYER = schema.satisfying(
    schema.dataclass_of(
        LayerTimes,
        layer=schema.string,
        axes=schema.sequence(schema.mapping(schema.fraction)),
        knots=schema.fixed_list(_KNOTS, _KNOTS),
        seconds=schema.sequence(schema.sequence(_SECONDS)),
    ),
    lambda layer: (
        [len(layer.knots[1])] * len(layer.knots[0]) == list(map(len, layer.seconds))
        and (len(layer.knots[0]) == 1 or len(layer.axes) == 2)
    ),
    "one row for each entry of the first of knots, one number for each of the second",
    ".seconds",
)
TABLE = schema.satisfying(
    schema.dataclass_of(
        LatencyTable,
        machine=schema.string,
        dtype=schema.string,
        batch=schema.integer(1),
        inputs=schema.sequence(schema.sequence(schema.integer())),
        groups=schema.mapping(schema.integer(1)),
        dense=_POSITIVE,
        factor=_POSITIVE,
        rest=schema.number(),
        error=_SECONDS,
        spread=_SECONDS,
        layers=schema.sequence(_LAYER),
    ),
    lambda table: all(axis.keys() <= table.groups.keys() for layer in table.layers for axis in layer.axes),
    "of groups that the table has",
    ".layers",
)
_FILE = schema.mapping(schema.anything)
