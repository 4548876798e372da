"""Any settings at all: they train with every invariant, or are refused before the first step.

``FUZZ_CASES`` in the environment asks for more cases than the suite has time for.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, LightningModule, Trainer
from lit import Lit, digits, hooks, same, seeded, trainer
from test_contract import TARGETS, shipped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_prune import (
    Channels,
    Criterion,
    Cubic,
    Experts,
    Global,
    Guard,
    Heads,
    NofM,
    OneShot,
    PerLayer,
    PruningCallback,
    Reconstruct,
    Rewind,
    Schedule,
    Selector,
    Steps,
    Structure,
    Threshold,
)

CASES = int(os.environ.get("FUZZ_CASES", "100"))
CHUNK = 50

# --- small networks


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        return self.head((maps + self.block(maps)).mean((2, 3)))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 4, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(images.squeeze(1)).mean(1))


class Mixed(nn.Module):
    """Two of three experts for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.reshape(-1, 8)
        shares, chosen = self.router(rows).softmax(-1).topk(2)
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            found = expert(rows[row]) * shares[row, place, None]
            mixed = mixed.index_add(0, row, found.to(mixed.dtype))
        return self.head((rows + mixed).relu().view(len(images), -1, 8).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(images.flatten(1)).relu()).relu()).relu())


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)),
    "residual": Residual,
    "attentive": Attentive,
    "tied": Tied,
    "mixed": Mixed,
    "rows": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
    ),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 10),
    ),
}


class Net(Lit):
    """One of them, under automatic or manual optimization."""

    def __init__(self, name: str, manual: bool) -> None:
        super().__init__()
        self.net = NETS[name]()
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return SGD(self.parameters(), 0.05, momentum=0.9)
        first, *others = self.parameters()
        return [SGD([first], 0.05, momentum=0.9, weight_decay=0.1), Adam(others, 0.01)]


# --- settings at random, some of them wrong

MOMENTS = ["0%", "50%", "0ep", "1ep", "1st", "2st", 0.3]
FITTING = [
    OneShot("1st"),
    OneShot("50%"),
    OneShot("1ep"),
    Steps({"1st": 0.5, "2st": 1.0}),
    Steps({"1ep": 0.5, "2ep": 1.0}),
    Cubic("1st", "2st", "1st"),
]
# what fits at least sometimes, and what is wrong
ARGUMENTS: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "at": (MOMENTS, ["9ep", "soon", -1]),
    "batch": ([None], [0, 1]),  # only a budget in time, which takes long to measure, has one
    "batches": ([1, 2], [0]),
    "budget": (["units", "units", "params", "macs"], ["bytes"]),
    "cost_weight": ([0.0, 0.5], [-1.0]),
    "cols": ([1, 2, 3, 4], [0]),
    "end": (["1ep", "2ep", "3st", "4st", "100%", 0.7], ["0%", "9ep", "soon"]),
    "estimator": (["exact", "hutchinson", "fisher"], ["guess"]),
    "every": ([1, 2, 3], [0]),
    "evolutionary": ([True, False], [3]),
    "exclude": ([None, None, "*.0.*", "*head*"], ["nowhere", 3]),
    "include": ([None, "*", "*weight", "net", ["net"], nn.Linear], ["nowhere", 3]),
    "l1": ([0.0, 0.01], [-1.0]),
    "max_gigabytes": ([4.0, 1e-5], [0.0]),
    "max_drop": ([0.0, 0.05, 1.0], [-1.0]),
    "max_passes": ([100_000], [20, 0]),
    "max_seconds": ([600], [0.0]),
    "mean": ([0.5, 1.0], [-1.0]),
    "minimum": ([1, 2, 0.5], [0, 9]),
    "most": ([1.0, 0.9, 0.5], [0.0, 1.5]),
    "mode": (["max", "min"], ["middle"]),
    "m": ([4, 2, 8], [0]),
    "monitor": (["acc"], ["loss", "nothing", ""]),
    "n": ([1, 2], [0, 9]),
    "normalize": ([None, "l2", "mean", "max", "cost"], ["sum"]),
    "p": ([1.0, 2.0], [0.0, float("nan")]),
    "pattern": ([None], [(4, 2)]),
    "patience": ([0, 1], [-1]),
    "positions": ([10, 40], [0]),
    "population": ([2, 3], [0]),
    "probes": ([1, 2], [0]),
    "quantile": ([0.3, 0.5], [1.5]),
    "ridge": ([0.0, 1e-3, 1.0], [-1.0]),
    "round_to": ([1, 2, 4], [0]),
    "rounds": ([1, 2], [0]),
    "rows": ([1, 2, 3, 4], [0]),
    "seed": ([0, 1], ["x"]),
    "selector": ([Global(), PerLayer()], [None]),
    "table": ([None], [3, "none.json"]),
    "shares": (
        [{"1ep": 1.0}, {"1st": 0.5, "1ep": 1.0}, {"50%": 1.0}],
        [{"1ep": 1.0, "1st": 0.5}, {"9ep": 1.0}, {}],
    ),
    "spread": ([0.3, 1.0], [-1.0]),
    "start": (MOMENTS, ["9ep", "soon", -1]),
    "std": ([0.5, 1.0], [-9.0]),
    "target": ([0.3, 0.5, 0.75, 0.95], [1e-6, 1 - 1e-9, 1.0, 0.0, None, "half"]),
    "to": (["0ep", "0ep", "1st", "random"], ["2ep", "soon"]),
    "value": ([0.05, 0.1], [-1.0, 1e-9]),
    "weights": ([True, True, False], ["yes"]),
}
OFTEN = {"every": (["1ep", "1st", "2st", "50%"], ["0st", "often"])}
COSTLY = ("batches", "population", "probes", "rounds")  # where the default takes long
# of these, one is wanted
LEVELS = ("value", "quantile", "mean", "std")


def drawn(draw: random.Random, name: str, values: Mapping[str, Any] = ARGUMENTS) -> Any:
    right, wrong = values[name]
    return draw.choice(wrong if draw.random() < 0.03 else right)


def built(draw: random.Random, part: type[Any], values: Mapping[str, Any] = ARGUMENTS) -> Any:
    """A part with some of its arguments, of which a wrong one is drawn now and then."""
    parameters = inspect.signature(part).parameters.values()
    chosen = [
        each.name
        for each in parameters
        if each.default is each.empty or each.name in COSTLY or draw.random() < 0.3
    ]
    if part is Threshold:
        chosen = [draw.choice(LEVELS)]
    return part(**{name: drawn(draw, name, values) for name in chosen})


def settings(draw: random.Random) -> dict[str, Any]:
    """Arguments of a PruningCallback.

    Raises:
        ValueError: If a part refuses its own.
    """
    structure, criterion, selector, schedule = (
        draw.choice(shipped(base)) for base in (Structure, Criterion, Selector, Schedule)
    )
    decides = selector in TARGETS or selector is NofM
    return {
        "structure": built(draw, structure),
        "criterion": built(draw, criterion),
        "selector": built(draw, selector),
        # one that fits, often, so that the rest is seen
        "schedule": draw.choice(FITTING) if draw.random() < 0.6 else built(draw, schedule, ARGUMENTS | OFTEN),
        "rewind": built(draw, Rewind) if draw.random() < 0.2 else None,
        "guard": built(draw, Guard) if draw.random() < 0.2 else None,
        "reconstruct": built(draw, Reconstruct) if draw.random() < 0.2 else None,
        "compact": way_to_compact(draw.random(), structure),
        "target": None if decides else drawn(draw, "target"),
    }


def way_to_compact(drawn: float, structure: type[Structure]) -> Any:
    """At each event only what is cut as a whole, for more would be refused."""
    return "each" if drawn > 0.6 and structure in (Channels, Heads, Experts) else drawn < 0.1


def options(draw: random.Random, manual: bool) -> dict[str, Any]:
    """Of a Trainer."""
    return {
        "max_epochs": draw.choice([1, 2, 2, 2, 3]),
        "limit_train_batches": draw.choice([2, 3, 3]),
        "limit_val_batches": 1,
        "accumulate_grad_batches": 1 if manual else draw.choice([1, 1, 2]),
        "gradient_clip_val": None if manual else draw.choice([None, 0.1]),
        "precision": draw.choice(["32-true", "32-true", "64-true", "bf16-mixed"]),
        "num_sanity_val_steps": draw.choice([0, 1]),
        "inference_mode": draw.choice([True, False]),
    }


# --- what holds


class Watch(Callback):
    """After each batch: what is masked is 0, and stays masked unless a guard goes back; no layer is empty."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.steps = 0
        self.before: dict[str, Tensor] = {}

    def on_train_batch_end(self, run: Trainer, module: LightningModule, *_: Any) -> None:
        self.steps = run.global_step
        self.check(module)

    def check(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        for name, mask in self.pruning.masks.items():
            assert mask.shape == parameters[name].shape
            assert mask.dtype == torch.bool
            # of a smaller network, a layer may have one unit left that only its bias drives; experts go whole
            smaller = self.pruning._state.network.plan is not None
            assert mask.any() or smaller or isinstance(self.pruning.structure, Experts), name
            assert not parameters[name][~mask].count_nonzero(), name
            if self.pruning.guard is None and name in self.before and self.before[name].shape == mask.shape:
                assert not (mask & ~self.before[name]).any(), name
        self.before = {name: mask.clone() for name, mask in self.pruning.masks.items()}


DATA: DataLoader[Any] = digits(8, 64)


def outcome(folder: Path, seed: int) -> str:
    """What becomes of one case: how it was refused, or that it trained."""
    draw = random.Random(seed)
    try:
        chosen = settings(draw)
        pruning = PruningCallback(**chosen)
    except ValueError:
        return "refused at construction"
    manual = draw.random() < 0.2
    # the others have no heads, or no experts
    needed = {Heads: "attentive", Experts: "mixed"}.get(type(pruning.structure))
    name = needed or draw.choice(list(NETS))
    how = options(draw, manual)
    model, watch = seeded(lambda: Net(name, manual)), Watch(pruning)
    names, keys = [each for each, _ in model.named_parameters()], list(model.state_dict())
    run = trainer(folder, pruning, watch, **how)
    ended = "trained"
    try:
        run.fit(model, DATA, DATA)
    except ValueError as error:
        # without a sanity check, only the first validation tells that nothing logs a guard's metric
        if watch.steps and "monitor='nothing' was not measured" not in str(error):
            raise
        ended = "refused before the first step"
    except RuntimeError as error:
        if "removed nothing at the last pruning event" not in str(error):
            raise
        ended = "removed nothing"
    assert hooks(model, run) == 0
    if ended != "trained":
        return ended
    watch.check(model)
    assert [each for each, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    check_state(pruning, model)
    check_count(pruning)
    return ended


def check_state(pruning: PruningCallback, model: LightningModule) -> None:
    """It is plain, and comes back."""
    file = io.BytesIO()
    torch.save(pruning.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = PruningCallback(0.5)
    again.load_state_dict(state)
    assert same(again.state_dict(), pruning.state_dict())
    masks, report = pruning.masks, again.report_of(copy.deepcopy(model), state)
    if pruning._state.network.plan is None:  # a compacted network keeps the report that was made then
        assert report.removed == sum(mask.numel() - int(mask.sum()) for mask in masks.values())


def check_count(pruning: PruningCallback) -> None:
    """Where a number of units is promised, it is met to the unit."""
    pruner, selector = pruning._state.network.pruner, pruning.selector
    promised = type(selector) is Global and selector.budget == "units"
    if not promised or pruning.guard is not None or pruner is None or not pruning.settled or pruner.protected:
        return
    structure = pruning.structure
    if isinstance(structure, Channels) and (structure.round_to, structure.minimum) != (1, 1):
        return
    total = sum(group.size for group in pruner.groups)
    kept = sum(int(group.kept(pruner.masks).sum()) for group in pruner.groups)
    assert kept == total - round(pruning.target * total)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("chunk", range(0, CASES, CHUNK))
def test_any_settings_train_with_all_invariants_or_are_refused_before_the_first_step(
    tmp_path: Path, chunk: int
) -> None:
    found: Counter[str] = Counter()
    for seed in range(chunk, min(chunk + CHUNK, CASES)):
        print(f"case {seed}")
        found[outcome(tmp_path, seed)] += 1
    # experts are refused by most criteria, and each wrong argument of any part is, so that many are refused
    assert found["trained"] > sum(found.values()) / 10, found
