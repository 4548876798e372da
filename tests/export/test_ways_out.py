"""Other ways out: torch.export and what runs it, and TorchScript give the same outputs; 8 bits keep zeros."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_onnx import IMAGES, TOKENS, cnn, embedded, masked
from torch import Tensor, nn

from lightning_prune import Channels, Unstructured, compact, export_onnx


@pytest.mark.parametrize(
    ("make", "example"), [(lambda: cnn().net, IMAGES), (embedded, TOKENS)], ids=["cnn", "transformer"]
)
def test_compacted_networks_are_exported_and_traced_for_any_batch(make: Any, example: Tensor) -> None:
    model, masks = masked(make, Channels(), example)
    smaller = compact(model, masks, example).eval()
    assert sum(each.numel() for each in smaller.parameters()) < sum(each.numel() for each in model.parameters())
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(copy.deepcopy(smaller), (example,), dynamic_shapes=(batch,)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and that attention compares sizes in Python
        script = torch.jit.trace(copy.deepcopy(smaller), example, check_trace=False)
    for size in (2, 7):
        data = torch.randn(size, *example.shape[1:])
        expected = model.eval()(data)
        for run in (program, script):
            torch.testing.assert_close(run(data), expected, rtol=1e-4, atol=1e-5)


def small_and_masked(make: Any, example: Tensor) -> tuple[nn.Module, nn.Module]:
    """A compacted network, and the masked one."""
    model, masks = masked(make, Channels(), example)
    return compact(model, masks, example).eval(), model.eval()


def plain_cnn() -> nn.Module:
    """A network whose weights lie in memory as PyTorch's runtimes for devices need it."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 3)
    )


NETWORKS = pytest.mark.parametrize(
    ("make", "example"), [(plain_cnn, IMAGES), (embedded, TOKENS)], ids=["cnn", "transformer"]
)


@NETWORKS
def test_openvino_runs_the_exported_program(make: Any, example: Tensor) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    smaller, model = small_and_masked(make, example)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(smaller, (example,), dynamic_shapes=(batch,))
    exactly = {"INFERENCE_PRECISION_HINT": "f32"}  # where a processor has units for it, bfloat16 is the default
    network = openvino.compile_model(openvino.convert_model(program), "CPU", exactly)
    for size in (2, 7):
        data = torch.randn(size, *example.shape[1:])
        found = torch.from_numpy(network(data.numpy())[0])
        torch.testing.assert_close(found, model(data).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of ExecuTorch, where torch is newer
@NETWORKS
def test_executorch_runs_the_exported_program(make: Any, example: Tensor) -> None:
    exir = pytest.importorskip("executorch.exir", reason="needs executorch")
    runtime = pytest.importorskip("executorch.runtime", reason="needs executorch")
    smaller, model = small_and_masked(make, example)
    batch = {0: torch.export.Dim("batch", max=16)}
    program = torch.export.export(smaller, (example,), dynamic_shapes=(batch,))
    saved = exir.to_edge(program).to_executorch().buffer
    network = runtime.Runtime.get().load_program(bytes(saved)).load_method("forward")
    for size in (2, 7):
        data = torch.randn(size, *example.shape[1:])
        torch.testing.assert_close(network.execute([data])[0], model(data).detach(), rtol=1e-4, atol=1e-5)


def sparse_layers() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two linear layers of which three quarters of the weights are 0."""
    example = torch.ones(1, 64)
    model, masks = masked(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)), Unstructured(), example
    )
    return model.eval(), dict(masks)


def test_zeros_stay_zeros_in_8_bits_of_onnxruntime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, masks = sparse_layers()
    export_onnx(model, tmp_path / "net.onnx", torch.ones(2, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(
            tmp_path / "net.onnx", tmp_path / "small.onnx", per_channel=True, weight_type=QuantType.QInt8
        )
    saved = onnx.load(tmp_path / "small.onnx").graph.initializer
    found = [torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in saved if each.data_type == 3]
    weights = [each for each in found if each.ndim == 2]
    assert len(weights) == 2
    for weight, mask in zip(weights, masks.values(), strict=True):
        kept = mask if weight.shape == mask.shape and not weight[~mask].any() else mask.T
        assert not weight[~kept].any()
        assert weight[kept].count_nonzero() > 0.9 * kept.sum()


def test_zeros_stay_zeros_in_8_bits_of_torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
        model, masks = sparse_layers()
        before = copy.deepcopy(model)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        data = torch.randn(3, 64)
        for name, mask in masks.items():
            weight = model.get_parameter(name).dequantize()
            assert not weight[~mask].any()
            assert weight[mask].count_nonzero() > 0.9 * mask.sum()
        torch.testing.assert_close(model(data), before(data), rtol=0.1, atol=0.02)
