"""Only what a fit trains is pruned, unless it is asked for by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import BackboneFinetuning
from lit import Lit, digits, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_prune import (
    Channels,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    Unstructured,
    compact,
    save_packed,
)

STAYS = "does not train: name it in include to prune it"
FOLLOWS = "looks like a moving average of net: exclude it if it is none"


def classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Distance(Metric):
    """Measures with a network of its own, whose parameters require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(64, 32)
        self.add_state("total", torch.zeros(()))

    def update(self, images: Tensor) -> None:
        self.total += self.features(images.flatten(1)).sum()

    def compute(self) -> Tensor:
        return self.total


class Distilled(Lit):
    """Holds a teacher and a metric; all parameters are given to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier(32)
        self.teacher = classifier(48).requires_grad_(requires_grad=False)
        self.distance = Distance()

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0]), self.teacher(batch[0])) + super().loss(batch)


class Loose(Distilled):
    """The teacher requires gradients, and no optimizer holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.requires_grad_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05)


def pruned(folder: Path, model: Lit, structure: Any, *callbacks: Any) -> PruningCallback:
    pruning = PruningCallback(0.5, structure=structure, selector=PerLayer(), schedule=OneShot("1ep"))
    trainer(folder, pruning, *callbacks, max_epochs=2).fit(model, digits())
    return pruning


@pytest.mark.parametrize("make", [Distilled, Loose])
@pytest.mark.parametrize("structure", [Unstructured(), Channels()], ids=["weights", "channels"])
def test_teachers_and_metrics_stay(tmp_path: Path, make: type[Lit], structure: Any) -> None:
    before = copy.deepcopy(model := make())
    pruning = pruned(tmp_path, model, structure)
    assert {name.partition(".")[0] for name in pruning.masks} == {"net"}
    hidden = int((model.net[1].weight == 0).sum())
    assert hidden == 64 * 32 // 2
    for name in ("teacher", "distance"):
        for one, other in zip(
            model.get_submodule(name).parameters(), before.get_submodule(name).parameters(), strict=True
        ):
            assert torch.equal(one, other)
    assert pruning.report.frozen["teacher.1.weight"] == STAYS
    assert "distance.features.weight" in pruning.report.frozen


@pytest.mark.parametrize("structure", [Unstructured, Channels])
def test_by_name_what_does_not_train_is_pruned(tmp_path: Path, structure: Any) -> None:
    pruning = pruned(tmp_path, model := Distilled(), structure(include="teacher.1"))
    assert int((model.teacher[1].weight == 0).sum()) == 64 * 48 // 2
    assert pruning.report.frozen["net.1.weight"] == "include does not name it"


class Transferred(Lit):
    """The network in two parts, as a finetuning callback wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.top = self.net[:5], self.net[5:]
        del self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.top(self.backbone(images))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda each: each.requires_grad, self.parameters()), 0.05)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
@pytest.mark.parametrize("thaws", [False, True])
def test_what_a_finetuning_callback_thaws_later_counts(tmp_path: Path, thaws: bool) -> None:
    model = Transferred()
    if thaws:
        callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)]
    else:
        callbacks = []
        model.backbone.requires_grad_(requires_grad=False)
    pruning = pruned(tmp_path, model, Unstructured(), *callbacks)
    assert ("backbone.0.weight" in pruning.masks) == thaws
    assert ("backbone.0.weight" in pruning.report.frozen) != thaws


class Critic(Lit):
    """A target network that requires gradients, is in no optimizer, and follows the online one by copies."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier(32)
        self.target = copy.deepcopy(self.net)

    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = self.target(batch[0])
        return F.mse_loss(self(batch[0]), wanted) + super().loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.target.load_state_dict(self.net.state_dict())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05)


def test_a_target_network_without_an_optimizer_follows(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"), compact=True)
    trainer(tmp_path, pruning, max_epochs=3).fit(model := Critic(), digits())
    assert [model.net[1].out_features, model.target[1].out_features] == [16, 16]
    assert torch.equal(model.net[1].weight, model.target[1].weight)
    model.on_train_batch_end()


class Ema(nn.Module):
    """A moving average in a plain module, as timm's ModelEmaV3."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for own, other in zip(self.module.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.5)


class Averaged(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier(32)
        self.ema = Ema(self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update(self.net)


@pytest.mark.parametrize("structure", [Unstructured(), Channels()], ids=["weights", "channels"])
def test_an_average_in_a_plain_module_has_the_zeros_of_what_it_follows(tmp_path: Path, structure: Any) -> None:
    pruning = pruned(tmp_path, model := Averaged(), structure)
    for name, mask in pruning.masks.items():
        average = name.replace("net.", "ema.module.")
        assert not model.get_parameter(average)[~mask].count_nonzero()
    assert pruning.report.frozen["ema.module.1.weight"] == FOLLOWS


class TaughtByCopy(Distilled):
    """The teacher has started as a copy of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(requires_grad=False)


class Momentum(Distilled):
    """The step itself updates a momentum encoder that has started with other weights."""

    def __init__(self, *, foreach: bool) -> None:
        super().__init__()
        self.foreach = foreach
        self.teacher = classifier(32).requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self) -> None:
        own, other = list(self.teacher.parameters()), list(self.net.parameters())
        if self.foreach:
            torch._foreach_lerp_(own, other, 0.1)
        else:
            for one, source in zip(own, other, strict=True):
                one.data = 0.9 * one.data + 0.1 * source.data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.update()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("foreach", [False, True])
def test_what_a_step_updates_by_itself_goes_with_what_it_is_updated_from(tmp_path: Path, foreach: bool) -> None:
    pruning = PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"), compact=True)
    trainer(tmp_path, pruning, max_epochs=3).fit(model := Momentum(foreach=foreach), digits())
    assert [model.net[1].out_features, model.teacher[1].out_features] == [16, 16]
    model.update()


@pytest.mark.parametrize("structure", [Unstructured, Channels])
def test_a_teacher_that_is_a_copy_stays_if_it_is_excluded(tmp_path: Path, structure: Any) -> None:
    for exclude in ("teacher", None):
        before = copy.deepcopy((model := TaughtByCopy()).teacher[1].weight)
        pruning = pruned(tmp_path, model, structure(exclude=exclude))
        assert int((model.net[1].weight == 0).sum()) == 64 * 32 // 2
        assert torch.equal(model.teacher[1].weight, before) == (exclude is not None)
        reason = (
            "exclude names it" if exclude else "looks like a moving average of net: exclude it if it is none"
        )
        assert pruning.report.frozen["teacher.1.weight"] == reason


def test_a_target_network_is_known_after_the_fit(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"))
    trainer(tmp_path, pruning, max_epochs=3).fit(model := Critic(), digits())
    small = compact(model, pruning.masks, next(iter(digits()))[0][:2])
    assert [small.net[1].out_features, small.target[1].out_features] == [16, 16]


class Watched(Lit):
    """A metric holds the network that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = Distance()
        self.distance.network = self.net


def test_a_network_that_a_metric_only_refers_to_trains(tmp_path: Path) -> None:
    pruning = pruned(tmp_path, Watched(), Unstructured())
    assert set(pruning.masks) == {"net.0.weight", "net.4.weight", "net.6.weight"}
    assert pruning.report.frozen == {"distance.features.weight": STAYS}


def test_what_trains_is_asked_anew_in_each_fit(tmp_path: Path) -> None:
    model, pruning = Lit(), PruningCallback(0.5, selector=PerLayer(), schedule=OneShot("1ep"))
    model.net[4].requires_grad_(requires_grad=False)
    trainer(tmp_path, pruning, max_epochs=2).fit(model, digits())
    assert pruning.report.frozen == {"net.4.weight": STAYS}
    first = pruning.masks["net.0.weight"].clone()
    model.net[4].requires_grad_()
    trainer(tmp_path, pruning, max_epochs=2).fit(model, digits())
    assert pruning.report.frozen == {}
    assert int((model.net[4].weight == 0).sum()) == 288 * 16 // 2
    assert torch.equal(pruning.masks["net.0.weight"], first)


# --- a loop of one's own


def test_in_a_plain_loop_gradients_decide() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    model[0].requires_grad_(requires_grad=False)
    pruner = Pruner(model, 0.5, schedule=None)
    assert pruner.frozen == {"0.weight": STAYS}
    pruner.prune(1.0)
    assert int((model[2].weight == 0).sum()) == 12
    by_name = Pruner(model, 0.5, structure=Unstructured(include="*"), schedule=None)
    assert [group.name for group in by_name.groups] == ["0.weight", "2.weight"]


def test_any_name_of_a_tied_weight_asks_for_it() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["a"].requires_grad_(requires_grad=False)
    found = Pruner(model, 0.5, structure=Unstructured(include=["b", "c"]), schedule=None)
    assert [group.name for group in found.groups] == ["a.weight", "c.weight"]


def test_where_nothing_trains_all_counts() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).requires_grad_(requires_grad=False)
    assert len(Pruner(model, 0.5, schedule=None).groups) == 2


# --- what is no plain number


class Codes(nn.Module):
    """A quantized layer: integer codes and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (6, 8), dtype=torch.int8), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ (self.weight.to(rows) / 8).t()


class Sealed(Tensor):
    """A tensor that refuses arithmetic."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.masked_fill_, Tensor.mul_):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("structure", [Unstructured(include="*"), Channels(include="*")])
def test_codes_of_quantized_layers_stay(structure: Any) -> None:
    model, example = nn.Sequential(Codes(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 8)
    before = model[0].weight.clone()
    pruner = Pruner(model, 0.5, structure=structure, selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    assert torch.equal(model[0].weight, before)
    assert "int8, not floating-point numbers" in pruner.frozen["0.weight"]
    assert pruner.sparsity > 0


def test_tensors_of_another_kind_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model[0].weight = nn.Parameter(torch.randn(6, 8).as_subclass(Sealed))
    pruner = Pruner(model, 0.5, schedule=None)
    assert pruner.frozen == {"0.weight": "is a Sealed, which does no plain arithmetic"}


class Quantized(Tensor):
    """A weight that holds integer codes and scales, as torchao's do: it can be multiplied, and nothing else."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __repr__(self) -> str:
        return "Quantized()"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Quantized:
        return Quantized(inner["codes"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, ops = torch.ops.aten, {torch.ops.aten.detach.default, torch.ops.aten.clone.default}
        given = args[0]
        if func in ops:
            return cls(given.codes, given.scales)
        if func is aten._to_copy.default:
            return cls(given.codes, given.scales.to(kwargs.get("dtype", given.dtype)))
        raise NotImplementedError(func)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            rows, weight, *bias = args
            return F.linear(rows, weight.codes.to(rows) * weight.scales.to(rows), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def quantized(layer: nn.Linear) -> nn.Linear:
    codes = (layer.weight.detach() * 100).to(torch.int8)
    weight = Quantized(codes, torch.full((len(codes), 1), 0.01))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("where", [0, 2, 4])
def test_channels_beside_a_weight_that_wraps_others_go_and_the_smaller_network_is_equal(where: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)]
    quantized(layers[where // 2])
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])
    example = torch.randn(3, 16)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    assert pruner.frozen[f"{where}.weight"] == "is a Quantized, which does no plain arithmetic"
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, example)
    assert sum(each.numel() for each in smaller.parameters()) < sum(each.numel() for each in model.parameters())
    torch.testing.assert_close(smaller(example), model(example))


def test_masks_of_such_a_weight_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    masks = {"0.weight": torch.rand(6, 8) > 0.5}
    quantized(model[0])
    with pytest.raises(ValueError, match=r"masks\['0.weight'\] belongs to a parameter that is a Quantized"):
        save_packed(model, masks, tmp_path / "out.packed")
