"""Changes of a network's shapes in the middle of a fit: who can follow them, and what is told of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_prune.core.averages import average_of, averaged_modules
from lightning_prune.core.probes import Probe
from lightning_prune.pruner import Pruner
from lightning_prune.training import trainer_queries
from lightning_prune.training.hooks import parameters_in
from lightning_prune.training.lightning_packages import LightningModule, Trainer, classes
from lightning_prune.training.pruned_network import PrunedNetwork

_DDP = classes("strategies", "DDPStrategy")
_FOLLOWING = (*classes("strategies", "SingleDeviceStrategy"), *_DDP)
_AT_THE_END = "Take compact=True, which cuts the network at the end of the fit"
# optimizers of torch whose state does not have the shapes of the parameters
_OWN_STATE = (LBFGS, *([torch.optim.Adafactor] if hasattr(torch.optim, "Adafactor") else []))


def check_reshaping(trainer: Trainer, module: LightningModule, pruner: Pruner) -> None:
    """Check that all that refers to the parameters of a module can follow when their shapes change.

    Args:
        trainer: The Trainer of the fit, before its first step.
        module: The module.
        pruner: Its pruner.

    Raises:
        ValueError: If something cannot; the message says what to do instead.
    """
    for why in _obstacles(trainer, module, pruner):
        raise ValueError(f"compact='each' cuts the network while it trains: {why}.")
    check_optimizer_states(trainer.optimizers)


def _obstacles(trainer: Trainer, module: LightningModule, pruner: Pruner) -> Iterator[str]:
    """Yield the reasons why a network cannot change its shapes in a fit, with what to do instead."""
    yield from _obstacles_of_strategy(trainer.strategy)
    if pruner.channel_groups is None:
        yield (
            "what is pruned leaves zeros in place, and nothing to cut: take Channels(), Heads() or Experts()."
            f" {_AT_THE_END} as far as single zeros have emptied it"
        )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, _OWN_STATE):
            yield (
                f"the state of {type(optimizer).__name__} does not have the shapes of the parameters, and"
                f" cannot be cut with them. {_AT_THE_END}, or another optimizer"
            )
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_weights_only", False):
            yield (
                f"{type(callback).__name__}(save_weights_only=True) leaves out the plan of the cuts, without"
                " which no new network gets the shapes of the weights. Let it save all"
            )
    held = [*trainer_queries.averaged_by_callbacks(trainer), *averaged_modules(module).items()]
    for holder, average in held:
        if average_of(module, average) is None:
            yield (
                f"the average that {holder} keeps is of no part of the model, or of one of several alike, and"
                f" cannot be cut with it. {_AT_THE_END}, or an average of the whole model"
            )


def _obstacles_of_strategy(strategy: Any) -> Iterator[str]:
    name = f"strategy={type(strategy).__name__}"
    if not isinstance(strategy, _FOLLOWING):
        yield f"{name} may keep its parameters elsewhere, too. {_AT_THE_END}, or a single device or DDP"
    if isinstance(strategy, _DDP) and strategy._ddp_kwargs.get("static_graph"):
        yield f"the graph of {name} is static, and changes then. Leave static_graph=True out"
    if isinstance(strategy, _DDP) and strategy._ddp_comm_state is not None:
        yield f"ddp_comm_state of {name} is of gradients of the first shapes. {_AT_THE_END}, or leave it out"


def check_optimizer_states(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError if a state tensor of an optimizer does not have the shape of its parameter."""
    for optimizer in optimizers:
        for parameter in parameters_in(optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.numel() > 1 and value.shape != parameter.shape:
                    raise ValueError(
                        f"compact='each' cannot cut {key!r} in the state of {type(optimizer).__name__}: its"
                        f" shape is {tuple(value.shape)}, that of its parameter {tuple(parameter.shape)}."
                        f" {_AT_THE_END}, or another optimizer."
                    )


@contextmanager
def reshaping(trainer: Trainer) -> Iterator[None]:
    """Let parameters change their shapes in a ``with`` block: gradient buckets and compiled code are made anew.

    After an error, which ends the fit, the module stays without buckets: to make them takes all processes.

    Args:
        trainer: The Trainer of the fit, between two steps.
    """
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = strategy.lightning_module
        gc.collect()  # the buckets hold on to what adds gradients to the parameters
    yield
    if wrapped:
        strategy.configure_ddp()
    torch.compiler.reset()  # each shape would count as one more version of the same code, of which few are kept


@contextmanager
def dense_shapes(
    trainer: Trainer, module: LightningModule, network: PrunedNetwork, probe: Probe | None
) -> Iterator[None]:
    """Give a network that is cut its dense shapes in a ``with`` block, then cut what masks have removed.

    Args:
        trainer: The Trainer of the fit, between two steps.
        module: The module.
        network: The network, with its masks.
        probe: Runs the module, to prove that its outputs stay the same; ``None`` to leave it dense.

    Raises:
        CompactionError: If outputs would change, in all processes; the network has the shapes from before then.
    """
    before, optimizers = network.plan, trainer.optimizers
    check_optimizer_states(optimizers)
    averages = trainer_queries.averages_in_callbacks(trainer, module)
    with reshaping(trainer):
        network.widen_(optimizers, averages)
        try:
            yield
            if probe is not None:
                plan = trainer_queries.all_succeed(trainer, partial(network.prove_cut, probe))
                network.narrow_(plan, optimizers, averages)
        except BaseException:
            if before is not None and network.plan is None:
                network.narrow_(before, optimizers, averages)
            raise
