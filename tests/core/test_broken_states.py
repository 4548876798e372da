"""Broken states, plans and files: each is refused before anything has changed, or does no harm."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightnings import NAME, ModelCheckpoint
from lit import Lit, digits, fit, same, seeded, trainer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lightning_prune import (
    Channels,
    Cubic,
    Guard,
    NofM,
    Oracle,
    PruningCallback,
    Rewind,
    Taylor,
    load_compact,
    load_packed,
    save_packed,
)
from lightning_prune.cli import PruningCommands, cli_of
from lightning_prune.export.compacted import plans_in

WHEN = Cubic("1ep", "3ep")
STATE = "PruningCallback"


class Scheduled(Lit):
    """With a learning rate that falls, and a metric in each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [MultiStepLR(optimizer, [2, 3])]


KINDS: dict[str, Callable[[], PruningCallback]] = {
    "statistics": lambda: PruningCallback(0.5, criterion=Taylor(), schedule=WHEN),
    "pattern": lambda: PruningCallback(selector=NofM(2, 4), schedule=WHEN),
    "channels": lambda: PruningCallback(0.5, criterion=Taylor(), structure=Channels(), schedule=WHEN),
    "compacted": lambda: PruningCallback(0.5, structure=Channels(), schedule=WHEN, compact=True),
    "cut": lambda: PruningCallback(
        0.5, criterion=Taylor(), structure=Channels(), schedule=Cubic("0ep", "3ep"), compact="each"
    ),
    "rewind": lambda: PruningCallback(0.5, schedule=WHEN, rewind=Rewind("4st")),
    "guard": lambda: PruningCallback(0.5, schedule=WHEN, guard=Guard("acc", max_drop=1.0)),
    "held": lambda: PruningCallback(0.5, criterion=Oracle(batches=2), structure=Channels(), schedule=WHEN),
}


@functools.cache
def checkpoint(kind: str) -> dict[str, Any]:
    """Of a fit of four epochs, between its events; at its end where it is compacted."""
    folder = Path(tempfile.mkdtemp())
    pruning = KINDS[kind]()
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = fit(folder, seeded(Scheduled), pruning, keep, enable_checkpointing=True, max_epochs=4)
    path = folder / "epoch=2.ckpt"
    if pruning.compact is True:
        run.save_checkpoint(path)
    return torch.load(path, weights_only=True)


# --- what may be wrong with a tree of tensors and plain values

JUNK = [
    *(None, True, "", "x", 0, 1, -1, 3, 10**30, -(10**30), 0.5, -0.5, float("nan"), float("inf")),
    *([], {}, [1, 2], ["x", None], {"x": 1}, {0: {}}, [[[]]], (0, 1)),
    *(
        torch.zeros(3),
        torch.tensor(2),
        torch.tensor([], dtype=torch.uint8),
        torch.ones(2, 2, dtype=torch.complex64),
    ),
    torch.ones(3, requires_grad=True),
]


def changed(draw: Callable[[Any], Any], value: Any) -> Any:
    """The value, with one thing about it that is another."""
    choices = list(JUNK)
    choices += [[value], {"x": value}, (value, value)]
    if torch.is_tensor(value):
        choices += [value[..., :-1] if value.ndim else value.expand(2), value.flatten(), value.unsqueeze(0)]
        choices += [value.to(dtype) for dtype in (torch.bool, torch.int32, torch.float64, torch.complex64)]
        choices += [value.to_sparse(), value.to("meta"), value.flip(0) if value.ndim else -value]
        choices += [value.double() * torch.nan, value.double().requires_grad_()]
    if isinstance(value, list | tuple):
        choices += [value[::-1], value[:-1], [*value, *value[-1:]], [*value[:1], *value], [*value, 10**6]]
    if isinstance(value, dict):
        choices += [value | {junk: value} for junk in ("x", 0)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        choices += [value + 1, -value, value * 2, float(value), str(value)]
    if isinstance(value, str):
        choices += [value + "x", value[:-1], value.encode()]
    return draw(st.sampled_from(choices))


def mutated(draw: Callable[[Any], Any], tree: Any) -> Any:
    """A copy of a tree in which an entry is missing, added, renamed, swapped with another, or changed."""
    if not isinstance(tree, dict | list | tuple) or not tree or draw(st.integers(0, 9)) == 0:
        return changed(draw, tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw(st.sampled_from(keys))
    parts = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    how = draw(st.sampled_from(["deeper"] * 6 + ["without", "renamed", "swapped"]))
    if how == "deeper":
        parts[key] = mutated(draw, parts[key])
    elif how == "without":
        del parts[key]
    elif how == "renamed":
        parts = {f"{name}x" if name == key else name: part for name, part in parts.items()}
    else:
        other = draw(st.sampled_from(keys))
        parts[key], parts[other] = parts[other], parts[key]
    return parts if isinstance(tree, dict) else type(tree)(parts.values())


def bits(model: nn.Module) -> Any:
    """All that may change of a model."""
    return (
        copy.deepcopy(model.state_dict()),
        repr(model),
        {name: id(each) for name, each in model.named_parameters()},
    )


def check_masked(model: nn.Module, masks: Any) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == parameters[name].shape
        assert not parameters[name][~mask].count_nonzero()


# --- states


def take_over(pruning: PruningCallback, model: Lit, state: Any) -> None:
    pruning.load_state_dict(state)
    pruning.bind(model)


@functools.cache
def bound(kind: str) -> tuple[Lit, PruningCallback]:
    """A model and its callback, as a checkpoint has them."""
    saved, model, pruning = checkpoint(kind), seeded(Scheduled), KINDS[kind]()
    load_compact(saved, model)
    pruning.load_state_dict(saved["callbacks"][STATE])
    pruning.bind(model, torch.zeros(1, 1, 8, 8))
    return model, pruning


@pytest.mark.filterwarnings("ignore:The checkpoint's network is compacted:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, derandomize=True)
@given(data=st.data())
def test_a_broken_state_is_refused_before_anything_changes_or_does_no_harm(kind: str, data: Any) -> None:
    model, pruning = bound(kind)
    good = checkpoint(kind)["callbacks"][STATE]
    before, masks = bits(model), copy.deepcopy(dict(pruning.masks))
    state = mutated(data.draw, good)
    try:
        take_over(pruning, model, state)
    except ValueError:
        assert same(bits(model), before)
        assert same(dict(pruning.masks), masks)
        if kind != "cut":  # without its plan it is the state of a network that began as small
            with pytest.raises(ValueError, match=r"state|mask"):
                PruningCallback(0.5).report_of(copy.deepcopy(model), state)
    else:
        check_masked(model, pruning.masks)
        torch.save(pruning.state_dict(), os.devnull)
    # nothing of it is left behind
    if kind in ("compacted", "cut"):
        model.load_state_dict(dict(checkpoint(kind)["state_dict"]))
    else:
        load_compact(checkpoint(kind), model)
    pruning.load_state_dict(good)
    pruning.bind(model)


@pytest.mark.parametrize("kind", ["statistics", "cut", "rewind", "guard"])
@settings(max_examples=12, derandomize=True)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fit_from_a_broken_state_is_refused_before_it_trains_or_goes_on(kind: str, data: Any) -> None:
    good = checkpoint(kind)
    state = mutated(data.draw, good["callbacks"][STATE])
    model, pruning = seeded(Scheduled), KINDS[kind]()
    steps: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "broken.ckpt")
        torch.save({**good, "callbacks": {STATE: state}}, path)
        model.on_train_batch_end = lambda *_: steps.append(1)
        try:
            fit(Path(folder), model, pruning, ckpt_path=path, max_epochs=5)
        except ValueError:
            assert not steps
        else:
            check_masked(model, pruning.masks)


def with_entry(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(state)
    *way, last = path
    functools.reduce(lambda node, key: node[key], way, changed)[last] = value
    return changed


WEIGHT = "net.0.weight"
BROKEN: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "text": (
        "statistics",
        ("agenda", "steps"),
        "x",
        r"agenda\.steps is 'x', expected a whole number of at least 0",
    ),
    "huge": ("statistics", ("pruner", "left_out"), 10**30, r"pruner\.left_out is 1000.*000, expected a whole"),
    "more": (
        "statistics",
        ("agenda", "odd"),
        1,
        "agenda has an entry 'odd', expected steps, stopped, handled, asked, given",
    ),
    "list": ("statistics", ("pruner", "masks"), [], r"pruner\.masks is \[\], expected a dict"),
    "name": ("statistics", ("pruner", "masks", 3), {}, r"pruner\.masks's key is 3, expected text"),
    "bits": (
        "statistics",
        ("pruner", "masks", WEIGHT, "bits"),
        torch.zeros(9),
        r"\['net\.0\.weight'\]\.bits is a tensor of shape \(9,\) and torch.float32, expected a tensor of",
    ),
    "short": (
        "statistics",
        ("pruner", "masks", WEIGHT, "bits"),
        torch.zeros(8, dtype=torch.uint8),
        r"a mask of shape \(8, 1, 3, 3\) needs 9 packed bytes",
    ),
    "version": ("statistics", ("version",), "1", "version '1', this lightning_prune reads 1: install"),
    "metric": ("guard", ("history", 0, "metric"), "good", r"history\[0\]\.metric is 'good', expected a number"),
    "share": ("guard", ("judge", "reached"), 1.5, r"judge\.reached is 1\.5, expected a number in \[0, 1\]"),
    "empty": ("held", ("held", 1), [], r"held\[1\] is \[\], expected a batch at least"),
    "places": (
        "compacted",
        ("pruner", "plan", "cuts", 0, 3),
        [0, 2, 1],
        r"pruner\.plan\.cuts\[0\]\[3\] should be places below its size, in ascending order",
    ),
    "report": (
        "compacted",
        ("pruner", "report", "params"),
        0,
        r"report\.params is 0, expected a whole number of",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_error_says_where_what_was_found_and_what_is_expected(case: str) -> None:
    kind, path, value, message = BROKEN[case]
    model, pruning = seeded(Scheduled), KINDS[kind]()
    before = bits(model)
    state = with_entry(checkpoint(kind)["callbacks"][STATE], path, value)
    with pytest.raises(ValueError, match=message):
        take_over(pruning, model, state)
    assert same(bits(model), before)
    assert pruning.masks == {}


ELSEWHERE: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "snapshot": (
        "rewind",
        ("snapshot", "weights", WEIGHT),
        torch.zeros(3),
        r"snapshot: weights\['net\.0\.weight'\]",
    ),
    "rate": (
        "rewind",
        ("snapshot", "optimizers", 0, "param_groups", 0, "lr"),
        "high",
        r"snapshot: optimizers\[0\]\['param_groups'\]\[0\]\['lr'\] is 'high', expected a number",
    ),
    "schedule": ("rewind", ("snapshot", "schedules"), [], r"snapshot: schedules is \(\), expected 1 of them"),
    "group": (
        "rewind",
        ("snapshot", "optimizers", 0, "param_groups", 0, "params"),
        [*range(99)],
        r"optimizers\[0\]\.param_groups should be the same parameters in each group",
    ),
    "good": ("guard", ("judge", "good", "weights", WEIGHT), torch.zeros(3), r"judge\.good: weights\["),
    "held": (
        "held",
        ("held", 1, 0),
        "no batch",
        r"the checkpoint's pruning state: training_step fails with .* for held\[1\]",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_is_brought_back_later_is_looked_at_before_training(tmp_path: Path, case: str) -> None:
    kind, path, value, message = ELSEWHERE[case]
    good = checkpoint(kind)
    file = tmp_path / "broken.ckpt"
    state = with_entry(good["callbacks"][STATE], path, value)
    torch.save({**good, "callbacks": {STATE: state}}, file)
    model = seeded(Scheduled)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model, KINDS[kind](), ckpt_path=file, max_epochs=5)
    assert same(model.state_dict(), good["state_dict"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_plain_and_comes_back_as_it_was(kind: str) -> None:
    saved = checkpoint(kind)  # read with weights_only=True
    _, pruning = bound(kind)
    again = pruning.state_dict()
    assert same({**again, "settings": None}, {**saved["callbacks"][STATE], "settings": None})
    assert again["settings"] == saved["callbacks"][STATE]["settings"]


def test_states_of_earlier_versions_load() -> None:
    older = copy.deepcopy(checkpoint("statistics")["callbacks"][STATE])
    for entry in ("judge", "snapshot", "held"):
        del older[entry]
    del older["agenda"]["stopped"], older["settings"]["rewind"], older["settings"]["guard"]
    del older["pruner"]["frozen"]
    model, pruning = seeded(Scheduled), KINDS["statistics"]()
    pruning.load_state_dict(older)
    pruning.bind(model)
    check_masked(model, pruning.masks)
    assert pruning.state_dict().keys() == checkpoint("statistics")["callbacks"][STATE].keys()
    assert pruning.report.removed > 0


# --- plans and packed files


@settings(max_examples=150, derandomize=True)
@given(data=st.data())
def test_a_broken_plan_is_refused_before_anything_changes_or_does_no_harm(data: Any) -> None:
    good = checkpoint("compacted")
    where = data.draw(st.sampled_from(["plan", "pruner", "state_dict", "callbacks", "all"]))
    broken = {**good}
    state = good["callbacks"][STATE]
    if where == "plan":
        pruner = {**state["pruner"], "plan": mutated(data.draw, state["pruner"]["plan"])}
        broken["callbacks"] = {STATE: {**state, "pruner": pruner}}
    elif where == "pruner":
        broken["callbacks"] = {STATE: {**state, "pruner": mutated(data.draw, state["pruner"])}}
    elif where == "all":
        broken = mutated(data.draw, good)
        assume(isinstance(broken, dict))
    else:
        broken[where] = mutated(data.draw, good[where])
    refused_or_loaded(Lit(), lambda model: load_compact(broken, model))


def refused_or_loaded(model: Lit, load: Callable[[Lit], Any]) -> None:
    before = bits(model)
    try:
        load(model)
    except ValueError:
        assert same(bits(model), before)
    else:
        model(torch.ones(2, 1, 8, 8))


@functools.cache
def packed(kind: str) -> dict[str, Any]:
    model, pruning = bound(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.packed")
        save_packed(model, pruning.masks, path, plans=plans_in(checkpoint(kind)))
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", ["statistics", "compacted"])
@settings(max_examples=100, derandomize=True)
@given(data=st.data())
def test_a_broken_packed_file_is_refused_before_anything_changes_or_does_no_harm(kind: str, data: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.packed")
        torch.save(mutated(data.draw, packed(kind)), path)
        refused_or_loaded(Lit(), lambda model: load_packed(path, model))


# --- checkpoints


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def cut_short(path: Path, content: Any) -> None:
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:2000])


FILES: dict[str, Callable[[Path, Any], Any]] = {
    "cut short": cut_short,
    "empty": lambda path, _: path.write_bytes(b""),
    "no checkpoint at all": lambda path, _: path.write_text("weights"),
    "with code": lambda path, content: torch.save({**content, "extra": Code(path.with_name("ran"))}, path),
    "only code": lambda path, _: path.write_bytes(pickle.dumps(Code(path.with_name("ran")))),
    "a tensor": lambda path, _: torch.save(torch.zeros(3), path),
}
READERS: dict[str, tuple[str, Callable[[Path, Lit], Any]]] = {
    "load_compact": ("checkpoint", load_compact),
    "load_packed": ("path", load_packed),
    "report": ("ckpt_path", lambda path, model: looking(path).report(model, str(path))),
    "export": ("ckpt_path", lambda path, model: looking(path).export(model, str(path), str(path) + ".packed")),
    "plan": ("ckpt_path", lambda path, model: looking(path).plan(model, ckpt_path=str(path))),
}


def looking(path: Path) -> PruningCommands:
    return cli_of(NAME).pruning_trainer(
        callbacks=[PruningCallback(0.5)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=path.parent,
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: str, reader: str) -> None:
    path = tmp_path / "broken.ckpt"
    FILES[file](path, checkpoint("compacted"))
    argument, load = READERS[reader]
    model = seeded(Lit)
    before = bits(model)
    with pytest.raises(ValueError, match=rf"{argument}='.*broken\.ckpt' (cannot be read|holds a Tensor)"):
        load(path, model)
    assert same(bits(model), before)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["broken.ckpt"]


@pytest.mark.parametrize("reader", [name for name in READERS if name != "load_packed"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda good: {"callbacks": good["callbacks"]}, "checkpoint: it has no entry 'state_dict'"),
        (lambda good: {**good, "callbacks": "none"}, "checkpoint: callbacks is 'none', expected a dict"),
        (lambda good: {**good, "state_dict": {}}, "the weights do not belong to this Lit: Error"),
        (
            lambda good: {**good, "callbacks": {STATE: {"pruner": {"masks": {}}}}},
            "the checkpoint's pruning state: pruner has no entry 'plan'",
        ),
    ],
)
def test_a_checkpoint_in_which_something_is_missing_is_refused(
    tmp_path: Path, reader: str, broken: Any, message: str
) -> None:
    path = tmp_path / "broken.ckpt"
    torch.save(broken(checkpoint("compacted")), path)
    model = seeded(Lit)
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        READERS[reader][1](path, model)
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", ["statistics", "compacted"])
def test_a_checkpoint_of_another_architecture_leaves_the_model_alone(tmp_path: Path, kind: str) -> None:
    model = seeded(Lit)
    model.net[6] = nn.Linear(16, 12)
    torch.save(checkpoint(kind), tmp_path / "other.ckpt")
    before = bits(model)
    with pytest.raises(ValueError, match=r"'net\.6\.(weight|bias)'"):
        load_compact(tmp_path / "other.ckpt", model)
    with pytest.raises(ValueError, match=r"'net\.6\.(weight|bias)'"):
        fit(tmp_path, model, KINDS[kind](), ckpt_path=tmp_path / "other.ckpt", max_epochs=5)
    assert same(bits(model), before)


def test_a_newer_state_is_refused_before_the_weights_are_loaded(tmp_path: Path) -> None:
    good = checkpoint("compacted")
    state = {**good["callbacks"][STATE], "version": 2}
    torch.save({**good, "callbacks": {STATE: state}}, tmp_path / "newer.ckpt")
    model = seeded(Scheduled)
    before = bits(model)
    with pytest.raises(
        ValueError, match="version 2, this lightning_prune reads 1: install the version that wrote it"
    ):
        fit(tmp_path, model, KINDS["compacted"](), ckpt_path=tmp_path / "newer.ckpt", max_epochs=5)
    assert same(bits(model), before)


def test_what_is_no_state_of_a_callback_is_not_one_of_another_version() -> None:
    message = "the checkpoint's pruning state is none that lightning_prune has written: it has no version"
    with pytest.raises(ValueError, match=message):
        PruningCallback(0.5).load_state_dict({"weights": {}})


def test_a_compacted_model_that_cannot_load_a_checkpoint_stays_compacted(tmp_path: Path) -> None:
    good = checkpoint("compacted")
    pruning, model = KINDS["compacted"](), seeded(Scheduled)
    fit(tmp_path, model, pruning, max_epochs=4)
    broken = {**good["state_dict"], "net.6.bias": torch.zeros(7)}
    torch.save({**good, "state_dict": broken}, tmp_path / "broken.ckpt")
    before, masks = bits(model), copy.deepcopy(dict(pruning.masks))
    with pytest.raises(ValueError, match=r"'net\.6\.bias' has shape \(7,\) in the checkpoint"):
        trainer(tmp_path, pruning).validate(model, digits(), ckpt_path=tmp_path / "broken.ckpt", verbose=False)
    assert same(bits(model), before)
    assert same(dict(pruning.masks), masks)
