"""Which dimensions of which layers units shorten, as seen in passes of copies in which one group is cut."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_prune.channels.latency.design import Axis
from lightning_prune.channels.latency.module_calls import CallSizes, Key, sizes_of
from lightning_prune.core.probes import Probe, evaluation_mode


def call_axes(
    dense: nn.Module, probe: Probe, cuts: Iterable[tuple[str, float, nn.Module]]
) -> dict[Key, tuple[Axis, ...]]:
    """Return, for each call of a module, the dimensions that units shorten, each way to shorten once.

    They are those of its inputs, parameters and outputs, and of the inputs and outputs of the modules that it
    calls: its own code sees these. A parameter of a module that is not called belongs to the one around it.

    Args:
        dense: The model.
        probe: Runs it.
        cuts: Copies of the model in which one group is cut: the name of the group, the share of its units that
            is left, and the copy.
    """
    whole = _sizes(dense, probe)
    parts: dict[Key, dict[str, dict[str, float]]] = {key: {} for key in whole}
    for name, share, smaller in cuts:
        for key, sizes in _sizes(smaller, probe).items():
            for place, size in whole.get(key, {}).items():
                if (left := sizes.get(place, size)) < size:
                    part = min(1.0, (1 - left / size) / (1 - share))
                    parts[key].setdefault(place, {})[name] = round(part, 6)
    return {
        key: tuple(dict.fromkeys(tuple(sorted(axis.items())) for axis in places.values()))
        for key, places in parts.items()
    }


def _sizes(model: nn.Module, probe: Probe) -> dict[Key, dict[str, int]]:
    """Return the sizes of what the code of each call of a module sees, by place."""
    calls = CallSizes()
    with evaluation_mode(model), calls.following(model):
        probe(model)
    found = {key: dict(sizes) for key, sizes in calls.sizes.items()}
    called = {name for name, _ in found}
    for key, caller in calls.caller.items():
        if caller is not None:
            found[caller] |= {f"{key}.{place}": size for place, size in calls.passed[key].items()}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in called:
            while owner and owner not in called:
                owner = owner.rpartition(".")[0]
            if owner in called:
                found[owner, 0] |= sizes_of({name: parameter})
    return found
