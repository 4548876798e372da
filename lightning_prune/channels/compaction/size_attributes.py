"""Whole numbers that a user's modules keep of their own sizes: heads, head size, inner width."""

from __future__ import annotations

from torch import nn

from lightning_prune.channels.compaction.module_widths import has_widths
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices

Attributes = tuple[tuple[str, str], ...]  # module and attribute names


def attribute_choices(model: nn.Module, group: UnitGroup) -> list[Attributes]:
    """Attributes that may have to shrink with a group, as they look like its size.

    Args:
        model: Whose modules.
        group: A unit group.

    Returns:
        Choices to try, the likeliest first.
    """
    counts = {int((part.index >= 0).sum()) for part in axis_slices(group.slices) if part.index is not None}
    size = {group.size}
    parts = {count // share for count in counts for share in (2, 3)}  # of queries, keys and values in one
    makers = [part.name.rpartition(".")[0] for part in group.slices]
    around = list(dict.fromkeys(maker.rpartition(".")[0] for maker in makers))
    own = [maker for maker in makers if not has_widths(model.get_submodule(maker))]
    choices: list[Attributes] = []
    for level in ([*own, *around], [name.rpartition(".")[0] for name in around]):
        for wanted in (size | counts, size | counts | parts, size):
            found = tuple(
                (name, key)
                for name in dict.fromkeys(level)
                for key, value in vars(model.get_submodule(name)).items()
                if type(value) is int and value in wanted and value > 1
            )
            choices += [found] if found else []
        choices += [(each,) for choice in choices[:] for each in choice]
    return list(dict.fromkeys(choices))
