"""How layers are called in a pass: how often, and whether a batch norm alone reads what they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_prune.core.tensors import reachable_tensors


class LayerCalls(TorchFunctionMode):
    """Sees a pass of a network.

    Args:
        model: The network.
        layers: Names of its layers.

    Attributes:
        counts: Name of each layer to how often it has run.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        # by ``id``; the tensors are kept, so that no other one has it
        self._outputs: dict[int, tuple[str, Tensor]] = {}
        self._readers: dict[str, set[nn.Module | None]] = {}
        self._norm: nn.Module | None = None
        self._norm_runs: Counter[nn.Module] = Counter()
        self._handles = [
            model.get_submodule(name).register_forward_hook(partial(self._ran, name)) for name in layers
        ]
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave))

    def look(self, run: Callable[[], object]) -> None:
        """Run a pass and see what happens."""
        try:
            with torch.no_grad(), self:
                result = run()
            for each in reachable_tensors(result):
                if id(each) in self._outputs:  # the caller reads it, too
                    self._readers.setdefault(self._outputs[id(each)][0], set()).add(None)
        finally:
            for handle in self._handles:
                handle.remove()
            self._outputs.clear()

    def norm_of(self, name: str) -> Any:
        """Return the batch norm with running statistics that reads the output of a layer, and nothing but it.

        Returns:
            ``None`` if there is none.
        """
        norm, *others = self._readers.get(name) or (None,)
        alone = isinstance(norm, _BatchNorm) and norm.running_mean is not None and self._norm_runs[norm] == 1
        return norm if alone and not others else None

    def _ran(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.counts[name] += 1
        if isinstance(output, Tensor):
            self._outputs[id(output)] = name, output

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._norm = module
        self._norm_runs[module] += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._norm = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and note which outputs of layers it reads."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self._outputs and not _looks(func):
                self._readers.setdefault(self._outputs[id(leaf)][0], set()).add(self._norm)
        return func(*args, **(kwargs or {}))


def _looks(func: Any) -> bool:
    """Return whether a function of a tensor reads an attribute, such as its shape."""
    return getattr(func, "__name__", "") in ("__get__", "size", "dim", "numel")
