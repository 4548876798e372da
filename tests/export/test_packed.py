"""Packed files: every bit comes back, the size is what the report says, a damaged file changes nothing."""

from __future__ import annotations

import copy
import re
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lit import Lit, fit, seeded
from torch import Tensor, nn

from lightning_prune import (
    Channels,
    Pruner,
    PruningCallback,
    Steps,
    Unstructured,
    load_compact,
    load_packed,
    measure,
    save_packed,
)
from lightning_prune.export.compacted import masks_in, plans_in

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int8]


NAMES = [
    "net.packed",
    pytest.param(
        "net.safetensors",
        marks=pytest.mark.skipif(find_spec("safetensors") is None, reason="safetensors not installed"),
    ),
]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state_bits(model: nn.Module) -> dict[str, bytes]:
    tensors = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    return {name: bits(value) for name, value in tensors.items()}


class Tied(nn.Module):
    """Two names for one weight, a buffer, and what is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(30, 40)
        self.leave = nn.Linear(40, 30)
        self.again = nn.Linear(30, 40)
        self.again.weight = self.enter.weight
        self.register_buffer("seen", torch.tensor(3))

    def get_extra_state(self) -> Any:
        return {"steps": 7}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


def pruned(model: nn.Module, target: float = 0.9) -> dict[str, Tensor]:
    pruner = Pruner(model, target, schedule=None)
    pruner.prune(1.0)
    return dict(pruner.masks)


# --- every bit


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), max_size=4),
    last=st.booleans(),
    kept=st.sampled_from([0.0, 0.05, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back(
    tmp_path: Path, dtype: torch.dtype, shape: list[int], last: bool, kept: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=draw) < kept
    # any bits at all: infinities, numbers that are none, the smallest ones, zeros with a sign
    raw = torch.randint(0, 256, (mask.numel() * dtype.itemsize,), dtype=torch.uint8, generator=draw)
    weight = raw.view(dtype).view(shape).masked_fill(~mask, 0)
    if last and len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    model, other = nn.Module(), nn.Module()
    model.weight = nn.Parameter(weight, requires_grad=False)
    other.weight = nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False)
    before = bits(model.weight)
    size = save_packed(model, {"weight": mask}, tmp_path / "net.packed")
    assert size == (tmp_path / "net.packed").stat().st_size
    assert load_packed(tmp_path / "net.packed", other) is other
    assert bits(other.weight) == bits(model.weight) == before


def test_what_is_tied_is_saved_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    masks = pruned(model)
    size = save_packed(model, masks, tmp_path / "net.packed")
    load_packed(tmp_path / "net.packed", other)
    assert other.again.weight is other.enter.weight
    assert state_bits(other) == state_bits(model)
    assert other.steps == 7
    model.again.weight = nn.Parameter(model.enter.weight.detach().clone())
    apart = save_packed(model, masks | {"again.weight": masks["enter.weight"]}, tmp_path / "apart.packed")
    assert apart - size > 150 + 4 * int(masks["enter.weight"].sum())


def test_a_weight_that_is_part_of_a_larger_tensor_takes_nothing_along(tmp_path: Path) -> None:
    model = nn.Linear(10, 10)
    model.bias.data = torch.randn(100_000)[:10]
    masks = pruned(model)
    assert save_packed(model, masks, tmp_path / "net.packed") < 4000
    assert bits(load_packed(tmp_path / "net.packed", nn.Linear(10, 10)).bias) == bits(model.bias)


# --- the size


def test_the_report_tells_the_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1000, 100), nn.BatchNorm1d(100), nn.Linear(100, 8))
    masks = pruned(model)
    report = measure(model, masks)
    biases, norm = 4 * (100 + 8), 4 * 4 * 100 + 8
    assert report.bytes == 4 * 100_800 + biases + norm
    assert report.bytes_packed == 4 * 10_080 + 100_800 // 8 + biases + norm
    size = save_packed(model, masks, tmp_path / "net.packed")
    tensors = 2 * 2 + 2 + 5
    assert 0 < size - report.bytes_packed < 400 * tensors
    assert f"bytes {report.bytes_packed:,} if saved with save_packed" in report.table()


def test_a_mask_that_saves_nothing_costs_nothing(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    sparse = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.99
    with torch.no_grad():
        model.weight[~sparse] = 0
    assert (~sparse).sum() * 4 < 64 * 64 / 8
    report = measure(model, {"weight": sparse})
    assert report.bytes_packed == report.bytes == 4 * (64 * 64 + 64)
    none, some = (save_packed(model, masks, tmp_path / "net.packed") for masks in ({}, {"weight": sparse}))
    assert none == some


# --- compacted networks


@pytest.mark.parametrize("structure", [Channels(), Unstructured()], ids=["channels", "single weights"])
def test_a_compacted_network_comes_back_from_a_dense_one(tmp_path: Path, structure: Any) -> None:
    model = seeded(Lit)
    callback = PruningCallback(0.97, structure=structure, schedule=Steps({"1ep": 1.0}), compact=True)
    fit(tmp_path, model, callback, max_epochs=2).save_checkpoint(tmp_path / "net.ckpt")
    checkpoint = torch.load(tmp_path / "net.ckpt", weights_only=True)
    masks, plans = masks_in(checkpoint), plans_in(checkpoint)
    assert {name: bits(mask) for name, mask in masks.items()} == {
        name: bits(mask) for name, mask in callback.masks.items()
    }
    size = save_packed(model, masks, tmp_path / "net.packed", plans=plans)
    paths = [tmp_path / "net.packed"]
    if find_spec("safetensors") is not None:
        paths.append(tmp_path / "net.safetensors")
        save_packed(model, masks, paths[1], plans=plans)
    for path, make in product(paths, (Lit, lambda: load_compact(checkpoint, Lit()))):
        other = load_packed(path, make())
        assert state_bits(other) == state_bits(model)
        assert other.net[4].out_features == model.net[4].out_features == len(model.net[4].weight)
    assert 0 < size - callback.report.bytes_packed < 8000
    assert callback.report.bytes_packed == measure(model, masks).bytes_packed
    assert (callback.report.bytes_packed < callback.report.bytes) == bool(masks)
    save_packed(model, masks, tmp_path / "bare.packed")
    dense = Lit()
    with pytest.raises(ValueError, match=r"does not belong to this Lit: '.*' has shape .* in the file, "):
        load_packed(tmp_path / "bare.packed", dense)


def test_the_masks_of_several_callbacks_are_packed_together(tmp_path: Path) -> None:
    model = seeded(Lit)
    both = [
        PruningCallback(
            structure=Channels(include=f"net.{n}"), target=0.5, name=f"{n}", schedule=Steps({"1ep": 1.0})
        )
        for n in (0, 4)
    ]
    fit(tmp_path, model, *both, max_epochs=2).save_checkpoint(tmp_path / "net.ckpt")
    masks = masks_in(torch.load(tmp_path / "net.ckpt", weights_only=True))
    one, other = (callback.masks["net.4.weight"] for callback in both)
    assert int(masks["net.4.weight"].sum()) == int((one & other).sum()) == 288 * 16 // 4
    save_packed(model, masks, tmp_path / "net.packed")
    assert state_bits(load_packed(tmp_path / "net.packed", Lit())) == state_bits(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_readers_find_the_tensors_of_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model = Tied()
    model.leave = nn.Linear(40, 30, dtype=dtype)
    masks = {"leave.weight": torch.arange(1200).view(30, 40) % 10 == 0}
    model.leave.weight.data.masked_fill_(~masks["leave.weight"], 0)
    path = tmp_path / "net.safetensors"
    size = save_packed(model, masks, path)
    found = safetensors.load_file(path)
    state = model.state_dict()
    assert found.keys() == {"enter.weight", "again.bias", "enter.bias", "leave.bias", "seen"} | {
        f"leave.weight.{part}" for part in ("bits", "values")
    }
    assert all(torch.equal(found[name], state[name]) for name in found.keys() & state.keys())
    assert len(found["leave.weight.values"]) == 120
    assert size == path.stat().st_size
    other = Tied()
    other.leave = nn.Linear(40, 30, dtype=dtype)
    assert state_bits(load_packed(path, other)) == state_bits(model)
    assert other.steps == 7
    assert other.again.weight is other.enter.weight


def test_without_safetensors_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_prune\[safetensors\]'"):
        save_packed(nn.Linear(2, 2), {}, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


# --- what is refused


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_a_file_cut_short_changes_nothing(tmp_path: Path, cut: int, name: str) -> None:
    model = Tied()
    save_packed(model, pruned(model), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:cut])
    other = Tied()
    before = state_bits(other)
    with pytest.raises(ValueError, match=rf"path='.*{re.escape(name)}' cannot be read"):
        load_packed(tmp_path / name, other)
    assert state_bits(other) == before


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_in_the_values_is_noticed(tmp_path: Path, name: str) -> None:
    model = Tied()
    save_packed(model, pruned(model), tmp_path / name)
    whole, saved = bytearray((tmp_path / name).read_bytes()), state_bits(model)
    place = bytes(whole).index(bits(model.leave.bias))
    noticed = 0
    for byte in (*range(0, len(whole), 37), *range(place, place + 120, 7)):
        damaged = whole.copy()
        damaged[byte] ^= 4
        (tmp_path / name).write_bytes(damaged)
        other = Tied()
        before = state_bits(other)
        try:
            load_packed(tmp_path / name, other)
        except ValueError:
            noticed += 1
            assert state_bits(other) == before
        else:
            assert not place <= byte < place + 120
            assert state_bits(other) == saved
    assert noticed > 50


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.packed"
    model = nn.Linear(40, 40)
    save_packed(model, pruned(model), path)
    cases: list[tuple[nn.Module, str]] = [
        (nn.Linear(40, 40, bias=False), r"only one of them has \['bias'\]"),
        (nn.Linear(40, 30), r"'weight' has shape \(40, 40\) in the file, \(30, 40\) in the model"),
        (
            nn.Linear(40, 40).half(),
            r"'weight' is torch.float32 in the file, torch.float16 in the model: convert",
        ),
    ]
    for other, message in cases:
        before = state_bits(other)
        with pytest.raises(ValueError, match=message):
            load_packed(path, other)
        assert state_bits(other) == before
    torch.save(model.state_dict(), path)
    with pytest.raises(
        ValueError, match="was written by something else than save_packed, or by a later version of it"
    ):
        load_packed(path, model)
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.packed", model)


class Odd(nn.Linear):
    """Saves what cannot be loaded safely."""

    def get_extra_state(self) -> Any:
        return Path("here")

    def set_extra_state(self, state: Any) -> None: ...


def test_what_cannot_be_packed_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "net.packed"
    path.write_text("old")
    model = nn.Linear(40, 40)
    masks = pruned(copy.deepcopy(model))
    cases: list[tuple[nn.Module, dict[str, Tensor], str]] = [
        (model, masks, r"masks\['weight'\] removes .* not 0: .* pruner\.apply_\(\) or .*mul_"),
        (model, {"weight": torch.eye(40) == 0}, r"masks\['weight'\] removes weights that are not 0"),
        (model, {"wait": masks["weight"]}, r"masks\['wait'\] of shape \(40, 40\) fits no parameter"),
        (nn.Linear(3, 3), masks, r"masks\['weight'\] has shape \(40, 40\), its parameter \(3, 3\);"),
        (Odd(40, 40), {}, r"^Odd\.state_dict\(\) holds .* get_extra_state, or name .* says: [\s\S]*PosixPath"),
        (nn.LazyLinear(3), {}, r"^'weight' has no shape yet: run a batch through the model first"),
    ]
    for given_, wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            save_packed(given_, wrong, path)
        assert [each.name for each in tmp_path.iterdir()] == ["net.packed"]
        assert path.read_text() == "old"


class Given:
    pass


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return Given()

    def set_extra_state(self, state: Any) -> None:
        assert isinstance(state, Given)


def test_extra_state_that_is_named_as_safe_is_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Extra\.state_dict\(\) .*\.add_safe_globals") as error:
        save_packed(Extra(3, 2), {}, tmp_path / "net.packed")
    assert str(tmp_path) not in str(error.value)
    with torch.serialization.safe_globals([Given]):
        save_packed(model := Extra(3, 2), {}, tmp_path / "net.packed")
        loaded = load_packed(tmp_path / "net.packed", Extra(3, 2))
    assert torch.equal(loaded.weight, model.weight)


def test_lazy_models_are_loaded_once_they_have_shapes(tmp_path: Path) -> None:
    save_packed(nn.Linear(3, 2), {}, tmp_path / "net.packed")
    weights = {"state_dict": nn.Linear(3, 2).state_dict()}
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"^'weight' has no shape yet: run a batch through the model first"):
        load_packed(tmp_path / "net.packed", lazy)
    with pytest.raises(ValueError, match=r"^'weight' has no shape yet: run a batch through the model first"):
        load_compact(weights, lazy)
    lazy(torch.ones(1, 3))
    load_packed(tmp_path / "net.packed", lazy)
    assert torch.equal(load_compact(weights, lazy).weight, weights["state_dict"]["weight"])


def test_several_masks_are_packed_together(tmp_path: Path) -> None:
    model = nn.Linear(40, 40)
    masks = [{"weight": torch.arange(1600).view(40, 40) % each != 0} for each in (2, 3)]
    both = masks[0]["weight"] & masks[1]["weight"]
    with torch.no_grad():
        model.weight.mul_(both)
    size = save_packed(model, masks, tmp_path / "two" / "net.packed")
    assert size == save_packed(model, {"weight": both}, tmp_path / "net.packed")
    assert torch.equal(load_packed(tmp_path / "two" / "net.packed", nn.Linear(40, 40)).weight, model.weight)
    report = measure(model, masks)
    assert report.layers[0].remaining == int(both.sum())
