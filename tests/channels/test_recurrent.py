"""Hidden units of LSTM, GRU and RNN: what goes together, and that a smaller layer of the same kind is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningModule
from lit import all_digits, seeded, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Channels,
    Global,
    Magnitude,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    Reconstruct,
    Taylor,
    compact,
    export_onnx,
    load_compact,
)
from lightning_prune.channels.graph.mac_counter import macs_by_parameter

SEQUENCES = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([3, 6, 4])
WORDS = torch.arange(12).view(2, 6) % 11
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
KINDS = pytest.mark.parametrize("kind", GATES)
without_mkldnn = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


class Between(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: Any, hidden: int = 6, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.memory = kind(7, hidden, **options)
        width = (options.get("proj_size") or hidden) * (1 + options.get("bidirectional", False))
        self.outer = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(self.memory(self.inner(x))[0])
        return result


class CRNN(nn.Module):
    """Convolutions, a recurrent layer along the width of the image, and a letter at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.memory = nn.LSTM(8, 10, num_layers=2, bidirectional=True, dropout=0.5)
        self.letters = nn.Linear(20, 5)

    def forward(self, images: Tensor) -> Tensor:
        steps = self.features(images).amax(2).permute(2, 0, 1)
        self.memory.flatten_parameters()
        result: Tensor = self.letters(F.dropout(self.memory(steps)[0], 0.5, self.training))
        return result


class Translator(nn.Module):
    """An encoder that hands its state over to a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 6), nn.Linear(8, 11)
        self.encoder, self.decoder = (nn.LSTM(6, 8, num_layers=2, batch_first=True) for _ in range(2))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.words(source))
        result: Tensor = self.out(self.decoder(self.words(target), state)[0])
        return result


class Bridge(nn.Module):
    """Both directions of an encoder, joined by a linear layer; a cell that reads what it has given before."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.join = nn.GRU(5, 8, bidirectional=True, batch_first=True), nn.Linear(16, 7)
        self.decoder, self.out = nn.GRUCell(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = self.join(torch.cat([*self.encoder(x)[1]], 1)).tanh()
        found = [x.new_zeros(len(x), 4)]
        for _ in range(4):
            state = self.decoder(found[-1], state)
            found.append(self.out(state))
        return torch.stack(found, 1)


class Stepwise(nn.Module):
    """A recurrent layer that is called for each step, with a state that is kept in between.

    Args:
        zeros: Whether the first state is given, of a size that is kept in an attribute.
    """

    def __init__(self, zeros: bool) -> None:
        super().__init__()
        self.hidden, self.zeros = 9, zeros
        self.inner, self.memory = nn.Linear(5, 6), nn.GRU(6, 9, num_layers=2, batch_first=True)
        self.out = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(2, len(x), self.hidden).to(x) if self.zeros else None
        found = []
        for step in x.split(1, 1):
            given, state = self.memory(self.inner(step), state)
            found.append(self.out(given))
        return torch.cat(found, 1)


class Packed(nn.Module):
    """Sequences of several lengths, and the last state of each."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.memory = (
            nn.Linear(5, 6),
            kind(6, 8, num_layers=2, bidirectional=True, batch_first=True),
        )
        self.out, self.last = nn.Linear(16, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(self.inner(x), lengths, batch_first=True, enforce_sorted=False)
        given, state = self.memory(packed)
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return self.out(pad_packed_sequence(given, batch_first=True)[0]), self.last(last)


class Cells(nn.Module):
    """Three cells, one on top of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.LSTMCell(5, 8), nn.LSTMCell(8, 7, bias=False), nn.RNNCell(7, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = two = three = None
        for step in x.unbind(1):
            one = self.one(step, one)
            two = self.two(one[0], two)
            three = self.three(two[0], three)
        result: Tensor = self.out(three)
        return result


class CellsFromZeros(nn.Module):
    """Cells whose first states are parts of zeros, of a size that is kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = 8, nn.Linear(8, 3)
        self.cells = nn.ModuleList([nn.LSTMCell(5, 8), nn.LSTMCell(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(2, len(x), self.hidden).to(x)
        states = [(zeros[number], zeros[number]) for number in range(2)]
        for step in x.unbind(1):
            for number, cell in enumerate(self.cells):
                below = states[number - 1][0] if number else step
                states[number] = cell(below, states[number])
        result: Tensor = self.out(states[-1][0])
        return result


class PackedFromZeros(nn.Module):
    """Packed sequences, and a first state that is put in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.memory, self.out = 8, nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        given, _ = self.memory(packed, torch.zeros(1, len(x), self.hidden).to(x))
        result: Tensor = self.out(pad_packed_sequence(given, batch_first=True)[0])
        return result


class Learned(nn.Module):
    """First states that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.cell = (nn.Parameter(torch.randn(2, 1, 8)) for _ in range(2))
        self.memory, self.out = nn.LSTM(5, 8, bidirectional=True, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = [each.expand(-1, len(x), -1).contiguous() for each in (self.hidden, self.cell)]
        result: Tensor = self.out(self.memory(x, tuple(state))[0])
        return result


class Residual(nn.Module):
    """Layers whose outputs are added to their inputs: both directions of the second one, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.one, self.two = nn.LSTM(8, 8), nn.LSTM(8, 4, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = x + self.one(x)[0]
        result: Tensor = self.out(x + self.two(x)[0])
        return result


class LastCell(nn.Module):
    """Reads the last states, of hidden units and of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.out, self.other = nn.LSTM(5, 8, num_layers=3), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cell) = self.memory(x)
        result: Tensor = self.out(hidden[-1]) + self.other(cell[-1])
        return result


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, int]]] = {
    **{kind.__name__: (partial(Between, kind), (SEQUENCES,), {"inner": 7, "memory": 6}) for kind in GATES},
    **{
        f"{kind.__name__}, 2 layers, both directions": (
            partial(Between, kind, num_layers=2, bidirectional=True, bias=False, dropout=0.5, batch_first=True),
            (SEQUENCES,),
            {"inner": 7, "memory": 6},
        )
        for kind in GATES
    },
    **{
        f"{kind.__name__}, packed": (
            partial(Packed, kind),
            (SEQUENCES, LENGTHS),
            {"inner": 6, "memory": 8},
        )
        for kind in GATES
    },
    "ReLU": (partial(Between, nn.RNN, nonlinearity="relu"), (SEQUENCES,), {"inner": 7, "memory": 6}),
    "one sequence": (partial(Between, nn.GRU), (SEQUENCES[0],), {"inner": 7, "memory": 6}),
    "CRNN": (CRNN, (IMAGES,), {"features.0": 6, "features.3": 8, "memory": 10}),
    "encoder and decoder": (Translator, (WORDS, WORDS[:, :4]), {"words": 6, "encoder": 8}),
    "bridge": (Bridge, (SEQUENCES,), {"encoder": 8, "join": 7}),
    "steps": (partial(Stepwise, zeros=False), (SEQUENCES,), {"inner": 6, "memory": 9}),
    "steps from zeros": (partial(Stepwise, zeros=True), (SEQUENCES,), {"inner": 6, "memory": 9}),
    "cells": (Cells, (SEQUENCES,), {"one": 8, "two": 7, "three": 6}),
    "cells from zeros": (CellsFromZeros, (SEQUENCES,), {"cells.1": 8}),
    "packed, from zeros": (PackedFromZeros, (SEQUENCES, LENGTHS), {"memory": 8}),
    "learned": (Learned, (SEQUENCES,), {"memory": 8}),
    "residual": (Residual, (SEQUENCES,), {"inner": 4}),
    "last states": (LastCell, (SEQUENCES,), {"memory": 8}),
}
ALL = pytest.mark.parametrize(("make", "example", "sizes"), NETS.values(), ids=NETS)


def outputs(model: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    double = [each.double() if each.is_floating_point() else each for each in example]
    with torch.no_grad():
        found = copy.deepcopy(model).double().eval()(*double)
    return list(found) if isinstance(found, tuple) else [found]


def assert_equal(model: nn.Module, smaller: nn.Module, example: tuple[Tensor, ...]) -> None:
    for one, other in zip(outputs(model, example), outputs(smaller, example), strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


def pruned(make: Callable[[], nn.Module], example: Any, **options: Any) -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    model = make()
    arguments = {"structure": Channels(), "selector": PerLayer(), "schedule": None} | options
    pruner = Pruner(model, 0.5, example=example, **arguments)
    pruner.prune(1.0)
    return model, pruner


def recurrent_layers(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, nn.RNNBase | nn.RNNCellBase)]


@ALL
def test_units_go_and_outputs_stay(make: Any, example: tuple[Tensor, ...], sizes: dict[str, int]) -> None:
    model, pruner = pruned(make, example)
    assert {group.name: group.size for group in pruner.groups} == sizes
    smaller = compact(model, pruner.masks, example)
    assert_equal(model, smaller, example)
    left = Channels().units(smaller, example).groups
    assert {group.name: group.size for group in left} == {
        name: size - round(size / 2) for name, size in sizes.items()
    }


@ALL
def test_a_smaller_layer_is_one_of_its_size(
    make: Any, example: tuple[Tensor, ...], sizes: dict[str, int]
) -> None:
    model, pruner = pruned(make, example)
    for layer in recurrent_layers(compact(model, pruner.masks, example)):
        keys = ["bias", "num_layers", "bidirectional", "dropout", "batch_first", "nonlinearity"]
        options = {key: getattr(layer, key) for key in keys if hasattr(layer, key)}
        fresh = type(layer)(layer.input_size, layer.hidden_size, **options)
        shapes = {name: each.shape for name, each in fresh.named_parameters()}
        assert {name: each.shape for name, each in layer.named_parameters()} == shapes
        flat = getattr(layer, "_flat_weights", [*layer.parameters()])  # what the fused op reads
        assert [*map(id, flat)] == [*map(id, layer.parameters())]


@KINDS
def test_a_unit_is_its_rows_in_all_gates_and_what_reads_it(kind: type[nn.RNNBase]) -> None:
    model = Between(kind, num_layers=2, bidirectional=True)
    (group,) = (each for each in Channels().units(model, SEQUENCES).groups if each.name == "memory")
    masks: dict[str, Tensor] = {}
    gone = torch.arange(6) == 4
    for part in group.masked:
        mask = masks.setdefault(part.name, torch.ones_like(part.weight, dtype=torch.bool))
        mask &= ~part.spread(gone)
    smaller = compact(model, masks, SEQUENCES)
    kept = torch.tensor([0, 1, 2, 3, 5])
    rows = torch.cat([kept + 6 * gate for gate in range(GATES[kind])])
    both = torch.cat([kept, kept + 6])
    expected = {"outer.weight": model.outer.weight[:, both]}
    for name, each in model.memory.named_parameters():
        columns = kept if "hh" in name else both if "l1" in name else torch.arange(7)
        expected[f"memory.{name}"] = each[rows] if each.ndim == 1 else each[rows][:, columns]
    for name, each in expected.items():
        assert torch.equal(smaller.get_parameter(name), each)
    assert repr(smaller.memory) == f"{kind.__name__}(7, 5, num_layers=2, bidirectional=True)"


@without_mkldnn
def test_projected_units_are_apart_from_hidden_ones_and_fewer() -> None:
    example = (SEQUENCES,)
    model, pruner = pruned(partial(Between, nn.LSTM, 8, proj_size=4, num_layers=2, bidirectional=True), example)
    assert [(group.name, group.size, group.minimum) for group in pruner.groups] == [
        ("inner", 7, 1),
        ("memory", 8, 5),
        ("memory[2]", 4, 1),
    ]
    smaller = compact(model, pruner.masks, example)
    assert_equal(model, smaller, example)
    memory = smaller.memory
    assert (memory.input_size, memory.hidden_size, memory.proj_size, smaller.outer.in_features) == (3, 5, 2, 4)
    assert memory.weight_ih_l1_reverse.shape == (20, 4)
    assert memory.weight_hr_l0.shape == (2, 5)


@without_mkldnn
def test_single_weights_leave_more_hidden_units_than_projected_ones() -> None:
    model = Between(nn.LSTM, proj_size=4)
    masks = {name: torch.ones_like(each, dtype=torch.bool) for name, each in model.named_parameters()}
    for gate in range(4):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            masks[f"memory.{name}"][6 * gate : 6 * gate + 3] = False
    assert compact(model, masks, SEQUENCES).memory.hidden_size == 5


@without_mkldnn
def test_hidden_units_stay_that_are_only_one_more_than_projected_ones() -> None:
    units = Channels().units(Between(nn.LSTM, proj_size=5), SEQUENCES)
    assert [group.name for group in units.groups] == ["inner", "memory"]
    assert units.groups[1].size == 5
    assert units.frozen["memory.weight_ih_l0"] == "is part of an op that needs 6 units"


def test_what_is_the_output_stays_and_what_feeds_it_goes() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.memory = nn.Linear(5, 7), nn.LSTM(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.memory(self.inner(x))[0]
            return result

    units = Channels().units(Open(), SEQUENCES)
    assert [(group.name, group.size) for group in units.groups] == [("inner", 7)]
    assert units.frozen == dict.fromkeys(
        ("memory.weight_ih_l0", "memory.weight_hh_l0"), "is the network's output"
    )


def test_a_given_state_keeps_the_units() -> None:
    class Given(Between):
        def forward(self, x: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
            result: Tensor = self.outer(self.memory(self.inner(x), state)[0])
            return result

    units = Channels().units(Given(nn.GRU), (SEQUENCES, torch.randn(1, 6, 6)))
    assert [group.name for group in units.groups] == ["inner"]
    why = "is combined with values that cannot shrink with it, such as an input or a constant (in memory)"
    assert units.frozen["memory.weight_ih_l0"] == why


def test_channels_along_the_batch_stay() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.memory, self.out = (
                nn.Conv1d(5, 7, 1),
                nn.GRU(1, 4, batch_first=True),
                nn.Linear(4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x.transpose(1, 2)).flatten(0, 1)[..., None]
            result: Tensor = self.out(self.memory(y)[0]).unflatten(0, (len(x), 7)).sum(1)
            return result

    units = Channels().units(Folded(), SEQUENCES)
    assert [group.name for group in units.groups] == ["memory"]
    assert units.frozen["inner.weight"] == "lies along the batch or the steps of a recurrent layer (in memory)"


def test_a_pass_that_records_gradients_runs() -> None:
    class Slope(Between):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                total = super().forward(x).sum()
                return torch.autograd.grad(total, x)[0].detach()

    with pytest.raises(ValueError, match=r"inner\.weight, .*: feeds mkldnn_rnn_layer, which is not followed"):
        Channels().units(Slope(nn.LSTM), SEQUENCES)


def test_multiples_and_minimum_count_hidden_units() -> None:
    make = partial(Between, nn.LSTM, 40, num_layers=2, bidirectional=True)
    model, pruner = pruned(make, SEQUENCES, structure=Channels("memory*", round_to=8, minimum=32))
    assert [group.least for group in pruner.groups] == [32]
    assert compact(model, pruner.masks, SEQUENCES).memory.hidden_size == 32


@ALL
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_what_units_save_is_counted_to_the_last_one(
    make: Any, example: tuple[Tensor, ...], sizes: dict[str, int], budget: str
) -> None:
    model, pruner = pruned(make, example)
    units = Channels().units(model, example)
    kept = {group.name: group.slices[0].kept(pruner.masks[group.slices[0].name]) for group in units.groups}
    smaller = compact(model, pruner.masks, example)

    def cost(net: nn.Module) -> int:
        by_parameter = macs_by_parameter(net, example)
        sizes = {name: each.numel() for name, each in net.named_parameters()}
        return sum((sizes if budget == "params" else by_parameter).values())

    assert units.budgets[budget].total == cost(model)
    assert units.budgets[budget].cost(kept) == pytest.approx(cost(smaller), rel=1e-12)


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_budget_is_met(budget: str) -> None:
    model, pruner = pruned(
        partial(Between, nn.LSTM, 64, num_layers=2), SEQUENCES, selector=Global(budget=budget)
    )
    smaller = compact(model, pruner.masks, SEQUENCES)
    before, after = (
        sum(macs_by_parameter(each, SEQUENCES).values())
        if budget == "macs"
        else sum(part.numel() for part in each.parameters())
        for each in (model, smaller)
    )
    assert after / before == pytest.approx(0.5, abs=0.01)


class Reader(LightningModule):
    """Reads the rows of a digit one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.memory = nn.LSTM(12, 16, num_layers=2, bidirectional=True, dropout=0.2, batch_first=True)
        self.out = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.out(self.memory(self.inner(images).relu())[0].mean(1))
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen = {name: (each.grad, each.detach().clone()) for name, each in self.named_parameters()}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def rows(examples: int = 320) -> DataLoader[Any]:
    images, labels = all_digits()
    return DataLoader(TensorDataset(images[:examples, 0], labels[:examples]), 64)


def callback(criterion: Any, **options: Any) -> PruningCallback:
    return PruningCallback(
        0.5,
        criterion=criterion,
        structure=Channels(),
        selector=PerLayer(),
        schedule=OneShot(at="50%"),
        **options,
    )


@pytest.mark.parametrize("criterion", [Magnitude(), Taylor()], ids=repr)
def test_units_go_in_a_fit(tmp_path: Path, criterion: Any) -> None:
    model, pruning = seeded(Reader), callback(criterion, compact=True)
    run = trainer(tmp_path, pruning, max_epochs=4)
    run.fit(model, rows())
    assert repr(model.memory) == "LSTM(6, 8, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)"
    assert (model.inner.out_features, model.out.in_features) == (6, 16)
    assert {name: tuple(each.shape) for name, each in model.memory.named_parameters()} == {
        f"{kind}_l{layer}{way}": shape
        for layer, columns in ((0, 6), (1, 16))
        for way in ("", "_reverse")
        for kind, shape in {
            "weight_ih": (32, columns),
            "weight_hh": (32, 8),
            "bias_ih": (32,),
            "bias_hh": (32,),
        }.items()
    }
    for parameter in model.parameters():
        assert run.optimizers[0].state[parameter]["exp_avg"].shape == parameter.shape
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_compact(tmp_path / "small.ckpt", Reader())
    images = next(iter(rows()))[0]
    assert torch.equal(again.eval()(images), model.eval()(images))
    F.cross_entropy(model.train()(images), torch.zeros(64, dtype=torch.int64)).backward()
    run.optimizers[0].step()


def test_masked_units_stay_at_0_in_training(tmp_path: Path) -> None:
    model, pruning = seeded(Reader), callback(Taylor())
    trainer(tmp_path, pruning, max_epochs=4).fit(model, rows())
    for name, mask in pruning.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
        assert (model.get_parameter(name)[mask] != 0).all()
    gone = ~pruning.masks["memory.weight_hh_l1"].any(0)
    assert int(gone.sum()) == 8
    assert (~pruning.masks["memory.bias_ih_l0_reverse"]).view(4, 16).equal(gone.expand(4, 16))


def test_layers_around_are_reconstructed_and_the_state_is_left_alone() -> None:
    torch.manual_seed(0)
    model, batches = Between(nn.LSTM, 24), [torch.randn(20, 8, 5) for _ in range(4)]
    expected, errors = outputs(model, (batches[0],))[0], {}
    for settings in (None, Reconstruct()):
        twin = copy.deepcopy(model)
        pruner = Pruner(
            twin, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=batches[0][:2, :2]
        )
        pruner.prune(1.0, reconstruct=settings, batches=batches)
        smaller = compact(twin, pruner.masks, SEQUENCES)
        errors[settings] = float((outputs(smaller, (batches[0],))[0] - expected).square().mean())
        for name, mask in pruner.masks.items():
            assert (twin.get_parameter(name)[~mask] == 0).all()
    assert pruner.unreconstructed == {
        "memory.weight_hh_l0": "weights of this kind, in a LSTM, are not solved for"
    }
    assert errors[Reconstruct()] < 0.8 * errors[None]


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="no onnx"
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore")
def test_smaller_layers_are_exported(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    make = partial(Between, kind, num_layers=2, bidirectional=True, batch_first=True)
    model, pruner = pruned(make, SEQUENCES)
    smaller = compact(model, pruner.masks, SEQUENCES)
    assert export_onnx(smaller, tmp_path / "small.onnx", SEQUENCES) < export_onnx(
        model, tmp_path / "dense.onnx", SEQUENCES
    )
