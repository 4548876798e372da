"""Structures: what is found by default, by pattern, and what stays out with which reason."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from lightning_prune import (
    Blocks,
    Channels,
    Global,
    Magnitude,
    NofM,
    Pruner,
    Unstructured,
    sensitivity,
)
from lightning_prune.units.groups import Units
from lightning_prune.units.slices import ElementSlice


class Zoo(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.bag = nn.EmbeddingBag(10, 8)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        self.up = nn.ConvTranspose2d(8, 4, 3)
        self.line = nn.Conv1d(4, 6, 3)
        self.volume = nn.Conv3d(2, 4, 3, bias=False)
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(8, 4)
        self.plane = nn.LayerNorm((4, 4))
        self.token = nn.Parameter(torch.zeros(1, 8))
        self.head = nn.Linear(8, 5)


DEFAULT = ["stem.0.weight", "up.weight", "line.weight", "volume.weight", "attention.in_proj_weight"]
DEFAULT += ["attention.out_proj.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "head.weight"]
LEFT = {
    "embedding.weight": "Embedding uses it",
    "bag.weight": "EmbeddingBag uses it",
    "plane.weight": "LayerNorm uses it",
    "plane.bias": "LayerNorm uses it",
}
NO_INPUTS = "none of its dimensions is known to run over inputs, as in Linear, Conv and the like"
UNKNOWN = "uses it in a way that is not known: name it in include to prune it, weight by weight"


def names(units: Units) -> list[str]:
    return [group.name for group in units.groups]


def encoder_and_decoder() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)),
            "decoder": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)),
        }
    )


def test_the_weights_of_linear_and_conv_by_default() -> None:
    model = Zoo()
    units = Unstructured().units(model)
    assert names(units) == DEFAULT
    assert units.frozen == {"token": f"Zoo {UNKNOWN}"} | LEFT
    parameters = dict(model.named_parameters())
    for group in units.groups:
        (part,) = group.slices
        assert part.name == group.name
        assert part.weight is parameters[group.name]
        assert isinstance(part, ElementSlice)
        assert group.shape == part.weight.shape
        assert group.size == part.weight.numel()


def test_inputs_run_along_the_dimension_that_the_layer_sums_over() -> None:
    found = {group.name: group.input_dim for group in Unstructured().units(Zoo()).groups}
    assert found == {name: 0 if name == "up.weight" else 1 for name in DEFAULT}


def test_a_lone_layer_is_a_model() -> None:
    assert names(Unstructured().units(nn.Linear(3, 2))) == ["weight"]


def test_subclasses_of_layers_count() -> None:
    class Scaled(nn.Linear):
        pass

    assert names(Unstructured().units(nn.Sequential(Scaled(3, 2)))) == ["0.weight"]


@pytest.mark.parametrize(
    ("include", "found"),
    [
        ("encoder", ["encoder.0.weight", "encoder.1.weight"]),
        ("encoder.*", ["encoder.0.weight", "encoder.1.weight"]),
        ("*.0", ["encoder.0.weight", "decoder.0.weight"]),
        ("*.0.weight", ["encoder.0.weight", "decoder.0.weight"]),
        ("encoder.?.weight", ["encoder.0.weight", "encoder.1.weight"]),
        ("decoder.[!0]", ["decoder.1.weight"]),
        ("*weight", ["encoder.0.weight", "encoder.1.weight", "decoder.0.weight", "decoder.1.weight"]),
        (["decoder.1", "encoder.0"], ["encoder.0.weight", "decoder.1.weight"]),
        (("decoder.1.weight",), ["decoder.1.weight"]),
    ],
)
def test_include_names_parameters_or_modules(include: str | list[str], found: list[str]) -> None:
    assert names(Unstructured(include=include).units(encoder_and_decoder())) == found


@pytest.mark.parametrize(
    ("exclude", "found"),
    [
        ("encoder", ["decoder.0.weight", "decoder.1.weight"]),
        ("*.0", ["encoder.1.weight", "decoder.1.weight"]),
        (["encoder.0", "decoder.1.weight"], ["encoder.1.weight", "decoder.0.weight"]),
        ([], ["encoder.0.weight", "encoder.1.weight", "decoder.0.weight", "decoder.1.weight"]),
    ],
)
def test_exclude_leaves_dense(exclude: str | list[str], found: list[str]) -> None:
    units = Unstructured(exclude=exclude).units(encoder_and_decoder())
    assert names(units) == found
    weights = {name for name, each in encoder_and_decoder().named_parameters() if each.ndim > 1}
    assert units.frozen == dict.fromkeys(weights - set(found), "exclude names it")


def test_exclude_wins_over_include() -> None:
    structure = Unstructured(include="encoder", exclude="*.1")
    assert names(structure.units(encoder_and_decoder())) == ["encoder.0.weight"]


def test_patterns_tell_upper_from_lower_case() -> None:
    with pytest.raises(ValueError, match="include='Encoder' matches no parameter or module"):
        Unstructured(include="Encoder").units(encoder_and_decoder())
    model = nn.ModuleDict({"A": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    assert names(Unstructured(include="a").units(model)) == ["a.weight"]
    assert names(Unstructured(exclude="a").units(model)) == ["A.weight"]


def test_include_takes_any_matrix_but_no_bias_norm_or_embedding() -> None:
    units = Unstructured(include="*").units(Zoo())
    assert names(units) == [
        "token",
        "stem.0.weight",
        "up.weight",
        "line.weight",
        "volume.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "head.weight",
    ]
    assert units.frozen == LEFT


def test_what_include_names_and_is_no_matrix_has_a_reason() -> None:
    units = Unstructured(include=["*bias*", "line", "embedding"]).units(Zoo())
    assert names(units) == ["line.weight"]
    why = "it has one dimension: biases and the like are not pruned"
    assert {name for name, each in units.frozen.items() if each == why} == {
        *(
            "line.bias",
            "stem.0.bias",
            "up.bias",
            "attention.in_proj_bias",
            "attention.out_proj.bias",
            "head.bias",
        ),
        *("recurrent.bias_ih_l0", "recurrent.bias_hh_l0"),
    }
    assert units.frozen["embedding.weight"] == "Embedding uses it"
    assert units.frozen["head.weight"] == "include does not name it"


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_names_the_nearest(argument: str) -> None:
    structure = Unstructured(**{argument: "encodr.0.weight"})
    with pytest.raises(ValueError, match="matches no parameter or module") as error:
        structure.units(encoder_and_decoder())
    assert str(error.value) == (
        f"{argument}='encodr.0.weight' matches no parameter or module; the nearest names are"
        " 'encoder.0.weight', 'encoder.1.weight', 'decoder.0.weight'."
    )


def test_every_pattern_needs_a_match() -> None:
    with pytest.raises(ValueError, match="exclude='middle' matches no parameter or module"):
        Unstructured(exclude=["encoder", "middle"]).units(encoder_and_decoder())


@pytest.mark.parametrize("patterns", [[5], ["encoder", None], [b"encoder"]])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_must_be_strings(argument: str, patterns: list[object]) -> None:
    with pytest.raises(ValueError, match="must be a pattern or a list of them") as error:
        Unstructured(**{argument: patterns})  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{argument}={patterns!r} ")


@pytest.mark.parametrize(
    ("structure", "model"),
    [
        (Unstructured(), nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))),
        (Unstructured(), nn.Sequential()),
        (Unstructured(exclude="*"), nn.Sequential(nn.Linear(2, 2))),
        (Unstructured(include="*.bias"), nn.Sequential(nn.Linear(2, 2))),
        (Unstructured(include=[]), nn.Sequential(nn.Linear(2, 2))),
    ],
)
def test_nothing_to_prune_is_an_error(structure: Unstructured, model: nn.Module) -> None:
    with pytest.raises(ValueError, match="finds nothing to prune in Sequential") as error:
        structure.units(model)
    assert str(error.value).startswith(repr(structure))


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: Embedding uses it"):
        Unstructured(include="0").units(nn.Sequential(nn.Embedding(4, 4)))


@pytest.mark.parametrize("order", ["embedding first", "linear first"])
def test_a_weight_tied_to_an_embedding_is_frozen(order: str) -> None:
    embedding, linear = nn.Embedding(6, 4), nn.Linear(4, 6)
    linear.weight = embedding.weight
    tied = [embedding, linear] if order == "embedding first" else [linear, embedding]
    units = Unstructured().units(nn.Sequential(*tied, nn.Linear(6, 2)))
    assert names(units) == ["2.weight"]
    assert units.frozen == {"0.weight": "Embedding uses it"}


def test_a_weight_that_a_module_of_another_kind_uses_is_frozen() -> None:
    class Other(nn.Module):
        def __init__(self, shared: nn.Parameter) -> None:
            super().__init__()
            self.matrix = shared

    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, Other(linear.weight), nn.Linear(4, 2))
    units = Unstructured().units(model)
    assert names(units) == ["2.weight"]
    assert units.frozen == {"0.weight": f"Other {UNKNOWN}"}


def test_a_weight_that_two_linears_share_is_one_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    units = Unstructured().units(model)
    assert names(units) == ["0.weight", "2.weight"]
    assert units.frozen == {}


def test_a_module_used_twice_is_one_group() -> None:
    shared = nn.Linear(4, 4)
    assert names(Unstructured().units(nn.Sequential(shared, shared))) == ["0.weight"]


def test_a_lazy_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^'1\.weight' has no shape yet: run a batch through the model"):
        Unstructured().units(model)
    assert names(Unstructured(exclude="1").units(model)) == ["0.weight"]
    with pytest.raises(ValueError, match=r"^'1\.weight' has no shape yet"):
        Unstructured(include="1.weight").units(model)
    model(torch.ones(1, 4))
    assert names(Unstructured().units(model)) == ["0.weight", "1.weight"]


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parametrised_weight_is_frozen() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3), nn.Conv2d(2, 2, 1))
    parametrize.register_parametrization(model[2], "weight", Doubled())
    units = Unstructured().units(model)
    assert names(units) == ["1.weight"]
    reason = "computed from other parameters (a parametrisation)"
    sources = ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    source = "a parametrisation computes a weight from it: name it in include to prune it"
    source += " (the computed weight need not be sparse)"
    assert units.frozen == {
        "0.weight": reason,
        "2.weight": reason,
        **dict.fromkeys((*sources, "2.parametrizations.weight.original"), source),
    }


def test_a_parametrised_bias_freezes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "bias", Doubled())
    units = Unstructured().units(model)
    assert (names(units), units.frozen) == (["0.weight"], {})


def test_a_model_that_is_one_parametrised_layer_says_why() -> None:
    with pytest.raises(ValueError, match=r"weight: computed from other parameters"):
        Unstructured().units(weight_norm(nn.Linear(4, 4)))


class Bare(nn.Module):
    """A product with a matrix of its own, beside a layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 6, dtype=dtype))
        self.head = nn.Linear(6, 2)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.head((data.to(self.matrix.dtype) @ self.matrix).abs())


def test_blocks_give_no_advice_that_does_not_help() -> None:
    for structure in (Blocks(2, 2), Blocks(2, 2, include="*")):
        frozen = Pruner(Bare(), 0.5, structure=structure).frozen
        assert frozen == {"matrix": f"{NO_INPUTS}: Unstructured can prune it"}
    assert Pruner(Bare(), 0.5).frozen == {"matrix": f"Bare {UNKNOWN}"}
    assert Pruner(Bare(), 0.5, structure=Unstructured(include="*")).frozen == {}


def test_complex_weights_are_not_scored() -> None:
    reason = "holds complex numbers, which are not scored"
    assert Pruner(Bare(torch.cfloat), 0.5).frozen == {"matrix": reason}
    assert Pruner(Bare(torch.cfloat), 0.5, structure=Unstructured(include="*")).frozen == {"matrix": reason}
    with pytest.raises(ValueError, match=rf"finds nothing to prune in Linear\. weight: {reason}"):
        Pruner(nn.Linear(4, 4, dtype=torch.cfloat), 0.5)
    found = sensitivity(Bare(torch.cfloat), lambda model: 1.0, ratios=[0.5], progress=False)
    assert found.frozen == {"matrix": reason}


def test_an_average_says_of_what() -> None:
    model = nn.ModuleDict({"student": nn.Linear(4, 4)})
    model["teacher"] = deepcopy(model["student"]).requires_grad_(requires_grad=False)
    model["ema"] = AveragedModel(model["student"])
    assert Unstructured().units(model).frozen == {
        "teacher.weight": "looks like a moving average of student: exclude it if it is none",
        "ema.module.weight": "is an average of student",
    }
    assert Unstructured(exclude="teacher").units(model).frozen["teacher.weight"] == "exclude names it"


def test_errors_give_each_reason_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    whole = r"0\.weight, 2\.weight, 0, 2: keeps all: no smaller number is a multiple of round_to=8"
    with pytest.raises(ValueError, match=rf"in Sequential\. {whole}; 4\.weight: is the network's output$"):
        Channels(round_to=8).units(model, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"in Sequential\. 0\.weight, 2\.weight, 4\.weight: exclude names it$"):
        Unstructured(exclude="*").units(model)
    with pytest.raises(ValueError, match=r"out of reach: .* 2\.weight, 4\.weight: exclude names it$"):
        Pruner(model, 0.9, structure=Unstructured(exclude=["2", "4"]), selector=Global(budget="params"))


def test_a_model_without_parameters_says_so() -> None:
    with pytest.raises(ValueError, match=r"finds nothing to prune in Sequential\. It has no parameters\.$"):
        Unstructured().units(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"finds nothing to prune in Sequential\. It has no parameters\.$"):
        Channels().units(nn.Sequential(nn.ReLU()), torch.ones(1, 4))
    with pytest.raises(
        ValueError, match=r"include='fc' matches no parameter .* the model has no named parts\.$"
    ):
        Unstructured(include="fc").units(nn.ReLU())


def test_looking_changes_nothing() -> None:
    model = Zoo()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Unstructured(include="*").units(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- blocks


def test_blocks_are_masked_whole() -> None:
    layer = nn.Linear(6, 4, bias=False)
    # blocks of 2 outputs x 3 inputs, of sizes 6, 12, 18 and 3
    layer.weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).repeat_interleave(2, 0).repeat_interleave(3, 1)
    pruner = Pruner(layer, 0.5, structure=Blocks(2, 3), schedule=None)
    assert [group.shape for group in pruner.groups] == [(2, 2)]
    pruner.prune(1.0)
    kept = [[False, True], [True, False]]
    assert torch.equal(
        pruner.masks["weight"], torch.tensor(kept).repeat_interleave(2, 0).repeat_interleave(3, 1)
    )
    assert (layer.weight != 0).sum() == 12


def test_blocks_of_convolutions_take_whole_kernels_of_outputs_by_inputs() -> None:
    torch.manual_seed(0)
    for layer, dims in ((nn.Conv2d(6, 4, 3), (0, 1)), (nn.ConvTranspose2d(6, 4, 3), (1, 0))):
        pruner = Pruner(layer, 0.5, criterion=Magnitude(p=2), structure=Blocks(2, 3), schedule=None)
        pruner.prune(1.0)
        mask = pruner.masks["weight"].movedim(dims, (0, 1))
        blocks = mask.reshape(2, 2, 2, 3, 9).movedim(1, 2).flatten(2)
        assert torch.equal(blocks.any(2), blocks.all(2))
        assert blocks.any(2).sum() == 2


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_blocks_meet_budgets(budget: Literal["params", "macs"]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 64, 1), nn.Flatten(), nn.Linear(256, 64))
    selector = Global(budget=budget, normalize="cost")
    pruner = Pruner(
        model, 0.5, structure=Blocks(2, 2), selector=selector, schedule=None, example=torch.zeros(1, 2, 2, 2)
    )
    pruner.prune(1.0)
    positions = {"0.weight": 4, "2.weight": 4, "4.weight": 1} if budget == "macs" else {}
    total = sum(positions.get(name, 1) * mask.numel() for name, mask in pruner.masks.items())
    total += (8 + 64 + 64) * (budget == "params")
    gone = sum(positions.get(name, 1) * int((~mask).sum()) for name, mask in pruner.masks.items())
    assert gone / total == pytest.approx(0.5, abs=0.0025)


def test_layers_that_blocks_do_not_divide_stay_dense_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.ConvTranspose1d(4, 4, 1, groups=2))
    units = Blocks(2, 2).units(model)
    assert names(units) == ["0.weight"]
    assert units.frozen == {
        "1.weight": "5 x 4 is no multiple of 2 x 2",
        "2.weight": f"{NO_INPUTS}: Unstructured can prune it",
    }
    with pytest.raises(
        ValueError, match=r"finds nothing to prune in Linear\. weight: 4 x 6 is no multiple of 3 x 3"
    ):
        Blocks(3, 3).units(nn.Linear(6, 4))


@pytest.mark.parametrize("argument", ["rows", "cols"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2", None])
def test_blocks_have_whole_sizes(argument: str, size: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1") as error:
        Blocks(**{"rows": 2, "cols": 2, argument: size})
    assert str(error.value).startswith(f"{argument}={size!r} ")


class Conv1D(nn.Module):
    """A linear layer whose weight is stored inputs first."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ self.weight + self.bias).relu()


class Turned(Conv1D):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.weight)


class Deep(nn.Module):
    """Does not say what it does with its matrix."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, text: str) -> str:
        return text


@pytest.mark.parametrize("size", [(32, 16), (16, 16)])
@pytest.mark.parametrize(("kind", "inputs"), [(Conv1D, 0), (Turned, 1), (nn.Linear, 1), (nn.GRUCell, 1)])
def test_patterns_run_along_the_inputs_however_a_weight_is_stored(
    kind: Any, inputs: int, size: tuple[int, int]
) -> None:
    model = nn.ModuleList([kind(*size)])
    pruner = Pruner(model, structure=Unstructured(include="*"), selector=NofM(2, 4), schedule=None)
    pruner.prune(1.0)
    for name, mask in pruner.masks.items():
        along = mask.movedim(inputs, -1).reshape(-1, 4).sum(-1)
        assert along.eq(2).all(), name
    pruner = Pruner(model, 0.5, structure=Blocks(1, 4, include="*"), schedule=None)
    pruner.prune(1.0)
    for mask in pruner.masks.values():
        assert set(mask.movedim(inputs, -1).reshape(-1, 4).sum(-1).tolist()) == {0, 4}


class Random(Conv1D):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(rows), training=self.training)


def test_a_look_at_a_module_leaves_the_random_state_alone() -> None:
    model, before = nn.ModuleList([Random(8, 4)]), torch.get_rng_state()
    (group,) = Unstructured(include="*").units(model).groups
    assert group.input_dim == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_matrix_whose_inputs_are_unknown_takes_no_pattern_but_single_weights() -> None:
    model = nn.ModuleList([Deep(8, 4), nn.Linear(8, 4)])
    by_pattern = Pruner(model, structure=Unstructured(include="*"), selector=NofM(2, 4), schedule=None)
    assert by_pattern.frozen["0.weight"] == (
        f"{NO_INPUTS}, and NofM(n=2, m=4) goes along inputs: Global() can prune it"
    )
    assert "0.weight" in Pruner(model, 0.5, structure=Unstructured(include="*"), schedule=None).masks
