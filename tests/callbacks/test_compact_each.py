"""``compact="each"``: the network shrinks at every event, and trains as the masked one does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, LightningModule, ModelCheckpoint, Trainer, callbacks
from lit import Lit, Manual, digits, fit, hooks, same, seeded, trainer
from test_fuzz import Attentive, Mixed, Residual
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop
from torch.optim.swa_utils import AveragedModel

from lightning_prune import (
    ActivationTaylor,
    BatchNormScale,
    Channels,
    CompactionError,
    Experts,
    Global,
    Guard,
    Heads,
    Magnitude,
    OptimalBrainDamage,
    PruningCallback,
    Random,
    Reconstruct,
    Rewind,
    Steps,
    Taylor,
    Unstructured,
    load_compact,
)

EVENTS = Steps({"1ep": 0.4, "2ep": 0.7, "3ep": 1.0})
DOUBLE = {"precision": "64-true"}
IMAGES = next(iter(digits()))[0]


def pruning(target: Any = 0.5, **options: Any) -> PruningCallback:
    defaults: dict[str, Any] = {
        "criterion": Taylor(),
        "structure": Channels(),
        "schedule": EVENTS,
        "compact": "each",
        "measure_seconds": 0,
        "write_report": False,
    }
    return PruningCallback(target, **defaults | options)


class Watch(Callback):
    """Notes the loss of each step, and the number of parameters in it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sizes: list[int] = []

    def on_train_batch_end(self, run: Trainer, module: LightningModule, *_: Any) -> None:
        self.losses.append(float(module.seen.detach()))
        self.sizes.append(size(module))


class Seen(Lit):
    """Keeps its last loss, with the graph behind it."""

    def loss(self, batch: Any) -> Tensor:
        self.seen = super().loss(batch)
        return self.seen


def size(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


class Arm:
    """A fit with one way to compact, and what it leaves."""

    def __init__(
        self,
        folder: Path,
        make: Callable[[], LightningModule],
        compact: Any,
        others: Callable[[], list[Any]] = list,
        settings: Any = None,
        **options: Any,
    ) -> None:
        self.model, self.callback, self.watch = seeded(make), pruning(compact=compact, **options), Watch()
        settings = {"max_epochs": 5} | DOUBLE | (settings or {})
        self.run = fit(folder, self.model, self.callback, *others(), self.watch, **settings)


def assert_trains_as_masked(
    folder: Path, make: Callable[[], LightningModule] = Seen, rel: float = 1e-9, **options: Any
) -> tuple[Arm, Arm]:
    """Compares the losses of both, step by step."""
    masked, cut = (Arm(folder, make, compact, **options) for compact in (False, "each"))
    assert len(masked.watch.losses) == len(cut.watch.losses) == 25
    assert cut.watch.losses == pytest.approx(masked.watch.losses, rel=rel)
    sizes = [cut.watch.sizes[5 * epoch] for epoch in range(5)]
    assert set(masked.watch.sizes) == {sizes[0]}
    assert sizes[0] > sizes[1] >= sizes[2] >= sizes[3] == sizes[4]
    assert cut.callback.report.history == masked.callback.report.history
    assert cut.callback.sparsity == masked.callback.sparsity > 0
    kept = [[(each.name, each.kept, each.size) for each in arm.callback.report.layers] for arm in (masked, cut)]
    assert kept[0] == kept[1]
    return masked, cut


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": partial(Adam, lr=0.01, amsgrad=True),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.9),
    "fused": partial(Adam, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_those_of_the_masked_network(tmp_path: Path, optimizer: str) -> None:
    masked, cut = assert_trains_as_masked(tmp_path, lambda: Seen(OPTIMIZERS[optimizer]))
    small = load_compact_twin(cut, Seen())
    assert [each.shape for each in small.parameters()] == [each.shape for each in cut.model.parameters()]
    dense = dict(masked.model.named_parameters())
    for name, parameter in cut.model.named_parameters():
        own, whole = cut.run.optimizers[0].state[parameter], masked.run.optimizers[0].state[dense[name]]
        for key, value in own.items():
            if value.ndim:
                assert value.shape == parameter.shape
                # what was cut is 0 in the state of the masked network
                noise = name == "net.0.bias"  # before a batch norm it has no gradient
                assert noise or float(value.norm()) == pytest.approx(float(whole[key].norm()), rel=1e-7)


def load_compact_twin(arm: Arm, model: nn.Module) -> nn.Module:
    return load_compact(
        {"state_dict": arm.model.state_dict(), "callbacks": {"PruningCallback": arm.callback.state_dict()}},
        model.double(),
    )


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_in_single_precision_they_differ_by_float_error(tmp_path: Path, optimizer: str) -> None:
    settings = {"precision": "32-true"}
    make = partial(Seen, OPTIMIZERS[optimizer])
    assert_trains_as_masked(tmp_path, make, rel=2e-5, settings=settings)


class Given(Seen):
    """Another network."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(partial(Adam, lr=0.01))
        self.net = make()


def gated() -> nn.Module:
    """Two branches that are concatenated, one of them depthwise."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
            self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.two = nn.Conv2d(1, 4, 3)
            self.mix = nn.Conv2d(10, 5, 1)
            self.norm, self.head = nn.GroupNorm(1, 5), nn.Linear(5, 10)

        def forward(self, images: Tensor) -> Tensor:
            both = torch.cat([self.deep(self.one(images)), self.two(images)], 1)
            return self.head(self.norm(self.mix(both)).relu().mean((2, 3)))

    return Gated()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "residual": (Residual, {}),
    "concatenated": (gated, {}),
    "attention": (Attentive, {"structure": Heads()}),
    "attention and units": (Attentive, {"structure": Channels()}),
    "experts": (Mixed, {"structure": Experts(), "target": 0.34, "schedule": Steps({"1ep": 1.0})}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_train_as_masked(tmp_path: Path, name: str) -> None:
    make, options = NETWORKS[name]
    assert_trains_as_masked(tmp_path, lambda: Given(make), criterion=Magnitude(), **options)


PARTS: dict[str, dict[str, Any]] = {
    "activations": {"criterion": ActivationTaylor(every=2), "selector": Global(budget="macs")},
    "penalty": {"criterion": BatchNormScale(l1=1e-3), "structure": Channels(include="net.0")},
    "losses": {"criterion": OptimalBrainDamage(batches=2)},
    "random": {"criterion": Random(seed=1), "selector": Global(normalize="mean")},
    "reconstruction": {"reconstruct": Reconstruct(batches=5)},
    "targets": {"target": {"net.0*": 0.25, "net.4*": 0.75}},
    "from the start": {"keep_zeros": True},
}


@pytest.mark.parametrize("name", PARTS)
def test_what_goes_is_what_the_masked_network_would_lose(tmp_path: Path, name: str) -> None:
    class Zeros(Seen):
        def __init__(self) -> None:
            super().__init__()
            if name == "from the start":
                with torch.no_grad():
                    self.net[4].weight[::4] = self.net[4].bias[::4] = 0
                    self.net[6].weight[:, ::4] = 0

    if name == "from the start":
        masked, cut = (Arm(tmp_path, Zeros, compact, **PARTS[name]) for compact in (False, "each"))
        assert cut.watch.losses == pytest.approx(masked.watch.losses, rel=1e-9)
        assert cut.watch.sizes[0] == size(Lit()) - 4 * (288 + 1 + 10)
    else:
        assert_trains_as_masked(tmp_path, **PARTS[name])


class ByHand(Manual, Seen):
    """Two optimizers under manual optimization."""


class Drawing(Seen):
    """Draws numbers in each step, as many as the batch has pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.2, self.training))


SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "with random numbers": (Drawing, {}),
    "clipped": (Seen, {"gradient_clip_val": 0.1}),
    "accumulated": (Seen, {"accumulate_grad_batches": 2}),
    "by hand": (partial(ByHand, 0.1), {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_of_all_kinds_train_as_masked(tmp_path: Path, name: str) -> None:
    make, settings = SETTINGS[name]
    assert_trains_as_masked(tmp_path, make, settings=settings)


class OwnAverage(Callback):
    """An average of the weights that stands in for them after the fit."""

    def on_train_start(self, run: Trainer, module: LightningModule) -> None:
        self.mean = AveragedModel(module.net, use_buffers=True)

    def on_train_batch_end(self, run: Trainer, module: LightningModule, *_: Any) -> None:
        self.mean.update_parameters(module.net)


AVERAGING: dict[str, Callable[[], Any]] = {
    "swa": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    "own": OwnAverage,
}
if hasattr(callbacks, "EMAWeightAveraging"):  # which earlier versions of Lightning lack
    AVERAGING["ema"] = partial(callbacks.EMAWeightAveraging, decay=0.9)


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
@pytest.mark.parametrize("name", AVERAGING)
def test_averages_shrink_along(tmp_path: Path, name: str) -> None:
    found = []
    for compact in (False, "each"):
        model, average = seeded(Seen), AVERAGING[name]()
        fit(tmp_path, model, pruning(compact=compact), average, max_epochs=5, **DOUBLE)
        net = average.mean.module if name == "own" else model.net
        found.append((net.double().eval()(IMAGES.double()), size(net)))
    # Lightning begins this average before the model is in double precision, and keeps it in single precision
    rtol, atol = (1e-5, 1e-6) if name == "ema" else (1e-8, 1e-10)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=rtol, atol=atol)
    assert found[1][1] < found[0][1]


# --- what a fit leaves


def test_checkpoints_within_a_fit_hold_the_network_as_it_was(tmp_path: Path) -> None:
    saved = {}
    for compact in (False, "each"):
        folder = tmp_path / str(compact)
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit(folder, seeded(Lit), pruning(compact=compact), keep, max_epochs=5, enable_checkpointing=True)
        saved[compact] = [folder / f"epoch={epoch}.ckpt" for epoch in range(5)]
    sizes = []
    for masked, cut in zip(*saved.values(), strict=True):
        whole, small = Lit(), load_compact(cut, Lit())
        whole.load_state_dict(torch.load(masked, weights_only=True)["state_dict"])
        torch.testing.assert_close(small.eval()(IMAGES), whole.eval()(IMAGES), rtol=1e-4, atol=1e-5)
        sizes.append(size(small))
    assert sizes[0] == size(Lit()) > sizes[1] > sizes[2] > sizes[3] == sizes[4]
    # and told of the dense network, by a callback that is not in a fit
    state = torch.load(saved["each"][2], weights_only=True)["callbacks"]["PruningCallback"]
    report = pruning().report_of(load_compact(saved["each"][2], Lit()), state, IMAGES)
    assert report.dense is not None
    assert (report.dense.params, report.params) == (size(Lit()), sizes[2])
    assert report.dense.macs == 72 * 36 + 288 * 16 + 160
    assert report.size == size(Lit()) - 10
    assert report.layers[0].shape == (8, 1, 3, 3)
    # the best one of a fit, which is larger than the network at its end
    model, callback = seeded(Lit), pruning()
    run = fit(tmp_path, model, callback, max_epochs=5)
    (found,) = run.validate(model, digits(examples=100), ckpt_path=saved["each"][1], verbose=False)
    assert size(model) == sizes[1]
    (again,) = trainer(tmp_path, pruning()).validate(
        seeded(Lit), digits(examples=100), ckpt_path=saved["each"][1], verbose=False
    )
    assert found == again


def test_a_report_within_a_fit_tells_of_the_dense_network(tmp_path: Path) -> None:
    reports = {}

    class Look(Callback):
        def on_train_epoch_end(self, run: Trainer, module: LightningModule) -> None:
            reports[run.current_epoch] = callback.report, size(module), dict(callback.masks)

    callback = pruning()
    fit(tmp_path, model := seeded(Lit), callback, Look(), max_epochs=5)
    assert reports[0][0].dense is None
    for epoch in (1, 2, 3):
        report, parameters, masks = reports[epoch]
        assert (report.dense.params, report.params) == (size(Lit()), parameters)
        assert report.macs_kept == report.macs < report.dense.macs == 72 * 36 + 288 * 16 + 160
        assert report.sparsity == report.history[-1].sparsity
        assert all(mask.all() for mask in masks.values())
    assert callback.report.params == size(model) == reports[4][1]
    assert callback.report.proof is not None
    assert callback.state_dict()["pruner"]["plan"] is not None


def test_nothing_is_left_on_the_model_and_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    model = seeded(Lit)
    before = list(map(id, model.parameters()))
    run = fit(tmp_path, model, pruning(), max_epochs=5)
    assert list(map(id, model.parameters())) == before
    assert [id(each) for group in run.optimizers[0].param_groups for each in group["params"]] == before
    assert hooks(model, run) == 0


class Spoil(Callback):
    """Puts in a layer whose outputs depend on the number of units."""

    def on_train_epoch_start(self, run: Trainer, module: LightningModule) -> None:
        if run.current_epoch == 2:
            self.size = size(module)
            module.net[5] = nn.Softmax(1)


def test_a_cut_that_cannot_be_proven_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model, spoil = seeded(Lit), Spoil()
    run = trainer(tmp_path, spoil, pruning(criterion=Magnitude()))
    with pytest.raises(CompactionError, match=r"Lit stays as it was\. net\.4 cannot be cut: outputs change"):
        run.fit(model, digits(), digits(examples=100))
    assert size(model) == spoil.size < size(Lit())
    assert model(IMAGES).shape == (64, 10)
    assert hooks(model, run) == 0


def test_compiled_code_is_compiled_anew_for_each_shape(tmp_path: Path) -> None:
    counts = []

    def backend(graph: Any, inputs: Any) -> Any:
        counts.append(len(inputs))
        return graph.forward

    many = Steps({f"{step}st": step / 12 for step in range(1, 13)})
    model = seeded(Lit)
    model.net.compile(backend=backend)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tmp_path, model, pruning(0.8, criterion=Magnitude(), schedule=many), max_epochs=3)
    finally:
        torch._dynamo.config.recompile_limit = limit
    assert len(counts) >= 12


def test_a_further_fit_of_one_plan_goes_on_with_the_cut_network(tmp_path: Path) -> None:
    def sizes(compact: Any) -> list[float]:
        callback = pruning(compact=compact, horizon="5ep")
        model, found = seeded(Seen), []
        for _ in range(2):
            watch = Watch()
            fit(tmp_path, model, callback, watch, max_epochs=3, **DOUBLE)
            found += watch.losses
        assert (size(model) < size(Lit())) == (compact == "each")
        return found

    assert sizes("each") == pytest.approx(sizes(False), rel=1e-9)


# --- resumed with another setting


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(("first", "second"), [("each", False), (False, "each"), ("each", True)])
def test_a_fit_is_resumed_with_another_way_to_compact(tmp_path: Path, first: Any, second: Any) -> None:
    def losses(compact: Any, ckpt_path: Path | None = None) -> list[float]:
        keep = ModelCheckpoint(tmp_path / str(compact), filename="{epoch}", save_top_k=-1)
        watch, model, callback = Watch(), seeded(Seen), pruning(compact=compact)
        options = {"max_epochs": 5, "enable_checkpointing": True, "ckpt_path": ckpt_path}
        fit(tmp_path, model, callback, watch, keep, **options)
        ends.append(size(model))
        return watch.losses

    ends: list[int] = []
    whole = losses(first)
    again = losses(second, tmp_path / str(first) / "epoch=1.ckpt")
    assert again == pytest.approx(whole[10:], rel=1e-4)
    assert (ends[1] < size(Lit())) == bool(second)


# --- refused before the first step


class Untouched(Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        raise AssertionError("a step was taken")


def refused(
    folder: Path, why: str, callback: PruningCallback, *others: Any, model: Any = Lit, **options: Any
) -> None:
    module = seeded(model)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=why):
        fit(folder, module, callback, *others, Untouched(), **options)
    assert same(dict(module.state_dict()), dict(before))


def test_what_cannot_follow_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for part in ({"rewind": Rewind("0ep")}, {"guard": Guard("acc", max_drop=0.1)}):
        with pytest.raises(ValueError, match=r"brings back an earlier point in training.*compact=True"):
            pruning(**part)
    with pytest.raises(ValueError, match=r"compact='end' must be True or False, or 'each'\."):
        pruning(compact="end")
    refused(tmp_path, r"take Channels\(\), Heads\(\) or Experts\(\)", pruning(structure=Unstructured()))
    other = PruningCallback(0.5, structure=Channels(include="net.0"), name="x")
    mine = pruning(structure=Channels(include="net.4"))
    refused(tmp_path, "compact='each' is for a single PruningCallback", mine, other)
    weights = ModelCheckpoint(tmp_path, save_weights_only=True)
    why = r"ModelCheckpoint\(save_weights_only=True\) leaves out the plan"
    refused(tmp_path, why, pruning(), weights, enable_checkpointing=True)
    refused(tmp_path, "the state of LBFGS does not have the shapes", pruning(), model=partial(Lit, LBFGS))


class Elsewhere(Callback):
    """An average of no part of the module."""

    def on_train_start(self, run: Trainer, module: LightningModule) -> None:
        self.mean = AveragedModel(nn.Linear(3, 2))


def test_an_average_of_no_part_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "the average that Elsewhere keeps is of no part of the model", pruning(), Elsewhere())


class Factored(SGD):
    """Keeps one number a row."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = parameter.new_zeros(3)
        return super().step(closure)


def test_an_optimizer_with_a_state_of_its_own_is_refused_after_its_first_step(tmp_path: Path) -> None:
    model = seeded(lambda: Lit(partial(Factored, lr=0.1)))
    run = trainer(tmp_path, pruning())
    with pytest.raises(ValueError, match="cannot cut 'rows' in the state of Factored: its shape is"):
        run.fit(model, digits())
    assert run.global_step == 1
