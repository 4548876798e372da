"""ONNX files: onnxruntime gives what the network gives, in batches of any size, or there is no file."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Lit
from torch import Tensor, nn

from lightning_prune import Channels, Heads, Pruner, Unstructured, compact, export_onnx
from lightning_prune.export import onnx

missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A transformer's block, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 32)
        self.narrow = nn.Linear(32, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((seen + self.narrow(self.wide(self.norm(seen)).relu())).mean(1))


def embedded() -> nn.Module:
    """A block whose width can go."""
    return nn.Sequential(nn.Linear(8, 8), Block())


class Given(nn.Module):
    """A linear layer, and a forward that is given."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.run = run

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.run(self.linear, x, y)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = Lit().eval()
    model(torch.randn(8, 1, 8, 8))
    model.net[1].running_mean.normal_()
    return model


def masked(make: Callable[[], nn.Module], structure: Any, example: Tensor) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = make()
    pruner = Pruner(model, 0.5, structure=structure, schedule=None, example=example)
    pruner.prune(1.0)
    return model, pruner.masks


def run(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """Of onnxruntime, without any code of ours."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {
        each.name: torch.from_numpy(value) for each, value in zip(session.get_outputs(), found, strict=True)
    }


def check(path: Path, model: nn.Module, example: Tensor, name: str) -> None:
    """Batches of 1, 2 and 7."""
    torch.manual_seed(1)
    for size in (1, 2, 7):
        data = torch.randn(size, *example.shape[1:])
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(data)
        torch.testing.assert_close(run(path, **{name: data})["output"], expected, rtol=1e-4, atol=1e-5)


# --- what is written


@needs_onnx
@pytest.mark.parametrize(
    ("make", "structure", "example", "name"),
    [
        (cnn, Channels(), IMAGES, "images"),
        (Block, Channels(), TOKENS, "tokens"),
        (embedded, Channels(), TOKENS, "input"),
        (Block, Heads(), TOKENS, "tokens"),
    ],
    ids=["cnn", "transformer", "width", "heads"],
)
def test_masked_and_compacted_networks_run_in_onnxruntime(
    tmp_path: Path, make: Callable[[], nn.Module], structure: Any, example: Tensor, name: str
) -> None:
    single, _ = masked(make, Unstructured(), example)
    size = export_onnx(single, tmp_path / "single.onnx", example)
    assert size == (tmp_path / "single.onnx").stat().st_size
    check(tmp_path / "single.onnx", single, example, name)

    whole, masks = masked(make, structure, example)
    smaller = compact(whole, masks, example)
    fewer = sum(p.numel() for p in single.parameters()) - sum(p.numel() for p in smaller.parameters())
    assert fewer > 0
    # a single example: exporters like to take its 1 for a constant
    assert export_onnx(smaller, tmp_path / "smaller.onnx", example[:1]) < size - 3 * fewer
    check(tmp_path / "smaller.onnx", smaller, example, name)
    check(tmp_path / "smaller.onnx", whole, example, name)


@needs_onnx
def test_inputs_and_outputs_are_named_after_their_places(tmp_path: Path) -> None:
    model = Given(lambda linear, x, y: {"sum": linear(x["a"]) + x["b"][0], "y": (y, y * 2)})
    x, y = {"a": torch.randn(3, 4), "b": [torch.randn(3, 4)]}, torch.randn(3, 4)
    for example in ((x, y), {"x": x, "y": y}):
        export_onnx(model, tmp_path / "net.onnx", example)
        given = {"x_a": torch.randn(5, 4), "x_b_0": torch.randn(5, 4), "y": torch.randn(5, 4)}
        found = run(tmp_path / "net.onnx", **given)
        assert list(found) == ["sum", "y_0", "y_1"]
        torch.testing.assert_close(found["sum"], model.linear(given["x_a"]).detach() + given["x_b_0"])
        assert torch.equal(found["y_1"], given["y"] * 2)
    # the last argument is a mapping, and an output has an input's name
    model = Given(lambda linear, x, y: {"x_a": linear(x["a"])})
    export_onnx(model, tmp_path / "net.onnx", ({"a": y},))
    assert list(run(tmp_path / "net.onnx", x_a=y)) == ["output_x_a"]


class Pooled(nn.Module):
    """Any height, width and length."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.tokens = nn.Conv2d(1, 4, 3), nn.Linear(8, 4)

    def forward(self, images: Tensor, tokens: Tensor, scale: int = 1) -> tuple[Tensor, Tensor]:
        lines = self.tokens(tokens) * scale
        return self.images(images).relu().mean((2, 3)) + lines.mean(1), lines


@needs_onnx
def test_sizes_in_which_examples_differ_are_free(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Pooled().eval(), tmp_path / "net.onnx"
    examples = [
        (torch.randn(2, 1, 8, 8), torch.randn(2, 5, 8)),
        (torch.randn(1, 1, 8, 11), torch.randn(1, 3, 8)),
        (torch.randn(1, 1, 9, 11), torch.randn(1, 3, 8), 2),  # another way, of which the file says nothing
    ]
    export_onnx(model, path, examples)
    images, tokens = torch.randn(3, 1, 8, 5), torch.randn(3, 9, 8)
    found = run(path, images=images, tokens=tokens)
    for one, other in zip(found.values(), model(images, tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=r"index: 2 Got: 9 Expected: 8"):
        run(path, images=torch.randn(3, 1, 9, 8), tokens=tokens)


@needs_onnx
def test_what_is_no_tensor_is_part_of_the_network(tmp_path: Path) -> None:
    model = Given(lambda linear, x, y: linear(x) * y)
    export_onnx(model, tmp_path / "net.onnx", (torch.randn(2, 4), 3.0))
    data = torch.randn(5, 4)
    torch.testing.assert_close(run(tmp_path / "net.onnx", x=data)["output"], model(data, 3.0).detach())


@needs_onnx
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_of_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    data = torch.randn(3, 4, dtype=dtype)
    export_onnx(model, tmp_path / "net.onnx", data)
    torch.testing.assert_close(run(tmp_path / "net.onnx", input=data)["output"], model(data).detach())


@needs_onnx
def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = cnn().train()
    model.net[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    export_onnx(model, tmp_path / "net.onnx", IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check(tmp_path / "net.onnx", model, IMAGES, "images")


@needs_onnx
def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "_LARGEST", 100)
    model = nn.Linear(8, 64)
    size = export_onnx(model, tmp_path / "new" / "net.onnx", TOKENS[0])
    files = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"net.onnx", "net.onnx.data"}
    assert sum(files.values()) == size > 4 * (8 * 64 + 64)
    check(tmp_path / "new" / "net.onnx", model, TOKENS[0], "input")


@needs_onnx
@pytest.mark.parametrize(
    "run_",
    [lambda linear, x, y: linear(x.view(3, 4)), lambda linear, x, y: torch.stack([linear(row) for row in x])],
    ids=["a literal size", "a loop over the batch"],
)
def test_a_forward_that_fixes_the_batch_size_is_told_of(tmp_path: Path, run_: Callable[..., Any]) -> None:
    model, data = Given(run_), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"net\.onnx' takes batches of 3 only, as in the example"):
        export_onnx(model, tmp_path / "net.onnx", data)
    torch.testing.assert_close(run(tmp_path / "net.onnx", x=data)["output"], model(data).detach())


# --- what is not written


def nothing_written(folder: Path) -> bool:
    """A file that was there stays, and nothing lies beside it."""
    return [path.name for path in folder.iterdir()] == ["net.onnx"] and (
        folder / "net.onnx"
    ).read_text() == "old"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "net.onnx").write_text("old")
    return tmp_path / "net.onnx"


@needs_onnx
@pytest.mark.parametrize(
    ("run_", "message"),
    [
        (
            lambda linear, x, y: linear(x[:, :3]),
            r"Given cannot run on the example: .*shapes cannot be multiplied",
        ),
        (
            lambda linear, x, y: linear(x) + torch.rand(4),
            "Given gives other outputs each time: .*'output' differs",
        ),
        (lambda linear, x, y: None, "Given gives no tensor on the example"),
    ],
    ids=["fails", "random", "nothing"],
)
def test_an_example_that_shows_nothing_is_refused(path: Path, run_: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(Given(run_), path, torch.randn(3, 4))
    assert nothing_written(path.parent)


@needs_onnx
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_model_that_cannot_be_exported_says_why(path: Path) -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^'0\.weight' has no shape yet: run a batch through the model first"):
        export_onnx(lazy, path, torch.randn(3, 4))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(
        ValueError, match="is compiled TorchScript code, which is not exported: give the module"
    ):
        export_onnx(scripted, path, torch.randn(3, 4))
    assert nothing_written(path.parent)


@needs_onnx
def test_a_way_that_data_decide_is_refused(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Given(lambda linear, x, y: linear(x) if x.sum() > 0 else -linear(x))
    with pytest.raises(
        RuntimeError, match=r"no ONNX file gives the outputs of Given; nothing is written at '.*'"
    ):
        export_onnx(model, path, torch.ones(3, 4))
    assert nothing_written(path.parent)


@needs_onnx
@pytest.mark.parametrize("late", [False, True], ids=["everywhere", "in larger batches"])
def test_a_file_that_gives_something_else_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    model, true = nn.Linear(4, 4), torch.onnx.export

    def wrong(given: Any, *args: Any, **options: Any) -> None:
        other = Given(lambda linear, x, y: linear(x) + 0.01 * torch.arange(x.shape[0]).ge(3 * late)[:, None])
        other.linear = given
        true(other, *args, **options | {"dynamic_shapes": {"x": options["dynamic_shapes"]["input"]}})

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RuntimeError, match=r"any batch size\): AssertionError: 'output' differs"):
        export_onnx(model, path, torch.randn(3, 4))
    assert nothing_written(path.parent)


@needs_onnx
def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        export_onnx(nn.Linear(4, 4), tmp_path, torch.randn(3, 4))


def test_missing_packages_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"onnx, onnxruntime, onnxscript: pip install 'lightning_prune\[onnx\]'"
    ):
        export_onnx(nn.Linear(4, 4), path, torch.randn(3, 4))
    assert nothing_written(path.parent)
