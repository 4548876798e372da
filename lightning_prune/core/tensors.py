"""Tensors inside objects of any kind: change them in a copy, find those that an object refers to."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MASKING = 1e4  # from here on a number may stand for infinity, as -1e9 does in masks
_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


class _TensorCopies(TorchFunctionMode):
    """Copies each tensor that ``copy.deepcopy`` meets by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = self._change(tensor)
        return memo[id(tensor)]


def map_tensors(data: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a deep copy of an object of any kind, with a function applied to each tensor in it.

    A tensor that occurs several times is changed once.

    Args:
        data: A tensor, or a container or object of any type that holds tensors.
        change: Returns the tensor that takes the place of its argument.

    Raises:
        ValueError: If the object cannot be copied.

    >>> map_tensors({"a": [torch.ones(2)], "b": "text"}, lambda tensor: 2 * tensor)
    {'a': [tensor([2., 2.])], 'b': 'text'}
    """
    with _TensorCopies(change):
        try:
            return copy.deepcopy(data)
        except Exception as error:  # a user's class may raise anything
            raise ValueError(
                f"a {type(data).__name__} of inputs cannot be copied ({error!r}), and models are tried on"
                " copies: leave out what cannot be copied, or give its class a __deepcopy__."
            ) from error


def reachable_tensors(result: Any) -> list[Tensor]:
    """Return the tensors that a result refers to, directly or through objects of any type, each once.

    Modules, classes and the global variables of functions are not searched.
    """
    found, seen, left = [], {id(result)}, [result]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found.append(value)
            continue
        if isinstance(value, nn.Module | ModuleType | type):
            continue
        inner = value.__closure__ or () if isinstance(value, FunctionType) else gc.get_referents(value)
        for each in inner:
            if id(each) not in seen:
                seen.add(id(each))
                left.append(each)
    return found


def cast_or_move(data: Any, target: torch.dtype | torch.device) -> Any:
    """Return a copy of an object with its numbers cast to a floating-point type, or its tensors on a device.

    Complex tensors are cast to the complex type of the same precision; others keep their type.
    """
    return map_tensors(data, lambda tensor: cast_or_move_tensor(tensor, target))


def cast_or_move_tensor(tensor: Tensor, target: torch.dtype | torch.device) -> Tensor:
    """Return a tensor on a device, or cast to a floating-point type; for complex tensors see above."""
    if isinstance(target, torch.device) or tensor.is_floating_point():
        return tensor.to(target)
    return tensor.to(_COMPLEX.get(target, tensor.dtype)) if tensor.is_complex() else tensor


def no_number(tensor: Tensor) -> str | None:
    """Return why a tensor does no plain arithmetic on floating-point numbers; ``None`` if it does."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"holds {kind}, not floating-point numbers, as the codes of a quantized layer"
    return opaque(tensor)


def no_score(tensor: Tensor) -> str | None:
    """Return why the elements of a tensor cannot be scored and compared; ``None`` if they can."""
    return "holds complex numbers, which are not scored" if tensor.is_complex() else no_number(tensor)


def opaque(tensor: Tensor) -> str | None:
    """Return why a tensor of a subclass does no plain arithmetic; ``None`` if it does."""
    if type(tensor) in (Tensor, nn.Parameter, UninitializedParameter):
        return None
    try:
        with torch.no_grad():
            numbers = tensor.detach().clone()
            numbers.masked_fill_(numbers != 0, 0)
            plain = not bool(numbers.count_nonzero())
    except Exception:  # a subclass may raise anything
        plain = False
    return None if plain else f"is a {type(tensor).__name__}, which does no plain arithmetic"


def check_materialized(model: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer has no shape yet, as those of lazy modules."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise shapeless(name)


def shapeless(name: str) -> ValueError:
    """Return the error to raise for a parameter or buffer that has no shape yet."""
    return ValueError(f"{name!r} has no shape yet: run a batch through the model first, as model(x) does.")


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that a module itself holds, without those of its submodules."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model, then the tensors inside those that wrap others, by name."""
    held = [*model.named_parameters(), *model.named_buffers()]
    yield from held
    while held:
        name, tensor = held.pop()
        held += (found := [(name, each) for each in _inner_tensors(tensor)])
        yield from found


def _inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a tensor subclass wraps, such as the codes and scales of a quantized weight."""
    if not is_traceable_wrapper_subclass(tensor):
        return []
    found = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [each for each in found if isinstance(each, Tensor)]


def to_model(example: Any, model: nn.Module) -> Any:
    """Return an example on the device of a model's first real parameter; its numbers have that one's type."""
    parameters = list(model.parameters())
    first = next((each for each in parameters if each.is_floating_point()), parameters[0])
    return cast_or_move(cast_or_move(example, first.device), first.dtype)


@torch.no_grad()
def cast_model_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and buffers of a model; complex ones stay complex, which ``nn.Module.to`` ends."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*attribute of a Tensor that is not a leaf")  # of scripted modules
        model._apply(lambda tensor: cast_or_move_tensor(tensor, dtype))


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor as a dense one: itself, unless it is sparse, as the gradient of an embedding may be."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
