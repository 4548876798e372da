"""Structures: what is found by default, by pattern, and what stays out with which reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune import Unstructured
from lightning_prune.units import Units


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


DEFAULT = ["stem.0.weight", "up.weight", "line.weight", "volume.weight", "attention.out_proj.weight"]
DEFAULT += ["head.weight"]


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
    assert units.frozen == {}
    parameters = dict(model.named_parameters())
    for group in units.groups:
        (part,) = group.slices
        assert part.name == group.name
        assert part.weight is parameters[group.name]
        assert part.dim is None
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
    assert units.frozen == {}


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
    assert units.frozen == {
        "embedding.weight": "Embedding uses it",
        "bag.weight": "EmbeddingBag uses it",
        "plane.weight": "LayerNorm uses it",
        "plane.bias": "LayerNorm uses it",
    }


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
    assert units.frozen == {"0.weight": "Other uses it"}


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
    with pytest.raises(ValueError, match=r"^'1\.weight' has no shape yet: run a batch"):
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
    assert units.frozen == {"0.weight": reason, "2.weight": reason}


def test_a_parametrised_bias_freezes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "bias", Doubled())
    units = Unstructured().units(model)
    assert (names(units), units.frozen) == (["0.weight"], {})


def test_a_model_that_is_one_parametrised_layer_says_why() -> None:
    with pytest.raises(ValueError, match=r"weight: computed from other parameters"):
        Unstructured().units(weight_norm(nn.Linear(4, 4)))


def test_looking_changes_nothing() -> None:
    model = Zoo()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Unstructured(include="*").units(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
