"""Passes of networks in step with each other: all of them stop at each layer before any goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe
from lightning_prune.core.process_state import ProcessState
from lightning_prune.statistics.reconstruction.layer_matrices import LayerCall
from lightning_prune.statistics.reconstruction.sum_terms import ResultsOfFunctions


class Run(NamedTuple):
    """A pass of a network that nothing else runs.

    Args:
        network: The network.
        start: Runs the pass.
        results: Sees the functions of the pass.
    """

    network: nn.Module
    start: Callable[[], object]
    results: ResultsOfFunctions


THREAD = "pass of a network"


class _CancelledError(BaseException):
    """Ends a pass that is not to go on; no ``Exception``, which a user's code may catch."""


class _Pass:
    """A pass in a thread of its own, which runs from one stop to the next when it is told to.

    It finds random generators and the default dtype as it has left them, whatever runs in between.

    Args:
        run: The network and the function that runs it.
        layers: Names of the layers before which it stops.
    """

    def __init__(self, run: Run, layers: Iterable[str]) -> None:
        self._run = run
        self.layer: str | None = None  # at which it has stopped; None at the end
        self.call = LayerCall((), {})
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._devices = sorted({each.device for each in run.network.parameters() if each.is_cuda}, key=str)
        self._state = ProcessState.now(self._devices)
        self._context = copy_context()
        default = torch.get_default_device()
        self._default_device = None if default.type == "cpu" else default
        self._thread = threading.Thread(target=self._context.run, args=(self._work,), name=THREAD, daemon=True)
        self._handles = [
            run.network.get_submodule(name).register_forward_pre_hook(
                partial(self._stop, name), with_kwargs=True
            )
            for name in layers
        ]

    def advance(self) -> None:
        """Run to the next stop, or to the end.

        Raises:
            Exception: What the pass has raised.
        """
        if not self._thread.ident:
            self._thread.start()
        others = ProcessState.now(self._devices)
        self._state.restore()
        try:
            self._go.release()
            self._stopped.acquire()
        finally:
            self._state = ProcessState.now(self._devices)
            others.restore()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the pass where it is, and remove its hooks."""
        self._cancelled = True
        self._go.release()
        if self._thread.ident:
            self._thread.join()
        for handle in self._handles:
            handle.remove()

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                current = torch.cuda.device(self._devices[0] if self._devices else -1)
                # what a new thread does not take over
                with torch.no_grad(), current, self._default_device or nullcontext():
                    self._run.start()
        except _CancelledError:
            pass
        except BaseException as error:  # a user's forward may raise anything
            self._error = error
        self.layer = None
        self._stopped.release()

    def _stop(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.layer, self.call = name, LayerCall(args, kwargs, self._run.results)
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _CancelledError


def run_of(probe: Probe, model: nn.Module, wanted: Iterable[int] = ()) -> Run:
    """Return a pass of a copy of a model with the same tensors: a pass may set attributes.

    Args:
        probe: Runs the model on a batch; the batch does not change.
        model: The model.
        wanted: Numbers of the functions whose results are asked for.
    """
    copied = copy_model(model, {id(each): each for each in (*model.parameters(), *model.buffers())})
    results = ResultsOfFunctions(wanted)

    def start() -> None:
        own = probe.map_tensors(torch.clone)
        with results:
            own(copied)

    return Run(copied, start, results)


def run_in_step(
    batches: Iterable[Sequence[Run]],
    layers: Iterable[str],
    arrive: Callable[[str, list[list[LayerCall]]], None],
) -> int:
    """Run passes of networks of one architecture in step with each other, one at a time between two layers.

    A batch of which one pass comes to another layer than those of the first batch runs no further.

    Args:
        batches: The passes of each batch. Networks may share tensors.
        layers: Names of the layers before which all passes wait for each other.
        arrive: Called with the name of each layer, before it runs, and its arguments in each pass of each
            batch.

    Returns:
        The number of batches that came to the end.

    Raises:
        Exception: What a pass or ``arrive`` has raised.
    """
    going = [[_Pass(run, layers) for run in runs] for runs in batches]
    passes = [each for batch in going for each in batch]
    try:
        while going:
            for each in (each for batch in going for each in batch):
                each.advance()
            going = [batch for batch in going if len({each.layer for each in batch}) == 1]
            name = going[0][0].layer if going else None
            going = [batch for batch in going if batch[0].layer == name]
            if name is None:
                break
            with torch.no_grad():
                arrive(name, [[each.call for each in batch] for batch in going])
    finally:
        for each in passes:
            each.cancel()
    return len(going)
