"""Channels: what is coupled goes together, masked and compacted networks are equal, the rest has a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks_by_coupling import (
    ALL,
    IMAGES,
    NETS,
    TOKENS,
    Net,
    conv,
    depthwise,
    head,
    plain,
    residual,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    Channels,
    CompactionError,
    PerLayer,
    Pruner,
    Taylor,
    Unstructured,
    compact,
    measure,
    save_packed,
)


def outputs(model: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(example.double())


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def pruned(make: Callable[[], nn.Module], example: Any) -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    return model, pruner


@ALL
def test_each_network_has_these_units(make: Any, example: Tensor, sizes: list[int]) -> None:
    assert [group.size for group in Channels().units(make(), example).groups] == sizes


@pytest.mark.parametrize(
    ("make", "sizes"), [(make, sizes) for make, example, sizes in NETS if example is IMAGES]
)
def test_channels_may_come_last(make: Any, sizes: list[int]) -> None:
    model, images = make(), IMAGES.to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    assert [group.size for group in Channels().units(model, images).groups] == sizes


def test_elements_that_are_laid_out_anew_stay() -> None:
    strided = Net(
        lambda m, x: m.head(m.one(x).as_strided((2, 4, 8, 8), (256, 64, 8, 1))),
        one=conv(3, 8),
        head=nn.Sequential(conv(4, 5), head(5)),
    )
    assert frozen(strided, IMAGES)["one.weight"] == "is laid out anew by as_strided"


@ALL
def test_masked_and_compacted_networks_are_equal(make: Any, example: Tensor, sizes: list[int]) -> None:
    model, pruner = pruned(make, example)
    before = copy.deepcopy(model.state_dict())
    smaller = compact(model, pruner.masks, example)
    expected = outputs(model, example)
    assert (outputs(smaller, example) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert params(smaller) < params(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    left = [group.size for group in Channels().units(smaller, example).groups]
    assert left == [size - round(size / 2) for size in sizes]


@ALL
def test_a_unit_is_masked_wherever_it_leads(make: Any, example: Tensor, sizes: list[int]) -> None:
    _, pruner = pruned(make, example)
    for group in pruner.groups:
        for part in group.masked:
            stays = part.spread(part.sum(pruner.masks[part.name]) > 0)
            assert (part.weight[~stays.expand_as(part.weight)] == 0).all()


def test_what_reads_units_does_not_count_though_it_has_one_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Flatten(), nn.Linear(36, 6))
    model.extend([nn.ReLU(), nn.Linear(6, 1)])
    convolution, neurons = Channels().units(model, IMAGES).groups
    assert [part.name for part in convolution.slices] == ["0.weight", "0.bias"]
    assert [part.name for part in convolution.followers] == ["2.weight"]
    assert [part.name for part in neurons.slices] == ["4.weight", "4.bias"]
    assert [part.name for part in neurons.followers] == ["6.weight"]


def test_attributes_say_what_the_tensors_are() -> None:
    _, pruner = pruned(depthwise, IMAGES)
    smaller = compact(depthwise(), pruner.masks, IMAGES)
    assert (smaller[0].in_channels, smaller[0].out_channels) == (3, 4)
    assert (smaller[2].in_channels, smaller[2].out_channels, smaller[2].groups) == (4, 4, 4)
    assert (smaller[4].in_channels, smaller[4].out_channels) == (4, 3)
    assert (smaller[5][2].in_features, smaller[5][2].out_features) == (3, 4)


# --- what stays, and why


def literal() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.one(x).view(2, 4, 2, 8, 8).flatten(1, 2)), one=conv(3, 8), head=nn.Conv2d(8, 2, 1)
    )


def frozen(model: nn.Module, example: Any) -> dict[str, str]:
    return Channels().units(model, example).frozen


def test_outputs_stay() -> None:
    assert frozen(plain(), IMAGES) == {"5.2.weight": "is the network's output"}


def test_what_weight_norm_gives_a_direction_stays_and_nothing_else() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(conv(3, 8), nn.ReLU(), norm(conv(8, 6)), nn.ReLU(), conv(6, 5), nn.ReLU(), head(5))
    units = Channels().units(model, IMAGES)
    assert [group.name for group in units.groups] == ["0", "4"]
    why = "is normalised by weight_norm_interface, and 0 has no direction (in 2.parametrizations.weight.0)"
    assert units.frozen["2.parametrizations.weight.original0"] == why


def test_a_literal_size_is_found_out_by_a_trial() -> None:
    model = literal()
    model.more = nn.Conv2d(2, 2, 1)
    with pytest.raises(ValueError, match=r"one: cannot be cut: RuntimeError: shape '\[2, 4, 2, 8, 8\]'"):
        Channels().units(model, IMAGES)


def test_an_op_without_a_rule_is_named() -> None:
    model = Net(
        lambda m, x: m.two(m.one(x).renorm(2, 0, 0.5)),
        one=nn.Linear(6, 8),
        two=nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)),
    )
    assert frozen(model, TOKENS)["one.weight"] == "feeds renorm, which is not followed"


def test_constants_that_channels_meet_keep_them() -> None:
    model = Net(
        lambda m, x: m.two(m.one(x) + torch.arange(8.0).view(-1, 1, 1).to(x)),
        one=conv(3, 8),
        two=nn.Sequential(conv(8, 6), nn.ReLU(), head(6)),
    )
    assert (
        frozen(model, IMAGES)["one.weight"]
        == "is combined with values that cannot shrink with it, such as an input or a constant"
    )


def marked(x: Tensor) -> Tensor:
    zeros = torch.zeros(1, x.shape[1], 1, 1).to(x)
    zeros[:, 0] = 1.0
    return x + zeros


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda x: x + torch.ones(1, x.shape[1], 1, 1).to(x).cumsum(1),
            "is combined with values that cannot shrink with it, such as an input or a constant",
        ),
        (marked, "is combined with values that cannot shrink with it, such as an input or a constant"),
        (lambda x: x + torch.zeros(6, 1, 1).to(x), "cannot be cut: RuntimeError"),
        (
            lambda x: x * F.pairwise_distance(x.mean((2, 3)), x.amax((2, 3)))[:, None, None, None],
            "feeds norm, which mixes all channels",
        ),
    ],
)
def test_only_what_is_the_same_everywhere_leaves_channels_alone(change: Any, why: str) -> None:
    rest = nn.Sequential(conv(6, 5), nn.ReLU(), head(5))
    model = Net(lambda m, x: m.rest(change(m.one(x))), one=conv(3, 6), rest=rest)
    reasons = frozen(model, IMAGES)
    assert (reasons.get("one.weight") or reasons["one"]).startswith(why)


def test_what_does_not_run_stays() -> None:
    model = Net(lambda m, x: m.used(x), used=plain(), unused=nn.Linear(3, 3))
    assert frozen(model, IMAGES)["unused.weight"] == "took no part in the forward pass"


def test_include_and_exclude_name_what_makes_the_channels() -> None:
    groups = Channels(include="0").units(plain(), IMAGES).groups
    assert [group.name for group in groups] == ["0"]
    units = Channels(exclude="0").units(plain(), IMAGES)
    assert [group.name for group in units.groups] == ["3"]
    assert units.frozen["0"] == "exclude names it"
    with pytest.raises(ValueError, match="include='1x' matches no parameter or module"):
        Channels(include="1x").units(plain(), IMAGES)


def test_an_analysis_that_takes_too_long_is_given_up() -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"max_seconds=1e-09 were not enough .* smaller example"):
        Channels(max_seconds=1e-9).units(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_labels_that_take_too_much_memory_freeze_what_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.channels.graph.trace._MOST_LABELS", 7)
    units = Channels().units(residual(), IMAGES)
    assert [group.size for group in units.groups] == [6]
    assert "takes too much memory" in units.frozen["stem.weight"]


class Choosy(nn.Module):
    """Goes another way where its values are large."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 2)
        nn.init.zeros_(self.inner.weight), nn.init.zeros_(self.inner.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return self.head(hidden.relu() if hidden.abs().max() > 0 else hidden.tanh()).mean(0)


class Counting(nn.Module):
    """Runs one more op from the third call on, of a model and its copies together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.calls = nn.Linear(6, 5), nn.Linear(5, 2), [0]

    def __deepcopy__(self, memo: Any) -> Counting:
        twin = Counting()
        twin.load_state_dict(self.state_dict())
        twin.calls = self.calls
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        hidden = self.inner(x)
        return self.head(hidden * 1.0 if self.calls[0] % 2 else hidden)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Choosy(), "Choosy runs other ops, or makes tensors of other shapes, when its weights change"),
        (Counting(), "Counting runs other ops|takes another way through its code each time"),
    ],
    ids=["values", "calls"],
)
def test_a_way_through_the_code_that_changes_is_refused(model: nn.Module, why: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=why):
        Channels().units(model, TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_example_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"example=None: .* follows an example"):
        Channels().units(plain())


def test_an_example_that_does_not_fit_is_refused_and_the_model_left_alone() -> None:
    model = plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Sequential cannot run on the example: RuntimeError"):
        Channels().units(model, torch.ones(1, 5, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Fickle(nn.Module):
    """Gives something else each time."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 8), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        Fickle.calls += 1
        return self.two(self.one(x)) * Fickle.calls


def test_a_model_that_gives_something_else_each_time_is_refused() -> None:
    with pytest.raises(ValueError, match="different outputs for one example"):
        Channels().units(Fickle(), IMAGES)


# --- compaction


def test_neurons_that_single_weights_have_emptied_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2))
    pruner = Pruner(model, 0.5, structure=Unstructured(), schedule=None)
    pruner.masks["2.weight"][:, [1, 4]] = False  # nothing reads these
    pruner.masks["2.weight"][3] = False  # this has no inputs: its bias is all that is left
    pruner.masks["2.weight"][5] = False  # nor has this, and no bias
    with torch.no_grad():
        model[2].bias[5] = 0
    smaller = compact(model, pruner.masks, TOKENS)
    assert [smaller[0].out_features, smaller[2].in_features, smaller[2].out_features] == [6, 6, 6]
    assert smaller[4].in_features == 6
    pruner.apply_()
    torch.testing.assert_close(outputs(smaller, TOKENS), outputs(model, TOKENS), rtol=1e-12, atol=0)


def test_a_unit_that_gives_something_though_its_weights_are_zero_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 2))
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[2] = False
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        CompactionError, match=r"Sequential stays as it was. 0 cannot be cut: outputs change by"
    ):
        compact(model, {"0.weight": mask}, TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_masked_gives_a_copy() -> None:
    model = plain()
    copied = compact(model, {}, IMAGES)
    assert copied is not model
    assert {name: value.shape for name, value in copied.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masks\['x'\] of shape \(3,\) fits no parameter"):
        compact(plain(), {"x": torch.ones(3, dtype=torch.bool)}, IMAGES)


def test_a_mask_is_a_bool_tensor() -> None:
    name, weight = next(plain().named_parameters())
    for mask, found in ((torch.ones_like(weight), r"torch\.float32"), ([True], "list")):
        for call in (partial(compact, example=IMAGES), measure, partial(save_packed, path="none.packed")):
            with pytest.raises(ValueError, match=rf"^masks\['{name}'\] must be a bool tensor, not {found}\.$"):
                call(plain(), {name: mask})


def test_masks_of_a_model_before_its_compaction_are_told_from_its_own() -> None:
    model, pruner = pruned(plain, IMAGES)
    small = compact(model, pruner.masks, IMAGES)
    message = (
        r"^masks\['.*'\] has shape .*, its parameter .*; of a compacted model give the masks that are left"
    )
    for call in (partial(compact, example=IMAGES), measure, partial(save_packed, path="none.packed")):
        with pytest.raises(ValueError, match=message):
            call(small, pruner.masks)
    assert measure(small, {}).params == sum(each.numel() for each in small.parameters())
    with pytest.raises(ValueError, match=r"^'0\.weight' has no shape yet: run a batch through the model first"):
        compact(nn.Sequential(nn.LazyLinear(3)), {}, torch.ones(1, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_the_same_channels_may_go() -> None:
    model = residual()
    here, there = (
        Pruner(
            copy.deepcopy(model).to(device), 0.5, structure=Channels(), schedule=None, example=IMAGES.to(device)
        )
        for device in ("cpu", "cuda")
    )
    assert [group.name for group in there.groups] == [group.name for group in here.groups]
    assert there.frozen == here.frozen


class ForEvaluation(nn.Module):
    """Adds a branch in evaluation mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.one(x)
        return self.out((made if self.training else made + self.other(x)).relu())


def test_units_of_which_a_member_takes_no_part_in_training_are_scored_by_the_others() -> None:
    torch.manual_seed(0)
    model, rows = ForEvaluation(), torch.randn(3, 6)
    pruner = Pruner(model, 0.5, criterion=Taylor(), structure=Channels(), schedule=None, example=rows)
    (group,) = pruner.groups
    assert {part.name for part in group.slices} >= {"one.weight", "other.weight"}
    model(rows).square().sum().backward()
    pruner.observe()
    one = model.one
    expected = ((one.weight * one.weight.grad).sum(1) + one.bias * one.bias.grad).square()
    (sums,) = pruner.state_dict()["statistics"].values()
    torch.testing.assert_close(sums["sums"]["score"].flatten(), expected.detach())
    pruner.prune(1.0)
    lost = expected.argsort()[:2]
    assert not model.one.weight[lost].any()
    assert not model.other.weight[lost].any()
    assert int(model.other.weight.count_nonzero()) == 12
