"""Masks: packing, and zeros that are exact whatever lies under them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.units.masks import MaskStore, pack, unpack

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}


class Holder(nn.Module):
    """Nothing but parameters."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER[tensor.element_size()])


def any_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Numbers of every kind: nan with payloads, infinities, subnormals, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGER[dtype.itemsize]
    limits = torch.iinfo(integer)
    values = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integer).view(dtype)
    special = [torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0, -1.0]
    flat = values.view(-1)
    flat[: 2 * len(special)] = torch.tensor(special * 2, dtype=dtype)[: len(flat)]
    return values


def any_mask(*shape: int, seed: int = 0) -> Tensor:
    """Half of the places; among the first 14 each is kept once and masked once."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[:7] = True
    mask.view(-1)[7:14] = False
    return mask


def half_masked(model: nn.Module, *names: str) -> MaskStore:
    store = MaskStore(model, names)
    for seed, mask in enumerate(store.masks.values()):
        mask.copy_(any_mask(*mask.shape, seed=seed))
    return store


@given(st.lists(st.integers(0, 5), max_size=4), st.randoms(use_true_random=False))
def test_packing_loses_nothing(shape: list[int], random: Any) -> None:
    order = random.sample(range(len(shape)), len(shape))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    size = torch.Size(shape).numel()
    mask = torch.tensor([random.random() < 0.5 for _ in range(size)], dtype=torch.bool).view(shape)
    elsewhere = mask.permute(order).contiguous().permute(inverse)  # the same mask in another memory layout
    packed = pack(mask)
    assert torch.equal(packed, pack(elsewhere))
    assert packed.numpy().tobytes() == np.packbits(mask.numpy(), bitorder="little").tobytes()
    back = unpack(packed, tuple(shape))
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)


def test_an_expanded_mask_packs_as_what_it_shows() -> None:
    row = torch.tensor([True, False, True])
    assert pack(row.expand(3, 3)).tolist() == [0b01101101, 0b1]


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, 1, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int8),
        torch.zeros(2, dtype=torch.bool),
        [0, 0],
        None,
    ],
)
def test_unpacking_refuses_other_bytes(packed: object) -> None:
    with pytest.raises(ValueError, match=r"^a mask of shape \(3, 3\) needs 2 packed bytes"):
        unpack(packed, (3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_become_zero_and_kept_stay_bit_for_bit(dtype: torch.dtype, layout: str) -> None:
    model = Holder(weight=LAYOUTS[layout](any_bits(dtype, 4, 3, 5, 2)))
    store = half_masked(model, "weight")
    mask = store.masks["weight"]
    before, strides = bits(model.weight).clone(), model.weight.stride()
    store.apply_()
    assert torch.equal(bits(model.weight), torch.where(mask, before, 0))
    assert model.weight.stride() == strides
    assert store.removed == 120 - int(mask.sum())
    store.apply_()
    assert torch.equal(bits(model.weight), torch.where(mask, before, 0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_masks_have_the_layout_of_their_weights(layout: str) -> None:
    model = Holder(weight=LAYOUTS[layout](torch.ones(4, 3, 5, 2)))
    mask = MaskStore(model, ["weight"]).masks["weight"]
    assert mask.stride() == model.weight.stride()
    assert mask.dtype == torch.bool
    assert not mask.requires_grad
    assert mask.all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_gradients_become_zero(dtype: torch.dtype, layout: str) -> None:
    model = Holder(weight=torch.ones(4, 3, 5, 2, dtype=dtype), other=torch.ones(3, dtype=dtype))
    store = half_masked(model, "weight")
    model.weight.grad = LAYOUTS[layout](any_bits(dtype, 4, 3, 5, 2))
    model.other.grad = any_bits(dtype, 3)
    before, other = bits(model.weight.grad).clone(), bits(model.other.grad).clone()
    store.apply_to_grads_(model.parameters())
    assert torch.equal(bits(model.weight.grad), torch.where(store.masks["weight"], before, 0))
    assert torch.equal(bits(model.other.grad), other)
    assert torch.equal(model.weight, torch.ones(4, 3, 5, 2, dtype=dtype))


def test_masked_gradients_of_rows_that_were_looked_up_become_zero() -> None:
    model = Holder(weight=torch.ones(5, 4))
    store = half_masked(model, "weight")
    rows, values = torch.tensor([[3, 0, 3]]), any_bits(torch.float32, 3, 4)
    model.weight.grad = torch.sparse_coo_tensor(rows, values, (5, 4), check_invariants=True)
    before = bits(values).clone()
    store.apply_to_grads_(model.parameters())
    assert torch.equal(
        bits(model.weight.grad._values()), torch.where(store.masks["weight"][rows[0]], before, 0)
    )


def test_only_the_parameters_given_are_touched() -> None:
    model = Holder(one=torch.ones(4, 4), two=torch.ones(4, 4), three=torch.ones(4, 4))
    store = half_masked(model, "one", "two")
    model.two.grad = torch.ones(4, 4)
    store.apply_([model.two, model.three, nn.Parameter(torch.ones(4, 4))])
    store.apply_to_grads_([model.one])  # which has no gradient
    assert torch.equal(model.one, torch.ones(4, 4))
    assert torch.equal(model.two, store.masks["two"].float())
    assert torch.equal(model.three, torch.ones(4, 4))
    assert torch.equal(model.two.grad, torch.ones(4, 4))
    assert list(store.named(model.parameters())) == ["one", "two"]


def test_a_shared_parameter_is_masked_under_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    store = half_masked(model, "0.weight")
    store.apply_()
    assert torch.equal(model[1].weight != 0, store.masks["0.weight"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda weights: torch.optim.Adam(weights, lr=0.1), ["exp_avg", "exp_avg_sq"]),
        (
            lambda weights: torch.optim.AdamW(weights, lr=0.1, amsgrad=True),
            ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        ),
    ],
)
def test_optimizer_state_is_zeroed_where_masked_alone(
    optimizer: Callable[..., torch.optim.Optimizer], names: list[str], layout: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Holder(
        weight=LAYOUTS[layout](torch.randn(4, 3, 5, 2, generator=generator)),
        other=torch.randn(4, generator=generator),
    )
    store = half_masked(model, "weight")
    stepper = optimizer(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    stepper.step()
    before = {name: stepper.state[model.weight][name].clone() for name in names}
    others = {key: torch.as_tensor(value).clone() for key, value in stepper.state[model.other].items()}
    weight = model.weight.detach().clone()
    store.apply_to_state_(stepper)
    mask = store.masks["weight"]
    for name in names:
        assert (before[name] != 0).all()
        assert torch.equal(bits(stepper.state[model.weight][name]), torch.where(mask, bits(before[name]), 0))
    assert all(torch.equal(stepper.state[model.other][key], value) for key, value in others.items())
    assert float(stepper.state[model.weight].get("step", 1)) == 1
    assert torch.equal(model.weight, weight)


def test_an_optimizer_without_state_is_left_alone() -> None:
    model = Holder(weight=torch.ones(4, 4))
    stepper = torch.optim.Adam(model.parameters())
    half_masked(model, "weight").apply_to_state_(stepper)
    assert not stepper.state


def test_masks_cannot_be_replaced() -> None:
    store = half_masked(Holder(weight=torch.ones(4, 4)), "weight")
    with pytest.raises(TypeError):
        store.masks["weight"] = torch.ones(4, 4, dtype=torch.bool)  # type: ignore[index]


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_comes_back_from_a_file_without_pickled_code(layout: str) -> None:
    values = any_bits(torch.float32, 4, 3, 5, 2)
    store = half_masked(Holder(weight=LAYOUTS[layout](values), bias=torch.ones(5, 7)), "weight", "bias")
    state = through_a_file(store.state_dict())
    assert [entry["bits"].numel() for entry in state.values()] == [15, 5]
    fresh = MaskStore(Holder(weight=torch.ones(4, 3, 5, 2), bias=torch.ones(5, 7)), ["weight", "bias"])
    alive = fresh.masks["weight"]
    fresh.load_state_dict(state)
    assert fresh.masks["weight"] is alive
    assert all(torch.equal(mask, store.masks[name]) for name, mask in fresh.masks.items())
    assert fresh.removed == store.removed > 0


def test_state_brings_masks_for_parameters_that_had_none() -> None:
    state = half_masked(Holder(weight=torch.ones(4, 4)), "weight").state_dict()
    model = Holder(weight=torch.ones(4, 4))
    store = MaskStore(model, [])
    store.load_state_dict(state)
    store.apply_()
    assert torch.equal(model.weight, any_mask(4, 4).float())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"gone": {"bits": pack(any_mask(4, 4)), "shape": [4, 4]}}, "a mask for 'gone', which the model"),
        ({"two": {"bits": pack(any_mask(2, 8)), "shape": [2, 8]}}, r"'two' has shape \(2, 8\)"),
        ({"two": {"bits": pack(any_mask(4, 5)), "shape": [4, 4]}}, r"shape \(4, 4\) needs 2 packed bytes"),
        ({"two": {"bits": "ff", "shape": [4, 4]}}, r"shape \(4, 4\) needs 2 packed bytes"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(entry: dict[str, Any], message: str) -> None:
    model = Holder(one=torch.ones(4, 4), two=torch.ones(4, 4))
    store = half_masked(model, "one", "two")
    before = {name: mask.clone() for name, mask in store.masks.items()}
    fitting = {"one": {"bits": pack(~before["one"]), "shape": [4, 4]}}
    with pytest.raises(ValueError, match=message):
        store.load_state_dict(fitting | entry)
    assert store.masks.keys() == before.keys()
    assert all(torch.equal(store.masks[name], mask) for name, mask in before.items())
    assert torch.equal(model.one, torch.ones(4, 4))
