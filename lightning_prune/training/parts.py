"""The arguments of a PruningCallback: checked, described, and turned into a pruner."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.parts import check_flag, check_part, check_seconds, describe
from lightning_prune.core.probes import own_example
from lightning_prune.criteria.base import Criterion
from lightning_prune.pruner import Pruner, check_parts
from lightning_prune.report.measurement import measure
from lightning_prune.report.report import Report
from lightning_prune.schedules.base import Schedule
from lightning_prune.schedules.moments import parse_horizon
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.targets import Target, resolved
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.reconstruction.reconstruct import Reconstruct
from lightning_prune.structures.base import Structure
from lightning_prune.training.guard import Guard
from lightning_prune.training.rewind import Rewind
from lightning_prune.training.slow_work import slow_work
from lightning_prune.units.given_masks import GivenMasks

_NAME = re.compile(r"[^/\\\x00-\x1f]{1,100}")


@dataclass(frozen=True)
class PruningParts:
    """The arguments of a ``PruningCallback``.

    Raises:
        ValueError: If an argument is wrong.
    """

    target: Target
    criterion: Criterion
    structure: Structure
    selector: Selector
    schedule: Schedule
    rewind: Rewind | None
    guard: Guard | None
    reconstruct: Reconstruct | None
    compact: bool | Literal["each"]
    name: str | None
    measure_seconds: float
    write_report: bool | str | Path
    keep_zeros: bool
    given_masks: GivenMasks | None
    horizon: str | None

    def __post_init__(self) -> None:
        if isinstance(self.target, Mapping):
            object.__setattr__(self, "target", dict(self.target))  # what the user does to it later is not ours
        check_parts(self.criterion, self.structure, self.selector)
        self.shares()
        check_part(self.schedule, Schedule, "schedule")
        parse_horizon(self.horizon)
        check_part(self.rewind, Rewind, "rewind", optional=True)
        check_part(self.guard, Guard, "guard", optional=True)
        check_part(self.reconstruct, Reconstruct, "reconstruct", optional=True)
        if self.reconstruct is not None and self.rewind is not None and self.rewind.weights:
            raise ValueError(
                f"rewind={self.rewind!r} takes back the weights that reconstruct={self.reconstruct!r} gives:"
                " take one of them, or Rewind(weights=False)."
            )
        check_flag(keep_zeros=self.keep_zeros)
        self._check_compact()
        if not isinstance(self.write_report, bool | str | Path) or self.write_report == "":
            raise ValueError(f"write_report={self.write_report!r} must be True, False or the path of a folder.")
        check_seconds(measure_seconds=self.measure_seconds)
        if self.name is not None and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise ValueError(f"name={self.name!r} must be 1 to 100 characters without slashes: files have it.")

    def _check_compact(self) -> None:
        if not isinstance(self.compact, bool) and self.compact != "each":
            raise ValueError(f"compact={self.compact!r} must be True or False, or 'each'.")
        for part in filter(None, (self.rewind, self.guard)):
            if self.shrinks:
                raise ValueError(
                    f"{part!r} brings back an earlier point in training, of which compact='each' has cut the"
                    " shapes: take compact=True, which cuts them at the end of the fit, or do without."
                )

    def shares(self) -> dict[str | None, float]:
        """Return the share that each target removes at the end; none where masks or zeros say all that goes.

        Raises:
            ValueError: If the selector cannot work with a target.
        """
        return resolved(self.target, self.selector, optional=self._from_start is not None)

    @property
    def _from_start(self) -> GivenMasks | None:
        """What is removed from the start, besides zeros; with either there need not be a target."""
        return GivenMasks({}) if self.given_masks is None and self.keep_zeros else self.given_masks

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint."""
        return "PruningCallback" if self.name is None else f"PruningCallback[{self.name}]"

    @property
    def metric(self) -> str:
        """Name under which the sparsity is logged."""
        return "prune/sparsity" if self.name is None else f"prune/{self.name}/sparsity"

    @property
    def needs_example(self) -> bool:
        """Whether the structure or the selector needs an example of the input of ``forward``."""
        return self.structure.needs_example or self.selector.needs_example

    @property
    def needs_probe(self) -> bool:
        """Whether the module is traced on a first batch: to find its units, or to compact it."""
        return self.needs_example or bool(self.compact)

    @property
    def shrinks(self) -> bool:
        """Whether the network is cut at each event, and not at the end of the fit alone."""
        return self.compact == "each"

    @property
    def restores_weights(self) -> bool:
        """Whether weights of an earlier point in training may be restored: by a rewind or a guard."""
        return self.rewind is not None or self.guard is not None

    @property
    def needs_whole(self) -> list[str]:
        """The arguments that need whole parameters in each process, as written in a call."""
        arguments = {
            f"compact={self.compact!r}": bool(self.compact),
            f"{self.structure!r} with {self.selector!r}": self.needs_example,
            repr(self.rewind): self.rewind is not None,
            repr(self.guard): self.guard is not None,
            repr(self.reconstruct): self.reconstruct is not None,
            repr(self.criterion): Needs.CALIBRATION in self.criterion.needs,
        }
        return [argument for argument, needed in arguments.items() if needed]

    def new_pruner(self, model: nn.Module, example: Any = None, table: LatencyTable | None = None) -> Pruner:
        """Return a pruner of a model.

        Args:
            model: The model.
            example: An input of ``forward``, or a probe, if structure or selector needs one.
            table: Measured times that the selector is to take; ``None`` if there are none yet.

        Raises:
            ValueError: If there is nothing to prune in it.
        """
        with slow_work(f"Finding what {type(self.structure).__name__} can remove, once before training,"):
            pruner = Pruner(
                model,
                self.target,
                criterion=self.criterion,
                structure=self.structure,
                selector=self.selector if table is None else self.selector.with_table(table),
                schedule=None,
                example=example,
                masks=self._from_start,
            )
        if self.keep_zeros:
            pruner.keep_zeros()
        return pruner

    def describe(self) -> dict[str, str]:
        """Return the arguments that a checkpoint records: name to value, as written in a call."""
        names = ("criterion", "structure", "selector", "schedule", "rewind", "guard", "reconstruct", "horizon")
        shares = self.shares()
        target = {"target": repr(shares.pop(None, None)), "target by pattern": repr(shares or None)}
        return target | {name: describe(getattr(self, name)) for name in names}

    def plan(self, model: nn.Module, example: Any = None) -> Report:
        """Return the report of a model as if it were pruned to the target; the model does not change.

        If criterion or selector needs training steps, the number of units that a layer keeps is ``None``.

        Args:
            model: The model.
            example: As for :class:`Pruner`; by default the model's ``example_input_array``.
        """
        if example is None:
            example = own_example(model)
        pruner = self.new_pruner(model, example)
        unknown = self.criterion.needs | self.selector.needs
        if not unknown:
            pruner.select(1.0)
        report = measure(model, pruner.masks, example, seconds=self.measure_seconds)
        if unknown:
            layers = tuple(replace(layer, kept=None) for layer in report.layers)
            report = replace(report, layers=layers, macs_kept=None)
        return replace(
            report,
            frozen=pruner.frozen,
            protected=tuple(sorted(pruner.protected)),
            latency_target=None if unknown else pruner.latency_target,
        )
