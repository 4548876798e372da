"""Unit groups that stay whole whatever a criterion says of them: what does not train, and what is no number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from lightning_prune.core.averages import averaged_names
from lightning_prune.core.tensors import no_score
from lightning_prune.core.trained import metric_tensors, trains
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.shards import to_local


def touchable_units(found: Units, model: nn.Module, who: str) -> Units:
    """Return the units with the groups that pruning must not touch moved to ``frozen``, each with the reason.

    Where no parameter of the model trains, as in one for inference, all count as if they did.

    Args:
        found: The unit groups that a structure has found.
        model: Their model.
        who: The structure, for the error message.

    Raises:
        ValueError: If no group is left.
    """
    parameters = dict(model.named_parameters())
    updated = averaged_names(model).keys() | found.written
    still = {id(each) for name, each in parameters.items() if name not in updated and not trains(each)}
    if not any(map(trains, parameters.values())):
        still = set()
    codes = {
        name: why for name, each in parameters.items() if each.ndim > 1 and (why := no_score(to_local(each)))
    }
    found = replace(found, frozen={**found.frozen, **codes})
    return found.without_refused(partial(_stays, still | metric_tensors(model), codes), who)


def _stays(still: set[int], codes: Mapping[str, str], group: UnitGroup) -> str | None:
    """Return why a group stays whole; ``None`` if it may be pruned.

    Args:
        still: The ``id`` of each parameter that does not train, and that nothing else updates.
        codes: Names of matrices whose elements cannot be scored, with the reasons.
        group: The group.
    """
    for part in group.masked:
        if part.name in codes:
            return codes[part.name] if len(group.masked) == 1 else f"{part.name} {codes[part.name]}"
    if not group.named and any(id(part.weight) in still for part in group.matrices.slices):
        return "does not train: name it in include to prune it"
    return None
