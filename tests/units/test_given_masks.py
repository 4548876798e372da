"""Masks from outside, held in a fit and pruned further; torch.nn.utils.prune is what they are compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback
from lit import Lit, digits, fit, seeded, trainer
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_prune import (
    Channels,
    Guard,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    Reconstruct,
    Rewind,
    Threshold,
    Unstructured,
    oneshot,
)
from lightning_prune.units.given_masks import GivenMasks

LAYERS = ("net.0", "net.4", "net.6")


def masked_by_torch() -> Lit:
    """A half of each matrix, at random, and three biases."""
    model = seeded(Lit)
    for name in LAYERS:
        prune.random_unstructured(model.get_submodule(name), "weight", 0.5)
    prune.random_unstructured(model.net[6], "bias", 3)
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix("_mask"): each.clone() for name, each in model.named_buffers() if "_mask" in name}


MASKS = masks_of(masked_by_torch())
FORMS: dict[str, Any] = {
    "0 and 1": lambda folder: MASKS,
    "bool": lambda folder: {name: mask.bool() for name, mask in MASKS.items()},
    "integers": lambda folder: {name: mask.long() for name, mask in MASKS.items()},
    "buffers": lambda folder: {f"{name}_mask": mask for name, mask in MASKS.items()},
    "network": lambda folder: masked_by_torch(),
    "state_dict": lambda folder: masked_by_torch().state_dict(),
    "file of masks": lambda folder: saved(folder, MASKS),
    "file of a state_dict": lambda folder: str(saved(folder, masked_by_torch().state_dict())),
    "checkpoint": lambda folder: saved(folder, {"state_dict": masked_by_torch().state_dict(), "epoch": 3}),
}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "masks.pt")
    return folder / "masks.pt"


def assert_exactly(masks: Any, expected: dict[str, Tensor] = MASKS) -> None:
    assert masks.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name].bool()) for name, mask in masks.items())


class Watch(Callback):
    """Whether all that the masks remove is 0, at the start of each batch, and how many events there were."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, mask in MASKS.items():
            assert not pl_module.get_parameter(name)[mask == 0].any(), name


# --- nothing but the masks


@pytest.mark.parametrize("form", FORMS)
def test_a_fit_without_a_target_keeps_exactly_these_masks(tmp_path: Path, form: str) -> None:
    model = seeded(Lit)
    before = copy.deepcopy(model.state_dict())
    pruning = PruningCallback(masks=FORMS[form](tmp_path))
    looked = pruning.plan(model)
    assert {each.name: each.kept for each in looked.layers} == {n: int(m.sum()) for n, m in MASKS.items()}
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    run = fit(tmp_path, model, pruning, Watch(), max_epochs=2)
    assert_exactly(pruning.masks)
    assert pruning.settled
    assert pruning.report.sparsity == pruning.sparsity == (36 + 2304 + 80 + 3) / (72 + 4608 + 160 + 10)
    assert [entry.sparsity for entry in pruning.report.history] == [pruning.sparsity]
    for name, mask in MASKS.items():
        weight, early = model.get_parameter(name), before[name]
        assert not weight[mask == 0].any()
        assert (weight[mask == 1] != early[mask == 1]).any()
    assert run.global_step == 10


def test_the_fit_is_the_one_that_torch_would_have_made(tmp_path: Path) -> None:
    ours, theirs = seeded(Lit), masked_by_torch()
    fit(tmp_path, ours, PruningCallback(masks=MASKS), max_epochs=2)
    fit(tmp_path, theirs, max_epochs=2)
    for name in MASKS:
        torch.testing.assert_close(
            ours.get_parameter(name), theirs.get_buffer(f"{name}") if False else _of(theirs, name)
        )


def _of(model: nn.Module, name: str) -> Tensor:
    """A weight that torch computes from ``weight_orig`` and ``weight_mask``."""
    return model.get_parameter(f"{name}_orig") * model.get_buffer(f"{name}_mask")


def test_a_resumed_fit_keeps_them_and_takes_further_ones(tmp_path: Path) -> None:
    path = tmp_path / "net.ckpt"
    fit(tmp_path, seeded(Lit), PruningCallback(masks=MASKS), max_epochs=1).save_checkpoint(path)
    again = PruningCallback(masks=MASKS)
    fit(tmp_path, seeded(Lit), again, Watch(), max_epochs=2, ckpt_path=path)
    assert_exactly(again.masks)
    other = torch.ones(16, 288)
    other[:4] = 0
    more = PruningCallback(masks={"net.4.weight": other})
    fit(tmp_path, seeded(Lit), more, max_epochs=2, ckpt_path=path)
    assert_exactly(more.masks, MASKS | {"net.4.weight": MASKS["net.4.weight"] * other})


def test_a_fit_without_a_target_keeps_exactly_the_zeros(tmp_path: Path) -> None:
    model = seeded(Lit)
    with torch.no_grad():
        for name, mask in MASKS.items():
            model.get_parameter(name).mul_(mask)
    pruning = PruningCallback(keep_zeros=True)
    fit(tmp_path, model, pruning, max_epochs=2)
    matrices = {name: mask.bool() for name, mask in MASKS.items() if mask.ndim > 1}
    assert pruning.masks.keys() == matrices.keys()
    assert all(torch.equal(pruning.masks[name], mask) for name, mask in matrices.items())
    assert pruning.settled
    assert pruning.report.removed == 36 + 2304 + 80


def test_a_pruner_takes_masks_later_or_stays_as_it_was() -> None:
    pruner = Pruner(seeded(Lit), 0.25, schedule=None)
    pruner.prune(1.0)
    first = {name: mask.clone() for name, mask in pruner.masks.items()}
    nothing = {"net.4.weight": torch.zeros(16, 288), "net.6.bias": torch.zeros(10)}
    for wrong in (nothing, {"net.9.weight": torch.ones(1)}, None):
        with pytest.raises(ValueError, match="masks"):
            pruner.load_masks(wrong)  # type: ignore[arg-type]
        assert pruner.masks.keys() == first.keys()
        assert all(torch.equal(pruner.masks[name], mask) for name, mask in first.items())
    pruner.load_masks(MASKS)
    for name, mask in MASKS.items():
        assert torch.equal(pruner.masks[name], mask.bool() & first.get(name, mask.bool()))
    pruner.apply_()
    assert pruner.store.enforced
    again = Pruner(seeded(Lit), 0.25, schedule=None)
    again.load_masks(MASKS)
    again.load_state_dict(Pruner(seeded(Lit), 0.25, schedule=None).state_dict())
    assert all(torch.equal(again.masks[name], mask.bool()) for name, mask in MASKS.items())


def test_in_a_second_fit_other_masks_count(tmp_path: Path) -> None:
    model, pruning = seeded(Lit), PruningCallback(masks=MASKS)
    fit(tmp_path, model, pruning, max_epochs=1)
    other = {"net.0.weight": torch.ones(8, 1, 3, 3), "net.6.bias": torch.ones(10)}
    other["net.0.weight"][:, :, 0] = 0
    pruning.given_masks = GivenMasks(other)
    fit(tmp_path, model, pruning, max_epochs=1)
    assert_exactly(pruning.masks, MASKS | {"net.0.weight": MASKS["net.0.weight"] * other["net.0.weight"]})


def test_without_training_they_are_held_too(tmp_path: Path) -> None:
    """And the weights that are left make up for those that went."""
    model, pruning = seeded(Lit), PruningCallback(masks=MASKS)
    run = trainer(tmp_path, pruning)
    model.train_dataloader = digits
    oneshot(run, model)
    assert_exactly(pruning.masks)
    for name, mask in MASKS.items():
        assert not model.get_parameter(name)[mask == 0].any()
    dense, kept = seeded(Lit).net[4].weight, MASKS["net.4.weight"] == 1
    assert not torch.equal(model.net[4].weight[kept], dense[kept])


# --- and more


def test_a_target_counts_what_the_masks_remove(tmp_path: Path) -> None:
    pruning = PruningCallback(0.75, masks=MASKS, selector=PerLayer(), schedule=OneShot("1ep"))
    fit(tmp_path, seeded(Lit), pruning, Watch(), max_epochs=2)
    assert [int((~mask).sum()) for mask in pruning.masks.values()] == [54, 3456, 120, 3]
    assert all((mask <= MASKS[name].bool()).all() for name, mask in pruning.masks.items())
    assert len({entry.sparsity for entry in pruning.report.history}) == 2


def test_a_selector_that_decides_goes_on(tmp_path: Path) -> None:
    pruning = PruningCallback(masks=MASKS, selector=Threshold(quantile=0.6), schedule=OneShot("1ep"))
    fit(tmp_path, seeded(Lit), pruning, Watch(), max_epochs=2)
    assert [int((~mask).sum()) for mask in pruning.masks.values()] == [43, 2765, 96, 3]


def test_zeros_that_are_there_go_too_if_they_are_to_be_kept(tmp_path: Path) -> None:
    for keep_zeros in (False, True):
        model = seeded(Lit)
        with torch.no_grad():
            model.net[0].weight[:4] = 0
        pruning = PruningCallback(masks={"net.4.weight": MASKS["net.4.weight"]}, keep_zeros=keep_zeros)
        fit(tmp_path, model, pruning, max_epochs=1)
        gone = {name: int((~mask).sum()) for name, mask in pruning.masks.items()}
        assert gone == {"net.0.weight": 36 * keep_zeros, "net.4.weight": 2304, "net.6.weight": 0}


def test_channels_that_masks_empty_are_cut_out(tmp_path: Path) -> None:
    """The weights and biases of four neurons."""
    weight, bias = torch.ones(16, 288), torch.ones(16)
    weight[:4], bias[:4] = 0, 0
    pruning = PruningCallback(
        masks={"net.4.weight": weight, "net.4.bias": bias}, structure=Channels(), compact=True
    )
    model = seeded(Lit)
    fit(tmp_path, model, pruning, max_epochs=1)
    assert model.net[4].out_features == 12


def test_in_a_plain_loop() -> None:
    model = seeded(Lit)
    pruner = Pruner(model, masks=MASKS)
    pruner.apply_()
    pruner.step(1.0)
    assert_exactly(pruner.masks)
    assert not model.net[4].weight[MASKS["net.4.weight"] == 0].any()
    other = Pruner(seeded(Lit), 0.5, schedule=None, selector=PerLayer())
    other.load_state_dict(pruner.state_dict())
    other.prune(1.0)
    assert_exactly(other.masks)


def test_a_tied_weight_takes_the_masks_of_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    one, other = torch.ones(4, 4), torch.ones(4, 4)
    one[0], other[1] = 0, 0
    pruner = Pruner(model, masks={"0.weight": one, "1.weight": other})
    assert_exactly(pruner.masks, {"0.weight": one * other})


# --- what is wrong


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (3, r"masks=3 must be a mapping of parameter names to masks, the path of a file"),
        (
            {"net.4.wieght": torch.ones(16, 288)},
            r"masks\['net\.4\.wieght'\] fits no parameter; .*'net\.4\.weight'",
        ),
        (
            {"net.4.weight": torch.ones(288, 16)},
            r"masks\['net\.4\.weight'\] has shape \(288, 16\), its .* \(16, 288\)",
        ),
        ({"net.4.weight": torch.full((16, 288), 0.5)}, r"masks\['net\.4\.weight'\] holds 0\.5, and must be"),
        ({"net.4.weight": torch.full((16, 288), float("nan"))}, r"masks\['net\.4\.weight'\] holds nan"),
        ({"net.4.weight": [[1.0]]}, r"masks\['net\.4\.weight'\] is a list, no tensor of bool, or of 0 and 1"),
        (
            {"net.4.weight": torch.zeros(16, 288)},
            r"leave 0 of 4608 units of 'net\.4\.weight', .* at least 1",
        ),
        ({3: torch.zeros(16, 288)}, r"masks=\{3: .* must be"),
        (Lit(), r"masks\['net\.0\.weight'\] holds .*, and must be"),
    ],
)
def test_wrong_masks_are_refused_before_the_first_step(tmp_path: Path, masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruner(seeded(Lit), masks=masks)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, seeded(Lit), PruningCallback(masks=masks))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Pruner(seeded(Lit), masks=tmp_path / "nothing.pt")
    path = saved(tmp_path, {"net.4.weight": Unstructured()})
    with pytest.raises(ValueError, match=r"masks='.*masks\.pt' cannot be read"):
        Pruner(seeded(Lit), masks=path)


@pytest.mark.parametrize("part", [Rewind(), Guard("acc"), Reconstruct()], ids=lambda part: type(part).__name__)
def test_what_follows_an_event_needs_a_target(tmp_path: Path, part: Any) -> None:
    pruning = PruningCallback(masks=MASKS, **{type(part).__name__.lower(): part})
    with pytest.raises(
        ValueError, match=f"{type(part).__name__}.* follows pruning events, and without a target"
    ):
        fit(tmp_path, seeded(Lit), pruning, num_sanity_val_steps=2)


def test_without_masks_a_target_is_wanted() -> None:
    for make in (PruningCallback, lambda: Pruner(seeded(Lit))):
        with pytest.raises(ValueError, match="target=None must be a number above 0 and below 1"):
            make()
