"""Integer attributes of user-defined modules that may hold a size: number of heads, head size, inner width."""

from __future__ import annotations

from torch import nn

from lightning_prune.channels.compaction.module_widths import has_widths
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices

Attributes = tuple[tuple[str, str], ...]  # pairs of a module name and an attribute name


def attribute_choices(model: nn.Module, group: UnitGroup) -> list[Attributes]:
    """Return integer attributes that may have to shrink with a group, since their values look like its size.

    Candidates are above 1 and equal to the group's number of units, to the number of places that its units take
    up along a dimension of a weight, or to a half or a third of the latter. They belong to modules of unknown
    kinds that hold the weights which make the units, or to modules one or two levels above.

    Args:
        model: The model.
        group: A unit group of the model.

    Returns:
        Choices to try, each a combination of attributes that shrink together, the likeliest first.
    """
    counts = {int((part.index >= 0).sum()) for part in axis_slices(group.slices) if part.index is not None}
    size = {group.size}
    # a projection may compute keys and values, or queries, keys and values, at once
    shares = {count // share for count in counts for share in (2, 3)}
    makers = [part.name.rpartition(".")[0] for part in group.slices]
    parents = list(dict.fromkeys(maker.rpartition(".")[0] for maker in makers))
    unknown = [maker for maker in makers if not has_widths(model.get_submodule(maker))]
    choices: list[Attributes] = []
    for level in ([*unknown, *parents], [name.rpartition(".")[0] for name in parents]):
        for wanted in (size | counts, size | counts | shares, size):
            found = tuple(
                (name, key)
                for name in dict.fromkeys(level)
                for key, value in vars(model.get_submodule(name)).items()
                if type(value) is int and value in wanted and value > 1
            )
            choices += [found] if found else []
        choices += [(each,) for choice in choices for each in choice]
    return list(dict.fromkeys(choices))
