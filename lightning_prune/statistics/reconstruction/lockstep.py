"""Passes of networks in step with each other: all of them wait where one of them comes to a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Run: TypeAlias = tuple[nn.Module, Callable[[], object]]  # a network, and a function that runs it
_END = ""  # in place of the name of a layer


class _Steps:
    """Lets one pass run at a time, and brings all of them to each layer before any goes on."""

    def __init__(self, count: int, arrive: Callable[[str, list[Tensor]], None]) -> None:
        self._found: list[tuple[str, Tensor]] = [(_END, torch.empty(0))] * count
        self._arrive = arrive
        self._barrier = threading.Barrier(count, self._meet)
        self._turn = threading.Lock()
        self._own = threading.local()
        self.errors: list[Exception] = []

    def run(self, number: int, pass_: Callable[[], object]) -> None:
        """Run a pass in a thread of its own."""
        self._own.number = number
        with self._turn:
            try:
                with torch.no_grad():
                    pass_()
                self.wait(_END, torch.empty(0))
            except threading.BrokenBarrierError:
                pass  # of another pass, whose error is told
            except Exception as error:  # a user's forward may raise anything
                self.errors.append(error)
                self._barrier.abort()

    def wait(self, name: str, given: Tensor) -> None:
        """Wait at a layer, or at the end, until all passes have come to it."""
        self._found[self._own.number] = name, given
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def _meet(self) -> None:
        name, *others = {each for each, _ in self._found}
        if others:
            raise ValueError("passes take different ways through the network, and cannot go in step.")
        if name != _END:
            with torch.no_grad(), self._turn:
                self._arrive(name, [given for _, given in self._found])


def run_in_step(
    runs: Sequence[Run], layers: Iterable[str], arrive: Callable[[str, list[Tensor]], None]
) -> None:
    """Run passes of networks of one architecture in step with each other, one at a time between two layers.

    Args:
        runs: The networks, of which one may occur several times, each with a function that runs it.
        layers: Names of the layers at which all passes wait for each other.
        arrive: Called with the name of each layer, before it runs, and its input in each pass.

    Raises:
        Exception: What a pass or ``arrive`` has raised.
        ValueError: If passes come to different layers.
    """
    steps = _Steps(len(runs), arrive)
    handles = []
    for model in {id(model): model for model, _ in runs}.values():
        for name in layers:

            def stop(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                steps.wait(name, args[0] if args else next(iter(kwargs.values())))

            handles.append(model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True))
    threads = [
        threading.Thread(target=steps.run, args=(number, pass_)) for number, (_, pass_) in enumerate(runs)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for handle in handles:
            handle.remove()
    if steps.errors:
        raise steps.errors[0]
