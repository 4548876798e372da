"""What holds in every training run: each test fails if the mechanism behind it is taken out."""

from __future__ import annotations

import gc
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from lightnings import Callback, LightningModule, MixedPrecision, ModelCheckpoint, Trainer
from lit import Lit, Manual, digits, fit, hooks, seeded
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_prune import (
    BatchNormScale,
    Channels,
    Cubic,
    Global,
    Gradient,
    LocalCriterion,
    Magnitude,
    NofM,
    OneShot,
    PruningCallback,
    Taylor,
    Unstructured,
)

EVERY_EPOCH = Cubic(start="1ep", end="3ep", every="1ep")


class Orthogonal(Optimizer):
    """Steps along the orthogonal factor of the gradient matrix: every entry of the update mixes all others."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter.ndim < 2:
                    continue
                u, _, v = torch.linalg.svd(parameter.grad.flatten(1), full_matrices=False)
                parameter.sub_((u @ v).view(parameter.shape), alpha=group["lr"])
        return loss


class ZeroWatch(Callback):
    """Checks after every batch that masked weights are 0; counts the masked."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.masked = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        self.masked = sum(int((~mask).sum()) for mask in self.pruning.masks.values())
        for name, mask in self.pruning.masks.items():
            assert bool((parameters[name][~mask] == 0).all()), name


OPTIMIZERS = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=0.01, amsgrad=True),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.9, centered=True),
    "orthogonal": Orthogonal,
    "fused": partial(Adam, lr=0.01, fused=True),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip norm": {"gradient_clip_val": 0.1},
    "clip value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_are_zero_after_every_step(tmp_path: Path, optimizer: str, setting: str) -> None:
    pruning = PruningCallback(0.8, criterion=Taylor(), schedule=EVERY_EPOCH)
    watch = ZeroWatch(pruning)
    model = seeded(lambda: Lit(OPTIMIZERS[optimizer]))
    fit(tmp_path, model, pruning, watch, **SETTINGS[setting])
    size = sum(mask.numel() for mask in pruning.masks.values())
    assert watch.masked == round(0.8 * size)
    watch.on_train_batch_end(None, model)  # and still after the fit


@pytest.mark.parametrize("clip", [None, 0.1])
def test_masked_weights_are_zero_under_manual_optimization(tmp_path: Path, clip: float | None) -> None:
    class Mixed(Manual):
        def configure_optimizers(self) -> Any:
            return [SGD(self.net[:4].parameters(), 0.05), Orthogonal(self.net[4:].parameters())]

    pruning = PruningCallback(0.8, criterion=Gradient(), schedule=EVERY_EPOCH)
    watch = ZeroWatch(pruning)
    fit(tmp_path, seeded(lambda: Mixed(clip)), pruning, watch)
    assert watch.masked == round(0.8 * sum(mask.numel() for mask in pruning.masks.values()))


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam", "adamw", "rmsprop"])
def test_optimizer_state_of_masked_weights_is_zero(tmp_path: Path, optimizer: str) -> None:
    pruning = PruningCallback(0.8, schedule=OneShot("2ep"))
    checked = []

    class StateWatch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            parameters = dict(pl_module.named_parameters())
            for name, mask in pruning.masks.items():
                for value in trainer.optimizers[0].state[parameters[name]].values():
                    if value.shape == mask.shape:
                        checked.append(int((~mask).sum()))
                        assert bool((value[~mask] == 0).all())

    fit(tmp_path, Lit(OPTIMIZERS[optimizer]), pruning, StateWatch(), max_epochs=3)
    assert max(checked) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [Lit, Manual])
def test_masked_gradients_do_not_count_in_clipping(tmp_path: Path, model: type[Lit], kind: str) -> None:
    """All that is left of the norm belongs to gradients that take part in the step."""
    clip = 1e-3
    pruning = KINDS[kind](schedule=OneShot("1ep"))
    norms = []

    class NormWatch(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            if trainer.current_epoch > 0 and all(grad is not None for grad in grads):
                norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
                parameters = dict(pl_module.named_parameters())
                for name, mask in pruning.masks.items():
                    assert bool((parameters[name].grad[~mask] == 0).all())

        on_train_batch_end = lambda self, trainer, module, *_: [  # noqa: E731
            self.on_before_zero_grad(trainer, module, each) for each in trainer.optimizers
        ]

    if model is Lit:
        fit(tmp_path, Lit(), pruning, NormWatch(), max_epochs=3, gradient_clip_val=clip)
    else:
        fit(tmp_path, Manual(clip), pruning, NormWatch(), max_epochs=3)
    assert norms
    assert norms == pytest.approx([clip] * len(norms), rel=1e-2)


class Trace(LocalCriterion):
    """Keeps the plain sum of gradients, so that a test can compare statistics."""

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad


def statistics(folder: Path, model: Lit, batch_size: int = 64, **options: Any) -> dict[str, Tensor]:
    """Mean gradient over one epoch in which weights do not change, from the callback's own state."""
    kept: dict[str, Any] = {}
    pruning = PruningCallback(0.5, criterion=Trace(), schedule=OneShot("1ep"))

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 0:
                for name, each in pruning.state_dict()["pruner"]["statistics"].items():
                    kept[name] = each["sums"]["score"] / each["count"]
                    kept["count"] = each["count"].clone()

    from lit import trainer as make

    make(folder, pruning, Keep(), max_epochs=2, **options).fit(model, digits(batch_size))
    return kept


STILL = partial(SGD, lr=0.0)


def assert_same(
    one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=rtol, atol=atol)


class Frozen(Lit):
    """Batch norm in evaluation mode, so that a batch is the mean of its halves."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[1].eval()


def test_statistics_see_unclipped_gradients(tmp_path: Path) -> None:
    plain = statistics(tmp_path, seeded(lambda: Frozen(STILL)))
    assert int(plain["count"]) == 5
    clipped = statistics(tmp_path, seeded(lambda: Frozen(STILL)), gradient_clip_val=1e-4)
    assert_same(plain, clipped)


def test_statistics_of_micro_batches_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole = statistics(tmp_path, seeded(lambda: Frozen(STILL)))
    parts = statistics(tmp_path, seeded(lambda: Frozen(STILL)), 16, accumulate_grad_batches=4)
    assert_same(whole, parts, rtol=1e-4)


def test_statistics_see_unclipped_gradients_under_manual_optimization(tmp_path: Path) -> None:
    class FrozenManual(Manual):
        on_train_batch_start = Frozen.on_train_batch_start

    plain = statistics(tmp_path, seeded(lambda: Frozen(STILL)))
    manual = statistics(tmp_path, seeded(lambda: FrozenManual(clip=1e-4, lr=0.0)))
    assert_same(plain, manual)


def test_a_layer_that_takes_no_part_in_a_step_is_not_observed(tmp_path: Path) -> None:
    class Parts(Manual):
        """The last layer takes part in the first batch; the first optimizer has a loss of its own."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            whole = self.loss(batch) if batch_idx == 0 else self.net[:6](batch[0]).square().mean()
            self.manual_backward(whole)
            second.step()
            self.manual_backward(self.net[:4](batch[0]).square().mean())
            first.step()

    pruning = PruningCallback(0.5, criterion=Trace(), schedule=OneShot("1ep"))
    counts: dict[str, int] = {}

    class Keep(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            if counts:
                return
            found = pruning.state_dict()["pruner"]["statistics"]
            counts.update({name: int(each["count"]) for name, each in found.items()})

    fit(tmp_path, seeded(Parts), pruning, Keep(), max_epochs=2)
    assert counts == {"net.0.weight": 5, "net.4.weight": 5, "net.6.weight": 1}


@pytest.mark.parametrize("fused", [False, True])
def test_statistics_see_unscaled_gradients(tmp_path: Path, fused: bool) -> None:
    plain = statistics(tmp_path, seeded(lambda: Frozen(STILL)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = statistics(
        tmp_path,
        seeded(lambda: Frozen(partial(SGD, lr=0.0, fused=fused))),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    assert int(scaled["count"]) == 5
    for name in plain:
        ratio = float((plain[name] * scaled[name]).sum() / (plain[name] ** 2).sum())
        assert ratio == pytest.approx(1, rel=0.02)  # half precision; a scale left in would be 1024


@pytest.mark.parametrize(
    "scaling", [{"init_scale": 2.0**8}, {"init_scale": 2.0**16}, {"init_scale": 64.0, "growth_interval": 1}]
)
def test_statistics_under_manual_optimization_do_not_depend_on_the_loss_scale(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    class FrozenManual(Manual):
        on_train_batch_start = Frozen.on_train_batch_start

    def scaled(**options: Any) -> dict[str, Tensor]:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))
        model = seeded(lambda: FrozenManual(clip=1e-4, lr=0.0))
        return statistics(tmp_path, model, plugins=[plugin])

    found = scaled(**scaling)
    assert int(found["count"]) == 5
    assert_same(found, scaled(init_scale=2.0**12))
    plain = statistics(tmp_path, seeded(lambda: Frozen(STILL)))
    assert_same(found, plain, rtol=0.02, atol=1e-4)


class Slim(Lit):
    """Has the penalty of network slimming in its loss."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.125 * self.net[1].weight.abs().sum()


class SlimManual(Manual, Slim):
    """The same under manual optimization."""


@pytest.mark.parametrize(
    ("plain", "penalised", "options"),
    [
        (Lit, Slim, {}),
        (Lit, Slim, {"accumulate_grad_batches": 5}),
        (Lit, Slim, {"gradient_clip_val": 0.01}),
        (Manual, SlimManual, {}),
        (
            partial(Lit, partial(LBFGS, lr=1e-3, max_iter=3)),
            partial(Slim, partial(LBFGS, lr=1e-3, max_iter=3)),
            {},
        ),
    ],
    ids=["automatic", "accumulated", "clipped", "manual", "closure"],
)
def test_a_penalty_trains_as_if_it_were_in_the_loss(
    tmp_path: Path, plain: Any, penalised: Any, options: dict[str, Any]
) -> None:
    pruning = PruningCallback(
        0.5, criterion=BatchNormScale(l1=0.125), structure=Channels(), schedule=OneShot("2ep")
    )
    seen: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(tmp_path, seeded(plain), pruning, Keep(), max_epochs=3, **options)
    with_callback, seen = seen, []
    fit(tmp_path, seeded(penalised), Keep(), max_epochs=3, **options)
    for ours, theirs in zip(with_callback[:2], seen[:2], strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_penalty_is_scaled_with_the_loss(tmp_path: Path, fused: bool) -> None:
    pruning = PruningCallback(
        0.5, criterion=BatchNormScale(l1=0.125), structure=Channels(), schedule=OneShot("1ep")
    )
    moved: list[Tensor] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            moved.append(pl_module.net[1].weight.detach().clone())

    class Still(Lit):
        """A loss that pulls at nothing."""

        def loss(self, batch: Any) -> Tensor:
            return 0 * super().loss(batch)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = seeded(lambda: Still(partial(SGD, lr=0.5, fused=fused)))
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    fit(tmp_path, model, pruning, Keep(), max_epochs=2, plugins=plugins)
    torch.testing.assert_close(moved[1], moved[0] - 0.5 * 0.125 * moved[0].sign())
    assert not (moved[-1] - moved[-2]).any()  # none after the last event


def test_a_closure_that_runs_many_times_is_one_observation(tmp_path: Path) -> None:
    assert int(statistics(tmp_path, Lit(partial(LBFGS, lr=1e-3, max_iter=4)))["count"]) == 5


def test_steps_with_bad_gradients_are_left_out_and_counted(tmp_path: Path) -> None:
    class Sometimes(Frozen):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            factor = [1.0, float("nan"), float("inf"), 1.0, 1.0][batch_idx]
            return super().training_step(batch, batch_idx) * factor

        def optimizer_step(self, *args: Any, **options: Any) -> None:
            super().optimizer_step(*args, **options)

    pruning = PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("1ep"))

    class Heal(Callback):
        """Bad steps would destroy the weights: lr is 0, but 0 * nan is nan."""

        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            for parameter in module.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)

    fit(tmp_path, seeded(lambda: Sometimes(STILL)), pruning, Heal(), max_epochs=2)
    report = pruning.report
    assert report.left_out == 2
    assert report.removed == round(0.5 * report.size)


def test_an_event_waits_for_a_finite_gradient(tmp_path: Path) -> None:
    class Late(Frozen):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1.0 if self.global_step > 6 else float("nan"))

    class Heal(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            for parameter in module.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)

    pruning = PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("1ep"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="waits") as warned:
            fit(tmp_path, seeded(lambda: Late(STILL)), pruning, Heal(), max_epochs=3)
        assert sum("waits" in str(each.message) for each in warned) == 1
        assert pruning.report.history[0].step == 8
        assert pruning.report.removed == round(0.5 * pruning.report.size)


class Break(Callback):
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.error is not None and trainer.global_step == 12:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_names_stay_and_no_hook_is_left(tmp_path: Path, error: BaseException | None) -> None:
    from lit import trainer as make

    model = Lit()
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    pruning = PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("1ep"))
    run = make(tmp_path, pruning, Break(error))
    try:
        run.fit(model, digits(), digits())
    except (RuntimeError, SystemExit):
        assert error is not None
    assert run.global_step == (20 if error is None else 12)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert all(type(each) is torch.nn.Parameter for each in model.parameters())
    assert hooks(model, run) == 0
    assert pruning.report.removed == round(0.5 * pruning.report.size)


def test_the_metric_in_a_checkpoint_belongs_to_its_weights(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="acc", mode="max", save_top_k=-1)
    pruning = PruningCallback(0.9, schedule=EVERY_EPOCH)
    run = fit(tmp_path, seeded(Lit), pruning, checkpoint, enable_checkpointing=True)
    assert len(checkpoint.best_k_models) == 4
    for path, metric in checkpoint.best_k_models.items():
        (found,) = run.validate(seeded(Lit), digits(examples=100), ckpt_path=path, verbose=False)
        assert found["acc"] == pytest.approx(float(metric), abs=1e-7)


@pytest.mark.parametrize("selector", [Global(), NofM(1, 2)])
def test_masks_never_grow_back(tmp_path: Path, selector: Any) -> None:
    pruning = PruningCallback(0.5, selector=selector, criterion=Gradient(), schedule=EVERY_EPOCH)
    before: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for name, mask in pruning.masks.items():
                assert not bool((mask & ~before.get(name, torch.ones_like(mask))).any())
                before[name] = mask.clone()

    fit(tmp_path, Lit(), pruning, Watch())
    assert pruning.report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_what_stays_has_a_reason_in_the_report(tmp_path: Path) -> None:
    pruning = PruningCallback(selector=NofM(2, 4), schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), pruning, max_epochs=2)
    assert pruning.report.frozen == {"net.0.weight": "1 inputs are no multiple of m=4"}
    assert pruning.report.sparsity == 0.5


def test_no_layer_is_emptied_and_the_report_says_where_that_bound(tmp_path: Path) -> None:
    class Small(Lit):
        def on_fit_start(self) -> None:
            with torch.no_grad():
                self.net[6].weight.mul_(1e-6)

    pruning = PruningCallback(0.8, schedule=OneShot("0%"))
    run = fit(tmp_path, seeded(lambda: Small(STILL)), pruning, max_epochs=1)
    report = pruning.report
    assert report.removed == round(0.8 * report.size)
    assert [layer.kept for layer in report.layers if layer.name == "net.6.weight"] == [1]
    assert report.protected == ("net.6.weight",)
    run.save_checkpoint(tmp_path / "net.ckpt")
    resumed = PruningCallback(0.8, schedule=OneShot("0%"))
    fit(tmp_path, Lit(STILL), resumed, max_epochs=2, ckpt_path=tmp_path / "net.ckpt")
    assert resumed.report.protected == ("net.6.weight",)


@pytest.mark.filterwarnings("ignore:A pruning event left:UserWarning")
def test_frozen_layers_wait_until_they_train(tmp_path: Path) -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.net[4].requires_grad_(trainer.current_epoch >= 2)

    kept = []

    class Watch(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            kept.append(int(pruning.masks["net.4.weight"].sum()))

    pruning = PruningCallback(0.5, criterion=Taylor(), schedule=EVERY_EPOCH)
    fit(tmp_path, Lit(), Thaw(), pruning, Watch())
    assert kept[:3] == [4608, 4608, 4608]
    assert kept[3] < 4608


def test_excluded_parameters_are_left_alone(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, structure=Unstructured(exclude="net.6"), schedule=OneShot("1ep"))
    fit(tmp_path, Lit(), pruning, max_epochs=2)
    assert set(pruning.masks) == {"net.0.weight", "net.4.weight"}


def test_magnitude_needs_no_gradient_to_prune_frozen_layers(tmp_path: Path) -> None:
    model = Lit()
    model.net[4].requires_grad_(False)
    pruning = PruningCallback(0.5, criterion=Magnitude(), schedule=OneShot("1ep"))
    fit(tmp_path, model, pruning, max_epochs=2)
    assert pruning.report.removed == round(0.5 * pruning.report.size)


class Tensors(Callback):
    """Counts live tensors in the middle between two events."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % 10 == 5:
            gc.collect()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))


@pytest.mark.parametrize("structure", [Unstructured(), Channels()])
def test_nothing_piles_up_over_many_events(tmp_path: Path, structure: Any) -> None:
    pruning = PruningCallback(
        0.5, criterion=Taylor(), structure=structure, schedule=Cubic("10st", "90st", every="10st")
    )
    fit(tmp_path, Lit(), pruning, tensors := Tensors(), max_epochs=20, limit_val_batches=0)
    assert len([entry for entry in pruning.report.history if entry.metric is None]) == 9
    assert len(set(tensors.counts[1:9])) == 1, tensors.counts
