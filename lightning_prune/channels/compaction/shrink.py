"""Takes units out of a model that masks have emptied, and proves that the outputs stay what they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction.analysis import analyse
from lightning_prune.channels.compaction.cut_trial import CutTrial
from lightning_prune.channels.compaction.plan import Kept, Plan, make_plan
from lightning_prune.channels.compaction.replay import cut_tensor, replay_
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe, as_probe
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import masked_parameters
from lightning_prune.units.shards import check_unsharded
from lightning_prune.units.slices import Slice

_Module = TypeVar("_Module", bound=nn.Module)


class CompactionError(RuntimeError):
    """A network could not be shown to give the same outputs once it is smaller; it is as it was."""


def compact(model: _Module, masks: Mapping[str, Tensor], example: Any) -> _Module:
    """A smaller copy of a masked network, whose outputs are the same.

    What goes are channels, filters, neurons that nothing reads any more, or that give nothing. Outputs are
    compared on the example: in double precision to 1e-9 of the largest; in single precision, where the model
    runs in no other, to 1e-3.

    Args:
        model: The network; stays as it is.
        masks: Parameter name to bool mask, True where kept.
        example: A tensor, or a tuple of ``forward``'s arguments.

    Returns:
        The copy, its masked weights set to 0, without what could go.

    Raises:
        ValueError: If a mask fits no parameter, or the model rejects the example.
        CompactionError: If outputs differ; the message names the groups at fault.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> mask = torch.ones(2, 3, dtype=torch.bool)
    >>> mask[:, 1] = False
    >>> compact(model, {"2.weight": mask}, torch.ones(1, 4))
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    check_unsharded(model, "compact")
    smaller = copy_model(model)
    apply_masks_(smaller, masks)
    compact_(smaller, masks, None, as_probe(example))
    return smaller


def compact_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    groups: Iterable[UnitGroup] | None,
    probe: Probe,
    optimizers: Iterable[Optimizer] = (),
) -> tuple[Plan, dict[str, Tensor]]:
    """Shrinks a masked network in place, and what optimizers remember of it.

    Args:
        model: Masked.
        masks: Parameter name to bool mask, True where kept.
        groups: Its unit groups, tried already; ``None`` to find them.
        probe: Runs it.
        optimizers: Of its parameters.

    Returns:
        The plan that was carried out, and the masks that are left, of the new shapes.

    Raises:
        CompactionError: If outputs differ; nothing has changed then.
    """
    found = analyse(model, probe).groups if groups is None else groups
    plan = prove(model, remaining_units(model, masks, found), probe)
    replay_(model, plan, optimizers)
    shorter = {
        name: cut_tensor(mask, [cut for cut in plan.cuts if cut.name == name]) for name, mask in masks.items()
    }
    return plan, {name: mask for name, mask in shorter.items() if not mask.all()}


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets masked weights to 0.

    Raises:
        ValueError: If a mask belongs to no parameter, or to one of another shape.
    """
    for name, parameter in masked_parameters(model, masks).items():
        parameter.masked_fill_(~masks[name].to(parameter.device), 0)


def prove(model: nn.Module, kept: Kept, probe: Probe) -> Plan:
    """The plan that takes units out, once it is shown that outputs stay the same.

    Args:
        model: Masked; stays as it is.
        kept: Groups, each with a bool a unit, False where it goes.
        probe: Runs it.

    Raises:
        CompactionError: If outputs differ; the message names the groups at fault.
    """
    trial = CutTrial(model, probe, ahead=False)
    trial.sharpen()
    failing = trial.failing(kept)
    if failing:
        faults = "; ".join(f"{name} {why}" for name, why in failing.items())
        raise CompactionError(f"{type(model).__name__} stays as it was. {faults}")
    return make_plan(model, kept)


def remaining_units(model: nn.Module, masks: Mapping[str, Tensor], groups: Iterable[UnitGroup]) -> Kept:
    """What is left of each group: a unit is gone if all that reads it is 0, or all that makes it.

    Args:
        model: Masked.
        masks: Parameter name to bool mask. What they leave alone is no reason for a unit to go.
        groups: Of this model, or of one of its architecture.
    """
    parameters = dict(model.named_parameters())

    def empty(parts: list[Slice], size: int) -> Tensor:
        if not any(part.name in masks for part in parts):
            return torch.zeros(size, dtype=torch.bool)
        return torch.stack([part.sum(parameters[part.name] != 0).cpu() == 0 for part in parts]).all(0)

    kept = []
    for group in groups:
        readers: list[Slice] = [*group.readers]
        makers = [part for part in group.masked if part not in readers]
        gone = empty(readers, group.size) | empty(makers, group.size)
        gone[0] &= not gone.all()  # no layer is emptied
        kept.append((group, ~gone))
    return kept
