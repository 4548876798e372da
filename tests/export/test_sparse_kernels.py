"""Sparse kernels: where a measurement shows a gain, with the same outputs; all else stays, with the reason."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import use_sparse_kernels
from lightning_prune.export import sparse_kernels


class Net(nn.Module):
    """Two linear layers, one without a bias, one whose weight the network reads, and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(24, 16)
        self.two = nn.Linear(16, 12, bias=False)
        self.read = nn.Linear(12, 12)
        self.tied = nn.Embedding(5, 12)
        self.line = nn.Conv1d(1, 1, 3)
        self.dense = nn.Linear(12, 3)
        self.idle = nn.Linear(4, 4)
        for layer in (self.one, self.two, self.read, self.line, self.idle):
            layer.weight.data.view(-1)[1::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(self.one(x).relu())
        hidden = self.read(hidden) + hidden * self.read.weight.diagonal()
        return self.dense(
            self.line(hidden[..., None, :, :].flatten(0, -3).flatten(0, 1)[:, None]).mean() + hidden
        )


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of a dense layer and of a sparse one, in place of those of the clock."""
    seconds = [2.0, 1.0]
    monkeypatch.setattr(sparse_kernels, "latency", lambda models, example, duration: seconds)
    return seconds


@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (2, 3, 24)], ids=str)
def test_layers_are_converted_with_the_same_outputs(shape: tuple[int, ...], timed: list[float]) -> None:
    model, x = Net(), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    found = use_sparse_kernels(model, x)
    results = {each.name: each.why_not for each in found.layers}
    assert results.pop("read").startswith("the model would not run")
    assert results == {
        "one": None,
        "two": None,
        "line": "PyTorch has no sparse kernel for Conv1d",
        "idle": "does not run on the example",
    }
    assert (found.before, found.after) == (2, 1)
    assert [each.kernel for each in found.layers[:2]] == ["CSR", "CSR"]
    assert [each.sparsity for each in found.layers[:2]] == [0.5, 0.5]
    for name in ("one", "two"):
        weight = found.model.get_parameter(f"{name}.weight")
        assert weight.layout == torch.sparse_csr
        assert torch.equal(weight.to_dense(), before[f"{name}.weight"])
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.model.one(x), F.linear(x, model.one.weight, model.one.bias))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "converted" in found.table()
    file = io.BytesIO()
    torch.save(found.model.state_dict(), file)
    assert found.model.state_dict().keys() == before.keys()


def test_without_a_gain_layers_stay(timed: list[float]) -> None:
    timed[1] = 1.9
    model = Net()
    found = use_sparse_kernels(model, torch.randn(2, 24))
    assert {each.name: each.why_not for each in found.layers[:2]} == dict.fromkeys(
        ("one", "two"), "is no faster with CSR"
    )
    assert all(type(each) in (Net, nn.Linear, nn.Conv1d, nn.Embedding) for each in found.model.modules())


def test_outputs_that_differ_are_refused(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    right = sparse_kernels.CSRLinear.forward
    monkeypatch.setattr(sparse_kernels.CSRLinear, "forward", lambda layer, x: 1.01 * right(layer, x))
    found = use_sparse_kernels(Net(), torch.randn(2, 24))
    assert all(each.why_not.startswith("outputs with CSR differ by") for each in found.layers[:2])


def test_a_kernel_that_fails_is_told(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: nn.Linear) -> None:
        raise RuntimeError("not for this type")

    monkeypatch.setattr(sparse_kernels, "_KERNELS", {"CSR": sparse_kernels._Kernel(lambda layer: True, fail)})
    found = use_sparse_kernels(Net(), torch.randn(2, 24))
    assert {each.why_not for each in found.layers[:2]} == {"CSR fails: not for this type"}


def test_the_clock_decides() -> None:
    layer = nn.Linear(64, 64)
    layer.weight.data.view(-1)[1:] = 0
    (trial,) = use_sparse_kernels(nn.Sequential(layer), torch.randn(4, 64), seconds=0.01).layers
    assert trial.before > 0
    assert (trial.before >= sparse_kernels._GAIN * trial.after) == (trial.why_not is None)
    with pytest.raises(ValueError, match=r"seconds=-1"):
        use_sparse_kernels(layer, torch.randn(4, 64), seconds=-1)
