"""Snapshots of weights, optimizers and learning-rate schedules: take, check and restore; fresh weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.core import schema
from lightning_prune.core.model_copies import copy_sharing_weights
from lightning_prune.core.same_kind import same_kind_as
from lightning_prune.core.tensors import tensors_by_name

_LEFT_OUT = object()
_METHODS = ("reset_parameters", "_reset_parameters")


class Stateful(Protocol):
    """The methods of a learning-rate schedule that a snapshot needs."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Load a state."""


@dataclass(frozen=True)
class TrainingObjects:
    """The objects that training changes, and that a snapshot restores.

    Args:
        model: The network.
        optimizers: The optimizers of its parameters.
        schedules: The learning-rate schedules of the optimizers.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer] = ()
    schedules: Sequence[Stateful] = ()


def take_snapshot(training: TrainingObjects, weights: bool = True) -> dict[str, Any]:
    """Return the state of all training objects, as plain values and tensors on the CPU.

    Args:
        training: The objects; they do not change.
        weights: Whether the snapshot includes parameters and buffers.
    """
    return {
        "weights": weights_of(training.model) if weights else {},
        "optimizers": [copy_plain(optimizer.state_dict()) for optimizer in training.optimizers],
        "schedules": [copy_plain(schedule.state_dict()) for schedule in training.schedules],
    }


def restore_snapshot_(training: TrainingObjects, snapshot: Mapping[str, Any]) -> None:
    """Restore a snapshot in place. The snapshot does not change, and can be restored again."""
    restore_weights_(training.model, snapshot["weights"])
    for optimizer, state in zip(training.optimizers, snapshot["optimizers"], strict=True):
        restore_optimizer_(optimizer, state)
    for schedule, state in zip(training.schedules, snapshot["schedules"], strict=True):
        schedule.load_state_dict({**schedule.state_dict(), **copy_plain(state)})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and buffers by name, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors_by_name(model).items()}


@torch.no_grad()
def restore_weights_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy saved values into parameters and buffers; those without a saved value stay as they are."""
    present = tensors_by_name(model)
    for name, value in weights.items():
        if name in present:
            present[name].copy_(value)


def optimizer_memory(optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of an optimizer's state of each parameter, without hyperparameters."""
    return copy_plain({"state": optimizer.state_dict()["state"]})


def restore_optimizer_(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore an optimizer; hyperparameters that were not saved, and parameter groups added since, stay."""
    now, then = optimizer.state_dict(), copy_plain(state)
    nothing: dict[str, Any] = {}
    groups = zip_longest(now["param_groups"], then.get("param_groups", ()), fillvalue=nothing)
    merged = [{**present, **earlier} for present, earlier in groups]
    optimizer.load_state_dict({**now, **then, "param_groups": merged})


def copy_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict that shares no memory with it and loads with ``weights_only=True``.

    Entries that hold anything else than tensors and plain values, such as functions, are left out.

    >>> copy_plain({"lr": 0.1, "betas": (0.9, 0.99), "anneal": max, "groups": [{"lr": 0.1, "anneal": max}]})
    {'lr': 0.1, 'betas': (0.9, 0.99), 'groups': [{'lr': 0.1}]}
    """
    copies = ((key, _copy(value)) for key, value in state.items())
    return {key: value for key, value in copies if value is not _LEFT_OUT}


def _copy(value: object) -> Any:
    copied: Any = _LEFT_OUT
    match value:
        case None | bool():
            copied = value
        case Integral():  # numpy integers and IntEnum members would not load with weights_only=True
            copied = int(value)
        case Real():
            copied = float(value)
        case str():
            copied = str(value)
        case Tensor():
            copied = value.detach().to("cpu", copy=True)
        case Counter():  # the milestones of MultiStepLR
            copied = Counter(value)
        case dict():
            copied = copy_plain(value)
        case list() | tuple():
            copies = [_copy(each) for each in value]
            if not any(each is _LEFT_OUT for each in copies):
                copied = tuple(copies) if isinstance(value, tuple) else copies
    return copied


def reinitialize_(model: nn.Module, seed: int) -> None:
    """Reinitialize all weights in place: call ``reset_parameters`` of each module, children before parents.

    The random state does not change. Modules with running statistics reset them, too.

    Args:
        model: The model.
        seed: Seed of the random weights; the same seed gives the same weights.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        torch.manual_seed(seed)
        for module in reversed(list(model.modules())):
            own = next((name for name in _METHODS if hasattr(module, name)), None)
            if own is not None:
                getattr(module, own)()


def not_reinitialized(model: nn.Module, seed: int) -> list[str]:
    """Return the names of the parameters that :func:`reinitialize_` does not fully replace, tried on a copy."""
    twin = copy_sharing_weights(model, own=dict(model.named_parameters()))
    floating = {
        name: each for name, each in twin.named_parameters() if each.is_floating_point() or each.is_complex()
    }
    with torch.no_grad():
        for parameter in floating.values():
            parameter.fill_(torch.nan)
    reinitialize_(twin, seed)
    return [name for name, parameter in floating.items() if bool(parameter.isnan().any())]


# --- schema of saved snapshots, and checks against the present training

_REMEMBERED = schema.record(
    {
        "state": schema.mapping(schema.mapping(schema.anything), key=schema.anything),
        "param_groups": schema.sequence(schema.mapping(schema.anything)),
    },
    before={"param_groups": ()},  # without saved hyperparameters, the present ones stay
    others=True,
)


def _optimizer(value: Any) -> dict[str, Any]:
    _REMEMBERED(value)
    return schema.mapping(schema.anything)(value)  # some optimizers have more entries


WEIGHTS = schema.mapping(schema.instance_of(Tensor, "a tensor"))
OPTIMIZERS = schema.sequence(_optimizer)
SNAPSHOT = schema.record(
    {
        "weights": WEIGHTS,
        "optimizers": OPTIMIZERS,
        "schedules": schema.sequence(schema.mapping(schema.anything)),
    }
)


def check_snapshot(saved: Mapping[str, Any], training: TrainingObjects, what: str) -> None:
    """Check that a saved snapshot can be restored into these training objects.

    Args:
        saved: The snapshot, as ``SNAPSHOT`` reads it; schedules may be missing.
        training: The objects; they do not change.
        what: Name of the snapshot, for the error message.

    Raises:
        ValueError: If a tensor has another shape, a value is not a number where one is needed, or the snapshot
            is of other optimizers, schedules or parameters.
    """
    optimizers = [each.state_dict() for each in training.optimizers]
    schedules = [each.state_dict() for each in training.schedules]

    def reader(value: Mapping[str, Any]) -> None:
        schema.read_at(".weights", same_kind_as(tensors_by_name(training.model)), value["weights"])
        schema.read_at(".optimizers", _each(_like_optimizer, optimizers), value["optimizers"])
        schema.read_at(".schedules", _each(same_kind_as, schedules), value.get("schedules", schedules))

    schema.read(saved, reader, what)


def _each(reader: Callable[[Any], schema.Reader[Any]], present: Sequence[Any]) -> schema.Reader[Any]:
    """Return a reader of a list with one item for each present object, read by ``reader`` of that object."""
    as_many = schema.satisfying(
        schema.sequence(schema.anything), lambda found: len(found) == len(present), f"{len(present)} of them"
    )
    return lambda value: [
        schema.read_at(f"[{place}]", reader(now), each)
        for place, (each, now) in enumerate(zip(as_many(value), present, strict=True))
    ]


def _like_optimizer(present: Mapping[str, Any]) -> schema.Reader[Any]:
    """Return a reader of an optimizer's state dict, of the same parameters in its first parameter groups."""
    own = [group["params"] for group in present["param_groups"]]

    def fits(value: Mapping[str, Any]) -> bool:
        then = [group.get("params") for group in value.get("param_groups", ())]
        return then == own[: len(then)]

    groups = schema.satisfying(schema.anything, fits, "the same parameters in each group", ".param_groups")
    return lambda value: same_kind_as(present)(groups(value))
