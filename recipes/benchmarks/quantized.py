"""Prunes a trained network and quantizes it to 8 bits: accuracy, size, and whether zeros stay zeros.

    pip install torchao
    python recipes/benchmarks/quantized.py --init-from resnet20.pt --root DIR

Each network is pruned at once and reconstructed on training images, without training, and then quantized twice,
weights and activations, with ranges seen on the same images: by onnxruntime in the file of ``export_onnx``, and
by torchao in the program of ``torch.export``. Sizes are of weights alone; the last column zips them.
"""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from reconstruction import ROWS, by_taylor, ready
from shared import Table, add_data, arguments, calibration_and_validation, network, percent, save
from torch import Tensor, nn

from lightning_prune import Reconstruct, compact, export_onnx

Run = Callable[[Tensor], Tensor]
_MOST = 64  # calibration images

NETWORKS: dict[str, Mapping[str, Any] | None] = {
    "dense": None,
    "single weights, 90 %": ROWS["single weights, magnitude, 90 %"],
    "2:4": ROWS["2:4, OptimalBrainSurgeon"],
    "channels, 2.1 times fewer multiply-adds": by_taylor(2.1),
}


def main() -> None:
    """Prune and quantize in each way, and print and save the results."""
    parser = arguments(__doc__ or "", out="quantized.json")
    add_data(parser, trained=True)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    batches, held = calibration_and_validation(options)
    inputs = [each for each, _ in batches]
    table = Table("network", "computes in", "accuracy, %", "bytes", "zipped", "zeros", "zeros lost")
    results = []
    for name, parts in NETWORKS.items():
        model = copy.deepcopy(network(options.init_from)).eval()
        if parts is not None:
            pruner = ready(model, parts, batches)
            pruner.prune(1.0, reconstruct=Reconstruct(), batches=inputs)
            if pruner.channel_groups:
                model = compact(model, pruner.masks, inputs[0][:2]).eval()
        before = weights_of(model)
        for kind, run, found in ways(model, inputs):
            # of equal shapes, all list them in the order in which they run
            after = sorted(found, key=lambda each: each.shape)
            assert [each.shape for each in after] == [each.shape for each in before]
            row: dict[str, Any] = {
                "network": name,
                "kind": kind,
                "accuracy": accuracy(run, held),
                "bytes": sum(each.nbytes for each in after),
                "zipped": sum(len(zlib.compress(each.tobytes())) for each in after),
                "zeros": sum(int((each == 0).sum()) for each in before),
                "lost": sum(
                    int(((one == 0) & (other != 0)).sum()) for one, other in zip(before, after, strict=True)
                ),
            }
            table.row(
                name,
                kind,
                *percent(row["accuracy"]),
                *(f"{row[key]:,}" for key in ("bytes", "zipped", "zeros", "lost")),
            )
            results.append(row)
    save(options.out, results)


def weights_of(model: nn.Module) -> list[numpy.ndarray]:
    """Return the weights of convolutions and linear layers, by their shapes."""
    layers = (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return sorted((layer.weight.detach().numpy() for layer in layers), key=lambda each: each.shape)


def ways(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Run, Sequence[numpy.ndarray]]]:
    """Yield the network as it is and as each package quantizes it: what it computes in, itself, its weights."""
    yield "float32", model, weights_of(model)
    yield "int8, onnxruntime", *by_onnxruntime(model, inputs)
    if find_spec("torchao") is not None:
        yield "int8, torchao", *by_torchao(model, inputs)


def by_onnxruntime(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Run, list[numpy.ndarray]]:
    """Return a network that onnxruntime has quantized, and its weights."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: inputs[0][:_MOST].numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, ready_, small = (str(Path(folder, name)) for name in ("plain.onnx", "ready.onnx", "small.onnx"))
        export_onnx(model, plain, inputs[0][:2])
        quant_pre_process(plain, ready_)
        graph = onnx.load(ready_).graph
        quantize_static(
            ready_,
            small,
            Reader(graph.input[0].name),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        tensors = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(small).graph.initializer}
        session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    order = [each.input[1] for each in graph.node if each.op_type in ("Conv", "Gemm", "MatMul")]
    weights = [tensors[f"{name}_quantized"] for name in order]

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])

    return run, weights


class Relu(nn.Module):
    """``nn.ReLU``, of which torchao's quantizer does not follow one module that is called at several places."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``max(x, 0)``."""
        return torch.relu(x)


def by_torchao(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Run, list[numpy.ndarray]]:
    """Return a network that torchao has quantized for x86, and its weights."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, Relu())
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(twin, (inputs[0][:_MOST],), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        prepared(inputs[0][:_MOST])
    small = convert_pt2e(prepared)
    found = [each for each in small.state_dict().values() if each.dtype == torch.int8]
    return small, [each.numpy() for each in found]


@torch.no_grad()
def accuracy(run: Run, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the share of images that a network classifies rightly."""
    hits = sum(int((run(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)
    return hits / sum(len(labels) for _, labels in batches)


if __name__ == "__main__":
    main()
