"""Mixtures of experts in a model: which modules are experts, and which of these can be cut."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.cut_trial import CutTrial
from lightning_prune.channels.compaction.experts import integers_in, is_removed, zeros_like_first
from lightning_prune.channels.compaction.module_widths import has_widths
from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.compaction.size_attributes import attribute_choices
from lightning_prune.channels.compaction.tracing import record_passes
from lightning_prune.channels.compaction.trial_cuts import least_cut, uneven_cut
from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.core.averages import averaged_modules
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Deadline, Probe, pass_mode, relative_difference
from lightning_prune.core.progress import pass_counter
from lightning_prune.core.tensors import reachable_tensors
from lightning_prune.units.budgets import Axis, Budget, Term
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice, WholeSlice

_CHAINED = "one of its modules reads what another one gives"
_NO_ROUTER = "no module that runs before it gives one number for each of its modules, as a router does"


class _Call(NamedTuple):
    """A call of a module in a pass.

    Attributes:
        name: Name of the module.
        training: Whether the pass is in training mode.
        args: Its arguments; empty for modules that are no experts, and so is the result.
        kwargs: Its keyword arguments.
        result: What it has returned.
        sizes: The sizes of the last dimensions of the tensors in the result.
    """

    name: str
    training: bool
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    result: Any = None
    sizes: frozenset[int] = frozenset()

    @property
    def given(self) -> list[Tensor]:
        """The tensors among the arguments, in the order of the call."""
        return [each for each in (*self.args, *self.kwargs.values()) if torch.is_tensor(each)]


@pass_counter("Find experts")
def analyse_experts(model: nn.Module, probe: Probe, max_seconds: float = math.inf) -> Units:
    """Return one group for each mixture of experts, and what is frozen, with the reason.

    A mixture is a list of modules of one kind, beside a router, or one module that holds the weights of all
    experts in stacked parameters and is called with their numbers. A group has passed a trial: a copy from
    which experts are cut gives the same outputs as one in which all their weights are 0.

    Args:
        model: Is not changed.
        probe: Runs the model.
        max_seconds: Time limit of the analysis, in seconds.

    Raises:
        ValueError: If the model cannot run on the example, or gives different outputs for it each time, or if
            the time limit is exceeded.
    """
    deadline = Deadline(max_seconds)
    averages = tuple(f"{name}." for name in averaged_modules(model))
    named = {name: each for name, each in model.named_modules() if not f"{name}.".startswith(averages)}
    lists = {name: found for name, each in named.items() if len(found := _experts_in(name, each)) > 1}
    stacks = {name: each for name, each in named.items() if _is_stack(each)}
    if not lists and not stacks:
        return Units((), {})
    records = record_passes(model, probe, deadline)
    probes = [each.probe for each in records]
    passes = _watch(model, probes, {*stacks, *chain(*lists.values())})
    reasons = {name: _no_mixture(model, name, lists[name], passes) for name in lists}
    found = [name for name in lists if reasons[name] is None]
    reasons |= {name: _CHAINED for name in found if _is_chain(model, probes, lists[name], passes)}
    reasons |= {name: _no_stack(name, passes) for name in stacks}
    reasons |= {name: why for name in reasons if (why := _tied(model, lists.get(name, [name]))) is not None}
    groups = [_group_of_list(model, name, lists[name]) for name in lists if reasons[name] is None]
    groups += [_group_of_stack(name, stacks[name]) for name in stacks if reasons[name] is None]
    frozen = {name: why for name, why in reasons.items() if why is not None}
    if not groups:
        return Units((), frozen)
    # most lists of modules are no mixtures, which needs no word where one is found
    frozen = {name: why for name, why in frozen.items() if why != _NO_ROUTER}
    perturb_(perturbed := copy_model(model))
    trial = CutTrial(model, list(map(TrialPass.of, records)), perturbed=perturbed, deadline=deadline)
    groups, failing = _tried(model, groups, trial)
    written = frozenset[str]().union(*(each.written for each in records))
    return Units(tuple(groups), frozen | failing, _budgets(model, groups, probe), written)


def _experts_in(name: str, module: nn.Module) -> list[str]:
    """Return the names of the modules in a list if all have the same parameters, of their own; else none."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return []
    found = {f"{name}.{key}".lstrip("."): each for key, each in module.named_children() if not is_removed(each)}
    kinds = {
        (type(each), *((leaf, one.shape) for leaf, one in each.named_parameters())) for each in found.values()
    }
    held = [id(one) for each in found.values() for one in each.parameters()]
    return list(found) if len(kinds) == 1 and held and len(held) == len(set(held)) else []


def _is_stack(module: nn.Module) -> bool:
    """Return whether all parameters of a module have an index of experts as their first dimension."""
    sizes = {len(each) if each.ndim else 0 for each in module.parameters()}
    deep = any(each.ndim > 2 for each in module.parameters(recurse=False))
    return deep and len(sizes) == 1 and min(sizes) > 1 and not has_widths(module)


@torch.no_grad()
def _is_chain(
    model: nn.Module, probes: Sequence[Probe], experts: Sequence[str], passes: Sequence[Sequence[_Call]]
) -> bool:
    """Return whether a module in a list is given something else when the weights of all of them are 0."""
    silent = copy_model(model)
    for expert in experts:
        for each in silent.get_submodule(expert).parameters():
            each.zero_()
    for calls, others in zip(passes, _watch(silent, probes, set(experts)), strict=True):
        one, other = ([call for call in each if call.name in experts] for each in (calls, others))
        if [call.name for call in one] != [call.name for call in other]:
            return True
        if any(
            relative_difference(before.given, after.given) for before, after in zip(one, other, strict=True)
        ):
            return True
    return False


def _watch(model: nn.Module, probes: Sequence[Probe], experts: set[str]) -> list[list[_Call]]:
    """Return the calls of modules in each pass, in the order in which they end."""
    passes = []
    for each in probes:
        twin = copy_model(model)
        calls: list[_Call] = []
        for name, module in twin.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                note = partial(_note, calls, name, each.training, name in experts)
                module.register_forward_hook(note, with_kwargs=True)
        with pass_mode(twin, training=each.training):
            each(twin)
        passes.append(calls)
    return passes


def _note(
    calls: list[_Call],
    name: str,
    training: bool,
    whole: bool,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    result: Any,
) -> None:
    """Append a call of a module, as its forward hook; with arguments and result if ``whole``."""
    sizes = frozenset(each.shape[-1] for each in reachable_tensors(result) if each.ndim)
    calls.append(
        _Call(name, training, args, kwargs, result, sizes) if whole else _Call(name, training, sizes=sizes)
    )


def _no_mixture(model: nn.Module, name: str, experts: Sequence[str], passes: list[list[_Call]]) -> str | None:
    """Return why a list of modules is no mixture of experts that can be cut; ``None`` if it is one."""
    count = len(model.get_submodule(name)._modules)
    scopes = [name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]]
    called: dict[str, list[_Call]] = defaultdict(list)
    for calls in passes:
        routed = False
        for call in calls:
            if call.name not in experts:
                beside = any(call.name.startswith(f"{scope}." if scope else "") for scope in scopes)
                routed |= beside and count in call.sizes and not call.name.startswith(f"{name}.")
                continue
            if not routed and not _gates(model, scopes[0], count):
                return _NO_ROUTER
            called[call.name].append(call)
    if not any(called.values()):
        return "the example calls none of its modules"
    some = next(call for calls in called.values() for call in calls)
    for expert in experts:
        module = model.get_submodule(expert)
        if (why := _not_zeros(module, called.get(expert) or [some])) is not None:
            return f"{expert} {why}"
    return None


def _gates(model: nn.Module, scope: str, count: int) -> bool:
    """Return whether a module has a matrix of its own with a row or column for each of so many experts."""
    own = model.get_submodule(scope).parameters(recurse=False)
    return any(each.ndim == 2 and count in each.shape for each in own)


@torch.no_grad()
def _not_zeros(expert: nn.Module, calls: Sequence[_Call]) -> str | None:
    """Return why an expert cannot go, or ``None``: in these calls it has to give zeros if its weights are 0."""
    if "forward" in vars(expert):
        return "has a forward of its own, set on the module"
    if any(not each.ndim for each in expert.parameters()):
        return "has a parameter without dimensions"
    twin = copy_model(expert)
    for each in twin.parameters():
        each.zero_()
    for call in calls:
        if not call.given:
            return "is given no tensor"
        expected = zeros_like_first(*call.args, **call.kwargs)
        with pass_mode(twin, training=call.training):
            found = twin(*call.args, **call.kwargs)
        same = torch.is_tensor(found) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if not same or found.any():
            return "gives something else than zeros of the shape of its input when all its weights are 0"
    return None


def _no_stack(name: str, passes: list[list[_Call]]) -> str | None:
    """Return why a module with stacked parameters is no mixture of experts; ``None`` if it is one."""
    calls = [call for each in passes for call in each if call.name == name]
    if not calls:
        return "is not called as a module"
    if any(len(integers_in((call.args, call.kwargs))) != 1 for call in calls):
        return "is not called with the numbers of its experts in one tensor"
    return None


def _tied(model: nn.Module, experts: Sequence[str]) -> str | None:
    """Return a reason if another module has a weight of these experts, too, and ``None`` if not."""
    own = {id(each) for expert in experts for each in model.get_submodule(expert).modules()}
    weights = {id(each) for expert in experts for each in model.get_submodule(expert).parameters()}
    for name, module in model.named_modules():
        if id(module) not in own and any(id(each) in weights for each in module.parameters(recurse=False)):
            return f"shares a weight with {name or 'the model itself'}"
    return None


def _group_of_list(model: nn.Module, name: str, experts: Sequence[str]) -> UnitGroup:
    parts = [
        WholeSlice(f"{expert}.{leaf}", each, 0, unit=unit, count=len(experts))
        for unit, expert in enumerate(experts)
        for leaf, each in model.get_submodule(expert).named_parameters()
    ]
    return UnitGroup(name, tuple(parts), modules=tuple(experts))


def _group_of_stack(name: str, module: nn.Module) -> UnitGroup:
    parts = (AxisSlice(f"{name}.{leaf}".lstrip("."), each, 0) for leaf, each in module.named_parameters())
    return UnitGroup(name, tuple(parts), numbered=((name, False),))


def _tried(
    model: nn.Module, groups: Sequence[UnitGroup], trial: CutTrial
) -> tuple[list[UnitGroup], dict[str, str]]:
    """Return the groups of which all but one unit can be cut, with what attributes that takes, and the others.

    Returns:
        The groups that can be cut, and the names of the others, with the reasons.
    """
    failures = trial.failing(least_cut(groups))
    passed = {group.name: group for group in groups if group.name not in failures}
    for group in groups:
        for way in _other_ways(model, group) if group.name in failures else ():
            if not trial.failing(least_cut([way]), least_cut([*passed.values()])):
                passed[group.name] = way
                break
    if passed:
        trial.refine()
        for cut in (least_cut, uneven_cut):
            failing = trial.failing(cut([*passed.values()]))
            passed = {name: group for name, group in passed.items() if name not in failing}
            failures |= failing
    found = [passed[group.name] for group in groups if group.name in passed]
    return found, {group.name: failures[group.name].reason for group in groups if group.name not in passed}


def _other_ways(model: nn.Module, group: UnitGroup) -> Iterator[UnitGroup]:
    """Yield the group with attributes that shrink with it and, of a stack, with shares that become 0."""
    attributes = attribute_choices(model, group)
    yield from (replace(group, attributes=each) for each in attributes)
    if group.numbered:
        shared = replace(group, numbered=tuple((name, True) for name, _ in group.numbered))
        yield from (replace(shared, attributes=each) for each in ((), *attributes))


def _budgets(model: nn.Module, groups: Sequence[UnitGroup], probe: Probe) -> dict[str, Budget]:
    """Return the budgets of parameters and of multiply-adds, those of a pass on the example as it is routed."""
    axes = dict(chain(*map(_axes, groups)))
    amounts = {
        "params": {name: each.numel() for name, each in model.named_parameters()},
        "macs": macs_by_parameter(copy_model(model), probe),
    }
    return {
        budget: Budget([Term(amount, axes.get(name, ())) for name, amount in each.items()])
        for budget, each in amounts.items()
    }


def _axes(group: UnitGroup) -> Iterator[tuple[str, tuple[Axis, ...]]]:
    """Yield the name of each parameter of a group, with the axis that its units shorten."""
    for part in group.slices:
        if isinstance(part, WholeSlice):
            yield part.name, (Axis(1, 0, ((group.name, torch.tensor([part.unit])),)),)
        else:
            yield part.name, (Axis(group.size, 0, ((group.name, None),)),)
