"""Reconstruction against ``torch.linalg.lstsq``, and against plain programs of what it does."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_prune import Channels, Magnitude, NofM, PerLayer, Pruner, Reconstruct
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.reconstruction import least_squares, network_fit
from lightning_prune.statistics.reconstruction.layer_matrices import LayerCall, layer_matrices
from lightning_prune.statistics.reconstruction.least_squares import Products, solve
from lightning_prune.statistics.reconstruction.lockstep import THREAD
from lightning_prune.statistics.reconstruction.network_fit import reconstruct_

EXACT = Reconstruct(ridge=0.0, positions=10**6)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- layers as matrices


class Conv1D(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (4, 7, 5)),
    "inputs first": (Conv1D(3, 5), (4, 7, 5)),
    "strided, dilated": (nn.Conv2d(4, 6, 3, padding=1, stride=2, dilation=2), (2, 4, 9, 8)),
    "grouped, same": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 9, 8)),
    "reflecting": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "circular": (nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    "volume": (nn.Conv3d(2, 4, 2, bias=False), (2, 2, 4, 4, 4)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 4),
    ),
    "transposed, dilated": (nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2, padding=2), (2, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    module, shape = LAYERS[name]
    (layer,), given = layer_matrices(module), numbers(*shape)
    with torch.no_grad():
        matrix = layer.matrix(module.weight)
        assert torch.equal(layer.weight(matrix), module.weight)
        rows = torch.stack([*layer.rows(LayerCall((given,), {}), 10**6)])
        found = torch.einsum("grc,goc->rgo", rows, matrix).flatten(1)
        found = found if module.bias is None else found + module.bias
        expected = module(given)
    channels_last = expected if name in ("linear", "inputs first") else expected.movedim(1, -1)
    torch.testing.assert_close(found, channels_last.flatten(0, -2))
    for positions in (10**6, 3):
        rows = layer.rows(LayerCall((given,), {}), positions)
        outputs = layer.output_rows(expected, positions)
        biases = torch.zeros(len(rows), 1) if module.bias is None else module.bias.view(len(rows), -1)
        for some, part, bias, output in zip(rows, matrix, biases, outputs, strict=True):
            torch.testing.assert_close(some @ part.t() + bias, output)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_attention_give_what_it_projects(batch_first: bool, bias: bool) -> None:
    module = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).eval()
    query, key = numbers(3, 5, 8), numbers(3, 5, 8, seed=1)
    inputs, outputs = layer_matrices(module)
    with torch.no_grad():
        rows = inputs.rows(LayerCall((query, key), {"value": key}), 1)
        assert all(map(torch.equal, rows, (query.flatten(0, 1), key.flatten(0, 1), key.flatten(0, 1))))
        assert torch.equal(inputs.weight(inputs.matrix(module.in_proj_weight)), module.in_proj_weight)
        (heads,) = outputs.rows(LayerCall((query, key), {"value": key}), 1)
        found = nn.functional.linear(heads, module.out_proj.weight, module.out_proj.bias)
        torch.testing.assert_close(found, module(query, key, key)[0].flatten(0, 1))


def test_rows_of_a_recurrent_layer_are_its_inputs_packed_or_not() -> None:
    module, given = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True), numbers(2, 5, 4)
    ahead, back = layer_matrices(module)
    assert (ahead.weight_name, back.weight_name) == ("weight_ih_l0", "weight_ih_l0_reverse")
    assert torch.equal(ahead.rows(LayerCall((given,), {}), 1)[0], given.flatten(0, 1))
    packed = pack_padded_sequence(given, torch.tensor([5, 2]), batch_first=True)
    assert back.rows(LayerCall((), {"input": packed}), 1)[0].shape == (7, 4)


def test_some_positions_of_each_image_are_some_of_the_rows() -> None:
    (layer,), call = layer_matrices(nn.Conv2d(3, 4, 3)), LayerCall((numbers(2, 3, 9, 9),), {})
    some, every = layer.rows(call, 5), layer.rows(call, 10**6)
    assert some[0].shape == (2 * 5, 27)
    assert all(any(torch.equal(row, other) for other in every[0]) for row in some[0])


# --- least squares


def products(rows: int = 200, columns: int = 12, outputs: int = 5) -> tuple[Tensor, Tensor]:
    mixed = numbers(rows, columns) @ numbers(columns, columns, seed=1)
    return mixed.double(), (mixed @ numbers(columns, outputs, seed=2) + numbers(rows, outputs, seed=3)).double()


def test_whole_inputs_have_the_solution_of_lstsq() -> None:
    x, y = products()
    kept = torch.ones(5, 12, dtype=torch.bool)
    kept[:, [2, 3, 7]] = False
    found = solve(Products.of(x, y), numbers(5, 12, seed=4), kept, ridge=0.0)
    expected = torch.linalg.lstsq(x[:, kept[0]], y).solution.t()
    torch.testing.assert_close(found[:, kept[0]], expected)
    assert not found[:, ~kept[0]].any()


def test_single_weights_have_the_solution_of_lstsq_row_by_row() -> None:
    x, y = products()
    kept = numbers(5, 12, seed=5) > 0
    found = solve(Products.of(x, y), numbers(5, 12, seed=4), kept, ridge=0.0)
    for row in range(5):
        expected = torch.linalg.lstsq(x[:, kept[row]], y[:, row : row + 1]).solution.flatten()
        torch.testing.assert_close(found[row, kept[row]], expected)
    assert not found[~kept].any()


def test_a_ridge_is_more_rows() -> None:
    x, y = products()
    matrix, kept, ridge = numbers(5, 12, seed=4).double(), torch.ones(5, 12, dtype=torch.bool), 0.3
    found = solve(Products.of(x, y), matrix, kept, ridge)
    weight = (ridge * x.square().sum(0).mean()).sqrt()
    more = torch.cat([x, weight * torch.eye(12)]), torch.cat([y, weight * matrix.t()])
    torch.testing.assert_close(found, torch.linalg.lstsq(*more).solution.t())


def test_centered_sums_fit_a_bias() -> None:
    x, y = products()
    kept = torch.ones(5, 12, dtype=torch.bool)
    found = solve(Products.of(x + 3, y - 2).centered(), numbers(5, 12, seed=4), kept, ridge=0.0)
    expected = torch.linalg.lstsq(torch.cat([x + 3, torch.ones(len(x), 1)], 1), y - 2).solution[:-1].t()
    torch.testing.assert_close(found, expected)


def sparsegpt(best: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The plain form: after each column the rest is solved anew, with the columns before it as they are."""
    matrix = best.clone()
    for column in range(matrix.shape[1]):
        error = matrix[:, column] * ~kept[:, column]
        inverse = torch.linalg.inv(hessian[column:, column:])
        matrix[:, column:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return matrix


def test_large_layers_are_swept_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = products()
    kept = numbers(5, 12, seed=5) > 0
    monkeypatch.setattr(least_squares, "_EXACT", 0)
    found = solve(Products.of(x, y), 1000 * numbers(5, 12, seed=4), kept, ridge=0.0)
    best = torch.linalg.lstsq(x, y).solution.t()
    torch.testing.assert_close(found, sparsegpt(best, x.t() @ x, kept), atol=1e-5, rtol=1e-5)
    assert not found[~kept].any()


def test_inputs_that_depend_on_each_other_have_a_solution() -> None:
    x, y = products()
    twice = torch.cat([x, x], 1)
    found = solve(Products.of(twice, y), torch.zeros(5, 24), torch.ones(5, 24, dtype=torch.bool), ridge=0.0)
    torch.testing.assert_close(twice @ found.t(), x @ torch.linalg.lstsq(x, y).solution, atol=1e-4, rtol=1e-4)


def test_no_row_gets_worse_and_no_input_is_no_problem() -> None:
    x, y = products()
    kept = numbers(5, 12, seed=5) > 0
    best = torch.zeros(5, 12, dtype=torch.float64)
    for row in range(5):
        best[row, kept[row]] = torch.linalg.lstsq(x[:, kept[row]], y[:, row : row + 1]).solution.flatten()
    found = solve(Products.of(x, y), best + 5 * ~kept, kept, ridge=10.0)  # a ridge that leads away from it
    error = (x @ found.t() - y).square().sum(0)
    assert (error <= (x @ best.t() - y).square().sum(0) * (1 + 1e-9)).all()
    silent = solve(Products.of(torch.zeros_like(x), y), best, kept, ridge=0.1)
    assert torch.equal(silent, best)


# --- networks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    ).eval()


BATCHES = [numbers(32, 3, 9, 9, seed=seed) for seed in range(3)]
KINDS: dict[str, dict[str, Any]] = {
    "weights": {"target": 0.7},
    "channels": {"target": 0.4, "structure": Channels(), "selector": PerLayer(), "example": BATCHES[0][:2]},
    "2:4": {"selector": NofM(2, 4)},
}


def pruned(model: nn.Module, kind: str, reconstruct: Any = None, batches: Any = BATCHES) -> Pruner:
    parts = dict(KINDS[kind])
    pruner = Pruner(model, parts.pop("target", None), criterion=Magnitude(), schedule=None, **parts)
    pruner.prune(1.0, reconstruct=reconstruct, batches=() if reconstruct is None else batches)
    return pruner


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_come_nearer_and_masks_hold(kind: str) -> None:
    images = torch.cat(BATCHES)
    dense, masked, better = network(), network(), network()
    pruner = pruned(masked, kind)
    again = pruned(better, kind, Reconstruct())
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruner.masks.items())
    for name, mask in again.masks.items():
        assert not better.get_parameter(name)[~mask].count_nonzero()
    with torch.no_grad():
        error = [float((model(images) - dense(images)).square().mean()) for model in (masked, better)]
    assert error[1] < 0.7 * error[0]
    assert again.unreconstructed == {}


def test_each_layer_is_solved_on_what_the_layers_before_it_give_now() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    rows, model = numbers(200, 6), copy.deepcopy(dense)
    pruner = Pruner(model, 0.5, schedule=None, selector=PerLayer())
    pruner.prune(1.0, reconstruct=EXACT, batches=rows.split(50))
    before = now = rows.double()
    with torch.no_grad():
        for layer, mask in ((0, "0.weight"), (2, "2.weight"), (4, "4.weight")):
            wanted = before @ dense[layer].weight.double().t() + dense[layer].bias
            outputs = []
            for row, kept in enumerate(pruner.masks[mask]):
                inputs = torch.cat([now[:, kept], torch.ones(len(now), 1)], 1)
                solution = torch.linalg.lstsq(inputs, wanted[:, [row]], driver="gelsd").solution.flatten()
                found = torch.cat([model[layer].weight[row, kept], model[layer].bias[row : row + 1]])
                torch.testing.assert_close(found.double(), solution, atol=1e-4, rtol=1e-4)
                outputs.append(inputs @ solution)
            before, now = wanted.tanh(), torch.stack(outputs, 1).tanh()


def test_a_batch_norm_takes_the_shift_of_a_layer_without_a_bias() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)).eval()
    rows, model = numbers(100, 6) + 2, copy.deepcopy(dense)
    Pruner(model, 0.5, schedule=None).prune(1.0, reconstruct=EXACT, batches=[rows])
    with torch.no_grad():
        torch.testing.assert_close(model(rows).mean(0), dense(rows).mean(0))
    assert not torch.equal(model[1].running_mean, dense[1].running_mean)


class Branched(nn.Module):
    """A norm is not alone in reading a layer; another layer runs twice; attention is not reconstructed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.twice = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight

    def forward(self, rows: Tensor) -> Tensor:
        found = self.first(rows)
        found = self.twice(self.twice(self.norm(found) + found))
        return self.other(self.tied(self.attention(found, found, found)[0]))


def test_what_is_not_reconstructed_stays_with_the_reason() -> None:
    torch.manual_seed(0)
    model = Branched().eval()
    before = copy.deepcopy(model)
    pruner = Pruner(model, 0.3, schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=[numbers(400, 8)])
    assert pruner.unreconstructed == {
        "twice.weight": "its layer runs 2 times in a pass",
        "tied.weight": "several layers share it, or its bias",
    }
    assert torch.equal(model.norm.running_mean, before.norm.running_mean)
    kept = pruner.masks["twice.weight"]
    assert torch.equal(model.twice.weight, before.twice.weight * kept)
    assert not torch.equal(model.first.weight, before.first.weight * pruner.masks["first.weight"])


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.one(rows) if rows.sum() > 0 else self.other(rows)


def test_batches_that_run_other_layers_are_left_out_with_a_warning() -> None:
    model, before, rows = Choosing(), None, numbers(20, 4).abs()
    masks = {"one.weight": torch.eye(4).bool(), "other.weight": torch.eye(4).bool()}
    with torch.no_grad():
        before = copy.deepcopy(model)
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    alone = copy.deepcopy(model)
    reconstruct_(alone, before, masks, Calibration.of([rows]), Reconstruct())
    with pytest.warns(UserWarning, match="1 of 2 batches run other layers than the first one"):
        found = reconstruct_(model, before, masks, Calibration.of([rows, -rows]), Reconstruct())
    assert found == {"other.weight": "its layer runs 0 times in a pass"}
    assert torch.equal(model.one.weight, alone.one.weight)


def test_a_batch_that_fails_stops_it_and_changes_nothing() -> None:
    model = Choosing()
    before, masks = copy.deepcopy(model), {"one.weight": torch.eye(4).bool()}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        reconstruct_(model, before, masks, Calibration.of([torch.ones(3, 4), torch.ones(3, 5)]), Reconstruct())
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert THREAD not in {each.name for each in threading.enumerate()}


class Noisy(nn.Module):
    """A step that adds noise to its input, and keeps what a later layer reads in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, rows: Tensor) -> Tensor:
        self.given = rows + torch.randn_like(rows)
        return self.other(self.one(self.given).relu() + self.given)


def test_passes_draw_the_same_noise_in_both_networks_and_keep_attributes_apart() -> None:
    torch.manual_seed(0)
    dense, batches = Noisy(), [numbers(30, 6, seed=seed) for seed in range(3)]
    masks = {"one.weight": torch.ones(6, 6).bool(), "other.weight": numbers(4, 6, seed=5) > 0}
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.other.weight.mul_(masks["other.weight"])
    reconstruct_(model, dense, masks, Calibration.of(batches), EXACT)
    with torch.no_grad():
        noisy = torch.cat([rows + drawn(rows) for rows in batches])
        inputs = (dense.one(noisy).relu() + noisy).double()
        wanted = nn.functional.linear(inputs, dense.other.weight.double(), dense.other.bias.double())
        for row, kept in enumerate(masks["other.weight"]):
            columns = torch.cat([inputs[:, kept], torch.ones(len(inputs), 1)], 1)
            solution = torch.linalg.lstsq(columns, wanted[:, row : row + 1]).solution.flatten()
            torch.testing.assert_close(
                model.other.weight[row, kept].double(), solution[:-1], atol=1e-5, rtol=1e-5
            )


def drawn(rows: Tensor) -> Tensor:
    """Return the noise of a pass: each begins with the same random state."""
    torch.manual_seed(0)
    return torch.randn_like(rows)


def test_ctrl_c_ends_all_passes() -> None:
    model, calls = network(), []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt

    before = copy.deepcopy(model)
    model[6].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pruned(model, "weights", Reconstruct())
    assert THREAD not in {each.name for each in threading.enumerate()}
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_a_network_whose_outputs_would_be_further_off_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_fit, "solve", lambda sums, matrix, kept, ridge: 50 * matrix.double() * kept)
    model, alone = network(), network()
    pruner = pruned(model, "weights", Reconstruct())
    pruned(alone, "weights")
    assert set(pruner.unreconstructed.values()) == {
        "outputs on the calibration data would be further from those before"
    }
    assert pruner.unreconstructed.keys() == pruner.masks.keys()
    assert all(map(torch.equal, model.state_dict().values(), alone.state_dict().values()))


def test_a_layer_that_takes_too_much_memory_is_named_and_left_alone() -> None:
    model, alone = network(), network()
    small = pruned(model, "weights", Reconstruct(max_gigabytes=4e-3))
    pruned(alone, "weights")
    assert small.unreconstructed == {
        "3.weight": "its solution takes 0.00538 GB, above max_gigabytes=0.004",
        "6.weight": "its solution takes 0.00436 GB, above max_gigabytes=0.004",
    }
    assert torch.equal(model[3].weight, alone[3].weight)
    assert not torch.equal(model[0].weight, alone[0].weight)


def test_few_rows_are_told_and_regularized_more() -> None:
    rows = numbers(20, 40)
    errors = []
    for factor in (1.0, 0.5):  # of the ridge that is asked for, which is doubled
        model, dense = nn.Linear(40, 8), None
        torch.manual_seed(0)
        nn.init.normal_(model.weight)
        dense = copy.deepcopy(model)
        pruner = Pruner(model, 0.5, schedule=None, selector=PerLayer())
        with pytest.warns(UserWarning, match="weight has 20 rows of calibration data for 40 inputs: its ridge"):
            pruner.prune(1.0, reconstruct=Reconstruct(ridge=0.1 * factor), batches=[rows])
        sums = Products.of(rows, rows.double() @ dense.weight.detach().double().t()).centered()
        expected = solve(sums, dense.weight.detach(), pruner.masks["weight"], 0.2 * factor)
        torch.testing.assert_close(model.weight.detach().double(), expected, atol=1e-5, rtol=1e-5)
        errors.append(pruner.unreconstructed)
    assert errors == [{}, {}]


def test_without_batches_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batches=\[\] must be at least one"):
        pruned(network(), "weights", Reconstruct(), batches=[])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": 0}, "positions=0 must be a whole number of at least 1"),
        ({"ridge": -1.0}, "ridge=-1.0 must be a number of at least 0"),
        ({"positions": 1.5}, "positions=1.5 must be a whole number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reconstruct(**arguments)


def test_the_random_state_and_the_mode_stay() -> None:
    model, state = network().train(), torch.get_rng_state()
    pruned(model, "weights", Reconstruct())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# --- what is easily got wrong


class Experts(nn.Module):
    """A layer of which no batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, rows: Tensor) -> Tensor:
        found = self.first(rows).relu()
        return self.last(found) + self.last.weight.sum() * self.idle(found[:0]).sum()


def test_a_layer_without_rows_is_named_and_left_alone() -> None:
    torch.manual_seed(0)
    model = Experts()
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=[numbers(40, 6)])
    assert pruner.unreconstructed == {"idle.weight": "no batch has rows for it"}
    assert all(bool(each.isfinite().all()) for each in model.parameters())


class Routed(nn.Module):
    """The first layer decides which rows the second one gets."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        chosen = self.router(rows).sum(1) > 0
        return self.head(rows.clone().index_put((chosen,), self.expert(rows[chosen])))


def test_a_layer_that_gets_other_rows_than_before_is_named_and_left_alone() -> None:
    torch.manual_seed(0)
    model, rows = Routed(), torch.randn(200, 8)
    pruner = Pruner(model, 0.6, schedule=None)
    before = model.expert.weight.detach().clone()
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=[rows])
    assert pruner.unreconstructed["expert.weight"].startswith("values decide which rows it gets")
    assert torch.equal(model.expert.weight, before * pruner.masks["expert.weight"])
    assert "head.weight" not in pruner.unreconstructed


def test_inf_or_nan_in_the_data_is_named() -> None:
    rows = numbers(40, 6)
    rows[3, 2] = torch.inf
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=[rows])
    assert set(pruner.unreconstructed.values()) == {"its data has inf or nan"}
    assert all(bool(each.isfinite().all()) for each in model.parameters())


class Counting(nn.Module):
    """Counts its passes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Tensor) -> Tensor:
        self.passes += 1
        return self.layer(rows)


def test_buffers_of_the_network_stay() -> None:
    model = Counting()
    Pruner(model, 0.5, schedule=None).prune(1.0, reconstruct=Reconstruct(), batches=[numbers(20, 6)] * 3)
    assert int(model.passes) == 0


class TwoIntoOne(nn.Module):
    """Two layers share a batch norm; a third one is read by a norm and by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.shared, self.seen = nn.BatchNorm1d(4), nn.Linear(6, 4, bias=False)
        self.own = nn.BatchNorm1d(4)

    def forward(self, rows: Tensor) -> Any:
        seen = self.seen(rows)
        return self.shared(self.one(rows)) + self.shared(self.other(rows)), self.own(seen), seen


def test_norms_that_are_not_alone_with_a_layer_take_no_shift() -> None:
    torch.manual_seed(0)
    model = TwoIntoOne().eval()
    dense, rows = copy.deepcopy(model), numbers(200, 6) + 1
    Pruner(model, 0.5, schedule=None).prune(1.0, reconstruct=Reconstruct(), batches=[rows])
    assert torch.equal(model.shared.running_mean, dense.shared.running_mean)
    assert torch.equal(model.own.running_mean, dense.own.running_mean)
    assert not torch.equal(model.one.weight, dense.one.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reconstruct": True, "batches": [numbers(4, 6)]}, "reconstruct=True is no Reconstruct"),
        ({"reconstruct": Reconstruct(), "batches": []}, r"batches=\[\] must be at least one"),
        ({"reconstruct": Reconstruct(), "batches": numbers(4, 6)}, "batches=Tensor must be a list"),
        ({"reconstruct": Reconstruct(), "batches": None}, "batches=NoneType must be a list"),
        ({"reconstruct": Reconstruct(), "batches": [[numbers(4, 6)]]}, "a tensor, a tuple or a mapping"),
        ({"reconstruct": Reconstruct(), "batches": [numbers(4, 5)]}, "shapes cannot be multiplied"),
    ],
)
def test_errors_leave_weights_and_masks_alone(arguments: dict[str, Any], message: str) -> None:
    model = nn.Linear(6, 4)
    before = copy.deepcopy(model)
    pruner = Pruner(model, 0.5, schedule=None)
    with pytest.raises((ValueError, RuntimeError), match=message):
        pruner.prune(1.0, **arguments)
    assert torch.equal(model.weight, before.weight)
    assert pruner.sparsity == 0


def test_an_event_that_removes_nothing_more_changes_nothing() -> None:
    model = network()
    pruner = pruned(model, "weights", Reconstruct())
    before = copy.deepcopy(model.state_dict())
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=BATCHES)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


class Standardised(nn.Linear):
    """Divides its weight by its norm."""

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight / self.weight.norm(), self.bias)


def test_subclasses_with_another_forward_and_shared_biases_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].bias = model[1].bias
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=[numbers(40, 6)])
    assert pruner.unreconstructed == {
        "0.weight": "weights of this kind, in a Standardised, are not solved for",
        "1.weight": "several layers share it, or its bias",
        "2.weight": "several layers share it, or its bias",
    }


def test_dead_inputs_without_a_ridge_are_no_problem() -> None:
    model = nn.Linear(6, 4)
    rows = numbers(40, 6)
    rows[:, 3:] = 0
    with torch.no_grad():
        model.weight[:, :3] = 0.01 * model.weight[:, :3].sign()
        model.weight[:, 3:] += model.weight[:, 3:].sign()
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(ridge=0.0), batches=[rows])
    assert model.weight.isfinite().all()
    assert not pruner.masks["weight"][:, :3].any()


def test_attention_is_called_in_any_way() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    rows = numbers(3, 5, 8)
    _, outputs = layer_matrices(module)
    with torch.no_grad():
        (found,) = outputs.rows(LayerCall((rows, rows, rows, None, False), {}), 1)
        (same,) = outputs.rows(LayerCall((), {"value": rows, "query": rows, "key": rows}), 1)
    assert torch.equal(found, same)
    (ahead,) = layer_matrices(nn.LSTM(8, 4))
    assert torch.equal(ahead.rows(LayerCall((), {"hx": None, "input": rows}), 1)[0], rows.flatten(0, 1))
