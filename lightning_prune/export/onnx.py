"""Export to ONNX files, whose outputs in onnxruntime are compared with those of the model."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import re
import warnings
from functools import partial
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from lightning_prune.core.files import atomic_write
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import ForwardProbe, batch_size, evaluation_mode, resize_batch
from lightning_prune.core.tensors import check_materialized
from lightning_prune.report.cost import dense_bytes
from lightning_prune.units.shards import check_unsharded

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LARGEST = 1_500_000_000  # bytes of weights in one file: protobuf allows 2 GiB in all
_HALF = (torch.float16, torch.bfloat16)


def export_onnx(model: nn.Module, path: str | PathLike[str], example: Any) -> int:
    """Export the evaluation-mode ``forward`` of a model to an ONNX file that accepts batches of any size.

    So it does of other sizes in which several examples differ, such as the length of a sequence or the height
    of an image. The file is run in onnxruntime on the CPU, on the examples and on a batch of another size, and
    its outputs are compared with those of the model. Absolute differences may be up to 1e-3 of the largest
    absolute value of each output (1e-2 in half precision); integers must be equal. Both exporters of torch are
    tried until a file passes. If none passes with free sizes, all sizes are fixed to those of the first
    example, with a warning.

    Args:
        model: A dense, masked or compacted model; it is not changed.
        path: The file to write; missing parent folders are created. Weights of more than 1.5 GB are written to
            a second file, whose name is that of the first followed by ``.data``.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keyword arguments. The first
            dimension of tensors is the batch. Or a list of several, of which those with the arguments of the
            first one show which sizes are free; others are other ways through the model, and a file has one.

    Returns:
        Number of bytes written.

    Raises:
        ImportError: If onnx, onnxruntime or onnxscript is not installed.
        ValueError: If the model does not run on the example, returns no tensor, or returns different outputs in
            two runs.
        RuntimeError: If no exported file gives the model's outputs; nothing is then written, and an existing
            file stays.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {', '.join(missing)}: pip install 'lightning_prune[onnx]'.")
    check_unsharded(model, "export_onnx")
    check_materialized(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{type(model).__name__} is compiled TorchScript code, which is not exported: give the module that"
            " it was compiled from."
        )
    twin = copy_model(model).cpu()
    with evaluation_mode(twin), atomic_write(path) as place:
        call = _Call(twin, example)
        failures: dict[str, str] = {}
        # some forward methods need a fixed batch size, and the dynamo exporter of torch 2.6 fails on batch norm
        for free, dynamo in product((True, False), repeat=2):
            try:
                size = _write(call, place, free=free, dynamo=dynamo)
            except Exception as error:  # an exporter, or onnxruntime, may raise anything
                way = f"dynamo={dynamo}, {'any' if free else 'fixed'} batch size"
                failures.setdefault(_one_line(error), way)
                for left in place.parent.iterdir():
                    left.unlink()
                continue
            if not free:
                sizes = f"batches of {call.batch}" if len(call.examples) == 1 else "the sizes of the first one"
                warnings.warn(
                    f"{os.fspath(path)!r} takes {sizes} only, as in the example." + _listed(failures),
                    stacklevel=2,
                )
            return size
        raise RuntimeError(
            f"no ONNX file gives the outputs of {type(model).__name__}; nothing is written at"
            f" {os.fspath(path)!r}. forward must take and give tensors only, of types that onnxruntime computes"
            " with on the CPU (model.float(), with an example in float32, helps), and go the same way through"
            " Python whatever the data; what is new in torch may need a newer onnxscript." + _listed(failures)
        )


class _Call:
    """A call of a model's ``forward`` with one of the examples, resized to any batch size.

    Args:
        model: The model, in evaluation mode and on the CPU.
        example: As for :func:`export_onnx`.

    Attributes:
        batch: Batch size of the first example.
        examples: Positional and keyword arguments of the first example and of those like it.

    Raises:
        ValueError: If the model does not run on the example, returns no tensor, or returns different outputs in
            two runs.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        given = example if isinstance(example, list) else [example]
        probes = (each if isinstance(each, ForwardProbe) else ForwardProbe(each) for each in given)
        moved = [probe.map_tensors(torch.Tensor.cpu) for probe in probes]
        first, *others = [(probe.arguments, probe.keywords) for probe in moved]
        self.examples = [first, *(other for other in others if _form(other) == _form(first))]
        self.batch = batch_size(first)
        who = type(model).__name__
        try:
            found, again = self.outputs(self.batch), self.outputs(self.batch)
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{who} cannot run on the example: {error!r}") from error
        if not found:
            raise ValueError(f"{who} gives no tensor on the example, so there is nothing to compare.")
        try:
            _compare(found, again)
        except AssertionError as error:
            raise ValueError(f"{who} gives other outputs each time: {_one_line(error)}") from error

    def arguments(self, size: int, place: int = 0) -> inspect.BoundArguments:
        """Return the arguments of ``forward`` for a batch of this size, of the example at this place."""
        positional, keywords = resize_batch(self.examples[place], size)
        return inspect.signature(self.model.forward).bind(*positional, **keywords)

    def inputs(self, size: int, place: int = 0) -> dict[str, Tensor]:
        """Return the input tensors, by names made from the argument names and the places in containers."""
        return _named(dict(self.arguments(size, place).arguments), "input")

    def outputs(self, size: int, place: int = 0) -> dict[str, Tensor]:
        """Return the output tensors, by names that differ from those of the inputs."""
        given = self.arguments(size, place)
        # on a copy, because a forward pass may change buffers
        found = _named(copy.deepcopy(self.model)(*given.args, **given.kwargs), "output")
        taken = self.inputs(size, place)
        return {f"output_{name}" if name in taken else name: tensor for name, tensor in found.items()}


def _write(call: _Call, path: Path, *, free: bool, dynamo: bool) -> int:
    """Write an ONNX file, and compare its outputs with those of the model.

    Args:
        call: The call to export.
        path: The file to write, in an empty folder.
        free: Whether the file is to accept batches of any size, and other sizes in which examples differ.
        dynamo: Whether to use the ``torch.export`` based exporter instead of the tracing one.

    Returns:
        Number of bytes written.

    Raises:
        Exception: Any, if the export fails, or the outputs differ.
    """
    # at least 2, because exporters treat a batch size of 1 as a constant
    size = max(2, call.batch) if free else call.batch
    given, inputs, outputs = call.arguments(size), call.inputs(size), call.outputs(size)
    axes: dict[str, Any] = {}
    others = range(1, len(call.examples))
    if free and dynamo:
        trees = [dict(call.arguments(size, place).arguments) for place in others]
        axes["dynamic_shapes"] = tree_map(partial(_free_axes, size), dict(given.arguments), *trees)
    elif free:
        tensors = [call.inputs(size, place) | call.outputs(size, place) for place in others]
        found = {
            name: _free_axes(size, tensor, *(each[name] for each in tensors))
            for name, tensor in (inputs | outputs).items()
        }
        axes["dynamic_axes"] = {
            name: {axis: f"{name}_{axis}" if axis else "batch" for axis in free_axes}
            for name, free_axes in found.items()
            if free_axes
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the comparison finds the errors that exporters warn of
        warnings.simplefilter("error", TracerWarning)  # data-dependent Python code, which a trace would freeze
        TracerWarning.ignore_lib_warnings()
        torch.onnx.export(
            copy.deepcopy(call.model),
            (*given.args, given.kwargs),  # torch takes a trailing mapping for keyword arguments
            str(path),
            dynamo=dynamo,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            external_data=dense_bytes(call.model) > _LARGEST,
            **axes,
        )
    runs = [(call.batch, 0), (size + 1, 0), *((call.batch, place) for place in others)]
    for run in runs if free else runs[:1]:
        _compare(call.outputs(*run), _run(path, call.inputs(*run), list(outputs)))
    return sum(written.stat().st_size for written in path.parent.iterdir())


def _run(path: Path, inputs: dict[str, Tensor], outputs: list[str]) -> dict[str, Tensor]:
    """Return the outputs of an ONNX file in onnxruntime, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # only the inputs that the file has: exporters may drop those without effect on the outputs
    fed = {each.name: inputs[each.name].detach().numpy() for each in session.get_inputs()}
    found = session.run(outputs, fed)
    return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise AssertionError if outputs differ by more than other summation orders in kernels explain."""
    for name, one in expected.items():
        finite = one[one.isfinite()]
        scale = float(finite.abs().max()) if finite.is_floating_point() and finite.numel() else 0.0
        allowed = scale * (1e-2 if one.dtype in _HALF else 1e-3)
        torch.testing.assert_close(
            found[name],
            one,
            rtol=0,
            atol=allowed,
            equal_nan=True,
            msg=f"{name!r} differs. {{}}".format,
        )


def _free_axes(size: int, leaf: Any, *others: Any) -> dict[int, Any] | None:
    """Return the ``dynamic_shapes`` of ``torch.export`` for a leaf of the arguments; ``None`` if none is free.

    Args:
        size: The batch size, with which a tensor begins whose batch is free.
        leaf: The leaf.
        others: The same leaf in other examples; sizes that differ from that of the first one are free.
    """
    if not torch.is_tensor(leaf):
        return None
    batch = {0} if leaf.ndim and len(leaf) == size else set()
    differing = {
        axis for axis in range(leaf.ndim) if any(each.shape[axis] != leaf.shape[axis] for each in others)
    }
    return dict.fromkeys(sorted(batch | differing), torch.export.Dim.AUTO) or None


def _form(example: Any) -> Any:
    """Return what examples of the same call have in common: all but the sizes and values of tensors."""
    return tree_map(lambda leaf: f"{leaf.ndim} dimensions" if torch.is_tensor(leaf) else leaf, example)


def _named(tree: Any, otherwise: str) -> dict[str, Tensor]:
    """Return the tensors of a pytree by names made from their paths.

    Args:
        tree: The pytree.
        otherwise: Start of the name if the path does not begin with a letter, as that of a single tensor.
    """
    found: dict[str, Tensor] = {}
    for place, leaf in tree_flatten_with_path(tree)[0]:
        if torch.is_tensor(leaf):
            name = re.sub(r"\W+", "_", keystr(place)).strip("_")
            name = name if name[:1].isalpha() else f"{otherwise}_{name}".rstrip("_")
            while name in found:
                name += "_"
            found[name] = leaf
    return found


def _one_line(error: BaseException) -> str:
    """Return an error and its root cause as one line, each cut to 200 characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(text.split())[:200]
    return text if root is error else f"{text} ... from {_one_line(root)}"


def _listed(failures: dict[str, str]) -> str:
    return "".join(f" With torch.onnx.export({way}): {reason}" for reason, way in failures.items())
