"""Criteria: scores by hand, by autograd, over micro-batches, and in pieces."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    FPGM,
    LAMP,
    BatchNormScale,
    Channels,
    Criterion,
    Fisher,
    Gradient,
    Losses,
    Magnitude,
    Movement,
    OptimalBrainDamage,
    PerLayer,
    Pruner,
    Random,
    Structure,
    Taylor,
    Unstructured,
    Wanda,
)
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice

SINGLE = Unstructured()
WATCHING = [Gradient(), Taylor(), Movement(), Fisher()]

WEIGHT = [[1.0, -2.0], [4.0, 0.5]]
FIRST = [[2.0, 1.0], [-0.5, 4.0]]
SECOND = [[-4.0, 3.0], [0.25, -2.0]]


class Rows(Structure):
    """One group a Linear, of its output rows."""

    def units(self, model: nn.Module, example: Any = None) -> Units:
        groups = [
            UnitGroup(name, (AxisSlice(f"{name}.weight", module.weight, dim=0),))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        return Units(tuple(groups), {})


class Hidden(Structure):
    """The units between two Linears: a row of the first with a column of the second."""

    def units(self, model: nn.Module, example: Any = None) -> Units:
        first, second = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
        rows = AxisSlice(f"{first[0]}.weight", first[1].weight, dim=0)
        columns = AxisSlice(f"{second[0]}.weight", second[1].weight, dim=1)
        return Units((UnitGroup("hidden", (rows, columns)),), {})


def linears(*weights: list[list[float]] | Tensor) -> nn.Sequential:
    layers = []
    for weight in map(torch.as_tensor, weights):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight.clone()
        layers.append(layer)
    return nn.Sequential(*layers)


def watched(criterion: Criterion, model: nn.Module, structure: Structure = SINGLE) -> Pruner:
    return Pruner(model, 0.5, criterion=criterion, structure=structure, schedule=None)


def means(pruner: Pruner) -> dict[str, list[Any]]:
    """What each group's units score, by the sums in the saved state."""
    statistics = pruner.state_dict()["statistics"]
    return {name: (each["sums"]["score"] / each["count"]).tolist() for name, each in statistics.items()}


def counts(pruner: Pruner) -> list[int]:
    return [int(each["count"]) for each in pruner.state_dict()["statistics"].values()]


def nothing_seen(group: UnitGroup) -> Statistics:
    return Statistics.zeros((), torch.ones(group.shape), group.dtype)


def by_weights(criterion: Criterion, structure: Structure, *weights: list[list[float]]) -> list[Any]:
    groups = structure.units(linears(*weights)).groups
    return [criterion.score(group, nothing_seen(group)).tolist() for group in groups]


# --- by hand


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1, [[1.0, 2.0], [4.0, 0.5]]),
        (1.0, [[1.0, 2.0], [4.0, 0.5]]),
        (2, [[1.0, 4.0], [16.0, 0.25]]),
        (3, [[1.0, 8.0], [64.0, 0.125]]),
    ],
)
def test_magnitude_is_a_power_of_the_size(p: float, expected: list[list[float]]) -> None:
    assert by_weights(Magnitude(p), SINGLE, WEIGHT) == [expected]


def test_magnitude_may_be_a_root() -> None:
    assert by_weights(Magnitude(0.5), SINGLE, [[4.0, -0.25, 0.0]]) == [[[2.0, 0.5, 0.0]]]


@pytest.mark.parametrize(("p", "expected"), [(1, [3.0, 4.5]), (2, [5.0, 16.25])])
def test_magnitude_adds_up_over_a_unit(p: float, expected: list[float]) -> None:
    assert by_weights(Magnitude(p), Rows(), WEIGHT) == [expected]


def test_magnitude_adds_up_over_layers() -> None:
    assert by_weights(Magnitude(), Hidden(), WEIGHT, [[3.0, -1.0], [-0.5, 8.0]]) == [[6.5, 13.5]]


def test_lamp_is_a_share_of_what_is_as_large_or_larger() -> None:
    # squares 1 4 16 0; of equals the earlier has the larger share
    (found,) = by_weights(LAMP(), SINGLE, [[1.0, -2.0], [4.0, 0.0]])
    assert found == torch.tensor([[1 / 21, 4 / 20], [1.0, 0.0]]).tolist()
    assert by_weights(LAMP(), SINGLE, [[2.0, 2.0]], [[0.0, 0.0]]) == [[[1.0, 0.5]], [[0.0, 0.0]]]


def test_lamp_compares_sums_of_squares_of_larger_units() -> None:
    # 1 + 4 + 9 + 1 and 16 + 4 + 4 + 1 = 25: 15 of 40
    (found,) = by_weights(LAMP(), Hidden(), [[1.0, -2.0], [4.0, 2.0]], [[3.0, -2.0], [1.0, 1.0]])
    assert found == [0.375, 1.0]


def test_lamp_spares_layers_of_small_weights() -> None:
    model = linears([[1.0, 2.0, 3.0, 4.0]], [[0.1], [0.2], [0.3], [0.4]])
    pruner = watched(LAMP(), model)
    pruner.prune(1.0)
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [2, 2]


def test_fpgm_adds_up_distances() -> None:
    # at (0, 0), (3, 4) and (6, 8): 5 + 10, 5 + 5, 10 + 5
    rows = [[3.0, 4.0], [6.0, 8.0], [0.0, 4.0]]
    assert by_weights(FPGM(), Rows(), rows) == [pytest.approx([8.0, 5 + 52**0.5, 3 + 52**0.5])]
    # (1, 3) and (4, -1) over both layers; a unit of zeros is gone, and no neighbour
    assert by_weights(FPGM(), Hidden(), [[1.0], [4.0]], [[3.0, -1.0]]) == [pytest.approx([5.0, 5.0])]
    assert by_weights(FPGM(), Hidden(), [[1.0], [0.0]], [[3.0, 0.0]]) == [pytest.approx([0.0, 10**0.5])]


def test_fpgm_removes_what_others_can_make_up_for() -> None:
    model = linears([[9.0, 0.0], [8.0, 1.0], [8.5, 0.5], [1.0, 0.0]])
    pruner = Pruner(model, 0.25, criterion=FPGM(), structure=Rows(), schedule=None)
    pruner.prune(1.0)
    assert pruner.masks["0.weight"].any(1).tolist() == [True, True, False, True]


def test_fpgm_has_nothing_to_say_of_single_weights() -> None:
    message = (
        r"^FPGM\(\) with Global\(.*\) can prune no layer\. 0\.weight: FPGM\(\) needs units of several weights"
    )
    with pytest.raises(ValueError, match=message):
        watched(FPGM(), linears(WEIGHT))


def test_a_units_elements_are_laid_out_in_order() -> None:
    weight = torch.arange(10.0).view(5, 2)
    part = AxisSlice("weight", weight, dim=0, index=torch.tensor([1, 0, -1, 0, 1]))
    assert part.vectors(weight).tolist() == [[2.0, 3.0, 6.0, 7.0], [0.0, 1.0, 8.0, 9.0]]
    part = AxisSlice("weight", weight, dim=0, index=torch.tensor([1, 0, -1, 1, 1]))
    assert part.vectors(weight).tolist() == [[2.0, 3.0, 0, 0, 0, 0], [0.0, 1.0, 6.0, 7.0, 8.0, 9.0]]


def normed() -> nn.Sequential:
    """Three channels go through two norms; those of the last layer through none."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 1, 1),
    )
    model.get_submodule("1").weight.data = torch.tensor([1.0, -2.0, 0.5])
    model.get_submodule("3").weight.data = torch.tensor([0.25, -1.0, 4.0])
    return model


def test_the_scales_of_norms_add_up_and_what_has_none_stays() -> None:
    image = torch.zeros(1, 1, 4, 4)
    pruner = Pruner(
        normed(), 0.5, criterion=BatchNormScale(), structure=Channels(), schedule=None, example=image
    )
    (group,) = pruner.groups
    assert BatchNormScale().score(group, nothing_seen(group)).tolist() == [1.25, 3.0, 4.5]
    why = "needs structure=Channels() and a batch norm with a scale (affine=True) after the layer"
    assert pruner.frozen["4"] == f"BatchNormScale(l1=0.0) {why}"


def test_a_penalty_is_the_gradient_of_the_scales_sizes() -> None:
    model, image = normed(), torch.randn(2, 1, 4, 4)
    criterion = BatchNormScale(l1=0.125)
    pruner = Pruner(model, 0.5, criterion=criterion, structure=Channels(), schedule=None, example=image)
    scales = [model.get_submodule(name).weight for name in ("1", "3")]
    loss = model(image).square().mean()
    (loss + 0.125 * sum(scale.abs().sum() for scale in scales)).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(image).square().mean().backward()
    pruner.observe()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_a_norm_over_channels_of_several_layers_is_penalised_once() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)
            self.first, self.norm, self.head = nn.BatchNorm2d(2), nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.one(x)).relu()
            return self.head(self.norm(torch.cat([x, self.two(x)], 1)))

    model, image = Dense(), torch.randn(2, 1, 4, 4)
    pruner = Pruner(
        model, 0.3, criterion=BatchNormScale(l1=0.5), structure=Channels(), schedule=None, example=image
    )
    (model(image).sum() * 0).backward()
    pruner.observe()
    for norm in (model.first, model.norm):
        assert torch.equal(norm.weight.grad, torch.full_like(norm.weight, 0.5))


@pytest.mark.parametrize("l1", [-1e-4, math.inf, math.nan, "1", None, True])
def test_penalties_are_not_negative(l1: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 0") as error:
        BatchNormScale(l1)
    assert str(error.value).startswith(f"l1={l1!r} ")


@pytest.mark.parametrize("p", [0, -1, math.inf, math.nan, "1", None])
def test_powers_are_above_zero(p: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number above 0") as error:
        Magnitude(p)
    assert str(error.value).startswith(f"p={p!r} ")


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Gradient(), [[3.0, 2.0], [0.375, 3.0]]),
        (Taylor(), [[10.0, 20.0], [2.5, 2.5]]),
        (Movement(), [[1.0, 4.0], [0.5, -0.5]]),
        (Fisher(), [[5.0, 10.0], [1.25, 1.25]]),
    ],
)
def test_single_weights_by_hand(criterion: Criterion, expected: list[list[float]]) -> None:
    pruner = watched(criterion, linears(WEIGHT))
    for grad in (FIRST, SECOND):
        pruner.observe({"0.weight": torch.tensor(grad)})
    assert means(pruner) == {"0.weight": expected}
    assert counts(pruner) == [2]


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # sums of w g: 0 and 0, then -10 and 0
        (Gradient(), [5.0, 3.375]),
        (Taylor(), [50.0, 0.0]),
        (Movement(), [5.0, 0.0]),
        (Fisher(), [15.0, 2.5]),
    ],
)
def test_rows_by_hand(criterion: Criterion, expected: list[float]) -> None:
    pruner = watched(criterion, linears(WEIGHT), Rows())
    for grad in (FIRST, SECOND):
        pruner.observe({"0.weight": torch.tensor(grad)})
    assert means(pruner) == {"0": expected}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # w g: 2 -2 and 3 in the first unit, -2 2 and -2 in the second
        (Gradient(), [4.0, 6.5]),
        (Taylor(), [9.0, 4.0]),
        (Movement(), [-3.0, 2.0]),
        (Fisher(), [8.5, 6.0]),
    ],
)
def test_units_across_layers_by_hand(criterion: Criterion, expected: list[float]) -> None:
    pruner = watched(criterion, linears(WEIGHT, [[3.0, -1.0]]), Hidden())
    pruner.observe({"0.weight": torch.tensor(FIRST), "1.weight": torch.tensor([[1.0, 2.0]])})
    assert means(pruner) == {"hidden": expected}


@pytest.mark.parametrize(
    ("criterion", "kept"),
    [
        (Magnitude(), [[False, True], [True, False]]),
        (Gradient(), [[True, False], [False, True]]),
        (Taylor(), [[True, True], [False, False]]),
        (Movement(), [[True, True], [False, False]]),
        (Fisher(), [[True, True], [False, False]]),
    ],
)
def test_what_scores_higher_stays(criterion: Criterion, kept: list[list[bool]]) -> None:
    pruner = watched(criterion, linears(WEIGHT))
    for grad in (FIRST, SECOND):
        pruner.observe({"0.weight": torch.tensor(grad)})
    pruner.prune(1.0)
    assert pruner.masks["0.weight"].tolist() == kept


def test_a_unit_across_layers_goes_as_a_whole() -> None:
    model = linears(WEIGHT, [[3.0, -1.0], [5.0, 2.0]])
    pruner = watched(Taylor(), model, Hidden())
    pruner.observe({"0.weight": torch.tensor(FIRST), "1.weight": torch.tensor([[1.0, 2.0], [0.0, 0.0]])})
    pruner.prune(1.0)
    assert model[0].weight.tolist() == [[1.0, -2.0], [0.0, 0.0]]
    assert model[1].weight.tolist() == [[3.0, 0.0], [5.0, 0.0]]


# --- by autograd


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
            torch.randn(8, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("criterion", "formula"),
    [
        (Gradient(), lambda w, g: abs(g)),
        (Taylor(), lambda w, g: (w * g) ** 2),
        (Movement(), lambda w, g: -w * g),
        (Fisher(), lambda w, g: (w * g) ** 2 / 2),
    ],
)
def test_means_over_training_steps(criterion: Criterion, formula: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = watched(criterion, model)
    seen: dict[str, list[Tensor]] = {"0.weight": [], "2.weight": []}
    for batch in batches(4):
        twin = copy.deepcopy(model)
        grads = torch.autograd.grad(loss_of(twin, batch), list(twin.parameters()))
        for (name, weight), grad in zip(twin.named_parameters(), grads, strict=True):
            seen[name].append(formula(weight.detach(), grad))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        pruner.observe()
        optimizer.step()
    for name, score in means(pruner).items():
        expected = torch.stack(seen[name]).mean(0)
        torch.testing.assert_close(torch.tensor(score, dtype=torch.float64), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("structure", [Rows(), Hidden()])
def test_taylor_of_a_unit_is_the_squared_gradient_of_its_gates(structure: Structure) -> None:
    """A gate on what a neuron takes has the gradient sum(w g) of its row; on what it gives, of its column."""
    model = network()
    pruner = watched(Taylor(), model, structure)
    expected = torch.zeros(4, dtype=torch.float64)
    for batch in batches(3):
        gates = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        hidden = model[1](model[0](batch[0]) * gates[0]) * gates[1]
        (grad,) = torch.autograd.grad(F.mse_loss(model[2](hidden), batch[1], reduction="sum"), gates)
        expected += (grad[0] if isinstance(structure, Rows) else grad.sum(0)).square() / 3
        model.zero_grad()
        loss_of(model, batch).backward()
        pruner.observe()
    score = torch.tensor(next(iter(means(pruner).values())), dtype=torch.float64)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", [SINGLE, Rows()])
@pytest.mark.parametrize("criterion", WATCHING)
def test_micro_batches_are_one_observation_of_their_sum(criterion: Criterion, structure: Structure) -> None:
    model = network()
    ((inputs, targets),) = batches(1)
    whole, parts = watched(criterion, model, structure), watched(criterion, model, structure)
    loss_of(model, (inputs, targets)).backward()
    whole.observe()
    model.zero_grad()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        loss_of(model, (inputs[rows], targets[rows])).backward()
    parts.observe()
    assert counts(parts) == [1, 1]
    for name, score in means(whole).items():
        torch.testing.assert_close(torch.tensor(means(parts)[name]), torch.tensor(score), rtol=1e-6, atol=0)


# --- what is observed


@pytest.mark.parametrize("poison", [[math.inf], [-math.inf], [math.nan], [math.inf, -math.inf]])
@pytest.mark.parametrize("criterion", WATCHING)
def test_steps_with_inf_or_nan_gradients_are_left_out_and_counted(
    criterion: Criterion, poison: list[float]
) -> None:
    model = linears(WEIGHT, WEIGHT)
    clean, poisoned = watched(criterion, model), watched(criterion, model)
    for grad in (FIRST, SECOND):
        good = {"0.weight": torch.tensor(grad), "1.weight": torch.tensor(FIRST)}
        clean.observe(good)
        poisoned.observe(good)
        bad = {name: value.clone() for name, value in good.items()}
        bad["1.weight"].view(-1)[: len(poison)] = torch.tensor(poison)
        poisoned.observe(bad)
    assert (clean.left_out, poisoned.left_out) == (0, 2)
    assert counts(poisoned) == [2, 2]
    assert means(poisoned) == means(clean)


def test_a_fit_of_bad_steps_alone_is_not_ready() -> None:
    pruner = watched(Taylor(), linears(WEIGHT))
    pruner.observe({"0.weight": torch.full((2, 2), math.nan)})
    assert not pruner.ready
    with pytest.raises(
        RuntimeError, match=r"^Taylor\(\) with .* has seen no finite gradient yet: call observe"
    ):
        pruner.prune(1.0)
    assert pruner.masks["0.weight"].all()


@pytest.mark.parametrize("criterion", [Taylor(), Wanda()])
def test_the_second_pruning_step_needs_steps_since_the_first(criterion: Criterion) -> None:
    model = linears(WEIGHT)
    pruner = watched(criterion, model)
    advice = r".* has seen no finite .*\.$"
    for share, since in ((0.5, rf"^{type(criterion).__name__}"), (1.0, "^Since the last pruning step ")):
        with pytest.raises(RuntimeError, match=since + advice):
            pruner.prune(share)
        with pruner.watch():
            model(torch.ones(2, 2)).sum().backward()
        pruner.observe()
        pruner.prune(share)
    assert pruner.masks["0.weight"].sum() == 2


@pytest.mark.parametrize("criterion", WATCHING)
def test_events_start_the_means_anew(criterion: Criterion) -> None:
    pruner = watched(criterion, linears(WEIGHT))
    pruner.observe({"0.weight": torch.tensor(FIRST)})
    assert pruner.ready
    pruner.prune(0.5)
    assert not pruner.ready
    assert counts(pruner) == [0]
    weight = torch.tensor(WEIGHT) * pruner.masks["0.weight"]
    pruner.observe({"0.weight": torch.tensor(SECOND)})
    fresh = watched(criterion, linears(weight))
    fresh.observe({"0.weight": torch.tensor(SECOND)})
    assert means(pruner) == means(fresh)


def test_layers_without_gradients_wait() -> None:
    model = linears(WEIGHT, WEIGHT)
    pruner = watched(Gradient(), model)
    model[1].weight.grad = torch.tensor(FIRST)
    pruner.observe()
    assert counts(pruner) == [0, 1]
    pruner.prune(1.0)
    assert pruner.masks["0.weight"].all()
    assert int(pruner.masks["1.weight"].sum()) == 2


def test_a_unit_is_observed_if_any_of_its_weights_has_a_gradient() -> None:
    model = linears(WEIGHT, WEIGHT)
    pruner = watched(Gradient(), model, Hidden())
    pruner.observe({})
    assert counts(pruner) == [0]
    pruner.observe({"0.weight": torch.tensor(FIRST)})
    assert counts(pruner) == [1]


@pytest.mark.parametrize("criterion", WATCHING)
def test_gradient_criteria_need_gradients(criterion: Criterion) -> None:
    with pytest.raises(ValueError, match="needs gradients, but no prunable parameter has any") as error:
        watched(criterion, linears(WEIGHT).requires_grad_(False))
    assert str(error.value).startswith(f"criterion={criterion!r} ")


@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_criteria_of_weights_watch_nothing(criterion: Criterion) -> None:
    pruner = watched(criterion, linears(WEIGHT).requires_grad_(False))
    assert pruner.ready
    pruner.observe({"0.weight": torch.full((2, 2), math.nan)})
    assert (counts(pruner), pruner.left_out) == ([0], 0)
    assert pruner.state_dict()["statistics"]["0.weight"]["sums"] == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_kept_in_float32_at_least(dtype: torch.dtype) -> None:
    pruner = watched(Gradient(), linears(torch.ones(1, 2, dtype=dtype)))
    for grad in (2048.0, 1.0, 1.0):
        pruner.observe({"0.weight": torch.full((1, 2), grad, dtype=dtype)})
    sums = pruner.state_dict()["statistics"]["0.weight"]["sums"]["score"]
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[2050.0, 2050.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("criterion", "expected"), [(Taylor(), 2.0**-40), (Fisher(), 2.0**-41)])
def test_small_products_of_half_precision_do_not_vanish(
    criterion: Criterion, expected: float, dtype: torch.dtype
) -> None:
    small = torch.full((1, 2), 2.0**-10, dtype=dtype)
    pruner = watched(criterion, linears(small))
    pruner.observe({"0.weight": small})
    assert means(pruner) == {"0.weight": [[expected, expected]]}


@pytest.mark.parametrize("criterion", WATCHING)
def test_watching_leaves_weights_and_gradients_alone(criterion: Criterion) -> None:
    model = linears(WEIGHT)
    model[0].weight.grad = torch.tensor(FIRST)
    pruner = watched(criterion, model)
    pruner.observe()
    pruner.select(1.0)
    assert model[0].weight.tolist() == WEIGHT
    assert model[0].weight.grad.tolist() == FIRST


# --- pieces


def large(seed: int) -> Tensor:
    """Small whole numbers, whose sums are exact in any order, and more of them than fit one piece."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (1100, 1000), generator=generator).float()


@pytest.mark.parametrize("structure", [SINGLE, Rows(), Hidden()])
@pytest.mark.parametrize("criterion", [Magnitude(), Magnitude(2), Random(), *WATCHING])
def test_scores_in_pieces_are_those_of_the_whole(criterion: Criterion, structure: Structure) -> None:
    model = linears(large(0), large(1).T)
    group = structure.units(model).groups[0]
    assert (len(criterion.pieces(group)) > 1) == (criterion.pointwise and group.divisible)
    statistics = Statistics.zeros(criterion.sums, torch.ones(group.shape), group.dtype)
    pruner = watched(criterion, model, structure)
    for seed in (2, 3):
        grads = {"0.weight": large(seed), "1.weight": large(seed + 10).T}
        whole = criterion.observe(group, [grads[part.name] for part in group.slices])
        statistics.add_(whole, torch.tensor(True))
        statistics.count.add_(1)
        pruner.observe(grads)
    kept = torch.ones(group.shape, dtype=torch.bool)
    candidates = Candidates(group, kept, criterion, statistics, torch.float32)
    score = criterion.score(group, statistics)
    assert score.shape == group.shape
    assert torch.equal(candidates.scores(), score)
    saved = pruner.state_dict()["statistics"][group.name]["sums"]
    assert saved.keys() == statistics.sums.keys()
    assert all(torch.equal(saved[name], total) for name, total in statistics.sums.items())


def test_ties_keep_the_earlier_across_pieces() -> None:
    model = linears(large(0))
    scores = model[0].weight.detach().abs().flatten()
    for target in (0.3, 0.93):
        pruner = Pruner(copy.deepcopy(model), target, schedule=None)
        pruner.prune(1.0)
        lowest_then_latest = len(scores) - 1 - scores.flip(0).argsort(stable=True)
        expected = torch.ones_like(scores, dtype=torch.bool)
        expected[lowest_then_latest[: round(target * len(scores))]] = False
        assert torch.equal(pruner.masks["0.weight"].flatten(), expected)


# --- chance


def draws(criterion: Random, model: nn.Module) -> list[Tensor]:
    return [criterion.score(group, nothing_seen(group)) for group in SINGLE.units(model).groups]


def test_chance_knows_the_name_but_not_the_weights() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(40, 30))
    first, second = draws(Random(), model)
    torch.manual_seed(123)
    nn.init.ones_(model[0].weight)
    again = draws(Random(), model.to(torch.float64))
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)


def test_chance_is_uniform() -> None:
    (scores,) = draws(Random(), nn.Sequential(nn.Linear(100, 100)))
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert scores.histc(10, 0, 1).sub(1000).abs().max() < 150  # five standard deviations


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_seeds_are_whole_numbers(seed: int) -> None:
    with pytest.raises(ValueError, match="must be an integer") as error:
        Random(seed)
    assert str(error.value).startswith(f"seed={seed!r} ")


# --- channels


def test_taylor_of_a_channel_is_its_gates_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-12), nn.ReLU(), nn.Conv2d(5, 2, 3)
    )
    model = model.double().train()
    nn.init.normal_(model[1].bias)
    images = torch.randn(8, 3, 7, 7, dtype=torch.float64)
    pruner = Pruner(model, 0.5, criterion=Taylor(), structure=Channels(), schedule=None, example=images)
    gates = torch.ones(1, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    model[3](model[2](model[1](model[0](images)) * gates)).square().mean().backward()
    pruner.observe()
    (score,) = pruner.scores().values()
    assert gates.grad is not None
    torch.testing.assert_close(score, gates.grad.flatten().square())
    assert score.unique().numel() == 5


def test_magnitude_of_a_channel_is_its_filters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    (group,) = Channels().units(model, torch.ones(1, 3, 7, 7)).groups
    assert {part.name for part in group.slices} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    statistics = Statistics.zeros((), torch.ones(5), torch.float32)
    for p in (1, 2):
        expected = model[0].weight.detach().abs().pow(p).flatten(1).sum(1)
        torch.testing.assert_close(Magnitude(p).score(group, statistics), expected)


def test_a_frozen_norm_does_not_keep_a_channel_from_being_watched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    model[1].requires_grad_(False)
    pruner = Pruner(
        model, 0.4, criterion=Gradient(), structure=Channels(), schedule=None, example=torch.ones(1, 3, 7, 7)
    )
    model(torch.randn(2, 3, 7, 7)).sum().backward()
    pruner.observe()
    pruner.prune(1.0)
    assert int((model[0].weight.flatten(1) == 0).all(1).sum()) == 2


@pytest.mark.parametrize(
    "criterion", [Gradient(), OptimalBrainDamage(), OptimalBrainDamage(estimator="hutchinson")], ids=repr
)
def test_sparse_gradients_of_an_embedding_count_as_dense_ones(criterion: Criterion) -> None:
    words = torch.arange(12).view(3, 4)

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(net(batch).mean(1), torch.arange(3))

    def masks(sparse: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 8, sparse=sparse), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        pruner = Pruner(
            model,
            0.5,
            criterion=criterion,
            structure=Channels(),
            selector=PerLayer(),
            schedule=None,
            example=words,
        )
        loss(model, words).backward()
        assert model.get_parameter("0.weight").grad.is_sparse == sparse  # type: ignore[union-attr]
        pruner.observe()
        pruner.prune(1.0, losses=Losses(loss, [words]))
        return dict(pruner.masks)

    sparse, dense = masks(True), masks(False)
    assert int((~dense["0.weight"]).sum()) == 80
    assert all(torch.equal(sparse[name], mask) for name, mask in dense.items())
