"""The callback's own compaction: what is saved, loaded, trained on and tested, dense, masked and compacted."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, LightningModule, ModelCheckpoint
from lit import Lit, digits, fit, seeded, trainer
from processes import run_script
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from lightning_prune import (
    Channels,
    CompactionError,
    Magnitude,
    OneShot,
    Pruner,
    PruningCallback,
    Steps,
    Structure,
    Taylor,
    Unstructured,
    compact,
    load_compact,
    measure,
)

DENSE = {"net.0.weight": (8, 1, 3, 3), "net.4.weight": (16, 288), "net.6.weight": (10, 16)}
IMAGES = next(iter(digits()))[0]


def pruning(target: float = 0.5, **options: Any) -> PruningCallback:
    """Half of the 8 channels and 16 neurons, by what 5 batches of gradients say, before the second epoch."""
    defaults = {
        "criterion": Taylor(),
        "structure": Channels(),
        "schedule": Steps({"1ep": 1.0}),
        "compact": True,
    }
    return PruningCallback(target, **defaults | options)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim > 1}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).cpu().eval()(IMAGES)


def widths(model: nn.Module) -> list[int]:
    return [model.net[0].out_channels, model.net[4].in_features, model.net[4].out_features]


# --- a fit


def test_a_fit_ends_with_a_smaller_network_that_gives_the_same(tmp_path: Path) -> None:
    masked, smaller = seeded(Lit), seeded(Lit)
    fit(tmp_path, masked, pruning(compact=False), max_epochs=3)
    callback = pruning()
    fit(tmp_path, smaller, callback, max_epochs=3)
    assert shapes(masked) == DENSE
    conv, features, neurons = widths(smaller)
    assert (8 - conv) + (16 - neurons) == 12
    assert features == 36 * conv
    assert shapes(smaller) == {
        "net.0.weight": (conv, 1, 3, 3),
        "net.4.weight": (neurons, features),
        "net.6.weight": (10, neurons),
    }
    assert smaller.net[1].num_features == conv == len(smaller.net[1].running_mean)
    torch.testing.assert_close(outputs(smaller), outputs(masked), rtol=1e-5, atol=1e-6)
    report = callback.report
    assert report.params == sum(parameter.numel() for parameter in smaller.parameters())
    assert report.dense.params == sum(parameter.numel() for parameter in masked.parameters())
    assert report.macs == 36 * 9 * conv + features * neurons + 10 * neurons
    assert report.dense.macs == 36 * 9 * 8 + 288 * 16 + 160
    assert set(report.latency) == set(report.dense.latency) == {1, 64}
    assert "times fewer" in report.table()


def test_single_weights_leave_neurons_that_nothing_reads(tmp_path: Path) -> None:
    callback = pruning(0.97, structure=Unstructured())
    model, masked = seeded(Lit), seeded(Lit)
    fit(tmp_path, model, callback, max_epochs=3)
    fit(tmp_path, masked, pruning(0.97, structure=Unstructured(), compact=False), max_epochs=3)
    assert model.net[4].in_features < 288 or model.net[4].out_features < 16
    torch.testing.assert_close(outputs(model), outputs(masked), rtol=1e-5, atol=1e-6)
    assert callback.masks
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in callback.masks.items())


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    model = seeded(Lit)
    apart = [pruning(structure=Channels(include=f"net.{n}"), name=f"{n}", compact=False) for n in (0, 4)]
    fit(tmp_path, model, *apart, max_epochs=2)
    assert "on_load_checkpoint" not in vars(model)
    assert not model._forward_pre_hooks


def test_a_network_that_would_change_stays_as_it_was(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_end(self, run: Any, module: Any) -> None:
            with torch.no_grad():
                module.net[6].weight.fill_(1.0)
                module.net[5] = nn.Sigmoid()

    model = seeded(Lit)
    with pytest.raises(CompactionError, match=r"Lit stays as it was\. net\.4 cannot be cut: outputs change"):
        fit(tmp_path, model, pruning(), Spoil(), max_epochs=2)
    assert shapes(model) == DENSE


def test_two_callbacks_compact_after_the_fit(tmp_path: Path) -> None:
    both = [pruning(compact=False), pruning(structure=Channels(include="net.0"), name="x", compact=False)]
    with pytest.raises(ValueError, match=r"two PruningCallbacks prune 'net\.0\.bias'"):
        fit(tmp_path, seeded(Lit), *both)
    apart = [pruning(structure=Channels(include=f"net.{n}"), name=f"{n}") for n in (0, 4)]
    with pytest.raises(ValueError, match="compact=True is for a single PruningCallback"):
        fit(tmp_path, seeded(Lit), *apart)


# --- what is seen of the training


class Bare(LightningModule):
    """No ``forward``, no example; logs, draws at random, and keeps count."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(64, 12)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(12, 10)
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []
        self.digests: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen += 1
        loss = F.cross_entropy(self.head(self.drop(self.lift(images.flatten(1)).relu())), labels)
        loss = loss + 1e-4 * sum(weight.abs().sum() for weight in self.parameters())
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        with torch.no_grad():
            self.digests.append(float(sum(value.double().sum() for value in self.state_dict().values())))
        assert self.trainer.current_epoch == self.current_epoch
        return loss

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), 1e-3)


def test_looking_at_a_training_step_leaves_no_trace(tmp_path: Path) -> None:
    plain, watched = seeded(Bare), seeded(Bare)
    late = pruning(schedule=Steps({"9st": 1.0}))
    for model, callbacks in ((plain, []), (watched, [late])):
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks, max_epochs=2).fit(model, digits())
    assert len(plain.losses) == len(watched.losses) == float(watched.seen) == 10
    assert watched.losses[:9] == plain.losses[:9]
    assert watched.digests[:9] == plain.digests[:9]
    assert watched.digests[9] != plain.digests[9]


COMPILED = {
    "the module": lambda model: model.compile(backend="eager"),
    "a submodule": lambda model: model.net.compile(backend="eager"),
    "a layer": lambda model: setattr(model.net, "4", torch.compile(model.net[4], backend="eager")),
    "wrapped": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler's own looking around
@pytest.mark.filterwarnings("ignore:Using `torch.compile.*global hooks:UserWarning")
@pytest.mark.parametrize("how", COMPILED)
def test_what_is_compiled_is_followed_and_compacted_all_the_same(tmp_path: Path, how: str) -> None:
    def shapes(change: Any) -> list[torch.Size]:
        model = seeded(Lit)
        wrapped = change(model)
        fit(tmp_path, model if wrapped is None else wrapped, pruning(), max_epochs=2)
        return [parameter.shape for parameter in model.parameters()]

    found = shapes(COMPILED[how])
    assert found == shapes(lambda model: None)
    assert found[0][0] < 8


def test_what_a_model_keeps_of_the_compiler_is_copied() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)
            self.activation = torch.compile(torch.relu, backend="eager")
            self.other = torch.compiler.disable(torch.tanh)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.other(self.activation(self.inner(x))))

    example = torch.ones(1, 4)
    pruner = Pruner(Own(), 0.5, structure=Channels(), schedule=None, example=example)
    assert [group.name for group in pruner.groups] == ["inner"]


def test_a_module_without_forward_is_compacted(tmp_path: Path) -> None:
    model = seeded(Bare)
    trainer(tmp_path, pruning(), max_epochs=2).fit(model, digits())
    assert (model.lift.out_features, model.head.in_features) == (6, 6)


class Short(Bare):
    """Its own name for the index of the batch."""

    def training_step(self, batch: Any, i: int) -> Tensor:
        return super().training_step(batch, i)


def test_the_index_of_the_batch_may_have_any_name(tmp_path: Path) -> None:
    model = seeded(Short)
    trainer(tmp_path, pruning(), max_epochs=2).fit(model, digits())
    assert model.lift.out_features == 6


class ByHand(Bare):
    """Manual optimization."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def test_manual_optimization_is_watched_up_to_its_backward_pass(tmp_path: Path) -> None:
    model = seeded(ByHand)
    model.automatic_optimization = False
    trainer(tmp_path, pruning(), max_epochs=2).fit(model, digits())
    assert model.lift.out_features == 6
    assert len(model.losses) == 10


class Own(Lit):
    """Its own example."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 8, 8)


@pytest.mark.parametrize("compact", [False, True])
def test_multiply_adds_are_those_of_one_example(tmp_path: Path, compact: bool) -> None:
    found = []
    for batch in (1, 3, 64):
        model = seeded(Lit)
        model.example_input_array = torch.zeros(batch, 1, 8, 8)
        callback = pruning(compact=compact)
        fit(tmp_path, model, callback, max_epochs=2)
        found.append((callback.report.macs, callback.report.dense and callback.report.dense.macs))
        assert callback.plan(seeded(Lit), torch.zeros(batch, 1, 8, 8)).macs == 72 * 36 + 4608 + 160
    assert len(set(found)) == 1
    assert found[0][compact] == 72 * 36 + 4608 + 160


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_an_example_need_not_have_the_precision_of_the_fit(
    tmp_path: Path, precision: Any, structure: Structure
) -> None:
    model = seeded(Own)
    callback = PruningCallback(0.5, structure=structure, schedule=OneShot("1ep"), compact=True)
    fit(tmp_path, model, callback, max_epochs=2, precision=precision)
    assert callback.report.dense is not None
    assert callback.report.dense.macs == 72 * 36 + 4608 + 160


class Graph(nn.Module):
    """Takes no batch: one example of its first input would leave indices that point nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.mix = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return self.mix(self.lift(nodes)[edges[0]])


@pytest.mark.parametrize(
    ("model", "example", "multiply_adds"),
    [
        (Graph(), (torch.ones(5, 8), torch.tensor([[0, 4, 4], [1, 2, 3]])), 5 * 128 + 3 * 64),
        (nn.Conv2d(3, 4, 3), torch.ones(3, 8, 8), 4 * 27 * 36),
        (nn.Linear(8, 4), torch.ones(8), 32),
        (nn.Linear(8, 4), torch.ones(6, 8), 32),
    ],
)
def test_what_is_no_batch_is_counted_as_a_whole(model: nn.Module, example: Any, multiply_adds: int) -> None:
    assert measure(model, example=example).macs == multiply_adds


class Picky(Lit):
    """Cannot run on its own example."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 5, 5)


def test_an_example_that_does_not_run_stops_the_fit_before_its_first_step(tmp_path: Path) -> None:
    model = seeded(Picky)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Picky cannot run on its example_input_array .* or none"):
        fit(tmp_path, model, PruningCallback(0.5, schedule=OneShot("1ep"), compact=True), max_epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="The report goes without multiply-adds"):
        fit(tmp_path, model, PruningCallback(0.5, schedule=OneShot("1ep")), max_epochs=2)


class Together(Lit):
    """Each of its layers may shrink, but not both."""

    def forward(self, images: Tensor) -> Tensor:
        if self.net[0].out_channels < 8 and self.net[4].out_features < 16:
            raise RuntimeError("too small")
        return super().forward(images)


def test_cuts_that_work_alone_and_not_together_are_not_made_together() -> None:
    model, images = seeded(Together).eval(), torch.randn(2, 1, 8, 8)
    units = Channels().units(model, images)
    assert len(units.groups) == 1
    assert any("too small" in reason for reason in units.frozen.values())
    masks = {
        name: torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        for name in ("net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.4.weight", "net.4.bias")
    }
    for mask in masks.values():
        mask[:2] = False
    smaller = compact(model, masks, images)
    assert (smaller.net[0].out_channels < 8) != (smaller.net[4].out_features < 16)
    for name, mask in masks.items():
        model.get_parameter(name).data[~mask] = 0
    torch.testing.assert_close(smaller(images), model(images))


def test_what_is_measured_last_does_not_undo_a_compaction(tmp_path: Path) -> None:
    class Small(Lit):
        """Runs on few examples only, when it is no longer trained."""

        def forward(self, images: Tensor) -> Tensor:
            if len(images) == 1 and self.net[0].out_channels < 8:
                raise RuntimeError("one example")
            return super().forward(images)

    model, callback = seeded(Small), pruning(compact=True)
    with pytest.warns(UserWarning, match="The report goes without multiply-adds"):
        fit(tmp_path, model, callback, max_epochs=2)
    assert shapes(model) != DENSE
    assert callback.report.params == sum(each.numel() for each in model.parameters())


def test_a_dry_run_takes_the_modules_own_example() -> None:
    report = pruning().plan(Own())
    assert {layer.name for layer in report.layers} >= {"net.0.weight", "net.4.weight", "net.1.bias"}
    with pytest.raises(ValueError, match="example=None"):
        pruning().plan(Lit())


# --- training on


def test_training_goes_on_as_it_would_have_masked(tmp_path: Path) -> None:
    losses: dict[bool, list[float]] = {}
    for smaller in (True, False):
        model = seeded(lambda: Lit(lambda p: Adam(p, 1e-2)))
        run = fit(tmp_path, model, pruning(compact=smaller), max_epochs=2)
        optimizer = run.optimizers[0]
        if smaller:
            for parameter in model.parameters():
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        losses[smaller] = []
        for batch in digits():
            optimizer.zero_grad()
            loss = model.loss(batch)
            loss.backward()
            optimizer.step()
            run.callbacks[0]._state.network.store.apply_()
            losses[smaller].append(float(loss.detach()))
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_a_second_fit_trains_the_smaller_network_and_removes_nothing_more(tmp_path: Path) -> None:
    model, callback = seeded(Lit), pruning()
    fit(tmp_path, model, callback, max_epochs=2)
    before = shapes(model)
    assert before != DENSE
    weights = copy.deepcopy(model.state_dict())
    fit(tmp_path, model, callback, max_epochs=3)
    assert shapes(model) == before
    assert not torch.equal(model.state_dict()["net.0.weight"], weights["net.0.weight"])
    assert all((parameter != 0).any() for parameter in model.parameters())


# --- {dense, masked, compacted} x {fit, test, load_compact}


def saved(folder: Path, kind: str) -> tuple[Path, Tensor, dict[str, tuple[int, ...]]]:
    """A checkpoint of each kind, with the outputs and shapes of its network."""
    model = seeded(Lit)
    path = folder / f"{kind}.ckpt"
    callbacks = [] if kind == "dense" else [pruning(compact=kind == "compacted")]
    run = fit(folder, model, *callbacks, max_epochs=2)
    run.save_checkpoint(path)
    return path, outputs(model), shapes(model)


class Watched(Lit):
    """Notes what it gives when it is tested."""

    def on_test_start(self) -> None:
        self.given = outputs(self)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("acc", self.loss(batch))


KINDS = pytest.mark.parametrize("kind", ["dense", "masked", "compacted"])


@KINDS
@pytest.mark.parametrize("shrunk", [False, True], ids=["into a dense model", "into a shrunk model"])
def test_every_checkpoint_can_be_tested(tmp_path: Path, kind: str, shrunk: bool) -> None:
    path, expected, sizes = saved(tmp_path, kind)
    model, callback = Watched(), pruning()
    if shrunk:
        fit(tmp_path, model, callback, max_epochs=2)
        assert shapes(model) != DENSE
    trainer(tmp_path, callback).test(model, digits(), ckpt_path=path, verbose=False)
    assert torch.equal(model.given, expected)
    assert shapes(model) == sizes


@KINDS
def test_every_checkpoint_can_be_trained_on(tmp_path: Path, kind: str) -> None:
    path, _, sizes = saved(tmp_path, kind)
    model, callback = Lit(), pruning(schedule=Steps({"3ep": 1.0}))
    before = torch.load(path, weights_only=True)["state_dict"]
    run = fit(tmp_path, model, callback, ckpt_path=path, max_epochs=4)
    assert run.global_step == 20
    if kind == "compacted":
        assert shapes(model) == sizes
        assert callback.report.dense.params == 72 + 8 + 16 + 288 * 16 + 16 + 160 + 10
    else:
        assert shapes(model) != DENSE
    assert before["net.6.bias"].shape == model.net[6].bias.shape
    assert not torch.equal(before["net.6.bias"], model.net[6].bias.detach())


@KINDS
def test_every_checkpoint_loads_into_a_fresh_model(tmp_path: Path, kind: str) -> None:
    path, expected, sizes = saved(tmp_path, kind)
    model = Lit()
    assert load_compact(path, model) is model
    assert shapes(model) == sizes
    assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(load_compact(torch.load(path, weights_only=True), Lit())), expected)


class Renamed(Lit):
    """Loads weights in its own way, as older code does."""

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        return super().load_state_dict(state_dict, strict)


class Migrating(Lit):
    """Looks at the version that wrote its weights."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("make", [Renamed, Migrating])
def test_a_module_that_loads_in_its_own_way_is_asked(tmp_path: Path, make: type[Lit]) -> None:
    model = seeded(make)
    run = fit(tmp_path, model, pruning(compact=True), max_epochs=2)
    run.save_checkpoint(path := tmp_path / "small.ckpt")
    assert torch.equal(outputs(load_compact(path, make())), outputs(model))


def test_a_new_process_gives_the_same_outputs(tmp_path: Path) -> None:
    path, expected, _ = saved(tmp_path, "compacted")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[2])\n"
        "from lit import Lit, digits; from lightning_prune import load_compact\n"
        "model = load_compact(sys.argv[1], Lit()).eval()\n"
        "torch.save(model(next(iter(digits()))[0]).detach(), sys.argv[1] + '.out')\n"
    )
    folder = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script, path, folder], check=True)
    assert torch.equal(torch.load(f"{path}.out"), expected)


@pytest.mark.parametrize("what", ["fit", "test"])
def test_a_compacted_network_stays_so_when_another_is_loaded(tmp_path: Path, what: str) -> None:
    path = tmp_path / "dense.ckpt"
    dense = trainer(tmp_path, max_epochs=1)
    dense.fit(Watched(), digits())
    dense.save_checkpoint(path)
    model, callback = seeded(Watched), pruning(criterion=Magnitude())
    fit(tmp_path, model, callback, max_epochs=2)
    small, expected = shapes(model), outputs(model)
    if what == "fit":
        fit(tmp_path, other := Watched(), callback, ckpt_path=path, max_epochs=3)
        assert shapes(other) != DENSE
    else:
        trainer(tmp_path, callback).test(other := Watched(), digits(), ckpt_path=path, verbose=False)
        assert shapes(other) == DENSE
        assert callback.report.params == sum(parameter.numel() for parameter in model.parameters())
    assert shapes(model) == small
    assert torch.equal(outputs(model), expected)


def test_the_best_checkpoint_of_a_fit_restores_the_dense_shapes(tmp_path: Path) -> None:
    model, callback = Watched(), pruning()
    best = ModelCheckpoint(tmp_path, monitor="acc", mode="max", save_top_k=1)
    run = fit(tmp_path, model, callback, best, max_epochs=3, enable_checkpointing=True)
    assert shapes(model) != DENSE
    run.test(model, digits(), ckpt_path="best", verbose=False)
    assert shapes(model) == DENSE


def test_the_dense_class_says_what_to_do_with_a_compacted_checkpoint(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, "compacted")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]
    model = Watched()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"is loaded with load_compact\(checkpoint, model\), or by a Trainer"):
        load_compact(checkpoint, model)
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"is loaded with load_compact\(checkpoint, model\), or by a Trainer"):
        trainer(tmp_path, pruning()).test(model, digits(), ckpt_path=tmp_path / "bare.ckpt", verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, "compacted")
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"made for another architecture|has no"):
        load_compact(path, model)
    wider = Lit()
    wider.net[4] = nn.Linear(288, 20)
    wider.net[6] = nn.Linear(20, 10)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(ValueError, match="made for another architecture"):
        load_compact(path, wider)
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())


def test_checkpoints_of_two_compactions_load_one_after_the_other(tmp_path: Path) -> None:
    model = seeded(Lit)
    for name in ("first", "second"):
        fit(tmp_path, model, pruning(0.3), max_epochs=2).save_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(
        ValueError, match=r"or follows an earlier compaction, whose checkpoint has to be loaded first"
    ):
        load_compact(tmp_path / "second.ckpt", Lit())
    small = load_compact(tmp_path / "second.ckpt", load_compact(tmp_path / "first.ckpt", Lit()))
    assert shapes(small) == shapes(model)
    torch.testing.assert_close(outputs(small), outputs(model))


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, "compacted")
    short = tmp_path / "short.ckpt"
    short.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"short\.ckpt.* cannot be read"):
        load_compact(short, Lit())
    with pytest.raises(FileNotFoundError):
        load_compact(tmp_path / "none.ckpt", Lit())


def test_sgd_without_momentum_has_nothing_to_cut(tmp_path: Path) -> None:
    model = seeded(lambda: Lit(lambda p: SGD(p, 0.05)))
    fit(tmp_path, model, pruning(), max_epochs=2)
    assert shapes(model) != DENSE


# --- statistics of norms


CRITERIA = ["Taylor", "ActivationNorm", "Oracle", "OptimalBrainDamage"]


@pytest.fixture(scope="module")
def compacted_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, in a folder for each criterion."""
    folder = tmp_path_factory.mktemp("ranks")
    run = run_script("two_ranks.py", folder, "ddp", *CRITERIA)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("criterion", CRITERIA)
def test_two_processes_compact_alike(compacted_by_two: Path, criterion: str) -> None:
    folder = compacted_by_two / criterion
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    first, second = (torch.load(folder / f"statistics{rank}.pt", weights_only=True) for rank in (0, 1))
    # observations: steps, or images of both; what asks for the loss has seen nothing before the event
    examples = {"Taylor": 1, "ActivationNorm": 2 * 64}.get(criterion, 0)
    for name, statistics in first.items():
        assert int(statistics["count"]) == int(second[name]["count"]) == examples
        torch.testing.assert_close(statistics["sums"], second[name]["sums"], rtol=0, atol=0)
        assert torch.equal(statistics["features"], second[name]["features"])
    smaller = load_compact(folder / "small.ckpt", Lit())
    assert {name: value.shape for name, value in smaller.named_parameters()} == {
        name: value.shape for name, value in ranks[0].items()
    }
    assert sum(value.numel() for value in ranks[0].values()) < sum(
        value.numel() for value in Lit().parameters()
    )


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("ModelParallelStrategy", "strategy=ModelParallelStrategy splits the model up"),
        ("ddp_fork", "use strategy='ddp' or a single device"),
    ],
)
def test_strategies_under_which_it_cannot_work_are_refused(tmp_path: Path, strategy: str, why: str) -> None:
    run = run_script("two_ranks.py", tmp_path, strategy, "Taylor")
    assert run.returncode != 0
    assert why in run.stderr


def test_a_fit_whose_processes_do_not_come_back_says_what_is_lost(tmp_path: Path) -> None:
    run = run_script("two_ranks.py", tmp_path, "ddp_spawn", "Taylor")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("the PruningCallback here will have neither masks nor a report") == 1


@pytest.mark.parametrize("structure", [Channels(), Unstructured()])
def test_the_report_counts_what_forward_is_given_by_name(tmp_path: Path, structure: Any) -> None:
    class Named(Lit):
        def forward(self, scale: float, images: Tensor) -> Tensor:  # type: ignore[override]
            return self.net(images * scale)

        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self(1.0, images=images), labels)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    callback = pruning(structure=structure, compact=False)
    fit(tmp_path, Named(), callback)
    assert callback.report.macs == 8 * 9 * 36 + 288 * 16 + 16 * 10


def test_batch_norm_statistics_are_taken_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    model.append(nn.ReLU()).append(nn.Flatten()).append(nn.Linear(96, 3))
    images = torch.randn(16, 1, 8, 8)
    pruner = Pruner(model, 0.5, structure=Channels(), schedule=None, example=images)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, images)
    torch.optim.swa_utils.update_bn([images], smaller)
    with torch.no_grad():
        inputs = smaller.train()[:4](images)
    torch.testing.assert_close(smaller[4].running_mean, inputs.mean((0, 2, 3)))
