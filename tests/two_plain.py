"""Prunes a model that two processes divide, in a loop of its own: used by two_shards.py, in each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lit import digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune import (
    Channels,
    Criterion,
    Fisher,
    Global,
    Gradient,
    Magnitude,
    Movement,
    NofM,
    PerLayer,
    Pruner,
    Selector,
    Taylor,
    compact,
    export_onnx,
    load_compact,
    load_packed,
    measure,
    save_packed,
    sensitivity,
)


def network() -> nn.Sequential:
    """Of all rows, two processes hold 2 and 1, 9 and 8, 1 and none, 5 and 5."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 17), nn.ReLU(), nn.Linear(17, 1)
    ).append(nn.Linear(1, 10))


def whole(tensors: Any) -> dict[str, Tensor]:
    """Copies of tensors by name, brought together."""
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in dict(tensors).items()
    }


def held(tensor: Tensor) -> Tensor:
    """What this process has."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


PLAIN: dict[str, tuple[Criterion, Selector, Any]] = {
    "magnitude": (Magnitude(), Global(), 0.6),
    "square": (Magnitude(p=2), PerLayer(), 0.6),
    "gradient": (Gradient(), Global(), 0.6),
    "gradient by layer": (Gradient(), PerLayer(), 0.6),
    "taylor": (Taylor(), Global(), 0.6),
    "taylor by layer": (Taylor(), PerLayer(), 0.6),
    "movement": (Movement(), Global(), 0.6),
    "fisher": (Fisher(), Global(), 0.6),
    "targets": (Magnitude(), Global(), {"3*": 0.7, "*": 0.4}),
    "pattern": (Taylor(), NofM(1, 2), None),
    "all but the last": (Magnitude(), Global(), 0.9995),
}


def coarse(model: nn.Module) -> None:
    """Few different weights, so that many are equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 20).round() / 20)


def give(model: nn.Module, copied: nn.Module) -> None:
    """Divides the gradients of a whole model as the parameters of the other one are."""
    for parameter, other in zip(model.parameters(), copied.parameters(), strict=True):
        parameter.grad = distribute_tensor(other.grad, parameter.device_mesh, [Shard(0)])


def plain(criterion: Criterion, selector: Selector, target: Any) -> dict[str, Any]:
    """Masks of three events, of a divided model and of a whole one, with the very same numbers."""
    torch.manual_seed(0)
    copied = network()
    coarse(copied)
    model = copy.deepcopy(copied)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    parts = {"criterion": criterion, "selector": selector, "schedule": None}
    mine, theirs = Pruner(model, target, **parts), Pruner(copied, target, **parts)
    optimizer = Adam(model.parameters(), 0.01)
    found: dict[str, Any] = {"mine": [], "theirs": [], "memory": 0}
    images, labels = next(iter(digits(64)))
    for fraction in (0.4, 0.7, 1.0):
        for _ in range(2):
            copied.zero_grad()
            F.cross_entropy(copied(images), labels).backward()
            give(model, copied)
            mine.observe()
            theirs.observe()
            optimizer.step()
            mine.apply_()
            weights = whole(model.named_parameters())
            copied.load_state_dict(weights)
        mine.prune(fraction, optimizer)
        theirs.prune(fraction)
        for name, parameter in model.named_parameters():
            if name in mine.masks:
                gone = ~held(mine.masks[name])
                found["memory"] += int(held(optimizer.state[parameter]["exp_avg"])[gone].count_nonzero())
        found["mine"].append(whole(mine.masks))
        found["theirs"].append(whole(theirs.masks))
        found["sparsity"] = mine.sparsity, theirs.sparsity
        found["protected"] = mine.protected, theirs.protected
    return found


class Sent(TorchDispatchMode):
    """Notes what processes exchange, as (operation, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [each for each in tree_leaves(args) if torch.is_tensor(each)]
            self.seen.append((func.__name__, sum(each.nbytes for each in tensors)))
        return func(*args, **(kwargs or {}))


def sent(width: int) -> dict[str, list[tuple[str, int]]]:
    """What an observation, an event and a step exchange, of a model of this width."""
    torch.manual_seed(0)
    copied = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    model = copy.deepcopy(copied)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    pruner = Pruner(model, 0.5, criterion=Taylor(), schedule=None)
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    copied(torch.ones(4, 64)).logsumexp(1).sum().backward()
    give(model, copied)
    with Sent() as observed:
        pruner.observe()
    with Sent() as pruned:
        pruner.prune(1.0, optimizer)
    optimizer.step()
    with Sent() as applied:
        pruner.apply_()
    with Sent() as control:
        whole(pruner.masks)
    return {"observe": observed.seen, "prune": pruned.seen, "apply": applied.seen, "control": control.seen}


def said(call: Callable[[], Any]) -> str:
    """The error."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def refused() -> list[str]:
    """What is said to those who want the whole model."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    image = torch.ones(1, 1, 8, 8)
    calls: list[Callable[[], Any]] = [
        lambda: compact(model, {}, image),
        lambda: export_onnx(model, "none.onnx", image),
        lambda: save_packed(model, {}, "none.packed"),
        lambda: sensitivity(model, lambda _: 0.0),
        lambda: Pruner(model, 0.5, structure=Channels(), example=image),
        lambda: Pruner(model, 0.5, selector=Global(budget="params")),
        lambda: load_packed("none.packed", model),
        lambda: load_compact({"state_dict": network().state_dict()}, model),
    ]
    return [said(call) for call in calls]


def given_masks() -> list[dict[str, Tensor]]:
    """Masks of a divided model and of a whole one that begin with the same masks, before and after an event."""
    torch.manual_seed(0)
    alone = network()
    model = copy.deepcopy(alone)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    masks = {"3.weight": torch.rand(17, 108) < 0.7, "3.bias": torch.arange(17) % 3 > 0}
    found = []
    for each in (model, alone):
        pruner = Pruner(each, 0.6, schedule=None, masks=masks)
        found.append(whole(pruner.masks))
        pruner.prune(1.0)
        found.append(whole(pruner.masks))
    return [masks, *found]


def masks_that_were_divided() -> tuple[str, list[int]]:
    """What is said of them with the whole model, and what the advice leaves: weights kept there and here."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.prune(1.0)
    alone = network()
    error = said(lambda: measure(alone, pruner.masks))
    kept = sum(int(each.sum()) for each in whole(pruner.masks).values())
    state = pruner.state_dict()
    if dist.get_rank() != 0:  # the first process has the masks
        return error, [kept, kept]
    one = Pruner(alone, 0.5, schedule=None)
    one.load_state_dict(state)
    return error, [kept, sum(layer.remaining for layer in measure(alone, one.masks).layers)]


def all_plain() -> dict[str, Any]:
    """All of this page."""
    return {
        "plain": {name: plain(*parts) for name, parts in PLAIN.items()},
        "refused plain": refused(),
        "given masks": given_masks(),
        "divided masks": masks_that_were_divided(),
        "sent": {width: sent(width) for width in (16, 16_384)},
    }
