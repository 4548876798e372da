"""What asks for the loss: against autograd's Hessian, plain loops, and all masks that there are."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightnings import Callback, ModelCheckpoint
from lit import Lit, Manual, digits, fit, seeded, trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import lightning_prune.statistics.losses
from lightning_prune import (
    Blocks,
    Channels,
    Criterion,
    Global,
    Losses,
    Magnitude,
    NofM,
    OneShot,
    OptimalBrainDamage,
    Oracle,
    ParticleFilter,
    PerLayer,
    Pruner,
    PruningCallback,
    Random,
    Steps,
    Structure,
    Taylor,
    Unstructured,
)

Batch = tuple[Tensor, Tensor]
EXAMPLE = torch.ones(2, 1, 6, 6, dtype=torch.float64)


def network() -> nn.Sequential:
    """Convolution, norm, attention of a kind, two linear layers, in float64, trained on nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.SiLU(),
        nn.Linear(4, 3),
    ).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].running_mean, -0.1, 0.1)
    return model


def batches(count: int = 3, size: int = 8) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(size, 1, 6, 6).double(), torch.randint(0, 3, (size,))) for _ in range(count)]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def branching(model: nn.Module, batch: Batch) -> Tensor:
    """Cannot be run for several networks at once."""
    loss = loss_of(model, batch)
    return loss if loss.item() > 0 else -loss


def noisy(model: nn.Module, batch: Batch) -> Tensor:
    """Draws numbers of its own."""
    return loss_of(model, (batch[0] + torch.rand(1).double() / 10, batch[1]))


def losses(loss: Callable[[nn.Module, Any], Tensor] = loss_of, **how: int) -> Losses:
    return Losses(loss, batches(**how), progress=False)


def scores(criterion: Criterion, model: nn.Module, structure: Structure, held: Losses) -> dict[str, Tensor]:
    return Pruner(model, 0.5, criterion=criterion, structure=structure, example=EXAMPLE).scores(held)


def mean_loss(model: nn.Module, held: Losses) -> float:
    with torch.no_grad():
        return sum(float(held.loss(model, batch)) for batch in held.batches) / len(held.batches)


# --- curvature


def hessian_diagonals(model: nn.Module, held: Losses) -> dict[str, Tensor]:
    """Each parameter's, of the whole matrix."""
    twin = copy.deepcopy(model).eval()
    found = {}
    for name, parameter in twin.named_parameters():

        def loss(values: Tensor, name: str = name) -> Tensor:
            def judged(batch: Batch) -> Tensor:
                return F.cross_entropy(functional_call(twin, {name: values}, (batch[0],)), batch[1])

            return torch.stack([judged(batch) for batch in held.batches]).mean()

        hessian = torch.autograd.functional.hessian(loss, parameter.detach())
        size = parameter.numel()
        found[name] = hessian.reshape(size, size).diagonal().view(parameter.shape)
    return found


def test_exact_curvature_is_that_of_autograd() -> None:
    model, held = network(), losses()
    diagonals = hessian_diagonals(model, held)
    found = scores(OptimalBrainDamage(estimator="exact"), model, Unstructured(), held)
    assert len(found) == 3
    for name, score in found.items():
        expected = diagonals[name] * model.get_parameter(name).detach().square() / 2
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-8)
    assert any((score < 0).any() for score in found.values())
    assert any((score > 1e-4).any() for score in found.values())


def test_the_curvature_of_a_channel_is_the_sum_over_all_that_makes_it() -> None:
    model, held = network(), losses()
    diagonals = hessian_diagonals(model, held)
    found = scores(OptimalBrainDamage(estimator="exact"), model, Channels(), held)
    assert [score.shape for score in found.values()] == [(3,), (4,)]
    for (_, score), names in zip(found.items(), (("0", "1"), ("6",)), strict=True):
        parts = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
        saliency = [diagonals[name] * model.get_parameter(name).detach().square() / 2 for name in parts]
        expected = torch.stack([each.flatten(1).sum(1) if each.ndim > 1 else each for each in saliency]).sum(0)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-8)


def test_signs_see_a_diagonal_curvature_without_error() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    curvature = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 4.0]], dtype=torch.float64)
    held = Losses(lambda net, batch: (curvature * net.weight.square() / 2).sum(), [None], progress=False)
    (score,) = scores(
        OptimalBrainDamage(estimator="hutchinson", probes=1), model, Unstructured(), held
    ).values()
    torch.testing.assert_close(score, curvature * model.weight.detach().square() / 2)


def test_more_signs_come_closer_to_the_curvature() -> None:
    model, held = network(), losses()
    exact = scores(OptimalBrainDamage(estimator="exact"), model, Unstructured(), held)

    def error(probes: int, seed: int) -> float:
        found = scores(
            OptimalBrainDamage(estimator="hutchinson", probes=probes, seed=seed), model, Unstructured(), held
        )
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    few, many = ([error(probes, seed) for seed in range(4)] for probes in (4, 100))
    assert max(many) < min(few) / 2  # sqrt(100 / 4) = 5 in the mean
    whole = sum(float(score.square().sum()) for score in exact.values()) ** 0.5
    assert max(many) < whole


def test_fisher_is_the_mean_squared_gradient() -> None:
    model, held = network(), losses()
    found = scores(OptimalBrainDamage(estimator="fisher"), model, Unstructured(), held)
    model.eval()
    for name, score in found.items():
        weight = model.get_parameter(name)
        grads = [torch.autograd.grad(loss_of(model, batch), weight)[0] for batch in held.batches]
        expected = torch.stack([grad.square() for grad in grads]).mean(0) * weight.detach().square() / 2
        torch.testing.assert_close(score, expected)


def test_what_the_loss_does_not_depend_on_has_no_curvature() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    held = Losses(lambda net, batch: net[0].weight.square().sum(), [None], progress=False)
    for estimator in ("exact", "hutchinson", "fisher"):
        found = scores(OptimalBrainDamage(estimator=estimator), model, Unstructured(), held)
        assert not found["1.weight"].any()
        assert found["0.weight"].all()


# --- brute force


@pytest.mark.parametrize("size", [8, 65], ids=["several at once", "one after the other"])
@pytest.mark.parametrize("loss", [loss_of, branching])
@pytest.mark.parametrize("structure", [Unstructured(), Blocks(1, 2), Channels()])
def test_the_oracle_is_a_plain_loop(structure: Structure, loss: Any, size: int) -> None:
    model, held = network(), losses(loss, count=2, size=size)
    pruner = Pruner(model, 0.5, criterion=Oracle(), structure=structure, example=EXAMPLE)
    found = pruner.scores(held)
    assert found.keys() == {group.name for group in pruner.groups}
    plain = copy.deepcopy(model).eval()
    dense = mean_loss(plain, held)
    for group in pruner.groups:
        for unit in itertools.product(*map(range, group.shape)):
            kept = torch.ones(group.shape, dtype=torch.bool)
            kept[unit] = False
            twin = copy.deepcopy(plain)
            for part in group.masked:
                twin.get_parameter(part.name).data.mul_(part.spread(kept))
            expected = abs(mean_loss(twin, held) - dense)
            assert float(found[group.name][unit]) == pytest.approx(expected, abs=1e-12)
    assert all(score.unique().numel() > 1 for score in found.values())


def test_the_oracle_looks_at_the_network_as_it_stands() -> None:
    model, held = network(), losses()
    pruner = Pruner(model, 0.5, criterion=Oracle(), structure=Channels(), example=EXAMPLE, schedule=None)
    pruner.prune(0.5, losses=held)
    gone = {name: ~mask for name, mask in pruner.masks.items()}
    dense = mean_loss(copy.deepcopy(model).eval(), held)
    for group in pruner.groups:
        score = pruner.scores(held)[group.name]
        removed = gone[group.slices[0].name].flatten(1).all(1)
        assert torch.equal(score == -torch.inf, removed)
        unit = int((~removed).nonzero()[0])
        twin, kept = copy.deepcopy(model).eval(), torch.arange(group.size) != unit
        for part in group.masked:
            twin.get_parameter(part.name).data.mul_(part.spread(kept))
        assert float(score[unit]) == pytest.approx(abs(mean_loss(twin, held) - dense), abs=1e-12)


def test_passes_are_limited_by_looking_at_fewer_batches() -> None:
    model, held = network(), losses()  # 7 channels
    first = Losses(loss_of, held.batches[:1], progress=False)
    found = scores(Oracle(batches=3, max_passes=14), model, Channels(), held)
    two = scores(Oracle(), model, Channels(), Losses(loss_of, held.batches[:2], progress=False))
    one = scores(Oracle(), model, Channels(), first)
    for name, score in found.items():
        torch.testing.assert_close(score, two[name])
        assert not torch.allclose(score, one[name])


@pytest.mark.parametrize(
    ("criterion", "passes"),
    # 27 + 48 + 12 weights
    [(Oracle(max_passes=80), "87"), (OptimalBrainDamage(estimator="exact", max_passes=800), "870")],
)
def test_too_many_passes_are_refused_and_timed(criterion: Criterion, passes: str) -> None:
    pruner = Pruner(network(), 0.5, criterion=criterion, schedule=None)
    with pytest.raises(ValueError, match=rf"would take {passes} passes .* about .* minutes.*max_passes="):
        pruner.estimate_seconds(losses())
    with pytest.raises(ValueError, match=f"would take {passes} passes"):
        pruner.prune(1.0, losses=losses())
    assert all(mask.all() for mask in pruner.masks.values())


HUTCHINSON = OptimalBrainDamage(batches=3, estimator="hutchinson", probes=10, max_passes=20)


@pytest.mark.parametrize(
    ("criterion", "advice", "follow"),
    [
        (Oracle(batches=2, max_passes=30), "leave layers out with include and exclude", {}),
        (
            OptimalBrainDamage(batches=1, estimator="exact", max_passes=30),
            "leave layers out with include and exclude",
            {},
        ),
        (HUTCHINSON, "lower batches=3 or probes=10", {"batches": 2}),
        (HUTCHINSON, "lower batches=3 or probes=10", {"probes": 6}),
        (OptimalBrainDamage(batches=3, max_passes=2), "lower batches=3", {"batches": 2}),
    ],
)
def test_the_advice_for_too_many_passes_works(
    criterion: OptimalBrainDamage | Oracle, advice: str, follow: dict[str, int]
) -> None:
    pruner = Pruner(network(), 0.5, criterion=criterion, schedule=None)
    with pytest.raises(ValueError, match=f"raise max_passes=[0-9]+, {advice}, or take another criterion"):
        pruner.prune(1.0, losses=losses())
    structure = Unstructured() if follow else Unstructured(include="0")
    pruner = Pruner(network(), 0.5, criterion=replace(criterion, **follow), structure=structure, schedule=None)
    pruner.prune(1.0, losses=losses())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.03)


def test_scores_of_a_criterion_of_losses_need_losses() -> None:
    pruner = Pruner(network(), 0.5, criterion=Oracle(), schedule=None)
    with pytest.raises(RuntimeError, match=r"give step\(\), prune\(\) or scores\(\) `losses="):
        pruner.scores()
    assert pruner.scores(losses()).keys() == {group.name for group in pruner.groups}


@pytest.mark.parametrize(
    "criterion", [Oracle(), OptimalBrainDamage(estimator="hutchinson"), OptimalBrainDamage(estimator="exact")]
)
def test_looking_leaves_no_trace(criterion: Criterion) -> None:
    model = network()
    model(batches()[0][0]).sum().backward()
    before, grads = copy.deepcopy(model.state_dict()), [each.grad.clone() for each in model.parameters()]
    held, state = losses(noisy), torch.get_rng_state()
    images = [batch[0].clone() for batch in held.batches]
    scores(criterion, model, Unstructured(), held)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, (each.grad for each in model.parameters()), grads))
    assert all(torch.equal(batch[0], image) for batch, image in zip(held.batches, images, strict=True))


def test_only_as_many_batches_are_looked_at_as_are_asked_for() -> None:
    model, held = network(), losses()
    first = Losses(loss_of, held.batches[:1], progress=False)
    for estimator in ("exact", "hutchinson", "fisher"):
        criterion = OptimalBrainDamage(batches=1, estimator=estimator)
        found, expected = (scores(criterion, model, Unstructured(), each) for each in (held, first))
        assert all(torch.equal(found[name], score) for name, score in expected.items())
    one, other = network(), network()
    for net, given in ((one, held), (other, first)):
        selector = ParticleFilter(batches=1, population=4, rounds=2)
        Pruner(net, 0.5, selector=selector, schedule=None).prune(1.0, losses=given)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


class Tracking(nn.Module):
    """Writes into a buffer in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + inputs.mean(0)
        return self.layer(inputs) + self.seen


@pytest.mark.parametrize("size", [2**10, 2**17], ids=["several at once", "one after the other"])
def test_no_variant_sees_what_another_left_in_buffers(size: int) -> None:
    torch.manual_seed(0)
    model, inputs = Tracking(), torch.randn(size, 3, dtype=torch.float64)
    held = Losses(lambda net, batch: net(batch).square().mean(), [inputs], progress=False)
    (found,) = scores(Oracle(), model, Unstructured(), held).values()
    dense = float(held.loss(copy.deepcopy(model), inputs).detach())
    for place in itertools.product(range(3), range(3)):
        twin = copy.deepcopy(model)
        twin.layer.weight.data[place] = 0
        without = float(held.loss(twin, inputs).detach())
        assert float(found[place]) == pytest.approx(abs(without - dense))


def test_a_unit_without_which_nothing_works_matters_most() -> None:
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    held = Losses(lambda net, batch: 1 / net.weight[0, 0] + net.weight.sum(), [None], progress=False)
    (score,) = scores(Oracle(), model, Unstructured(), held).values()
    assert score.argmax() == 0
    assert score[0, 1:].tolist() == pytest.approx([2.0, 2.0])
    broken = Losses(lambda net, batch: net.weight.sum() / 0, [None], progress=False)
    with pytest.raises(RuntimeError, match="the loss on held batches is inf"):
        scores(Oracle(), model, Unstructured(), broken)


def test_small_gradients_of_half_precision_are_not_lost() -> None:
    model = nn.Linear(2, 1, bias=False).half()
    nn.init.ones_(model.weight)
    held = Losses(lambda net, batch: (net.weight * 1e-4).sum(), [None], progress=False)
    (score,) = scores(OptimalBrainDamage(), model, Unstructured(), held).values()
    assert score.dtype == torch.float32
    assert score.tolist() == [pytest.approx([0.5e-8] * 2, rel=1e-2)]


def test_what_only_the_selector_asks_for_is_not_asked_of_scores() -> None:
    pruner = Pruner(network(), 0.5, selector=ParticleFilter(), schedule=None)
    plain = Pruner(network(), 0.5, schedule=None)
    assert all(torch.equal(score, plain.scores()[name]) for name, score in pruner.scores().items())
    taylor = Pruner(network(), 0.5, criterion=Taylor(), selector=ParticleFilter(), schedule=None)
    with pytest.raises(
        RuntimeError, match=r"gradient yet: call observe\(\) after backward\(\) and before zero_grad\(\)"
    ):
        taylor.prune(1.0, losses=losses())


def test_without_losses_there_is_nothing_to_score() -> None:
    for how in ({"criterion": Oracle()}, {"selector": ParticleFilter()}):
        pruner = Pruner(network(), 0.5, schedule=None, **how)
        with pytest.raises(RuntimeError, match=r"give step\(\), prune\(\) or scores\(\) `losses=Losses"):
            pruner.prune(1.0)
    with pytest.raises(ValueError, match="must be at least one"):
        pruner.prune(1.0, losses=Losses(loss_of, []))
    oracle = Pruner(network(), 0.5, criterion=Oracle(), schedule=None)
    with pytest.raises(RuntimeError, match=r"or scores\(\) `losses=Losses\(loss, batches\)`"):
        oracle.scores()
    assert oracle.scores(losses()).keys() == oracle.masks.keys()


# --- particles


def every_mask(pruner: Pruner, count: int) -> Iterator[dict[str, Tensor]]:
    """All choices of units that empty no group."""
    units = [(group.name, unit) for group in pruner.groups for unit in range(group.size)]
    for gone in itertools.combinations(units, count):
        kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in pruner.groups}
        for name, unit in gone:
            kept[name][unit] = False
        if all(each.any() for each in kept.values()):
            yield kept


def loss_with(pruner: Pruner, model: nn.Module, kept: dict[str, Tensor], held: Losses) -> float:
    twin = copy.deepcopy(model).eval()
    for group in pruner.groups:
        for part in group.masked:
            twin.get_parameter(part.name).data.mul_(part.spread(kept[group.name]))
    return mean_loss(twin, held)


@pytest.mark.parametrize("evolutionary", [False, True])
@pytest.mark.parametrize("criterion", [Magnitude(), Random()])
def test_particles_find_the_best_of_all_masks(criterion: Criterion, evolutionary: bool) -> None:
    model, held = network(), losses()
    selector = ParticleFilter(spread=1.0, rounds=12, evolutionary=evolutionary)
    how: dict[str, Any] = {"structure": Channels(), "example": EXAMPLE, "schedule": None}
    pruner = Pruner(model, 3 / 7, criterion=criterion, selector=selector, **how)
    alone = Pruner(model, 3 / 7, criterion=criterion, **how)
    found = {
        loss_with(pruner, model, kept, held): kept for kept in every_mask(pruner, 3)
    }  # of 7 channels, 3 and 4
    assert len(found) == 35 - 1
    best = found[min(found)]
    alone.select(1.0)
    first = {group.name: alone.masks[group.slices[0].name].flatten(1).any(1) for group in alone.groups}
    assert loss_with(pruner, model, first, held) > min(found)
    pruner.prune(1.0, losses=held)
    for group in pruner.groups:
        assert torch.equal(pruner.masks[group.slices[0].name].flatten(1).any(1), best[group.name])


@pytest.mark.parametrize("selector", [Global(), PerLayer(), NofM(1, 3), Global(budget="params")])
def test_particles_keep_to_the_selector_within(selector: Any) -> None:
    target = None if isinstance(selector, NofM) else 0.5
    held, how = losses(), {"schedule": None, "example": EXAMPLE}
    plain = Pruner(network(), target, selector=selector, **how)
    pruner = Pruner(network(), target, selector=ParticleFilter(selector, population=4, rounds=3), **how)
    assert pruner.frozen == plain.frozen
    plain.prune(1.0)
    pruner.prune(1.0, losses=held)
    counts = [{name: int(mask.sum()) for name, mask in each.masks.items()} for each in (plain, pruner)]
    assert sum(counts[0].values()) == sum(counts[1].values())
    if not isinstance(selector, Global):
        assert counts[0] == counts[1]
    assert any(not torch.equal(mask, plain.masks[name]) for name, mask in pruner.masks.items())


@pytest.mark.parametrize("seed", range(3))
def test_particles_are_never_worse_than_the_criterion_alone(seed: int) -> None:
    held, how = losses(), {"schedule": None, "example": EXAMPLE, "criterion": Random(seed)}
    found = []
    for selector in (Global(), ParticleFilter(population=3, rounds=1)):
        model = network()
        pruner = Pruner(model, 0.5, selector=selector, **how)
        pruner.prune(0.5, losses=held)
        found.append(mean_loss(model.eval(), held))
    assert found[1] <= found[0]


@pytest.mark.parametrize("evolutionary", [False, True])
def test_particles_get_better_and_the_best_of_all_is_taken(evolutionary: bool) -> None:
    tried: list[float] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found = loss_of(model, batch)
        tried.append(float(found))
        return found

    model, held = network(), losses(count=1)
    selector = ParticleFilter(rounds=6, spread=0.5, evolutionary=evolutionary)
    pruner = Pruner(model, 0.5, criterion=Random(), selector=selector, schedule=None)
    pruner.prune(1.0, losses=Losses(loss, held.batches, progress=False))
    rounds = torch.tensor(tried).view(6, 16)
    assert rounds.mean(1)[-1] < rounds.mean(1)[0]
    assert rounds.min(1).values.tolist() == sorted(rounds.min(1).values.tolist(), reverse=True)
    assert mean_loss(model.eval(), held) == pytest.approx(min(tried), abs=1e-12)


def test_particles_without_a_loss_do_not_blind_the_others() -> None:
    left, right = [torch.zeros(1)], [torch.ones(1)]
    draws = torch.Generator().manual_seed(0)
    selector = ParticleFilter(population=200, spread=1e-3)
    hopeless = [[torch.full((1,), 2.0)]]
    drawn = selector._drawn([left, right, *hopeless], torch.tensor([0.1, 9.0, torch.inf]), draws)
    places = torch.cat([each for (each,) in drawn]).round().int().bincount(minlength=3).tolist()
    assert places[2] == 0
    assert places[0] > 5 * places[1]
    lost = selector._drawn([left, right], torch.tensor([torch.inf, torch.inf]), draws)
    assert 50 < sum(float(each) > 0.5 for (each,) in lost) < 150


@pytest.mark.parametrize("lost", [[math.inf], [math.nan], [math.inf, math.nan]])
def test_losses_that_are_not_finite_do_not_hide_which_particles_are_good(lost: list[float]) -> None:
    tried: list[float] = []

    def loss(particle: Sequence[Tensor]) -> float:
        tried.append(float(particle[0]))
        if len(tried) <= len(lost):
            return lost[len(tried) - 1]
        return 0.1 if tried[-1] > 0 else 9.0

    count = 2000
    best = ParticleFilter(population=count, rounds=2)._search([torch.zeros(1)], loss)
    assert float(best[0]) > 0
    assert sum(value > 0 for value in tried[:count]) < 0.53 * count
    assert sum(value > 0 for value in tried[count:]) > 0.6 * count


def test_masks_are_as_they_were_where_a_loss_fails() -> None:
    model, seen = network(), []

    def fails(net: nn.Module, batch: Batch) -> Tensor:
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return loss_of(net, batch)

    pruner = Pruner(model, 0.5, selector=ParticleFilter(), schedule=None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(1.0, losses=losses(fails))
    assert all(mask.all() for mask in pruner.masks.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_population_of_one_is_the_criterion_alone() -> None:
    plain, alone = network(), network()
    Pruner(plain, 0.5, schedule=None).prune(1.0)
    lone = ParticleFilter(population=1)
    Pruner(alone, 0.5, selector=lone, schedule=None).prune(1.0, losses=losses())
    assert all(map(torch.equal, plain.parameters(), alone.parameters()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ParticleFilter(population=0), "population=0 must be a whole number of at least 1"),
        (lambda: ParticleFilter(rounds=1.5), "rounds=1.5 must be a whole number"),
        (lambda: ParticleFilter(batches=True), "batches=True must be a whole number"),
        (lambda: ParticleFilter(spread=0), "spread=0 must be a finite number above 0"),
        (lambda: ParticleFilter(seed="x"), "seed='x' must be an integer"),
        (lambda: ParticleFilter(Magnitude()), "selector=Magnitude.* is no Selector"),
        (lambda: ParticleFilter(ParticleFilter()), "must be one that goes by scores"),
        (lambda: Oracle(batches=0), "batches=0 must be a whole number of at least 1"),
        (lambda: Oracle(max_passes=-1), "max_passes=-1 must be a whole number"),
        (lambda: OptimalBrainDamage(estimator="diagonal"), "estimator='diagonal' must be one of 'exact'"),
        (lambda: OptimalBrainDamage(estimator="hutchinson", probes=0), "probes=0 must be a whole number"),
        (lambda: Global(cost_weight=-1.0, budget="macs"), "cost_weight=-1.0 must be a finite number"),
        (lambda: Global(cost_weight=0.1), "cost_weight=0.1 needs budget='params' or budget='macs'"),
    ],
)
def test_wrong_arguments_are_named(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


# --- what units cost


def test_what_units_cost_is_taken_from_their_scores() -> None:
    def left(cost_weight: float) -> list[int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 1))
        for layer in model:
            nn.init.ones_(layer.weight)
        model[0].weight.data *= 2  # a neuron of the first layer scores 8, of the second one 4
        selector = Global(budget="params", cost_weight=cost_weight)
        pruner = Pruner(model, 0.4, structure=Channels(), selector=selector, example=torch.ones(1, 4))
        pruner.prune(1.0)
        return [int(layer.weight.any(1).sum()) for layer in model[:2]]

    # of 57 parameters a neuron of the first layer saves 12, of the second one 5
    assert left(0.0) == [4, 3]
    assert left(40.0) == [2, 8]  # 8 - 40 * 12 / 57 = -.42 and 4 - 40 * 5 / 57 = .49 are the other way round


# --- in a Trainer


class Dropping(Lit):
    """Draws numbers in every step, and spoils its batch."""

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(F.dropout(images, 0.1)), labels)
        images.zero_()
        return loss


class Witness(Callback):
    """Random state at the start of each batch."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.states.append(torch.get_rng_state())


WAYS: dict[str, dict[str, Any]] = {
    "Oracle": {"criterion": Oracle(batches=2), "structure": Channels()},
    "OptimalBrainDamage": {"criterion": OptimalBrainDamage(batches=2, probes=1, estimator="hutchinson")},
    "ParticleFilter": {"selector": ParticleFilter(population=2, rounds=2, batches=2)},
}
HALVES = Steps({"3st": 0.5, "8st": 1.0})


@pytest.mark.parametrize("make", [Dropping, Manual])
@pytest.mark.parametrize("way", WAYS)
def test_the_first_batches_are_held_until_the_last_event(tmp_path: Path, way: str, make: Any) -> None:
    callback, before, after = PruningCallback(0.5, schedule=HALVES, **WAYS[way]), Witness(), Witness()
    seen: list[list[Any]] = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(copy.deepcopy(callback.state_dict()["held"]))

    model = seeded(make)
    run = fit(tmp_path, model, before, callback, after, Look(), max_epochs=3)
    first, second, *_ = digits()
    assert [len(each) for each in seen] == [1] + [2] * 7 + [0] * 7
    for held in seen[1:8]:
        for (kept,), batch in zip(held, (first, second), strict=True):  # of one process
            assert all(map(torch.equal, kept, batch))
    assert callback.report.sparsity > 0.3
    assert all(map(torch.equal, before.states, after.states))
    assert not model.trainer.callback_metrics.keys() - {"loss", "acc", "prune/sparsity"}
    assert run.global_step == 15 * len(run.optimizers)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_holds_the_batches_of_the_first(tmp_path: Path, way: str) -> None:
    def callback() -> PruningCallback:
        return PruningCallback(0.5, schedule=OneShot("2ep"), **WAYS[way])

    whole, resumed = seeded(Lit), seeded(Lit)
    checkpoint = first_epoch(tmp_path, whole, callback())
    assert len(torch.load(checkpoint, weights_only=True)["callbacks"]["PruningCallback"]["held"]) == 2
    fit(tmp_path, resumed, callback(), ckpt_path=checkpoint)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert any((parameter == 0).any() for parameter in whole.parameters())


def first_epoch(folder: Path, model: Lit, callback: PruningCallback) -> Path:
    """The checkpoint of the first epoch of a whole fit."""
    every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    fit(folder, model, callback, every, enable_checkpointing=True)
    return folder / "epoch=0.ckpt"


def test_a_run_resumed_with_other_parts_waits_for_a_batch(tmp_path: Path) -> None:
    checkpoint = first_epoch(tmp_path, seeded(Lit), PruningCallback(0.5, schedule=OneShot("2ep")))
    callback = PruningCallback(0.5, schedule=OneShot("1ep"), criterion=OptimalBrainDamage(batches=1))
    with pytest.warns(UserWarning, match="A pruning event waits"):
        fit(tmp_path, seeded(Lit), callback, ckpt_path=checkpoint)
    assert callback.report.sparsity == pytest.approx(0.5, abs=1e-3)


class Pair(NamedTuple):
    images: Tensor
    labels: Tensor


class Silent(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


@pytest.mark.parametrize(
    ("criterion", "model", "collate", "message"),
    [
        (Oracle(max_passes=10), Lit, None, "would take .* passes of a batch .* in one event, about .* minutes"),
        (Oracle(), Silent, None, "gives no loss for the first batch: take a criterion and a sel"),
        (
            Oracle(),
            Lit,
            lambda pairs: Pair(*map(torch.stack, zip(*pairs, strict=True))),
            "holds a Pair.* such as a namedtuple",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_step(
    tmp_path: Path, criterion: Criterion, model: Any, collate: Any, message: str
) -> None:
    subject = seeded(model)
    before = copy.deepcopy(subject.state_dict())
    loader = torch.utils.data.DataLoader(
        [(image, label) for batch in digits() for image, label in zip(*batch, strict=True)],
        64,
        collate_fn=collate,
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, PruningCallback(0.5, criterion=criterion)).fit(subject, loader)
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_an_event_before_the_first_batch_is_refused(tmp_path: Path, way: str) -> None:
    with pytest.raises(ValueError, match="prunes before the first batch"):
        fit(tmp_path, seeded(Lit), PruningCallback(0.5, schedule=OneShot(0), **WAYS[way]))


def test_a_plan_does_not_ask_for_the_loss() -> None:
    for way in WAYS.values():
        report = PruningCallback(0.5, **way).plan(seeded(Lit), torch.ones(1, 1, 8, 8))
        assert all(layer.kept is None for layer in report.layers)


def test_several_at_once_and_one_after_the_other_agree_in_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for together in (16, 1):
        monkeypatch.setattr(lightning_prune.statistics.losses, "_TOGETHER", together)
        how = {"structure": Blocks(4, 4), "schedule": OneShot("1ep")}
        callback = PruningCallback(0.5, criterion=Oracle(batches=1), **how)
        fit(tmp_path, seeded(Lit), callback, max_epochs=2)
        found.append({name: mask.clone() for name, mask in callback.masks.items()})
    same = sum(int((mask == found[1][name]).sum()) for name, mask in found[0].items())
    assert same >= 0.999 * sum(mask.numel() for mask in found[0].values())


class Keeping(Lit):
    """Keeps what its passes give, as modules do for the end of an epoch; skips every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.latest = self(batch[0])
        loss = F.cross_entropy(self.latest, batch[1])
        self.kept.append(loss)
        return None if int(batch[1][0]) % 2 else {"loss": loss}


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_results_that_a_module_keeps_and_batches_that_it_skips(tmp_path: Path) -> None:
    callback = PruningCallback(0.5, criterion=Oracle(batches=3), structure=Channels(), schedule=OneShot("9st"))
    model = seeded(Keeping)
    firsts = [int(labels[0]) for _, labels in digits()]
    assert firsts[0] % 2 == 0
    assert any(label % 2 for label in firsts)
    held: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            held.append(len(callback.state_dict()["held"]))

    fit(tmp_path, model, callback, Look(), max_epochs=6)
    assert max(held) == 3
    assert callback.report.sparsity > 0.3
    assert all(each.grad_fn is not None for each in model.kept)
