"""The config of a compacted Hugging Face model: the sizes by which its class makes the smaller network anew."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from heapq import heappop, heappush
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import as_probe, evaluation_mode, relative_difference
from lightning_prune.core.tensors import cast_model_, check_materialized, reachable_tensors, tensors_by_name
from lightning_prune.units.shards import check_unsharded

_Place: TypeAlias = tuple[str | int, ...]  # names of attributes and indices of lists that lead to an entry
_Change: TypeAlias = tuple[int | None, int]  # a value before and after
_TOLERANCE = 1e-6  # relative difference of outputs in double precision


def update_config(model: nn.Module, example: Any) -> dict[str, _Change]:
    """Set the sizes in ``model.config`` to those of a compacted model, so that ``save_pretrained`` keeps them.

    The class of the model makes it from sizes in a config, such as ``intermediate_size``,
    ``num_attention_heads``, ``num_key_value_heads`` or ``head_dim``, which are the same in all layers. Which of
    them change is found by trial: models are made without memory for weights, and the shapes of their tensors
    and the numbers that their modules keep are compared with those of ``model``. In the end the model is made
    with the weights, and its outputs on the example are compared in double precision.

    Args:
        model: The compacted model; only its ``config`` changes.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of its keyword arguments.

    Returns:
        Name of each entry that has changed to its value before and after.

    Raises:
        ValueError: If the model has no ``config`` that its class makes it from, or no sizes in it give this
            model, as where layers that share an entry have different widths. The message names what differs
            first. ``config`` is then unchanged.
    """
    check_unsharded(model, "update_config")
    check_materialized(model)
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"model={type(model).__name__} has no config: update_config is for models that type(model)(config)"
            " makes, as those of Hugging Face's transformers."
        )
    found = _search(model, config)
    changes = found.changes
    why = _Form.of(model).difference(found.form) or _other_outputs(model, _changed(config, changes), example)
    said = {".".join(map(str, place)): (_read(config, place), value) for place, value in changes.items()}
    if why is not None:
        best = ", ".join(f"{name}={after}" for name, (_, after) in said.items()) or "the sizes that are there"
        raise ValueError(
            f"no sizes in {type(config).__name__} give this {type(model).__name__}. With {best}, {why}. Layers"
            " that share an entry need one width: prune with PerLayer(), and exclude what no entry says, as the"
            " width of a residual stream, whose norms count the channels that went."
        )
    for place, value in changes.items():
        _write(config, place, value)
    return said


@dataclass(frozen=True)
class _Form:
    """What the sizes of a model decide.

    Args:
        shapes: The shape of each parameter and buffer, by name.
        numbers: The numbers that modules keep, by module and attribute.
    """

    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[tuple[str, str], Any]

    @staticmethod
    def of(model: nn.Module) -> _Form:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model).items()}
        numbers = {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if type(value) in (int, float)
        }
        return _Form(shapes, numbers)

    def distance(self, other: _Form) -> tuple[int, int]:
        """Return how many shapes differ, and how many numbers."""
        shapes, numbers = (
            self.shapes.items() ^ other.shapes.items(),
            self.numbers.items() ^ other.numbers.items(),
        )
        return len(dict(shapes)), len(dict(numbers))

    def changes(self, other: _Form) -> set[tuple[int, int]]:
        """Return the pairs of different whole numbers at one place, in this form and in another one."""
        shapes = ((shape, other.shapes.get(name, ())) for name, shape in self.shapes.items())
        sizes = [pair for one, two in shapes if len(one) == len(two) for pair in zip(one, two, strict=True)]
        kept = ((value, other.numbers.get(name)) for name, value in self.numbers.items())
        sizes.extend((one, two) for one, two in kept if isinstance(one, int) and isinstance(two, int))
        return {(one, two) for one, two in sizes if one != two and min(one, two) > 0}

    def difference(self, other: _Form) -> str | None:
        """Return the first tensor of another shape, as text; ``None`` if all shapes are equal."""
        for name in (*self.shapes, *other.shapes):
            ours, theirs = self.shapes.get(name), other.shapes.get(name)
            if ours != theirs:
                return f"{name} would have shape {theirs}, and has {ours}"
        return None


@dataclass(frozen=True, order=True)
class _Trial:
    """A model made from a config with some changes.

    Args:
        distance: How far it is from the model that is wanted.
        changes: The changes, by their places.
        form: Its form.
    """

    distance: tuple[int, int]
    changes: Mapping[_Place, int] = field(compare=False)
    form: _Form = field(compare=False)


def _search(model: nn.Module, config: Any) -> _Trial:
    """Return the trial that comes nearest to a model, of those that come nearer with each change."""
    goal = _Form.of(model)

    def tried(changes: Mapping[_Place, int]) -> _Trial:
        form = _form(model, config, changes)
        return _Trial(goal.distance(form), changes, form)

    try:
        start = tried({})
    except Exception as error:  # a constructor may raise anything
        raise ValueError(
            f"model={type(model).__name__} cannot be made from its config: {error!r}. update_config is for"
            " models that type(model)(config) makes."
        ) from error
    # sizes that a config leaves to be worked out from others, which may change: as they are
    implied = {
        place: value
        for place, value in _worked_out(config, start.form)
        if (same := _attempt(tried, {place: value})) is not None and same.form == start.form
    }
    best, waiting, seen = start, [start], {frozenset(implied.items())}
    while waiting and best.distance > (0, 0):
        last = heappop(waiting)
        for place, value in _candidates(config, {**implied, **last.changes}, last.form.changes(goal)):
            changes = {**implied, **last.changes, place: value}
            if (key := frozenset(changes.items())) in seen:
                continue
            seen.add(key)
            found = _attempt(tried, changes)
            if found is not None and found.distance < last.distance:
                heappush(waiting, found)
                best = min(best, found)
    needed = {place: value for place, value in best.changes.items() if implied.get(place) != value}
    return replace(best, changes=needed) if _form(model, config, needed) == best.form else best


def _attempt(tried: Callable[[Mapping[_Place, int]], _Trial], changes: Mapping[_Place, int]) -> _Trial | None:
    try:
        return tried(changes)
    except Exception:  # a constructor may refuse sizes by any error
        return None


def _form(model: nn.Module, config: Any, changes: Mapping[_Place, int]) -> _Form:
    """Return the form of the model that a changed config gives, which takes no memory for weights."""
    with torch.device("meta"):
        return _Form.of(type(model)(_changed(config, changes)))


def _candidates(
    config: Any, changes: Mapping[_Place, int], wanted: set[tuple[int, int]]
) -> Iterator[tuple[_Place, int]]:
    """Yield places in a config with sizes to try there: what a size becomes if it goes along with a change."""
    for place, value in _entries(config):
        present = changes.get(place, value)
        if present is None:
            sizes = {after for _, after in wanted}
        else:
            related = (pair for pair in wanted if present % pair[0] == 0 or pair[0] % present == 0)
            sizes = {present * after // before for before, after in related if present * after % before == 0}
        yield from ((place, size) for size in sorted(sizes))


def _worked_out(config: Any, form: _Form) -> Iterator[tuple[_Place, int]]:
    """Yield the places of a config that hold ``None``, with the number that all modules have by that name."""
    for place, value in _entries(config):
        found = {number for (_, key), number in form.numbers.items() if key == place[-1]}
        if value is None and len(found) == 1 and type(number := found.pop()) is int:
            yield place, number


def _entries(config: Any, place: _Place = ()) -> Iterator[tuple[_Place, int | None]]:
    """Yield the places in a config, in its lists and in configs within it, that hold a size or ``None``."""
    for key, value in dict(enumerate(config)).items() if isinstance(config, list) else vars(config).items():
        if str(key).startswith("_"):
            continue
        if value is None or (type(value) is int and value > 0):
            yield (*place, key), value
        elif isinstance(value, list) or hasattr(value, "to_dict"):
            yield from _entries(value, (*place, key))


def _step(config: Any, key: str | int) -> Any:
    return getattr(config, key) if isinstance(key, str) else config[key]


def _read(config: Any, place: _Place) -> Any:
    return reduce(_step, place, config)


def _write(config: Any, place: _Place, value: int) -> None:
    holder, key = _read(config, place[:-1]), place[-1]
    if isinstance(key, str):
        setattr(holder, key, value)
    else:
        holder[key] = value


def _changed(config: Any, changes: Mapping[_Place, int]) -> Any:
    """Return a copy of a config with these changes."""
    twin = copy.deepcopy(config)
    for place, value in changes.items():
        _write(twin, place, value)
    return twin


def _other_outputs(model: nn.Module, config: Any, example: Any) -> str | None:
    """Return how the outputs of the model that a config gives differ, as text; ``None`` if they do not."""
    twin, device = copy_model(model), next(model.parameters()).device
    cast_model_(twin, torch.float64)
    probe = as_probe(example).to(device).to(torch.float64)
    with evaluation_mode(twin):  # random state is as before at its end
        try:
            expected = reachable_tensors(probe(twin))
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
        made = type(model)(config).to(device).eval()
        made.load_state_dict(model.state_dict())
        cast_model_(made, torch.float64)
        difference = relative_difference(expected, reachable_tensors(probe(made)))
    if difference <= _TOLERANCE:
        return None
    kinds = dict(made.named_modules())
    other = (
        f", as {name} is a {type(module).__name__}"
        for name, module in model.named_modules()
        if type(kinds.get(name)) is not type(module)
    )
    apart = (
        f"differ by {difference:.1e} of the largest"
        if difference < math.inf
        else "are others in number or shape"
    )
    return f"outputs {apart}{next(other, '')}"
