"""Distillation gives the gradients of a term that is written into the loss, however a fit is set up."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from distilled import Explicit, ExplicitManual, distance
from lightnings import Callback, MixedPrecision, ModelCheckpoint, ModelParallelStrategy
from lit import Lit, Manual, digits, fit, hooks, same, seeded, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD

from lightning_prune import Channels, Distillation, Linear, OneShot, PruningCallback, Taylor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
    # of the compiler's own looking around
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile.*global hooks:UserWarning"),
]
DOUBLE = {"precision": "64-true"}
EVENTS = Linear("1ep", "3ep", every="1ep")


def after(folder: Path, make: Callable[[], Any], *callbacks: Any, **options: Any) -> Any:
    """A module that was trained."""
    model = seeded(make)
    fit(folder, model, *callbacks, **options)
    return model


def check(
    folder: Path, taught: Any, make: Callable[[], Any], explicit: Callable[[], Any], **options: Any
) -> None:
    """A module was trained as the one with the term in its loss is, and not as the one without."""
    assert distance(taught, after(folder, explicit, **options)) < 1e-12
    assert distance(taught, after(folder, make, **options)) > 1e-4


# --- gradients


@pytest.mark.parametrize(
    ("make", "explicit", "options"),
    [
        (Lit, Explicit, {}),
        (Lit, Explicit, {"accumulate_grad_batches": 2}),
        (Lit, Explicit, {"accumulate_grad_batches": 3}),  # two batches are left over
        (Lit, Explicit, {"gradient_clip_val": 0.1}),
        (Manual, ExplicitManual, {}),
    ],
)
def test_gradients_are_those_of_a_term_in_the_loss(
    tmp_path: Path, make: type[Lit], explicit: type[Lit], options: dict[str, Any]
) -> None:
    taught = after(tmp_path, make, Distillation(), **options, **DOUBLE)
    check(tmp_path, taught, make, explicit, **options, **DOUBLE)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (3, 4)])
def test_weight_and_temperature_are_those_of_the_paper(
    tmp_path: Path, weight: float, temperature: float
) -> None:
    class Other(Explicit):
        pass

    Other.weight, Other.temperature = weight, temperature
    taught = after(tmp_path, Lit, Distillation(weight=weight, temperature=temperature), **DOUBLE)
    check(tmp_path, taught, Lit, Other, **DOUBLE)


def test_every_closure_of_a_step_is_taught(tmp_path: Path) -> None:
    def search(kind: type[Lit]) -> Callable[[], Lit]:
        return lambda: kind(lambda parameters: LBFGS(parameters, 0.1, max_iter=3))

    taught = after(tmp_path, search(Lit), Distillation(), **DOUBLE)
    assert distance(taught, after(tmp_path, search(Explicit), **DOUBLE)) < 1e-9
    assert distance(taught, after(tmp_path, search(Lit), **DOUBLE)) > 1e-4


@pytest.mark.parametrize(("make", "explicit"), [(Lit, Explicit), (Manual, ExplicitManual)])
@pytest.mark.parametrize("name", ["bf16-mixed", "scaled", "scaled less"])
def test_gradients_are_right_in_mixed_precision(
    tmp_path: Path, name: str, make: type[Lit], explicit: type[Lit]
) -> None:
    def options() -> dict[str, Any]:
        if name == "bf16-mixed":
            return {"precision": name}
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0 if name == "scaled" else 16.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    def gradients(make: type[Lit], *callbacks: Any) -> Tensor:
        first = Gradients()
        after(tmp_path, make, *callbacks, first, **options(), limit_train_batches=1, max_epochs=1)
        return first.found

    strong = type("Strong", (explicit,), {"weight": 4.0})
    taught, wanted, plain = gradients(make, Distillation(weight=4)), gradients(strong), gradients(make)
    # bfloat16 has 8 bits, and processors without units for it round otherwise
    share = 0.04 if name == "bf16-mixed" else 0.02
    assert float((taught - wanted).norm()) < share * float((taught - plain).norm())


class Gradients(Callback):
    """Keeps the gradients of the first backward pass: scaled, and not clipped."""

    found: Tensor

    def on_after_backward(self, run: Any, module: Any) -> None:
        self.found = torch.cat([each.grad.flatten().clone() for each in module.parameters()])


class Inner(nn.Sequential):
    """torch 2.6 compiles no container of its own."""

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


def compiled_net() -> Any:
    model = seeded(Lit)
    model.net = Inner(*model.net)
    model.net.compile(backend="aot_eager")
    return model


def wrapped_net() -> Any:
    model = seeded(Lit)
    model.net = torch.compile(Inner(*model.net), backend="aot_eager")
    return model


def compiled_module() -> Any:
    model = seeded(Lit)
    model.compile(backend="aot_eager")
    return model


def compiled_outside() -> Any:
    return torch.compile(seeded(Lit), backend="aot_eager")


@pytest.mark.parametrize("make", [compiled_net, wrapped_net, compiled_module, compiled_outside])
@pytest.mark.parametrize(("name", "before"), [(None, False), ("net", True)])
def test_compiled_modules_are_taught(
    tmp_path: Path, make: Callable[[], Any], name: str | None, before: bool
) -> None:
    torch._dynamo.reset()
    taught = make()
    if before:  # it was compiled without
        own = getattr(taught, "_orig_mod", taught)
        start = copy.deepcopy(own.state_dict())
        fit(tmp_path, taught, max_epochs=1, limit_val_batches=0)
        own.load_state_dict(start)
    fit(tmp_path, taught, Distillation(module=name), limit_val_batches=0)
    assert distance(taught, after(tmp_path, Explicit)) < 1e-5
    assert hooks(getattr(taught, "_orig_mod", taught), trainer(tmp_path)) == 0


# --- what meets the loss


def test_each_call_and_each_use_of_an_output_counts_as_in_the_loss(tmp_path: Path) -> None:
    class Twice(Lit):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            given = self(images)
            return (
                super().loss((images.flip(-1), labels)) + F.cross_entropy(given, labels) + given.square().mean()
            )

    class Added(Explicit):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            first = super().loss(batch)
            given = first_output[-1]
            return super().loss((images.flip(-1), labels)) + first + given.square().mean()

        def forward(self, images: Tensor) -> Tensor:
            first_output.append(super().forward(images))
            return first_output[-1]

    first_output: list[Tensor] = []
    taught = after(tmp_path, Twice, Distillation(), **DOUBLE, max_epochs=2)
    # batch norms see the halves in another order
    assert distance(taught, after(tmp_path, Added, **DOUBLE, max_epochs=2)) < 1e-10


@pytest.mark.parametrize("given", [False, True])
def test_outputs_that_are_no_logits_have_a_squared_error(tmp_path: Path, given: bool) -> None:
    class Regression(Lit):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            return (self(images)[:, 0] - labels).square().mean()

    class WithTerm(Regression):
        teacher: nn.Module | None = None

        def loss(self, batch: Any) -> Tensor:
            if self.teacher is None:
                vars(self)["teacher"] = copy.deepcopy(self.net).eval().requires_grad_(False)
            assert self.teacher is not None
            images, _ = batch
            wanted = self.teacher(images)
            self.term = 2 * F.mse_loss(self(images), wanted)
            return super().loss(batch) + self.term

        def forward(self, images: Tensor) -> Tensor:
            if getattr(self, "kept", (None,))[0] is not images:
                self.kept = images, super().forward(images)
            return self.kept[1]

    teacher = seeded(Regression).net if given else None
    settings = Distillation(teacher, loss="mse", weight=2)
    options = {"gradient_clip_val": 1.0, **DOUBLE}
    check(tmp_path, after(tmp_path, Regression, settings, **options), Regression, WithTerm, **options)


def test_a_class_that_is_ruled_out_does_no_harm(tmp_path: Path) -> None:
    def masked(make: type[Lit]) -> type[Lit]:
        def forward(self: Any, images: Tensor) -> Tensor:
            return self.net(images).index_fill(1, torch.tensor([9]), -torch.inf)

        def loss(self: Any, batch: Any) -> Tensor:
            images, labels = batch
            return make.loss(self, (images, labels % 9))

        return type("Masked", (make,), {"forward": forward, "loss": loss})

    logged = Logged()
    taught = after(tmp_path, masked(Lit), Distillation(), logged, **DOUBLE)
    assert all(bool(each.isfinite().all()) for each in taught.parameters())
    assert all(0 <= value < 10 for value in logged.values)


class Logged(Callback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_end(self, run: Any, module: Any) -> None:
        self.values.append(float(run.callback_metrics["distill/loss"]))


def test_the_term_is_logged_without_its_weight(tmp_path: Path) -> None:
    logged = Logged()
    model = seeded(Lit)
    teacher = copy.deepcopy(model.net).eval()
    outputs: list[Tensor] = []
    model.net.register_forward_hook(lambda module, args, output: outputs.append((args[0], output)))
    fit(tmp_path, model, Distillation(teacher, weight=5), logged, max_epochs=1, limit_val_batches=0)
    images, given = outputs[-1]
    wanted = (teacher(images) / 2).softmax(1)
    expected = 4 * F.kl_div((given / 2).log_softmax(1), wanted, reduction="batchmean")
    assert logged.values == pytest.approx([float(expected.detach())], rel=1e-4)


def test_logits_are_found_in_what_is_returned(tmp_path: Path) -> None:
    class InDict(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            found = self(images)
            return {"loss": F.cross_entropy(found["logits"], labels)}

        def forward(self, images: Tensor) -> Any:
            return {"features": images * 2, "logits": self.net(images)}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    taught = after(tmp_path, InDict, Distillation(), **DOUBLE)
    check(tmp_path, taught, InDict, Explicit, **DOUBLE)


@pytest.mark.parametrize("dim", [1, -1])
def test_positions_beside_the_classes_are_examples(tmp_path: Path, dim: int) -> None:
    class Dense(Lit):
        """Of 4 positions of each image, each with 4 x 18 features, the class of the image."""

        def forward(self, images: Tensor) -> Tensor:
            found = self.net[4:](self.net[:4](images).view(4 * len(images), 72).repeat(1, 4))
            return found.view(len(images), 4, 10) if dim == -1 else found.view(-1, 4, 10).transpose(1, 2)

        def logits(self, images: Tensor) -> Tensor:
            return self(images) if dim == -1 else self(images).transpose(1, 2)

        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.logits(images).flatten(0, 1), labels.repeat_interleave(4))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Added(Dense):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            if getattr(self, "teacher", None) is None:
                vars(self)["teacher"] = copy.deepcopy(self).eval().requires_grad_(False)
            wanted = (self.teacher.logits(images).flatten(0, 1) / 2).softmax(1)
            found = self.logits(images).flatten(0, 1)
            term = F.kl_div((found / 2).log_softmax(1), wanted, reduction="batchmean")
            return F.cross_entropy(found, labels.repeat_interleave(4)) + 4 * term

    check(tmp_path, after(tmp_path, Dense, Distillation(dim=dim), **DOUBLE), Dense, Added, **DOUBLE)


def test_an_input_that_is_changed_in_place_is_the_same_for_the_teacher(tmp_path: Path) -> None:
    def in_place(make: type[Lit]) -> type[Lit]:
        def forward(self: Any, images: Tensor) -> Tensor:
            return self.net(images.square_())

        return type("InPlace", (make,), {"forward": forward})

    class Squared(Explicit):
        def loss(self, batch: Any) -> Tensor:
            return super().loss((batch[0].square(), batch[1]))

    taught = after(tmp_path, in_place(Lit), Distillation(), **DOUBLE)
    assert distance(taught, after(tmp_path, Squared, **DOUBLE)) < 1e-12


def test_a_gradient_within_the_step_is_no_loss(tmp_path: Path) -> None:
    def penalised(make: type[Lit]) -> type[Lit]:
        def forward(self: Any, images: Tensor) -> Tensor:
            self.output = self.net(images)
            return self.output

        def loss(self: Any, batch: Any) -> Tensor:
            batch[0].requires_grad_()
            loss = make.loss(self, batch)
            (slope,) = torch.autograd.grad(self.output.logsumexp(1).sum(), batch[0], create_graph=True)
            return loss + 0.1 * slope.square().sum()

        return type("Penalised", (make,), {"forward": forward, "loss": loss})

    taught = after(tmp_path, penalised(Lit), Distillation(), **DOUBLE)
    check(tmp_path, taught, penalised(Lit), penalised(Explicit), **DOUBLE)


# --- which module is compared


class Parts(Lit):
    """Calls no forward of its own."""

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


def test_the_module_that_the_step_calls_is_compared(tmp_path: Path) -> None:
    class WithMetric(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            return self.criterion(self.net(images), labels)

    callback = Distillation()
    taught = after(tmp_path, WithMetric, callback, **DOUBLE)
    assert callback.state_dict()["module"] == "net"
    check(tmp_path, taught, Lit, Explicit, **DOUBLE)


def test_a_module_that_does_not_show_what_is_compared_is_refused(tmp_path: Path) -> None:
    class Split(Lit):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net[4:](self.net[:4](images)), labels)

    class Direct(Lit):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            hidden = self.net[0](images)
            for layer in self.net[1:]:
                hidden = layer(hidden)
            return F.cross_entropy(hidden, labels)

    class Unused(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(1, 1)

    model = seeded(Direct)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"calls 'net.0', 'net.1', 'net.4', 'net.6'.*module='NAME'"):
        fit(tmp_path, model, Distillation())
    with pytest.raises(ValueError, match=r"module='net.6' is called with what other trained modules"):
        fit(tmp_path, model, Distillation(module="net.6"))
    with pytest.raises(ValueError, match="module='other' is not called in training_step"):
        fit(tmp_path, seeded(Unused), Distillation(module="other"))
    with pytest.raises(ValueError, match=r"module='nte' must be the name of a module of Lit: '', 'net'"):
        fit(tmp_path, seeded(Lit), Distillation(module="nte"))
    assert same(dict(model.named_parameters()), before)
    assert hooks(model, trainer(tmp_path)) == 0


def test_an_output_that_reaches_no_loss_is_told(tmp_path: Path) -> None:
    class Cut(Lit):
        def loss(self, batch: Any) -> Tensor:
            images, labels = batch
            self(images)
            return F.cross_entropy(self.net(images), labels)

    with pytest.warns(UserWarning, match="Distillation has added nothing in a batch") as told:
        fit(tmp_path, seeded(Cut), Distillation())
    assert sum("added nothing" in str(each.message) for each in told) == 1


# --- the teacher


class Watched(Lit):
    """Counts the passes of all its copies."""

    passes: ClassVar[list[tuple[int, bool]]] = []

    def forward(self, images: Tensor) -> Tensor:
        Watched.passes.append((id(self), self.training))
        return super().forward(images)


@pytest.mark.parametrize("first", [True, False])
def test_the_teacher_runs_in_training_steps_alone_and_does_not_train(tmp_path: Path, first: bool) -> None:
    Watched.passes.clear()
    model, teacher = seeded(Watched), seeded(Watched)
    before = copy.deepcopy(teacher.state_dict())
    pruning = PruningCallback(0.4, structure=Channels(), criterion=Taylor(), schedule=EVENTS, compact=True)
    callback = Distillation(module="")
    names = list(model.state_dict())

    class Look(Callback):
        teacher: Any = None

        def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
            Look.teacher = callback._teacher
            assert list(module.state_dict()) == names
            held = {id(each) for group in run.optimizers[0].param_groups for each in group["params"]}
            assert held == {id(each) for each in module.parameters()}

    order = (callback, pruning) if first else (pruning, callback)
    run = fit(tmp_path, model, *order, Look(), num_sanity_val_steps=2)
    assert [training for one, training in Watched.passes if one == id(Look.teacher)] == [False] * 20
    assert same(callback.state_dict()["weights"], before)
    assert model.net[0].weight.shape[0] < 8
    assert hooks(model, run) == 0
    assert callback._teacher is None


@pytest.mark.parametrize("first", [True, False])
def test_beside_pruning_the_dense_network_teaches(tmp_path: Path, first: bool) -> None:
    def pruning() -> PruningCallback:
        return PruningCallback(0.9, criterion=Taylor(), schedule=EVENTS)

    callbacks = (Distillation(), pruning()) if first else (pruning(), Distillation())
    taught = after(tmp_path, Lit, *callbacks, **DOUBLE)
    explicit, plain = after(tmp_path, Explicit, pruning(), **DOUBLE), after(tmp_path, Lit, pruning(), **DOUBLE)
    assert distance(taught, explicit) < 1e-12
    assert distance(taught, plain) > 1e-4
    mask = callbacks[1 if first else 0].masks["net.4.weight"]
    assert int((~mask).sum()) == int((taught.net[4].weight == 0).sum()) > 0


@pytest.mark.parametrize("kind", ["dense", "compacted", "network"])
def test_a_teacher_may_come_from_elsewhere(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "teacher.ckpt"
    pruning = PruningCallback(0.4, structure=Channels(), schedule=OneShot("1ep"), compact=True)
    model = seeded(Lit)
    fit(tmp_path, model, *([pruning] if kind == "compacted" else []), max_epochs=2).save_checkpoint(path)
    network = copy.deepcopy(model)
    before = copy.deepcopy(network.state_dict())

    class Other(Explicit):
        def __init__(self) -> None:
            super().__init__()
            vars(self)["teacher"] = copy.deepcopy(network.net).eval().double().requires_grad_(False)

    callback = Distillation(network if kind == "network" else path)
    check(tmp_path, after(tmp_path, Lit, callback, **DOUBLE), Lit, Other, **DOUBLE)
    assert callback.state_dict()["weights"] is None
    assert network.training
    assert all(each.requires_grad for each in network.parameters())
    assert same(network.state_dict(), before)


def test_each_fit_takes_a_new_teacher(tmp_path: Path) -> None:
    callback, model = Distillation(), seeded(Lit)
    fit(tmp_path, model, callback, max_epochs=1)
    trained = copy.deepcopy(model.state_dict())
    fit(tmp_path, model, callback, max_epochs=1)
    assert same(callback.state_dict()["weights"], dict(trained))


# --- stop and resume


PRUNING: dict[str, Callable[[], list[PruningCallback]]] = {
    "alone": lambda: [],
    "weights": lambda: [PruningCallback(0.8, criterion=Taylor(), schedule=EVENTS)],
    "channels": lambda: [
        PruningCallback(0.4, structure=Channels(), criterion=Taylor(), schedule=EVENTS, compact=True)
    ],
}


def every(folder: Path, name: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, name + "-{step}", save_top_k=-1, every_n_train_steps=5)


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("find", [None, "net"])
def test_a_resumed_fit_goes_on_with_its_teacher(tmp_path: Path, name: str, find: str | None) -> None:
    whole, callback = seeded(Lit), Distillation(module=find)
    keep = every(tmp_path, "whole")
    fit(tmp_path, whole, callback, *PRUNING[name](), keep, enable_checkpointing=True)
    for step in (5, 15):
        again, other = seeded(Lit), Distillation(module=find)
        with torch.no_grad():
            again.net[0].weight.add_(1)  # what the file holds counts
        path = tmp_path / f"whole-step={step}.ckpt"
        fit(tmp_path, again, other, *PRUNING[name](), ckpt_path=path)
        assert same(again.state_dict(), whole.state_dict())
        assert same(other.state_dict(), callback.state_dict())


def test_a_network_that_was_compacted_is_taught_by_the_dense_one(tmp_path: Path) -> None:
    model, callback = seeded(Lit), Distillation()
    run = fit(tmp_path, model, callback, *PRUNING["channels"]())
    run.save_checkpoint(tmp_path / "small.ckpt")
    again, other = seeded(Lit), Distillation()
    fit(tmp_path, again, *PRUNING["channels"](), other, ckpt_path=tmp_path / "small.ckpt", max_epochs=6)
    assert again.net[0].weight.shape == model.net[0].weight.shape
    assert not same(again.state_dict(), model.state_dict())
    assert other.state_dict()["weights"]["net.0.weight"].shape == (8, 1, 3, 3)
    assert same(other.state_dict(), callback.state_dict())


def test_the_state_is_plain_and_lies_in_the_checkpoint_once(tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    model, callback = seeded(lambda: Lit(partial(SGD, lr=0.05))), Distillation()
    first = copy.deepcopy(model.state_dict())
    run = fit(tmp_path, model, callback)
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(first)
    assert same(saved["callbacks"]["Distillation"], {"version": 1, "module": "", "weights": dict(first)})
    twin = pickle.loads(pickle.dumps(callback))
    assert same(twin.state_dict(), callback.state_dict())
    assert same(copy.deepcopy(run).callbacks[0].state_dict(), callback.state_dict())
    given = Distillation()
    given.load_state_dict(twin.state_dict())  # for the next fit, and for this one alone
    fit(tmp_path, model, given, max_epochs=1)
    assert same(given.state_dict(), callback.state_dict())
    fit(tmp_path, model, given, max_epochs=1)
    assert not same(given.state_dict(), callback.state_dict())


def test_a_checkpoint_without_a_teacher_is_told(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    model = seeded(Lit)
    fit(tmp_path, model, max_epochs=2).save_checkpoint(path)
    callback = Distillation()
    with pytest.warns(UserWarning, match="holds no teacher for Distillation"):
        fit(tmp_path, seeded(Lit), callback, ckpt_path=path)
    assert same(callback.state_dict()["weights"], dict(model.state_dict()))


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    fit(tmp_path, seeded(Lit), Distillation()).save_checkpoint(path)
    good = torch.load(path, weights_only=True)["callbacks"]["Distillation"]
    bad: dict[str, dict[str, Any]] = {
        "version 2, this lightning_prune reads 1": {"version": 2},
        "weights is 3, expected a dict": {"weights": 3},
        "module is 3, expected text": {"module": 3},
        "has no entry 'module'": {"module": None},
        "'net.0.weight'": {
            "weights": {name: each for name, each in good["weights"].items() if "0.w" not in name}
        },
        r"\['net.0.bias'\] is a tensor of shape \(3,\)": {
            "weights": good["weights"] | {"net.0.bias": torch.zeros(3)}
        },
        "module='other' must be the name of a module": {"module": "other"},
    }
    for message, change in bad.items():
        state = good | change
        if change == {"module": None}:
            del state["module"]
        model = seeded(Lit)
        before = copy.deepcopy(model.state_dict())
        callback = Distillation()

        def use(state: Any, model: Any = model, callback: Any = callback) -> None:
            callback.load_state_dict(state)
            fit(tmp_path, model, callback)

        with pytest.raises(ValueError, match=message):
            use(state)
        assert same(model.state_dict(), before)
    with pytest.raises(ValueError, match=r"module='net': the checkpoint has a teacher of module=''"):
        fit(tmp_path, seeded(Lit), Distillation(module="net"), ckpt_path=path, max_epochs=6)


# --- what is left, and what is refused


class Break(Callback):
    def __init__(self, error: BaseException, at: str) -> None:
        self.error, self.at = error, at

    def on_after_backward(self, run: Any, *_: Any) -> None:
        if self.at == "backward" and run.global_step == 7:
            raise self.error

    def on_train_start(self, *_: Any) -> None:
        if self.at == "start":
            raise self.error


@pytest.mark.parametrize("at", ["start", "backward"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_no_hook_is_left_after_an_error(tmp_path: Path, error: BaseException, at: str) -> None:
    model, callback = seeded(Lit), Distillation(module="")
    step = model.training_step
    run = trainer(tmp_path, callback, Break(error, at))
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(model, digits(), digits())
    assert hooks(model, run) == 0
    assert model.training_step == step
    assert callback._teacher is None


def test_copies_of_a_taught_module_have_no_teacher(tmp_path: Path) -> None:
    class Look(Callback):
        size = 0

        def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
            Look.size = len(pickle.dumps(module))
            twin = copy.deepcopy(module)
            assert twin.training_step.__self__ is twin
            (hook,) = twin._forward_hooks.values()
            assert vars(hook) == {"_run": None}

    model = seeded(lambda: Lit(partial(SGD, lr=0.05)))
    fit(tmp_path, model, Distillation(), Look())
    assert Look.size < len(pickle.dumps(model)) + 2000


def test_evaluation_has_no_teacher(tmp_path: Path) -> None:
    model, callback = seeded(Lit), Distillation()
    run = fit(tmp_path, model, callback)
    run.save_checkpoint(tmp_path / "whole.ckpt")
    before = copy.deepcopy(callback.state_dict())
    run.validate(model, digits(), verbose=False)
    run.validate(model, digits(), ckpt_path=tmp_path / "whole.ckpt", verbose=False)
    assert same(callback.state_dict(), before)
    fit(tmp_path, model, callback, max_epochs=1)  # the teacher is not that of the file
    assert not same(callback.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": 3}, "teacher=3 must be None, the path of a checkpoint, or a network"),
        ({"weight": 0}, "weight=0 must be a finite number greater than 0"),
        ({"weight": float("inf")}, "weight=inf must be a finite number greater than 0"),
        ({"temperature": -1.0}, r"temperature=-1.0 must be a finite number greater than 0"),
        ({"temperature": True}, "temperature=True must be"),
        ({"loss": "l1"}, "loss='l1' must be one of 'kl', 'mse'"),
        ({"module": 3}, "module=3 must be the name of a module, or None"),
        ({"dim": "last"}, "dim='last' must be the number of a dimension, or None"),
    ],
)
def test_arguments_that_are_wrong_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**options)


class Shaped(Lit):
    """Returns what a test asks for."""

    shape: Callable[[Tensor], Any] = staticmethod(lambda logits: logits)

    def forward(self, images: Tensor) -> Any:
        return type(self).shape(super().forward(images))

    def loss(self, batch: Any) -> Tensor:
        return torch.stack([each.sum() for each in torch.utils._pytree.tree_leaves(self(batch[0]))]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            lambda logits: (logits, logits),
            {},
            "forward of Shaped returns a tuple with 2 floating-point tensors",
        ),
        (lambda logits: logits[:, 0], {}, r"dim=None: an output of shape \(64,\) does not show"),
        (lambda logits: logits.view(-1, 2, 5), {}, r"dim=None: an output of shape \(64, 2, 5\) does not show"),
        (lambda logits: logits, {"dim": 2}, r"dim=2 must be a dimension of the output.*\(64, 10\)"),
        (lambda logits: logits[:, :1], {}, "loss='kl' compares two classes or more"),
        (lambda logits: logits, {"teacher": nn.Flatten()}, r"the teacher's output has the shape \(64, 64\)"),
    ],
)
def test_outputs_that_cannot_be_compared_are_named_before_a_step(
    tmp_path: Path, shape: Callable[[Tensor], Any], options: dict[str, Any], message: str
) -> None:
    model = seeded(type("Shaped", (Shaped,), {"shape": staticmethod(shape)}))
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model, Distillation(**options))
    assert same(dict(model.named_parameters()), before)


def test_a_teacher_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_text("x")
    torch.save({"state_dict": {"net.0.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    for name, error in (("none", FileNotFoundError), ("broken", ValueError), ("other", ValueError)):
        with pytest.raises(error, match=rf"{name}.ckpt'"):
            fit(tmp_path, seeded(Lit), Distillation(tmp_path / f"{name}.ckpt"))


def test_a_strategy_that_divides_the_network_is_refused(tmp_path: Path) -> None:
    class Divided(Lit):
        def configure_model(self) -> None:
            pass

    run = trainer(tmp_path, Distillation(), strategy=ModelParallelStrategy(1, 1), devices=1)
    with pytest.raises(ValueError, match="strategy=ModelParallelStrategy divides parameters"):
        run.fit(seeded(Divided), digits())
