"""Pruning of parameters that processes divide: against one process, and against what is easy to see."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightnings import DeepSpeedStrategy, FSDPStrategy
from lit import same
from torch import Tensor, nn
from two_plain import PLAIN
from two_shards import FITS, REFUSED, pruning, run

from lightning_prune.criteria.base import Criterion
from lightning_prune.export.compacted import masks_in
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.radix import bracket, find_boundary
from lightning_prune.selectors.selection import remove_lowest, remove_up_to
from lightning_prune.statistics.sums import Statistics
from lightning_prune.training.trainer_queries import check_strategy
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MaskStore, pack
from lightning_prune.units.shards import Shards
from lightning_prune.units.slices import ElementSlice

SHAPES = {
    "net.0.weight": (3, 1, 3, 3),
    "net.3.weight": (17, 108),
    "net.5.weight": (1, 17),
    "net.6.weight": (10, 1),
}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process finds."""
    return {
        "taylor": run(folder, pruning(*FITS["taylor"][:2]), save=folder / "one.ckpt"),
        "gradient": run(folder, pruning(*FITS["gradient"][:2])),
    }


@pytest.fixture(scope="module")
def found(folder: Path, alone: dict[str, Any]) -> Found:
    """What two processes find, by rank."""
    script = Path(__file__).parents[1] / "two_shards.py"
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)],
            env={**os.environ, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in both]
    finally:
        for each in both:
            each.kill()
    assert [each.returncode for each in both] == [0, 0], said
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


# --- several processes are threads here


class Threads(Shards):
    """Processes of one program."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(board))
        self._board = board
        self._barrier = barrier

    def _all(self, mine: Any) -> list[Any]:
        self._board[self.rank] = mine
        self._barrier.wait(30)
        every = list(self._board)
        self._barrier.wait(30)
        return every

    def add_up(self, numbers: Tensor) -> Tensor:
        return torch.stack(self._all(numbers)).sum(0)

    def maximum(self, numbers: Tensor) -> Tensor:
        return torch.stack(self._all(numbers)).max(0).values

    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        every = torch.cat(self._all(rows))
        return rows[:0] if self.rank else every

    def own(self, whole: Tensor) -> Tensor:
        parts = whole.chunk(self.size)
        return parts[self.rank] if self.rank < len(parts) else whole[:0]

    def reshard(self) -> None:
        pass


def together(count: int, work: Callable[[Shards], Any]) -> list[Any]:
    """What so many processes find."""
    board: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_what_is_not_divided_keeps_its_whole_mask() -> None:
    """Beside parameters that are divided."""
    model, mask = nn.Linear(3, 2), torch.tensor([[True, False, True], [False, True, True]])
    state = {"weight": {"bits": pack(mask), "shape": [2, 3]}}

    def loaded(shards: Shards) -> tuple[Tensor, Any]:
        store = MaskStore(model, ["weight"], shards)
        store.load_state_dict(state)
        return store.masks["weight"], store.state_dict()

    for found, again in together(2, loaded):
        assert torch.equal(found, mask)
        assert torch.equal(again["weight"]["bits"], state["weight"]["bits"])


VALUES = st.lists(st.integers(-3, 3) | st.sampled_from([0.0, -0.0, 0.5]), min_size=1, max_size=30)


@settings(max_examples=50)
@given(VALUES, st.integers(1, 4), st.data())
def test_all_processes_find_the_boundary_of_all_scores(
    values: list[float], count: int, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(values)), min_size=count - 1, max_size=count - 1).map(sorted))
    rank = data.draw(st.integers(1, len(values)))
    share = data.draw(st.floats(0.001, 1))
    scores = torch.tensor(values, dtype=torch.float32)
    parts = scores.tensor_split(cuts)  # some of them empty
    expected = find_boundary(lambda: [scores], rank), bracket(scores, share)

    def work(shards: Shards) -> Any:
        mine = parts[shards.rank]
        return find_boundary(lambda: [mine], rank, shards), bracket(mine, share, shards)

    assert together(count, work) == [expected] * count


class Given(Criterion):
    """The weights themselves."""

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        return group.weights[0]


class Rows(Candidates):
    """Units of which some rows are here; sizes are those of all."""

    def __init__(self, name: str, weights: Tensor, kept: Tensor, shards: Shards, misled: Tensor | None) -> None:
        whole = UnitGroup(name, (ElementSlice(name, weights),))
        mine = UnitGroup(name, (ElementSlice(name, shards.own(weights)),))
        zeros = Statistics.zeros((), kept, torch.float32)
        super().__init__(whole, shards.own(kept).clone(), Given(), zeros, torch.float32, shards)
        self._here = mine
        self._ranges = [(0, mine.shape[0])]
        self._misled = misled

    def sample(self) -> Any:
        return super().sample() if self._misled is None else iter([self._misled])


LAYERS = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 3)).flatmap(
        lambda shape: st.lists(
            st.tuples(st.integers(-3, 3), st.booleans()),
            min_size=shape[0] * shape[1],
            max_size=shape[0] * shape[1],
        ).map(lambda units: (shape, units))
    ),
    min_size=1,
    max_size=3,
)


@given(LAYERS, st.integers(2, 4), st.data())
def test_shards_lose_what_the_whole_loses(layers: Any, count: int, data: st.DataObject) -> None:
    weights = [torch.tensor([float(u) for u, _ in units]).view(shape) for shape, units in layers]
    kept = [torch.tensor([stays for _, stays in units]).view(shape) for shape, units in layers]
    for each in kept:
        each[-1, -1] = True  # no group is empty
    size = sum(each.numel() for each in kept)
    lowest = data.draw(st.integers(0, size))
    misled = data.draw(st.none() | st.lists(st.sampled_from([-9.0, 0.0, 1.0, 9.0]), min_size=1, max_size=3))

    def work(shards: Shards) -> Any:
        sample = None if misled is None else torch.tensor(misled)
        groups = [
            Rows(f"{number}", values, stays, shards, sample)
            for number, (values, stays) in enumerate(zip(weights, kept, strict=True))
        ]
        remove_lowest(groups, lowest)
        return [each.kept for each in groups], [(each.left, each.protected) for each in groups]

    ((whole, counts),) = together(1, work)
    parts = together(count, work)
    for number, stays in enumerate(whole):
        assert torch.equal(torch.cat([masks[number] for masks, _ in parts]), stays)
    assert [told for _, told in parts] == [counts] * count


@given(LAYERS, st.integers(2, 4), st.integers(-4, 4))
def test_shards_fall_to_a_level_as_the_whole_does(layers: Any, count: int, level: int) -> None:
    (shape, units), *_ = layers
    weights = torch.tensor([float(unit) for unit, _ in units]).view(shape)

    def work(shards: Shards) -> Any:
        rows = Rows("one", weights, torch.ones(shape, dtype=torch.bool), shards, None)
        remove_up_to(rows, level)
        return rows.kept

    (whole,) = together(1, work)
    assert torch.equal(torch.cat(together(count, work)), whole)
    assert whole.any()


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 3))
def test_scores_that_are_not_finite_stop_all_processes(place: int, count: int, wrong: int) -> None:
    weights = torch.arange(41.0).view(41, 1)
    weights[place] = [math.nan, math.inf, -math.inf, 0.0][wrong]

    def work(shards: Shards) -> str:
        rows = Rows("one", weights, torch.ones(41, 1, dtype=torch.bool), shards, None)
        try:
            remove_lowest([rows], 7)
        except ValueError as error:
            assert bool(rows.kept.all())
            return str(error)
        return ""

    said = together(count, work)
    assert all(("must give finite scores" in each) == (wrong < 3) for each in said), said


# --- two processes, without a Trainer


@pytest.mark.parametrize("name", PLAIN)
def test_masks_are_those_of_the_whole_model(found: Found, name: str) -> None:
    for each in found:
        seen = each["plain"][name]
        assert len(seen["mine"]) == 3
        for mine, theirs in zip(seen["mine"], seen["theirs"], strict=True):
            assert same(mine, theirs)
        assert not torch.equal(mine["3.weight"], seen["mine"][0]["3.weight"])
        sparsity, expected = seen["sparsity"]
        assert sparsity == expected > 0.4
        protected, expected = seen["protected"]
        assert protected == expected
        assert seen["memory"] == 0


def test_no_layer_is_emptied(found: Found) -> None:
    seen = found[0]["plain"]["all but the last"]
    assert seen["protected"][0] == {"0.weight", "3.weight", "5.weight", "6.weight"}
    assert [int(mask.sum()) for mask in seen["mine"][-1].values()] == [1, 1, 1, 1]


def test_masks_from_outside_are_those_of_the_whole_model(found: Found) -> None:
    for each in found:
        given, begun, pruned, *alone = each["given masks"]
        assert same([begun, pruned], alone)
        assert torch.equal(begun["3.weight"], given["3.weight"])
        assert torch.equal(begun["3.bias"], given["3.bias"])
        assert not (pruned["3.weight"] & ~given["3.weight"]).any()
        assert sum(int((~mask).sum()) for name, mask in pruned.items() if "bias" not in name) == round(
            0.6 * 1890
        )


def test_what_processes_exchange_does_not_grow_with_the_model(found: Found) -> None:
    histogram = 8 * 2**16
    small, large = (found[0]["sent"][width] for width in (16, 16_384))
    for seen in (small, large):
        assert {operation for operation, _ in seen["prune"]} == {"allreduce_.default"}
        assert max(size for _, size in seen["prune"]) == histogram
        assert seen["observe"] == [("allreduce_.default", 8)]
        assert seen["apply"] == []
    # that it would have been seen
    assert sum(size for _, size in large["control"]) > 16_384 * 74
    assert sum(size for _, size in large["prune"]) <= sum(size for _, size in small["prune"])


def test_what_needs_the_whole_model_says_so(found: Found) -> None:
    for each in found:
        said = each["refused plain"]
        assert [line.split(" needs whole parameters")[0] for line in said[:4]] == [
            "compact",
            "export_onnx",
            "save_packed",
            "sensitivity",
        ]
        assert said[4].startswith("Channels(")
        assert "take Unstructured() with budget='units'" in said[4]
        assert "take selector=PerLayer(), or Global() without other arguments" in said[5]
        for name, line in zip(("load_packed", "load_compact"), said[6:], strict=True):
            assert line.startswith(f"{name} needs whole parameters")
            assert line.endswith(": load into the whole model, and divide it then.")
        assert "masks go along in Pruner.state_dict()" in said[0]


def test_masks_that_were_divided_go_to_the_whole_model_in_a_state(found: Found) -> None:
    for each in found:
        error, (kept, left) = each["divided masks"]
        assert "is divided among processes, and its parameter is not: load the Pruner.state_dict()" in error
        assert kept == left > 0


# --- two processes, under a Trainer


needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on the CPU"
)


def lowest(weights: dict[str, Tensor], before: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks without the ``count`` smallest, by a sort; what is gone goes first, of equals the later."""
    names = list(before)
    sizes = torch.cat([torch.where(before[name], weights[name].abs(), -1.0).flatten() for name in names])
    order = sizes.flip(0).argsort(stable=True)
    flat = torch.ones(len(sizes), dtype=torch.bool)
    flat[len(sizes) - 1 - order[:count]] = False
    parts = flat.split([before[name].numel() for name in names])
    return {name: part.view(before[name].shape) for name, part in zip(names, parts, strict=True)}


@needs_fsdp
def test_magnitude_removes_the_smallest_of_all(found: Found) -> None:
    seen = found[0]["magnitude"]
    assert {name: tuple(mask.shape) for name, mask in seen["masks"][0].items()} == SHAPES
    counts = []
    for epoch in (1, 2, 3):
        before, after = seen["masks"][epoch - 1 : epoch + 1]
        counts.append(sum(int((~mask).sum()) for mask in after.values()))
        expected = lowest(seen["weights before"][epoch], before, counts[-1])
        assert same(after, expected)
    assert counts[0] == 0 < counts[1] < counts[2] == round(0.6 * SIZE)


@needs_fsdp
@pytest.mark.parametrize("name", ["taylor", "gradient", "from one"])
def test_masks_are_those_of_one_process_but_for_float_error(
    found: Found, alone: dict[str, Any], name: str
) -> None:
    mine, theirs = found[0][name], alone["taylor" if name == "from one" else name]
    steps = len(mine["losses"])
    assert mine["losses"] == pytest.approx(theirs["losses"][-steps:], rel=1e-4)
    assert mine["sparsity"] == theirs["sparsity"]
    groups = [list(SHAPES)] if name != "gradient" else [[layer] for layer in SHAPES]
    for event in (-2, -1):
        for names in groups:
            stays, wanted, scores = (
                torch.cat([each[event][layer].flatten() for layer in names])
                for each in (mine["masks"], theirs["masks"], theirs["scores"])
            )
            assert int(stays.sum()) == int(wanted.sum()) < len(wanted)
            level = scores[~wanted].max()
            assert bool(((scores - level).abs()[stays != wanted] < 1e-4 * level).all())


@needs_fsdp
def test_steps_by_hand_are_seen_and_clipped_like_others(found: Found) -> None:
    by_hand, seen = found[0]["by hand"], found[0]["taylor"]
    assert by_hand["losses"] == seen["losses"]
    assert same(by_hand["masks"], seen["masks"])


@needs_fsdp
@pytest.mark.parametrize("name", [*FITS, "from one", "by hand"])
def test_masked_weights_and_their_momentum_are_zero_after_every_step(found: Found, name: str) -> None:
    assert [each[name]["wrong"] for each in found] == [0, 0]
    assert sum(each[name]["masked"] for each in found) == round(0.6 * SIZE)
    assert found[0][name]["kinds"] == {"DTensor"}


@needs_fsdp
@pytest.mark.parametrize("name", FITS)
def test_reports_count_what_is_in_all_processes(found: Found, name: str) -> None:
    for each in found:
        seen = each[name]
        masks = seen["masks"][-1]
        assert seen["kept"] == {layer: int(mask.sum()) for layer, mask in masks.items()}
        assert seen["width"] == {layer: int(mask.flatten(1).any(1).sum()) for layer, mask in masks.items()}
        assert seen["sparsity"][-1] == round(0.6 * SIZE) / SIZE


@needs_fsdp
@pytest.mark.parametrize("name", ["taylor", "gradient"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(found: Found, name: str) -> None:
    for each in found:
        resumed, seen = each[f"{name} resumed"], each[name]
        assert len(resumed["losses"]) == 10
        assert resumed["losses"] == seen["losses"][10:]
        assert resumed["kept"] == seen["kept"]
        assert same(resumed["weights"], seen["weights"])
        assert same(resumed["masks"], seen["masks"][2:])


@needs_fsdp
def test_a_checkpoint_of_two_processes_goes_on_in_one(found: Found, folder: Path) -> None:
    path = folder / "gradient.ckpt"
    seen = found[0]["gradient"]
    saved = masks_in(torch.load(path, weights_only=True))
    assert same(saved, seen["masks"][1])
    resumed = run(folder, pruning(*FITS["gradient"][:2]), resume=path)
    assert resumed["losses"] == pytest.approx(seen["losses"][10:], rel=1e-4)
    assert resumed["kept"] == seen["kept"]


@needs_fsdp
def test_a_step_with_inf_in_one_process_is_left_out_in_all(found: Found) -> None:
    for each in found:
        assert each["broken"] == {"counts": [{1}, {2}, {2}, {3}, {4}] + [{0}] * 5, "left out": 1}


# --- what cannot work


WHY = {
    "Channels": "strategy=ModelParallelStrategy splits the model up: Channels",
    "macs": "strategy=ModelParallelStrategy splits the model up: .*budget='macs'",
    "params": r"take selector=PerLayer\(\), or Global\(\) without other arguments",
    "most": r"take selector=PerLayer\(\), or Global\(\) without other arguments",
    "normalize": r"take selector=PerLayer\(\), or Global\(\) without other arguments",
    "Blocks": r"take structure=Unstructured\(\)",
    "Threshold": r"take selector=PerLayer\(\), or Global\(\) without other arguments",
    "ParticleFilter": r"take selector=PerLayer\(\), or Global\(\) without other arguments",
    "LAMP": "take a criterion that scores each weight by itself",
    "Random": "take a criterion that scores each weight by itself",
    "ActivationNorm": "take a criterion that scores each weight by itself",
    "Oracle": "take a criterion that scores each weight by itself",
    "Rewind": "splits the model up: Rewind",
    "Guard": "splits the model up: Guard",
    "compact": "splits the model up: compact=True",
}


@needs_fsdp
@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_parameters_is_refused_before_the_first_step(found: Found, name: str) -> None:
    for each in found:
        said, steps = each["refused"][name]
        assert steps == 0
        with pytest.raises(ValueError, match=WHY[name]):
            raise ValueError(said)


@needs_fsdp
def test_other_divisions_are_refused_before_the_first_step(found: Found) -> None:
    for each in found:
        said, steps = each["columns"]
        assert steps == 0
        assert said.startswith("parameter 'net.3.weight' is divided as (Shard(dim=1),)")
        assert "as fully_shard does it" in said


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_with_parameters_of_their_own_are_refused(kind: type[Any]) -> None:
    strategy = object.__new__(kind)  # these want an accelerator
    with pytest.raises(ValueError, match=f"strategy={kind.__name__} keeps .*: use DDP or FSDP2"):
        check_strategy(strategy, ())
