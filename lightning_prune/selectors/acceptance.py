"""The choice of the unit groups that a criterion and a selector can prune; the others get a reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lightning_prune.criteria.base import Criterion
from lightning_prune.selectors.base import Selector
from lightning_prune.statistics.input_hooks import LayerInput
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.reconstruction.layer_matrices import LayerMatrix
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.shards import Shards, to_local


def accepted_units(
    found: Units,
    criterion: Criterion,
    selector: Selector,
    shards: Shards,
    layers: Mapping[str, Sequence[LayerInput]],
    matrices: Mapping[str, LayerMatrix],
) -> Units:
    """Return the units with the groups that cannot be pruned moved to ``frozen``, each with the reason.

    The other groups have the limits that the selector sets.

    Args:
        found: The unit groups that a structure found in a model.
        criterion: Scores the units.
        selector: Chooses the units to remove.
        shards: The processes among which the rows of the parameters are divided.
        layers: Group name to the layers that read the group's units and whose inputs can be observed.
        matrices: Parameter name to the matrix, of the layers that can be calibrated.

    Raises:
        ValueError: If no group can be pruned.
    """

    def refuses(group: UnitGroup) -> str | None:
        why = selector.refuses(group) or criterion.refuses(group)
        if why is None and shards.sharded:
            why = _refuses_sharded(group, criterion, selector)
        if why is None and Needs.ACTIVATION in criterion.needs and not layers[group.name]:
            return f"{criterion!r} needs a layer with groups=1 that reads the units, called as a module"
        if why is None:
            known = [matrices[each.name] for each in group.readers if each.name in matrices]
            why = criterion.refuses_layers(group, known)
        return why

    accepted = found.without_refused(refuses, f"{criterion!r} with {selector!r}")
    return replace(accepted, groups=tuple(map(selector.limited, accepted.groups)))


def _refuses_sharded(group: UnitGroup, criterion: Criterion, selector: Selector) -> str | None:
    """Return why a group of divided parameters cannot be pruned, or ``None`` if it can."""
    if any(to_local(part.weight) is part.weight for part in group.slices):
        return "each process has a copy of its own, while other parameters are divided among them"
    alone = criterion.pointwise and criterion.needs in Needs.GRADIENT
    fits = {
        "structure=Unstructured()": group.divisible,
        "a criterion that scores each weight by itself, such as Magnitude() or Taylor()": alone,
        "selector=PerLayer(), or Global() without other arguments": selector.splits(group),
    }
    wanted = [part for part, fit in fits.items() if not fit]
    return f"its rows lie in several processes: take {', '.join(wanted)}" if wanted else None


def check_units(groups: Collection[UnitGroup], target: object, share: float, criterion: Criterion) -> None:
    """Check that the target removes at least one unit and that the criterion can score the groups.

    Args:
        groups: The unit groups that may be pruned.
        target: The target as the user gave it.
        share: The share of the units to remove that the selector derives from the target.
        criterion: Scores the units.

    Raises:
        ValueError: If the target removes no unit, if every group must keep all its units, or if the criterion
            needs gradients and no weight requires them.
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
