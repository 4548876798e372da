"""What every criterion, structure, selector and schedule keeps to: one suite, which finds them by itself."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

import lightning_prune
from lightning_prune import (
    FPGM,
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    BatchNormScale,
    Blocks,
    Channels,
    Criterion,
    Experts,
    Global,
    Guard,
    Heads,
    Losses,
    NofM,
    OptimalBrainSurgeon,
    Oracle,
    ParticleFilter,
    Pruner,
    Reconstruct,
    Rewind,
    Schedule,
    Selector,
    Structure,
    Threshold,
    Unstructured,
    Wanda,
)
from lightning_prune.core.parts import Part, concrete_subclasses
from lightning_prune.schedules.moments import FitLength, TimeUnit
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.reconstruction.layer_matrices import named_matrices
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice, BlockSlice, ElementSlice

# Parts that cannot be built without arguments. The levels of Threshold(mean=...) and Threshold(std=...) are
# taken anew at each event, so that those two go on removing when an event is repeated.
EXAMPLES: dict[type[Part], list[Part]] = {
    Threshold: [Threshold(value=2.5), Threshold(quantile=0.5)],
    Global: [Global(), Global(most=0.8)],
    Blocks: [Blocks(2, 2), Blocks(1, 4)],
    # little work is enough to see what all of them keep to
    ParticleFilter: [ParticleFilter(population=3, rounds=2)],
    Oracle: [Oracle(batches=1)],
}
# For selectors that take none; the others are given one half.
TARGETS: dict[type[Part], float | None] = {Threshold: None}


def shipped(base: type[Part]) -> list[type[Part]]:
    found = (part for part in concrete_subclasses(base) if part.__module__.startswith("lightning_prune"))
    return sorted(found, key=lambda part: part.__name__)


def built(part: type[Part]) -> list[Any]:
    return EXAMPLES.get(part) or [part()]


def parts(*bases: type[Part]) -> pytest.MarkDecorator:
    found = [part for base in bases for part in shipped(base)]
    return pytest.mark.parametrize("part", found, ids=lambda part: part.__name__)


BASES = (Criterion, Structure, Selector, Schedule)
PUBLIC = {name: getattr(lightning_prune, name) for name in lightning_prune.__all__}


# --- all


@pytest.mark.parametrize("base", BASES)
def test_the_suite_finds_every_public_part(base: type[Part]) -> None:
    public = {each for each in PUBLIC.values() if inspect.isclass(each) and issubclass(each, base)}
    assert {each for each in public if not inspect.isabstract(each)} == set(shipped(base)) != set()


@parts(*BASES)
def test_is_public(part: type[Part]) -> None:
    assert PUBLIC.get(part.__name__) is part


@parts(*BASES)
def test_has_a_card(part: type[Part]) -> None:
    card = vars(part).get("__doc__") or ""
    assert len(card.split()) > 3
    assert not card.startswith(f"{part.__name__}(")  # which is what a dataclass makes up


@parts(*BASES)
def test_prints_as_the_call_that_rebuilds_it(part: type[Part]) -> None:
    for example in built(part):
        again = eval(repr(example), dict(PUBLIC))
        assert type(again) is part
        assert repr(again) == repr(example)
        assert vars(again) == vars(example)


# what no argument is: not to be printed, not to be held by a tensor, or of no use at all
STRANGE = (10**400, -(10**30), float("nan"), float("-inf"), object(), {"a": 1}, [[]], b"x", lambda: None, 1j)


@pytest.mark.parametrize(
    "example",
    [
        *(each for base in BASES for part in shipped(base) for each in built(part)),
        Rewind(),
        Guard("acc"),
        Reconstruct(),
    ],
    ids=repr,
)
def test_strange_arguments_are_refused_by_name(example: Part) -> None:
    for name in vars(example):
        for strange in STRANGE:
            given: dict[str, Any] = {**vars(example), name: strange}
            with pytest.raises(ValueError, match=name):
                type(example)(**given)


@parts(*BASES)
def test_is_immutable(part: type[Part]) -> None:
    for example in built(part):
        for name, value in vars(example).items():
            with pytest.raises(AttributeError):
                setattr(example, name, value)
            with pytest.raises(AttributeError):
                delattr(example, name)


@parts(*BASES)
def test_has_no_state_that_changes_with_use(part: type[Part]) -> None:
    for example in built(part):
        before = copy.deepcopy(vars(example))
        use(example)
        assert vars(example) == before


def use(example: Part) -> None:
    if isinstance(example, Criterion):
        model = network_for(example)
        scores(example, model, scorable(example, model)[0])
    elif isinstance(example, Structure):
        example.units(Attentive(), IMAGE)
    elif isinstance(example, Selector):
        pruner_for(example).prune(1.0, losses=LOSSES, batches=BATCHES)
    elif isinstance(example, Schedule):
        example(0.5)
        example.timetable(FitLength(10, None, 10))


# --- what they are tried on

IMAGE = torch.ones(1, 3, 8, 8)
BATCHES = [torch.linspace(-1, 1, 768).view(4, 3, 8, 8)]


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images.to(next(model.parameters()))).square().mean().sqrt()


def some_losses() -> Losses:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)]
    return Losses(loss_of, batches, progress=False)


LOSSES = some_losses()


def network() -> nn.Sequential:
    """Weights are small whole numbers, whose sums are exact in any order; the first layer has the smallest."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 4),
    )
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate((model[0], model[3], model[5], model[6], model[7])):
        size = torch.randint(1, 3 + 2 * index, layer.weight.shape, generator=generator)
        sign = torch.randint(0, 2, layer.weight.shape, generator=generator) * 2 - 1
        layer.weight.data = (size * sign).float()
        if layer.bias is not None:
            nn.init.ones_(layer.bias)
    model[1].weight.data = torch.arange(8.0) - 3
    return model


class Quality(Metric):
    """Measures with a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(8, 6)

    def update(self, values: Tensor) -> None:
        pass

    def compute(self) -> Tensor:
        return torch.zeros(())


class Conv1D(nn.Module):
    """A linear layer whose weight is stored inputs first, as that of Hugging Face."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Attentive(nn.Module):
    """Has single weights, channels, neurons, attention heads, experts, and what modules hold beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1)
        )
        self.block = nn.TransformerEncoderLayer(8, 4, dim_feedforward=12, dropout=0.0, batch_first=True)
        self.places = nn.Embedding(4, 8)
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.memory = nn.LSTM(8, 3, batch_first=True)
        self.mix = Conv1D(8, 3)
        self.head = nn.Linear(8, 4)
        self.teacher = nn.Linear(50, 60).requires_grad_(requires_grad=False)
        self.quality = Quality()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.places.weight
        tokens = self.block(tokens)
        shares = self.router(tokens).softmax(-1).split(1, -1)
        mixed = sum(share * expert(tokens) for share, expert in zip(shares, self.experts, strict=True))
        states, _ = self.memory(tokens + mixed)
        logits: Tensor = self.head(self.mix(states.mean(1)).relu())
        return logits


def groups(model: nn.Module) -> list[UnitGroup]:
    """Single weights, filters, neurons, inputs of a layer, blocks, and units of several places."""
    single = [
        UnitGroup(name, (ElementSlice(name, parameter),), input_dim=1)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    ]
    filters = UnitGroup("filters", (AxisSlice("0.weight", model[0].weight, dim=0),))
    neurons = UnitGroup("neurons", (AxisSlice("5.weight", model[5].weight, dim=0),))
    channels = UnitGroup(
        "channels",
        (
            AxisSlice("0.weight", model[0].weight, dim=0),
            AxisSlice("3.weight", model[3].weight, dim=1),
            AxisSlice("1.weight", model[1].weight, dim=0, scale=True),
        ),
        followers=(AxisSlice("3.weight", model[3].weight, dim=1),),
    )
    blocks = UnitGroup("blocks", (BlockSlice("5.weight", model[5].weight, 2, 3),), input_dim=1)
    places = torch.tensor([0, 1, -1, 0, 1, 2, 2, -1])
    scattered = UnitGroup("scattered", (AxisSlice("6.weight", model[6].weight, dim=0, index=places),))
    return [*single, filters, neurons, channels, blocks, scattered]


def scorable(criterion: Criterion, model: nn.Module) -> list[UnitGroup]:
    """What a criterion has something to say of; it gives its reason for the rest."""
    known = named_matrices(model)

    def why(group: UnitGroup) -> str | None:
        matrices = [known[each.name][1] for each in group.readers if each.name in known]
        return criterion.refuses(group) or criterion.refuses_layers(group, matrices)

    refused = [each for each in groups(model) if why(each)]
    assert all(repr(criterion) in str(why(each)) for each in refused)
    return [each for each in groups(model) if each.name not in {group.name for group in refused}]


def measured(criterion: Criterion, model: nn.Module, group: UnitGroup) -> dict[str, Tensor]:
    """What a criterion makes of losses, or of the inputs of layers, if it asks for them."""
    kept = {group.name: torch.ones(group.shape, dtype=torch.bool)}
    found = criterion.measure([group], kept, LossEvaluator(model, LOSSES)).get(group.name, {})
    calibration = Calibration.of(each.to(next(model.parameters())) for each in BATCHES)
    return {**found, **criterion.calibrate([group], kept, model, calibration).get(group.name, {})}


def scores(
    criterion: Criterion, model: nn.Module, group: UnitGroup, layout: torch.memory_format | None = None
) -> Tensor:
    """What a criterion makes of three observations, or of losses."""
    generator = torch.Generator().manual_seed(1)
    statistics = Statistics.zeros(criterion.sums, torch.ones(group.shape), group.dtype, group.inputs)
    if criterion.held:
        statistics.add_(measured(criterion, model, group), torch.tensor(True))
        statistics.count.add_(1)
        return criterion.score(group, statistics)
    for _ in range(3):
        grads = []
        for weight in group.weights:
            grad = torch.randint(-4, 5, weight.shape, generator=generator).float()
            grads.append(grad.to(memory_format=layout) if layout and grad.ndim == 4 else grad)
        statistics.add_(criterion.observe(group, grads), torch.tensor(True))
        statistics.features.add_(torch.randint(1, 5, (group.inputs,), generator=generator))
        statistics.count.add_(1)
    return criterion.score(group, statistics)


def alike(criterion: Criterion, one: Tensor, other: Tensor) -> bool:
    """Bit for bit; but passes of a network differ in their last bits, by where tensors happen to lie."""
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9) if criterion.held else torch.equal(one, other)


def network_for(criterion: Criterion) -> nn.Module:
    return network().double() if criterion.held else network()


def pruner_for(selector: Selector) -> Pruner:
    target = TARGETS.get(type(selector), 0.5)
    return Pruner(network(), target, selector=selector, schedule=None)


# --- criteria


@parts(Criterion)
def test_scores_are_one_finite_number_a_unit(part: type[Criterion]) -> None:
    for criterion in built(part):
        model = network_for(criterion)
        assert scorable(criterion, model)
        for group in scorable(criterion, model):
            score = scores(criterion, model, group)
            assert score.shape == group.shape
            assert score.dtype.is_floating_point
            assert score.isfinite().all()


@parts(Criterion)
def test_scores_tell_units_apart(part: type[Criterion]) -> None:
    for criterion in built(part):
        model = network_for(criterion)
        for group in scorable(criterion, model):
            assert scores(criterion, model, group).unique().numel() > 1


@parts(Criterion)
def test_scores_repeat_themselves(part: type[Criterion]) -> None:
    for criterion in built(part):
        models = network_for(criterion), network_for(criterion)
        for one, other in zip(*(scorable(criterion, model) for model in models), strict=True):
            score = scores(criterion, models[0], one)
            torch.manual_seed(5)
            assert alike(criterion, scores(criterion, models[0], one), score)
            assert alike(criterion, scores(criterion, models[1], other), score)


@parts(Criterion)
def test_scores_do_not_depend_on_the_memory_layout(part: type[Criterion]) -> None:
    for criterion in built(part):
        plain, last = network_for(criterion), network_for(criterion).to(memory_format=torch.channels_last)
        assert last[3].weight.stride() != plain[3].weight.stride()
        for one, other in zip(scorable(criterion, plain), scorable(criterion, last), strict=True):
            found = scores(criterion, plain, one), scores(criterion, last, other, torch.channels_last)
            assert alike(criterion, *found)


@parts(Criterion)
def test_addends_and_scores_leave_their_inputs_alone(part: type[Criterion]) -> None:
    for criterion in built(part):
        model = network_for(criterion)
        for group in scorable(criterion, model):
            grads = [torch.ones_like(weight) for weight in group.weights]
            before = [weight.clone() for weight in group.weights]
            addends = criterion.observe(group, grads) or measured(criterion, model, group)
            assert addends.keys() == set(criterion.sums)
            assert all(addend.shape == group.shape for addend in addends.values())
            scores(criterion, model, group)
            assert all(map(torch.equal, group.weights, before))
            assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


# --- structures


@parts(Structure)
def test_units_belong_to_one_group_and_to_the_model(part: type[Structure]) -> None:
    for structure in built(part):
        model = Attentive()
        parameters = dict(model.named_parameters())
        units = structure.units(model, IMAGE)
        assert units.groups
        names = [group.name for group in units.groups]
        assert len(names) == len(set(names))
        slices = [each for group in units.groups for each in group.slices]
        taken = [each.name for each in slices]
        assert len(taken) == len(set(taken))
        assert not set(units.frozen) & {*names, *taken}
        for each in slices:
            assert each.weight is parameters[each.name]
        for group in units.groups:
            assert {each.shape for each in group.slices} == {group.shape}
            assert group.input_dim is None or group.input_dim < len(group.shape)


@parts(Structure)
def test_units_are_found_alike_each_time_and_the_model_is_left_as_it_was(part: type[Structure]) -> None:
    for structure in built(part):
        model = Attentive()
        before = copy.deepcopy(model.state_dict())
        found = [[group.name for group in structure.units(model, IMAGE).groups] for _ in range(2)]
        assert found[0] == found[1]
        assert model.training
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@parts(Structure)
def test_a_model_with_nothing_to_prune_is_refused(part: type[Structure]) -> None:
    for structure in built(part):
        with pytest.raises(ValueError, match="nothing to prune"):
            structure.units(nn.Sequential(nn.ReLU()), IMAGE)


# --- selectors


@parts(Selector)
def test_what_is_gone_stays_gone_and_no_layer_is_emptied(part: type[Selector]) -> None:
    for selector in built(part):
        pruner = pruner_for(selector)
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        sparsities = []
        for fraction in (0.1, 0.4, 0.4, 0.2, 0.9, 1.0):
            pruner.prune(fraction, losses=LOSSES)
            for name, mask in pruner.masks.items():
                assert not (mask & ~before[name]).any()
                assert mask.any()
                before[name] = mask.clone()
            sparsities.append(pruner.sparsity)
        assert sparsities == sorted(sparsities)
        assert 0 < sparsities[-1] < 1


@parts(Selector)
def test_an_event_repeated_removes_nothing_more(part: type[Selector]) -> None:
    for selector in built(part):
        for fraction in (0.5, 1.0):
            pruner = pruner_for(selector)
            pruner.prune(fraction, losses=LOSSES)
            before = {name: mask.clone() for name, mask in pruner.masks.items()}
            pruner.prune(fraction, losses=LOSSES)
            assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())


@parts(Selector)
def test_selection_in_one_go_or_several_removes_the_same(part: type[Selector]) -> None:
    if Needs.LOSS in part.needs:
        return  # the loss changes with what is gone
    for selector in built(part):
        once, often = pruner_for(selector), pruner_for(selector)
        once.prune(1.0)
        for fraction in (0.25, 0.5, 1.0):
            often.prune(fraction)
        assert all(torch.equal(mask, often.masks[name]) for name, mask in once.masks.items())


@parts(Selector)
def test_selection_does_not_depend_on_the_memory_layout(part: type[Selector]) -> None:
    for selector in built(part):
        target = TARGETS.get(part, 0.5)
        plain = Pruner(network(), target, selector=selector, schedule=None)
        model = network().to(memory_format=torch.channels_last)
        last = Pruner(model, target, selector=selector, schedule=None)
        plain.prune(1.0, losses=LOSSES)
        last.prune(1.0, losses=LOSSES)
        assert all(torch.equal(mask, last.masks[name]) for name, mask in plain.masks.items())


# --- schedules


@parts(Schedule)
def test_shares_rise_from_zero_to_one(part: type[Schedule]) -> None:
    for schedule in built(part):
        shares = [schedule(percent / 100) for percent in range(101)]
        assert shares == sorted(shares)
        assert shares[0] >= 0
        assert shares[-1] == 1.0


@parts(Schedule)
@pytest.mark.parametrize(
    "horizon",
    [
        *(FitLength(epochs, None, 10) for epochs in (1, 2, 3, 5, 10, 30)),
        FitLength(30, None, None),
        FitLength(None, 50, 10),
        FitLength(10, 35, 10),
    ],
)
def test_timetables_end_at_one_inside_the_fit(part: type[Schedule], horizon: FitLength) -> None:
    for schedule in built(part):
        table = schedule.timetable(horizon)
        end = horizon.epochs if table.unit is TimeUnit.EPOCH else horizon.length
        assert end is not None
        places = [event.position for event in table.events]
        shares = [event.fraction for event in table.events]
        assert places == sorted(set(places))
        assert 0 < places[0] <= places[-1] < end
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert schedule.timetable(horizon) == table


# --- all together


# n of m consecutive inputs is a pattern of single weights; distances are those of units of several
REFUSED: set[tuple[type[Any], type[Any]]] = {(FPGM, Unstructured)}
REFUSED |= {(NofM, each) for each in (Channels, Heads, Experts)}
REFUSED |= {(BatchNormScale, each) for each in (Unstructured, Blocks, Heads, Experts)}
# nn.MultiheadAttention never calls the layer that reads its heads, and no layer reads one expert alone
activations = (ActivationNorm, ActivationTaylor, APoZ, Wanda)
REFUSED |= {(each, structure) for each in activations for structure in (Heads, Experts)}
# the experts of a list are tensors of their own, which have no distance, and no layer reads them
REFUSED |= {(each, Experts) for each in (FPGM, OptimalBrainSurgeon)}

KINDS = (Structure, Selector, Criterion, Schedule)
Pairs = frozenset[tuple[type[Part], ...]]


def pairs_of(parts: tuple[type[Part], ...]) -> Pairs:
    return frozenset(itertools.combinations(parts, 2))


def refused(structure: type[Any], selector: type[Any], criterion: type[Any], schedule: type[Any]) -> Pairs:
    return frozenset(REFUSED & {(selector, structure), (criterion, structure)})


@functools.cache
def combinations() -> list[tuple[type[Part], ...]]:
    """One of each kind, so that any two which go together meet, and any two which do not are refused."""
    every = list(itertools.product(*map(shipped, KINDS)))
    allowed = {each: pairs_of(each) for each in every if not refused(*each)}
    alone: dict[Pairs, tuple[type[Part], ...]] = {}
    for each in every:
        if len(refused(*each)) == 1:
            alone.setdefault(refused(*each), each)
    found = list(alone.values())
    unmet = set().union(*allowed.values())
    while unmet:
        found.append(max(allowed, key=lambda each: len(allowed[each] & unmet)))
        unmet -= allowed[found[-1]]
    return found


def test_any_two_parts_meet_that_can() -> None:
    met = set().union(*(refused(*each) or pairs_of(each) for each in combinations()))
    for each in itertools.product(*map(shipped, KINDS)):
        assert (refused(*each) or pairs_of(each)) <= met


@pytest.mark.parametrize(
    ("structure", "selector", "criterion", "schedule"),
    combinations(),
    ids=["-".join(part.__name__ for part in each) for each in combinations()],
)
def test_any_combination_prunes_or_is_refused_at_once(
    structure: type[Any], selector: type[Any], criterion: type[Any], schedule: type[Any]
) -> None:
    model, known = analysed(structure)
    target, choice = TARGETS.get(selector, 0.5), built(selector)[-1]
    scored, when = built(criterion)[-1], built(schedule)[-1]
    how = {"structure": known, "selector": choice, "criterion": scored, "schedule": when}
    for part, _ in refused(structure, selector, criterion, schedule):
        with pytest.raises(ValueError, match=f"{part.__name__}.* needs"):
            Pruner(model, target, **how)
        return
    pruner = Pruner(model, target, **how)
    matrices = {name for name, each in model.named_parameters() if each.ndim > 1}
    assert matrices <= {*pruner.masks, *pruner.frozen}
    assert not {"teacher.weight", "quality.features.weight", "places.weight"} & {
        part.name for group in pruner.groups for part in group.slices
    }
    train(model, pruner)
    total = sum(group.size for group in pruner.groups)
    kept = sum(int(group.kept(pruner.masks).sum()) for group in pruner.groups)
    assert 0 < kept < total
    if selector is Global:
        assert kept == total - round(total / 2)


class Known(Structure):
    """What another structure has found in a model."""

    def __init__(self, found: Units) -> None:
        self.found = found

    def units(self, model: nn.Module, example: Any = None) -> Units:
        return self.found


@functools.cache
def searched(structure: type[Any]) -> tuple[Attentive, dict[str, Tensor], Known]:
    model = Attentive()
    return model, copy.deepcopy(model.state_dict()), Known(built(structure)[0].units(model, IMAGE))


def analysed(structure: type[Any]) -> tuple[Attentive, Known]:
    """A fresh network, searched once for all combinations."""
    model, fresh, known = searched(structure)
    model.load_state_dict(fresh)
    model.zero_grad()
    return model, known


def train(model: nn.Module, pruner: Pruner) -> None:
    """A loop with momentum, after each step of which all that is coupled to a masked unit is 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for step in range(6):
        pruner.step(step / 6, losses=LOSSES, batches=BATCHES)
        optimizer.zero_grad()
        images = torch.randn(4, 3, 8, 8, generator=generator)
        with pruner.watch(step):
            nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        pruner.observe()
        optimizer.step()
        pruner.apply_()
        for group in pruner.groups:
            units = group.kept(pruner.masks)
            for part in group.masked:
                gone = ~part.spread(units).expand(part.weight.shape)
                assert not parameters[part.name][gone].count_nonzero()
