"""Which unit groups a criterion and a selector can work with; the others stay dense, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lightning_prune.criteria import Criterion
from lightning_prune.selectors.base import Selector
from lightning_prune.statistics.input_hooks import LayerInput
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.shards import Shards, to_local


def accepted_units(
    found: Units,
    criterion: Criterion,
    selector: Selector,
    shards: Shards,
    layers: Mapping[str, Sequence[LayerInput]],
) -> Units:
    """Return the units without the groups that cannot be pruned, which are frozen with the reason.

    Args:
        found: What a structure found in a model.
        criterion: Scores the units.
        selector: Chooses among them.
        shards: Which rows of the parameters this process holds.
        layers: Group name to the layers that read it and whose inputs can be observed.

    Raises:
        ValueError: If nothing is left.
    """

    def refuses(group: UnitGroup) -> str | None:
        why = selector.refuses(group) or criterion.refuses(group)
        if why is None and shards.sharded:
            why = _refuses_sharded(group, criterion, selector)
        if why is None and Needs.ACTIVATION in criterion.needs and not layers[group.name]:
            return f"{criterion!r} needs an ungrouped layer that is called on the units"
        return why

    return found.accepted(refuses, f"{criterion!r} with {selector!r}")


def _refuses_sharded(group: UnitGroup, criterion: Criterion, selector: Selector) -> str | None:
    if any(to_local(part.weight) is part.weight for part in group.slices):
        return "each process has a copy of its own, while other parameters are divided among them"
    alone = criterion.pointwise and criterion.needs in Needs.GRADIENT
    fits = {
        "structure=Unstructured()": group.divisible,
        "a criterion that scores each weight by itself, such as Magnitude() or Taylor()": alone,
        "selector=Global() or PerLayer()": selector.splits(group),
    }
    wanted = [part for part, fit in fits.items() if not fit]
    return f"its rows lie in several processes: take {', '.join(wanted)}" if wanted else None


def check_units(
    groups: Collection[UnitGroup], target: float | None, share: float, criterion: Criterion
) -> None:
    """Check that something can be pruned.

    Args:
        groups: What may be pruned.
        target: As the user gave it.
        share: Share of the units that the selector makes of it.
        criterion: Scores the units.

    Raises:
        ValueError: If the target removes no unit, all units have to stay, or gradients are needed and no weight
            trains.
    """
    units = sum(group.size for group in groups)
    if target is not None and round(share * units) == 0:
        raise ValueError(f"target={target!r} of {units} units removes none.")
    if all(group.least == group.size for group in groups):
        bounds = ", ".join(f"{group.name} at least {group.least} of {group.size}" for group in groups)
        raise ValueError(f"no unit can go: {bounds} must stay.")
    trainable = [part.weight.requires_grad for group in groups for part in group.slices]
    if Needs.GRADIENT in criterion.needs and not any(trainable):
        raise ValueError(
            f"criterion={criterion!r} needs gradients, but no prunable parameter has any:"
            " set requires_grad, or choose a criterion that looks at weights."
        )
