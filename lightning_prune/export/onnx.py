"""ONNX files, each shown by onnxruntime to give the outputs that the network gives."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import re
import warnings
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
from lightning_prune.core.probes import ForwardProbe, evaluation_mode
from lightning_prune.report.cost import batch_size, dense_bytes, of_size
from lightning_prune.units.shards import check_unsharded

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LARGEST = 1_500_000_000  # bytes of weights in one file: protobuf allows 2 GiB in all
_HALF = (torch.float16, torch.bfloat16)


def export_onnx(model: nn.Module, path: str | PathLike[str], example: Any) -> int:
    """Writes a network in evaluation mode as an ONNX file that takes batches of any size.

    The file is run with onnxruntime, on the CPU, on the example and on a batch of another size, and its
    outputs are compared with the model's: each to 1e-3 of its largest number (1e-2 in half precision), whole
    numbers exactly. torch's exporters are tried in turn until one passes. Where none does with batches of any
    size, the size is the example's, and a warning says so.

    Args:
        model: Dense, masked or compacted; of a LightningModule, what its ``forward`` does. Stays as it is.
        path: The file to write; its folder is made if it is missing. Weights of more than 1.5 GB lie beside
            it, in a file with ``.data`` after its name.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keywords. The first dimension
            is the batch.

    Returns:
        Bytes written.

    Raises:
        ImportError: Without onnx, onnxruntime and onnxscript.
        ValueError: If the model does not run on the example, or gives no tensor, or something else each time.
        RuntimeError: If no file gives the same outputs. Nothing is written then; what was there stays.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {', '.join(missing)}: pip install 'lightning_prune[onnx]'.")
    check_unsharded(model, "export_onnx")
    twin = copy_model(model).cpu()
    with evaluation_mode(twin), atomic_write(path) as place:
        call = _Call(twin, example)
        failures: dict[str, str] = {}
        # a forward may insist on a batch size, and the newer exporter of torch 2.6 on no batch norm
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
                warnings.warn(
                    f"{os.fspath(path)!r} takes batches of {call.batch} only, as in the example."
                    + _listed(failures),
                    stacklevel=2,
                )
            return size
        raise RuntimeError(
            f"no ONNX file gives the outputs of {type(model).__name__}; nothing is written at"
            f" {os.fspath(path)!r}. forward must take and give tensors only, of types that onnxruntime computes"
            " with on the CPU (model.float() helps), and go the same way through Python whatever the data; what"
            " is new in torch may need a newer onnxscript." + _listed(failures)
        )


class _Call:
    """A call of a model's ``forward``, with batches of any size.

    Args:
        model: In evaluation mode, on the CPU.
        example: As for :func:`export_onnx`.

    Attributes:
        batch: How many examples there are in the example.

    Raises:
        ValueError: If the model rejects the example, or gives no tensor, or something else each time.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        probe = example if isinstance(example, ForwardProbe) else ForwardProbe(example)
        probe = probe.to(torch.device("cpu"))
        self._example = (probe.arguments, probe.keywords)
        self.batch = batch_size(self._example)
        who = type(model).__name__
        try:
            first, second = self.outputs(self.batch), self.outputs(self.batch)
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{who} cannot run on the example: {error!r}") from error
        if not first:
            raise ValueError(f"{who} gives no tensor on the example, so there is nothing to compare.")
        try:
            _compare(first, second)
        except AssertionError as error:
            raise ValueError(f"{who} gives other outputs each time: {_one_line(error)}") from error

    def arguments(self, size: int) -> inspect.BoundArguments:
        """What ``forward`` is given, with so many examples."""
        positional, keywords = of_size(self._example, size)
        return inspect.signature(self.model.forward).bind(*positional, **keywords)

    def inputs(self, size: int) -> dict[str, Tensor]:
        """The tensors among it, by names made of the arguments'."""
        return _named(dict(self.arguments(size).arguments), "input")

    def outputs(self, size: int) -> dict[str, Tensor]:
        """The tensors that it makes of them, by other names."""
        given = self.arguments(size)
        # a copy, since a pass may change buffers
        found = _named(copy.deepcopy(self.model)(*given.args, **given.kwargs), "output")
        taken = self.inputs(size)
        return {f"output_{name}" if name in taken else name: tensor for name, tensor in found.items()}


def _write(call: _Call, path: Path, *, free: bool, dynamo: bool) -> int:
    """Writes a file and tries it.

    Args:
        call: Of the model.
        path: In an empty folder.
        free: Whether it is to take batches of any size.
        dynamo: Which exporter is to write it.

    Returns:
        Bytes written.
    """
    # of a single example, exporters take the 1 for a constant
    size = max(2, call.batch) if free else call.batch
    given, inputs, outputs = call.arguments(size), call.inputs(size), call.outputs(size)
    axes: dict[str, Any] = {}
    if free and dynamo:
        axes["dynamic_shapes"] = tree_map(lambda leaf: _free_axis(leaf, size), dict(given.arguments))
    elif free:
        tensors = (inputs | outputs).items()
        axes["dynamic_axes"] = {name: {0: "batch"} for name, tensor in tensors if _free_axis(tensor, size)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what else they warn of, the comparison finds
        warnings.simplefilter("error", TracerWarning)  # a branch, or a number, that other data would change
        TracerWarning.ignore_lib_warnings()
        torch.onnx.export(
            copy.deepcopy(call.model),
            (*given.args, given.kwargs),  # a mapping that comes last is taken for keywords
            str(path),
            dynamo=dynamo,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            external_data=dense_bytes(call.model) > _LARGEST,
            **axes,
        )
    for tried in (call.batch, size + 1) if free else (call.batch,):
        _compare(call.outputs(tried), _run(path, call.inputs(tried), list(outputs)))
    return sum(written.stat().st_size for written in path.parent.iterdir())


def _run(path: Path, inputs: dict[str, Tensor], outputs: list[str]) -> dict[str, Tensor]:
    """What onnxruntime makes of a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # what has no effect on the outputs may not be an input of the file
    fed = {each.name: inputs[each.name].detach().numpy() for each in session.get_inputs()}
    found = session.run(outputs, fed)
    return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises AssertionError if outputs differ by more than kernels that add up in another order."""
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


def _free_axis(leaf: Any, size: int) -> dict[int, Any] | None:
    """The batch dimension as torch.export wants to be told that its size is free, if there is one."""
    batched = torch.is_tensor(leaf) and leaf.ndim and len(leaf) == size
    return {0: torch.export.Dim.AUTO} if batched else None


def _named(tree: Any, otherwise: str) -> dict[str, Tensor]:
    """The tensors of nested containers, by names made of their places; ``otherwise`` where there are none."""
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
    """An error, and what it came from, in short."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(text.split())[:200]
    return text if root is error else f"{text} ... from {_one_line(root)}"


def _listed(failures: dict[str, str]) -> str:
    return "".join(f" With torch.onnx.export({way}): {reason}" for reason, way in failures.items())
