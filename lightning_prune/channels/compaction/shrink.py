"""Compaction of a masked model: cut the units that masks have emptied, if the outputs stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction.analysis import analyse
from lightning_prune.channels.compaction.cut_trial import CutTrial
from lightning_prune.channels.compaction.known_analyses import Analysis
from lightning_prune.channels.compaction.mixtures import analyse_experts
from lightning_prune.channels.compaction.parts import follow_parts
from lightning_prune.channels.compaction.plan import Kept, Plan, make_plan
from lightning_prune.channels.compaction.proof import Proof
from lightning_prune.channels.compaction.replay import cut_tensor, replay_
from lightning_prune.channels.compaction.size_attributes import size_attributes
from lightning_prune.channels.compaction.tracing import record_passes
from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.channels.compaction.whole_numbers import get_number
from lightning_prune.core.averages import Average, averages_within
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import NotFollowedError, Probe, as_probe
from lightning_prune.core.progress import pass_counter
from lightning_prune.core.tensors import check_materialized
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.masks import Masks, joined_masks
from lightning_prune.units.shards import check_unsharded
from lightning_prune.units.slices import Slice

_Module = TypeVar("_Module", bound=nn.Module)

_PROOF = "Prove that outputs stay the same"  # beside the counter of passes


@dataclass(frozen=True, eq=False)
class ProvenPlan:
    """A plan of which trials have shown that it leaves outputs as they are.

    Attributes:
        plan: The plan.
        proof: The comparison of outputs; ``None`` if the model has no unit groups.
        unchanged: Whole numbers of modules that are left alone, as ``module.attribute=value``, although they
            equal a width that changes.
    """

    plan: Plan
    proof: Proof | None
    unchanged: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Compacted(ProvenPlan):
    """What a compaction has done: the plan that was applied, with its proof.

    Attributes:
        masks: The masks in the new shapes, without those that mask nothing any more.
    """

    masks: dict[str, Tensor]


class CompactionError(RuntimeError):
    """Raised when a cut changes the outputs of a model, or makes it fail; the model itself is unchanged."""


@pass_counter(_PROOF)
def compact(model: _Module, masks: Masks, example: Any) -> _Module:
    """Return a smaller copy of a masked model that gives the same outputs.

    A channel, filter or neuron is cut if all weights that produce it are 0, or all weights that read it; an
    expert of a mixture, if all its weights are.
    Outputs are compared before and after, on the example and on other inputs, in double precision with a
    tolerance of 1e-9 of the largest output; where the model fixes another type, that of its rounding errors.
    Of a model that cannot be followed as a whole, the largest parts that can be, and that masks belong to, are
    compacted, each on the inputs that it gets; the whole has to run, and to give the same if it does so twice.

    Args:
        model: The model; is not changed.
        masks: Parameter name to bool mask, True where kept; or a list of several such mappings, as of several
            callbacks or pruners.
        example: A tensor, a tuple of ``forward``'s arguments or a mapping of keyword arguments; or a list of
            several of these, to run all of the model.

    Returns:
        The copy, with masked weights set to 0 and the units cut that can be.

    Raises:
        ValueError: If a mask fits no parameter, or the model has parameters without a shape, or cannot run on
            the example.
        CompactionError: If outputs differ; the message names the groups that cannot be cut.

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
    check_materialized(model)
    smaller = copy_model(model)
    joined = joined_masks(smaller, masks)
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            if name in joined:
                parameter.masked_fill_(~joined[name].to(parameter.device), 0)
    probe = as_probe(example)
    units, passes = _emptied(model, smaller, joined, probe)
    compact_(smaller, joined, units.groups, probe, parts=units.parts, passes=passes)
    return smaller


@pass_counter(_PROOF)
def compact_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    groups: Iterable[UnitGroup] | None,
    probe: Probe,
    optimizers: Iterable[Optimizer] = (),
    averages: Iterable[Average] = (),
    parts: Sequence[str] = (),
    passes: Sequence[TrialPass] = (),
) -> Compacted:
    """Shrink a masked model in place, together with the optimizer state of its parameters.

    Args:
        model: The model, with masked weights at 0.
        masks: Parameter name to bool mask, True where kept.
        groups: Its unit groups, which have passed the trial cuts of an analysis; ``None`` to analyse the model.
        probe: Runs the model.
        optimizers: Optimizers of its parameters.
        averages: Weight averages outside the model; they are cut in the same way.
        parts: Names of the modules in which alone the groups were found; none for the whole model.
        passes: The passes of that analysis, if it was one of the same network on the same example.

    Returns:
        What was done, with its proof.

    Raises:
        CompactionError: If outputs differ; the model is unchanged, and the message names the groups that
            cannot be cut.
    """
    if groups is None:
        emptied = _emptied(model, model, masks, probe)
        groups, parts, passes = emptied.units.groups, emptied.units.parts, emptied.passes
    found = prove_plan(model, remaining_units(model, masks, groups), probe, parts, passes)
    replay_(model, found.plan, optimizers, averages)
    cut_masks = {name: cut_tensor(mask, found.plan.cuts_of(name)) for name, mask in masks.items()}
    left = {name: mask for name, mask in cut_masks.items() if not mask.all()}
    return Compacted(found.plan, found.proof, found.unchanged, left)


def prove_plan(
    model: nn.Module,
    kept: Kept,
    probe: Probe,
    parts: Sequence[str] = (),
    passes: Sequence[TrialPass] = (),
) -> ProvenPlan:
    """Return the plan that cuts units out of a masked model, with the proof that its outputs stay the same.

    Args:
        model: The model, with the weights of these units at 0; it is not changed.
        kept: Its unit groups, each with a bool mask over its units, False for a unit to cut.
        probe: As for :func:`compact_`.
        parts: As for :func:`compact_`.
        passes: As for :func:`compact_`.

    Raises:
        CompactionError: If outputs differ; the message names the groups that cannot be cut.
    """
    trial = _refined_trial(model, probe, parts, passes)
    failing = trial.failing(kept)
    if failing:
        kept = [
            (group, _with_second(units)) if group.name in failing else (group, units) for group, units in kept
        ]
        failing = trial.failing(kept)
    if failing:
        faults = "; ".join(f"{name} {failure.reason}" for name, failure in failing.items())
        raise CompactionError(f"{type(model).__name__} stays as it was. {faults}")
    plan = make_plan(model, kept, averages_within(model))
    return ProvenPlan(plan, trial.proof, _unchanged(model, kept, plan))


def _emptied(dense: nn.Module, model: nn.Module, masks: Mapping[str, Tensor], probe: Probe) -> Analysis:
    """Return the unit groups that masks may have emptied: experts and, if more is masked, channels.

    Args:
        dense: The model to analyse.
        model: The same, with masked weights at 0.
        masks: Parameter name to bool mask.
        probe: Runs the model.
    """
    experts: tuple[UnitGroup, ...] = ()
    if any(map(_may_hold_experts, masks.values())):
        with suppress(NotFollowedError):  # parts may be followed alone
            experts = analyse_experts(dense, probe).groups
    whole = {
        part.name: part.spread(units.to(part.weight.device))
        for group, units in remaining_units(model, masks, experts)
        for part in group.masked
    }
    if all(torch.equal(mask, whole.get(name, torch.ones_like(mask))) for name, mask in masks.items()):
        return Analysis(Units(experts, {}), ())
    named = [name for name, mask in masks.items() if not mask.all()]
    units, passes = analyse(dense, probe, named=named)
    return Analysis(replace(units, groups=(*units.groups, *experts)), passes)


def _may_hold_experts(mask: Tensor) -> bool:
    """Return whether a mask removes a whole tensor, or one of several stacked matrices, as of an expert."""
    return not mask.any() or (mask.ndim == 3 and not mask.flatten(1).any(1).all())


def _refined_trial(
    model: nn.Module, probe: Probe, parts: Sequence[str], passes: Sequence[TrialPass]
) -> CutTrial:
    """Return the trial that a compaction has to pass: of what was followed and, if it can be run, of the whole.

    What gives other outputs each time, as the rest of the model may, has to run, and no more.

    Args:
        model: The model, with masked weights at 0.
        probe: Runs the model.
        parts: Names of the modules that were followed alone; none for the whole model.
        passes: The passes of the analysis of the whole model, if they are known.

    Raises:
        NotFollowedError: If what was followed gives different outputs each time.
    """

    def trial_of(passes: Sequence[TrialPass], *, known: bool = False) -> CutTrial:
        trial = CutTrial(model, passes, known=known)
        trial.refine()
        return trial

    if passes and not parts:
        return trial_of(passes, known=True)
    followed = list(map(TrialPass.of, record_passes(model, follow_parts(model, probe, parts).probe)))
    if parts:
        with suppress(NotFollowedError):
            return trial_of([*followed, *map(TrialPass.of, record_passes(model, probe))])
    return trial_of(followed)


def _with_second(units: Tensor) -> Tensor:
    """Return the units that remain, with a second one, whose weights are 0, where there is one alone.

    How PyTorch lays out a result in memory depends on whether there is one channel; ``view`` may then fail.
    """
    if int(units.count_nonzero()) > 1:
        return units
    second = units.clone()
    second[int(units[0])] = True
    return second


def _unchanged(model: nn.Module, kept: Kept, plan: Plan) -> tuple[str, ...]:
    """Return the integer attributes that look like a size that the plan changes, and that it leaves alone."""
    found: dict[str, None] = {}
    for group, units in kept:
        if not units.all():
            for name, key in size_attributes(model, group):
                if key not in plan.attributes.get(name, {}):
                    attribute = f"{name}.{key}".lstrip(".")
                    found[f"{attribute}={get_number(model.get_submodule(name), key)}"] = None
    return tuple(found)


def remaining_units(model: nn.Module, masks: Mapping[str, Tensor], groups: Iterable[UnitGroup]) -> Kept:
    """Return which units remain in each group.

    A unit is removed if its elements are 0 in all weights that read it, or in all other masked slices of its
    group, which make it; where a sum takes it in, in both. As many remain as the group keeps at least.

    Args:
        model: The model, with masked weights at 0.
        masks: Parameter name to bool mask. The weights that read a unit can remove it only if one of them has a
            mask, and so can those that make it.
        groups: Unit groups of this model, or of one of the same architecture.

    Returns:
        The groups, each with a bool mask over its units, True for a unit that remains.
    """
    parameters = dict(model.named_parameters())

    def empty(parts: list[Slice], size: int) -> Tensor:
        if not any(part.name in masks for part in parts):
            return torch.zeros(size, dtype=torch.bool)
        return ~torch.stack([part.kept(parameters[part.name] != 0).cpu() for part in parts]).any(0)

    kept = []
    for group in groups:
        readers: list[Slice] = [*group.readers]
        if group.summed:
            removed = empty([*group.masked], group.size)
        else:
            makers = [part for part in group.masked if part not in readers]
            removed = empty(readers, group.size) | empty(makers, group.size)
        # at least one unit remains, so that no layer becomes empty
        missing = max(0, group.minimum - int((~removed).count_nonzero()))
        removed[removed.nonzero().flatten()[:missing]] = False
        kept.append((group, ~removed))
    return kept
