"""Batch norms that train, in reconstruction, against a pass of the finished network in training mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Pruner, Reconstruct


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [2 * numbers(size, 3, 9, 9, seed=size) + 1 for size in (80, 100)]


def trained(model: nn.Sequential, batches: list[Tensor]) -> nn.Sequential:
    """Return a network in training mode whose running statistics are those of batches."""
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model


def network() -> nn.Sequential:
    """Return norms before and after the first layer that loses weights, and one that does not train."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(150, 5),
        nn.BatchNorm1d(5),
    )
    trained(layers, BATCHES)[9].eval()
    return layers


def reconstructed(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    pruner = Pruner(model, {"2": 0.8, "5": 0.6, "8": 0.5}, schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(), batches=batches)
    return model


def statistics(norm: nn.Module) -> list[Tensor]:
    return [norm.get_buffer("running_mean"), norm.get_buffer("running_var")]


def test_running_statistics_are_those_of_the_batches_after_the_first_new_weights() -> None:
    before = network()
    model = reconstructed(copy.deepcopy(before), BATCHES)
    oracle = copy.deepcopy(model)
    for place in (3, 6):
        oracle[place].reset_running_stats()
    oracle[1].eval()  # nothing has changed before it
    with torch.no_grad():
        for batch in BATCHES:
            oracle(batch)
    for place in (3, 6):
        torch.testing.assert_close(statistics(model[place]), statistics(oracle[place]))
    for place in (1, 9):
        assert all(map(torch.equal, statistics(model[place]), statistics(before[place])))
    assert [model[place].num_batches_tracked.item() for place in (1, 3, 6, 9)] == [2] * 4
    assert [model[place].training for place in (3, 9)] == [True, False]


def test_weights_suit_the_statistics_of_a_batch() -> None:
    """The network gives in training mode what it gives in evaluation mode, but for the noise of a batch."""
    dense = network().eval()
    errors = []
    for training in (False, True):
        model = reconstructed(copy.deepcopy(dense).train(training), BATCHES)
        model.train()
        with torch.no_grad():
            found = nn.Sequential(*model[:9])(BATCHES[0]) - nn.Sequential(*dense[:9])(BATCHES[0])
        errors.append(float(found.square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_a_batch_of_one_value_a_channel_keeps_the_running_statistics() -> None:
    torch.manual_seed(0)
    batches = [numbers(1, 4, seed=0), numbers(80, 4, seed=1)]
    dense = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), batches[1:])
    model = copy.deepcopy(dense)
    Pruner(model, 0.3, schedule=None).prune(1.0, reconstruct=Reconstruct(), batches=batches)
    with torch.no_grad():
        seen = model[0](batches[1])
    torch.testing.assert_close(statistics(model[1]), [seen.mean(0), seen.var(0)])
    model = copy.deepcopy(dense)
    with pytest.warns(UserWarning, match="0.weight has 1 rows of calibration data"):
        Pruner(model, 0.3, schedule=None).prune(1.0, reconstruct=Reconstruct(), batches=batches[:1])
    assert torch.equal(model[1].running_var, dense[1].running_var)


def test_a_frozen_norm_and_one_of_another_kind_keep_theirs() -> None:
    """As does one that keeps no statistics at all."""

    class Own(nn.BatchNorm1d):
        pass

    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(4, 3),
        Own(3),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Linear(3, 3),
        nn.BatchNorm1d(3),
    )
    dense[4].eval()
    model = copy.deepcopy(dense)
    Pruner(model, 0.5, schedule=None).prune(1.0, reconstruct=Reconstruct(), batches=[numbers(8, 4, seed=0)])
    assert torch.equal(model[1].running_var, dense[1].running_var)
    assert torch.equal(model[4].running_var, dense[4].running_var)
