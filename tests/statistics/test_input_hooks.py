"""Criteria that watch activations: scores by hand and by autograd, and hooks that leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, MixedPrecision
from lit import Lit, Manual, fit, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import (
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    Blocks,
    Channels,
    Criterion,
    Cubic,
    Global,
    Heads,
    NofM,
    OneShot,
    Pruner,
    PruningCallback,
    Structure,
    Unstructured,
    Wanda,
)
from lightning_prune.units.slices import AxisSlice

CHANNELS = Channels()
WATCHING = [ActivationNorm(), ActivationTaylor(), APoZ(), Wanda()]
EACH = pytest.mark.parametrize("criterion", WATCHING, ids=lambda part: type(part).__name__)

# what the second layer reads of two examples: 3 0 2 and 4 0 0
INPUTS = torch.tensor([[3.0, 2.0], [4.0, 0.0]])
WEIGHTS = ([[1.0, 0.0], [0.0, -1.0], [0.0, 1.0]], [[1.0, 2.0, -3.0], [-1.0, 0.5, 0.25]], [[1.0, 1.0]])


def layers() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(2, 3, bias=False),
        nn.ReLU(),
        nn.Linear(3, 2, bias=False),
        nn.ReLU(),
        nn.Linear(2, 1, bias=False),
    )
    for layer, weight in zip(model[::2], WEIGHTS, strict=True):
        layer.weight.data = torch.tensor(weight)
    return model


def watched(
    model: nn.Module,
    criterion: Criterion,
    structure: Structure = CHANNELS,
    inputs: Sequence[Tensor] = (INPUTS,),
    **options: Any,
) -> Pruner:
    pruner = Pruner(
        model, 0.3, criterion=criterion, structure=structure, schedule=None, example=inputs[0], **options
    )
    for batch in inputs:
        with pruner.watch():
            model(batch).sum().backward()
    return pruner


def scores(pruner: Pruner, criterion: Criterion) -> dict[str, Tensor]:
    return {
        group.name: criterion.score(group, pruner.observations.statistics[group.name])
        for group in pruner.groups
    }


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# --- by hand


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (APoZ(), [1.0, 0.0, 0.5]),
        (ActivationNorm(), [12.5**0.5, 0.0, 2.0**0.5]),
        # sums of sizes 2, 2.5 and 3.25 of the columns that read them
        (Wanda(), [2 * 12.5**0.5, 0.0, 3.25 * 2.0**0.5]),
        # the second layer gives -3 -> 0 and -2.5 -> 0, then 4 and -4 -> 0: one path of weight 1 is open
        (ActivationTaylor(), [2.0, 0.0, 0.0]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_units_by_hand(criterion: Criterion, expected: list[float]) -> None:
    pruner = watched(layers(), criterion)
    assert scores(pruner, criterion)["0"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (APoZ(), [[1.0, 0.0, 0.5], [1.0, 0.0, 0.5]]),
        (ActivationNorm(), [[12.5**0.5, 0.0, 2.0**0.5], [12.5**0.5, 0.0, 2.0**0.5]]),
        # ranks of 3.54, 0 and 4.24, and of 3.54, 0 and .35
        (Wanda(), [[2 / 3, 1 / 3, 1.0], [1.0, 1 / 3, 2 / 3]]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_single_weights_by_hand(criterion: Criterion, expected: list[list[float]]) -> None:
    pruner = watched(layers(), criterion, Unstructured())
    torch.testing.assert_close(scores(pruner, criterion)["2.weight"], torch.tensor(expected))


def test_wanda_takes_the_same_share_of_every_output_and_of_n_of_m() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 4), torch.randn(16, 8) * torch.arange(1.0, 9.0)
    pruner = Pruner(model, 0.25, criterion=Wanda(), structure=Unstructured(), schedule=None)
    with pruner.watch():
        model(inputs).sum().backward()
    pruner.prune(1.0)
    product = model.weight.detach().abs() * inputs.norm(dim=0)
    assert pruner.masks["weight"].sum(1).tolist() == [6, 6, 6, 6]
    assert (product * pruner.masks["weight"]).count_nonzero() == 24

    model = nn.Linear(8, 4)
    dense = model.weight.detach().clone()
    pruner = Pruner(model, criterion=Wanda(), selector=NofM(2, 4), schedule=None)
    with pruner.watch():
        model(inputs).sum().backward()
    pruner.prune(1.0)
    best = (dense.abs() * inputs.norm(dim=0)).view(4, 2, 4).topk(2).indices
    expected = torch.zeros(4, 2, 4, dtype=torch.bool).scatter_(2, best, value=True).view(4, 8)
    assert torch.equal(pruner.masks["weight"], expected)


def test_blocks_take_the_mean_over_their_inputs() -> None:
    model = nn.Linear(4, 2, bias=False)
    pruner = Pruner(model, 0.5, criterion=ActivationNorm(), structure=Blocks(2, 2), schedule=None)
    with pruner.watch():
        model(torch.tensor([[1.0, 3.0, 5.0, 9.0]])).sum().backward()
    assert scores(pruner, ActivationNorm())["weight"].tolist() == [[2.0, 7.0]]


# --- by autograd


class Network(nn.Module):
    """A stem, a grouped convolution, a residual block, and neurons that read all positions of a channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 4, 3, padding=1)
        self.outer = nn.Conv2d(4, 8, 1)
        self.hidden = nn.Linear(8 * 16, 6)
        self.head = nn.Linear(6, 3)
        self.gates: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.inner(self._gated("stem by inner", x)).relu()
        x = (x + self.outer(self._gated("inner", y))).relu()
        x = self.hidden(self._gated("stem by hidden", x).flatten(1)).relu()
        return self.head(x)

    def _gated(self, name: str, x: Tensor) -> Tensor:
        """Gates of 1, one an example and channel, whose gradient is the sum of activation times gradient."""
        if name in self.gates:
            return x * self.gates[name][..., None, None]
        return x


def test_the_product_with_the_gradient_is_that_of_a_gate_on_each_example() -> None:
    model, images = Network(), torch.randn(5, 3, 4, 4)
    pruner = watched(model, ActivationTaylor(), inputs=[images])
    found = scores(pruner, ActivationTaylor())
    sizes = {"stem by inner": 8, "inner": 4, "stem by hidden": 8}
    model.gates = {name: torch.ones(5, size, requires_grad=True) for name, size in sizes.items()}
    grads = torch.autograd.grad(model(images).sum(), list(model.gates.values()))
    expected = {name: (grad / 16).abs().mean(0) for name, grad in zip(sizes, grads, strict=True)}
    torch.testing.assert_close(found["inner"], expected["inner"])
    # two layers read the stem's channels: the mean
    torch.testing.assert_close(found["stem"], (expected["stem by inner"] + expected["stem by hidden"]) / 2)


@EACH
def test_watching_changes_neither_outputs_nor_gradients(criterion: Criterion) -> None:
    images = torch.randn(5, 3, 4, 4)
    plain, seen = Network(), Network()
    plain(images).sum().backward()
    watched(seen, criterion, inputs=[images])
    for one, other in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@EACH
def test_micro_batches_add_up(criterion: Criterion) -> None:
    images = torch.randn(6, 3, 4, 4)
    whole, parts = Network().eval(), Network().eval()
    one = watched(whole, criterion, inputs=[images])
    other = watched(parts, criterion, inputs=[images[:1], images[1:4], images[4:]])
    for name, score in scores(one, criterion).items():
        torch.testing.assert_close(scores(other, criterion)[name], score)


def test_positions_of_sequences_and_examples_without_a_batch() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    sequence = torch.randn(4, 5, 2)
    found = scores(watched(model, ActivationNorm(), inputs=[sequence]), ActivationNorm())["0"]
    torch.testing.assert_close(found, model[:2](sequence).square().mean((0, 1)).sqrt())
    found = scores(watched(model, ActivationNorm(), inputs=[sequence[0, 0]]), ActivationNorm())["0"]
    torch.testing.assert_close(found, model[:2](sequence[0, 0]))


def test_grouped_convolutions_read_the_same_units_in_each_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 1, groups=2), nn.ReLU(), nn.Conv1d(4, 1, 1)
    )
    inputs = torch.randn(3, 2, 5)
    pruner = watched(model, ActivationNorm(), inputs=[inputs])
    given = model[:2](inputs)
    group = next(group for group in pruner.groups if group.name == "0")
    (part,) = (part for part in group.slices if part.name == "0.weight")
    assert isinstance(part, AxisSlice)
    assert part.index is not None
    units = [given[:, part.index == unit] for unit in range(group.size)]
    expected = torch.stack([each.square().mean() for each in units]).sqrt()
    torch.testing.assert_close(scores(pruner, ActivationNorm())["0"], expected)


class Conv1D(nn.Module):
    """Stores its inputs first, as that of Hugging Face."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


@EACH
@pytest.mark.parametrize("structure", [CHANNELS, Unstructured()], ids=["channels", "weights"])
def test_layers_that_store_their_inputs_first_are_looked_at_too(
    criterion: Criterion, structure: Structure
) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    other = nn.Sequential(*(Conv1D(each) if isinstance(each, nn.Linear) else each for each in linear))
    inputs = [torch.randn(5, 7, 4), torch.randn(5, 7, 4)]
    expected = watched(linear, criterion, structure, inputs).scores()
    found = watched(other, criterion, structure, inputs).scores()
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score if structure is CHANNELS else score.t())


# --- what is looked at


@EACH
def test_hooks_last_as_long_as_the_block(criterion: Criterion) -> None:
    model = layers()
    pruner = Pruner(model, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    with pruner.watch():
        assert hooks(model) == 2
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="cannot be multiplied"), pruner.watch():
        model[2](model[2](model[:2](INPUTS)))
    assert hooks(model) == 0
    assert not pruner.ready  # half a step is no observation


@EACH
def test_passes_without_gradients_are_left_alone(criterion: Criterion) -> None:
    model = layers()
    pruner = Pruner(model, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    other = Pruner(model, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    with pruner.watch():
        with torch.no_grad():
            model(INPUTS * 3)  # of a teacher
        model(INPUTS).sum().backward()
    with other.watch():
        model(INPUTS).sum().backward()
    found, expected = pruner.scores(), other.scores()
    assert all(map(torch.equal, found.values(), expected.values()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("criterion", [each for each in WATCHING if not each.backward], ids=str)
def test_forward_passes_alone_are_enough_where_no_gradient_is_needed(criterion: Criterion, mode: Any) -> None:
    model, inputs = layers(), [INPUTS, INPUTS.flip(0) * 2]
    pruner = Pruner(model, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    for each in inputs:
        with pruner.watch(), mode():
            model(each)
    found, expected = pruner.scores(), watched(layers(), criterion, inputs=inputs).scores()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


def test_a_criterion_of_gradients_says_what_it_needs() -> None:
    model = layers()
    criterion = ActivationTaylor()
    pruner = Pruner(model, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    with pruner.watch(), torch.no_grad():
        model(INPUTS)
    assert not pruner.ready
    message = r"has seen no finite activation yet: run forward and backward in `with pruner\.watch\(\):`"
    with pytest.raises(RuntimeError, match=message):
        pruner.prune(1.0)


@EACH
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_passes_with_inf_or_nan_are_left_out_and_counted(criterion: Criterion, poison: float) -> None:
    clean, bad = layers(), layers()
    one = watched(clean, criterion, inputs=[INPUTS])
    other = watched(bad, criterion, inputs=[INPUTS, INPUTS * torch.tensor([poison, 1.0])])
    assert (one.left_out, other.left_out) == (0, 1)
    found = scores(other, criterion)
    assert all(torch.equal(score, found[name]) for name, score in scores(one, criterion).items())


@EACH
def test_events_start_the_means_anew(criterion: Criterion) -> None:
    pruner = watched(layers(), criterion)
    assert pruner.ready
    pruner.prune(1.0)
    assert not pruner.ready


def test_what_no_layer_is_called_on_stays_with_the_reason() -> None:
    model = nn.TransformerEncoderLayer(8, 4, dim_feedforward=12, dropout=0.0, batch_first=True)
    tokens = torch.randn(2, 5, 8)
    pruner = Pruner(model, 0.5, criterion=APoZ(), structure=Channels(), schedule=None, example=tokens)
    assert [group.name for group in pruner.groups] == ["linear1"]
    assert "needs a layer with groups=1 that reads the units, called as a module" in pruner.frozen["self_attn"]
    with pytest.raises(ValueError, match=r"^APoZ\(every=10\) with Global.* can prune no layer"):
        Pruner(model, 0.5, criterion=APoZ(), structure=Heads(), schedule=None, example=tokens)


@EACH
def test_single_weights_of_grouped_convolutions_stay_with_the_reason(criterion: Criterion) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 4, 1))
    pruner = Pruner(model, 0.5, criterion=criterion, structure=Unstructured(), schedule=None)
    assert [group.name for group in pruner.groups] == ["1.weight"]
    assert "needs a layer with groups=1 that reads the units, called as a module" in pruner.frozen["0.weight"]
    with pruner.watch():
        model(torch.randn(2, 8, 3)).sum().backward()
    pruner.prune(1.0)
    assert pruner.masks["1.weight"].sum() == 16


def test_what_is_added_to_units_does_not_read_them() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 6)
            self.places = nn.Parameter(torch.randn(1, 4, 6))
            self.inner = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.words(tokens) + self.places
            return self.head(x + self.inner(x).relu())

    group = next(iter(Channels().units(Tokens(), torch.randint(0, 50, (2, 4))).groups))
    assert {part.name for part in group.masked} >= {"words.weight", "places", "inner.weight", "head.weight"}
    assert {part.name for part in group.readers} <= {"inner.weight", "head.weight"}


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_parts_stay_out_of_the_backward_pass(frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    pruner = Pruner(model, 0.5, criterion=ActivationTaylor(), structure=Unstructured(), schedule=None)
    model[:3].requires_grad_(not frozen)
    given: list[bool] = []
    model[3].register_forward_hook(lambda module, args, output: given.append(args[0].requires_grad))
    with pruner.watch():
        model(INPUTS).sum().backward()
    assert given == [not frozen]


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "2", None])
def test_batches_are_sampled_by_whole_numbers(every: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1") as error:
        APoZ(every)
    assert str(error.value).startswith(f"every={every!r} ")


# --- in a Trainer


class Keep(Callback):
    """Statistics at the end of each epoch, and whether anything is left on the model."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        assert hooks(pl_module) == 0
        statistics = self.pruning.state_dict()["pruner"]["statistics"]
        self.seen.append(
            {
                name: {"count": int(each["count"]), "features": each["features"].clone()}
                for name, each in statistics.items()
            }
        )


def fitted(folder: Path, criterion: Criterion, model: Lit, **options: Any) -> list[dict[str, Any]]:
    pruning = PruningCallback(
        0.5, criterion=criterion, structure=Channels(), selector=Global(normalize="l2"), schedule=OneShot("2ep")
    )
    keep = Keep(pruning)
    fit(folder, model, pruning, keep, max_epochs=3, **options)
    assert pruning.report.sparsity > 0
    assert hooks(model) == 0
    return keep.seen


@EACH
@pytest.mark.parametrize("make", [Lit, Manual])
def test_it_prunes_channels_in_a_fit_and_leaves_nothing_behind(
    criterion: Criterion, make: Any, tmp_path: Path
) -> None:
    seen = fitted(tmp_path, criterion, seeded(make))
    # the first of 5 batches of 64 in each of two epochs; after the last event no more
    assert [each["net.0"]["count"] for each in seen] == [64, 128, 0]


@pytest.mark.parametrize(
    ("every", "counts"), [(1, [320, 640]), (2, [192, 384]), (3, [128, 256]), (9, [64, 128])]
)
def test_every_so_manyth_batch_is_looked_at(every: int, counts: list[int], tmp_path: Path) -> None:
    seen = fitted(tmp_path, APoZ(every=every), seeded(Lit))
    assert [each["net.4"]["count"] for each in seen[:2]] == counts


def test_a_batch_is_looked_at_where_an_event_has_emptied_the_statistics(tmp_path: Path) -> None:
    schedule = Cubic("2st", "8st", "2st")
    pruning = PruningCallback(0.5, criterion=ActivationNorm(every=100), structure=Channels(), schedule=schedule)
    fit(tmp_path, seeded(Lit), pruning, max_epochs=2)
    assert [entry.step for entry in pruning.report.history if entry.metric is None] == [2, 4, 6, 8]


def test_gradients_are_unscaled(tmp_path: Path) -> None:
    class Still(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    plain = fitted(tmp_path, ActivationTaylor(every=1), seeded(Still))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    scaled = fitted(tmp_path, ActivationTaylor(every=1), seeded(Still), plugins=plugins)
    one, other = plain[0]["net.4"]["features"], scaled[0]["net.4"]["features"]
    assert float((one * other).sum() / one.square().sum()) == pytest.approx(1, rel=0.02)


def test_gradients_are_unscaled_where_the_scale_changes_within_a_batch(tmp_path: Path) -> None:
    class Twice(Lit):
        def __init__(self) -> None:
            super().__init__(lambda parameters: torch.optim.SGD(parameters, 0.0))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    plain = fitted(tmp_path, ActivationTaylor(every=1), seeded(Twice))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    scaled = fitted(tmp_path, ActivationTaylor(every=1), seeded(Twice), plugins=plugins)
    one, other = plain[0]["net.4"]["features"], scaled[0]["net.4"]["features"]
    assert float((one * other).sum() / one.square().sum()) == pytest.approx(1, rel=0.02)


class ByHand(Lit):
    """Hands its optimizer a closure under manual optimization."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@pytest.mark.parametrize("kind", [Lit, ByHand])
def test_a_closure_that_runs_many_times_is_one_observation(kind: Any, tmp_path: Path) -> None:
    model = seeded(lambda: kind(lambda parameters: torch.optim.LBFGS(parameters, lr=1e-3, max_iter=3)))
    model.automatic_optimization = kind is Lit
    seen = fitted(tmp_path, APoZ(every=1), model)
    assert [each["net.0"]["count"] for each in seen] == [320, 640, 0]


def test_a_skipped_batch_leaves_no_hook_and_no_observation(tmp_path: Path) -> None:
    class Skips(Lit):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    seen = fitted(tmp_path, APoZ(every=1), seeded(Skips))
    assert [each["net.0"]["count"] for each in seen] == [192, 384, 0]


def test_an_error_in_a_step_leaves_no_hook_and_no_half_observation(tmp_path: Path) -> None:
    class Stops(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise KeyboardInterrupt
            return loss

    pruning = PruningCallback(0.5, criterion=APoZ(every=1), structure=Channels(), schedule=OneShot("1ep"))
    model = seeded(Stops)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, model, pruning, max_epochs=2)
    assert hooks(model) == 0
    assert int(pruning.state_dict()["pruner"]["statistics"]["net.0"]["count"]) == 128


@EACH
@pytest.mark.parametrize("part", ["net", "net.2", "net.4"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler's own looking around
def test_compiled_parts_are_seen(criterion: Criterion, part: str, tmp_path: Path) -> None:
    def compiled() -> Lit:
        model = Lit()
        model.get_submodule(part).compile(backend="eager")
        return model

    (plain, *_), (found, *_) = (fitted(tmp_path, criterion, seeded(make)) for make in (Lit, compiled))
    for name, expected in plain.items():
        assert found[name]["count"] == expected["count"]
        torch.testing.assert_close(found[name]["features"], expected["features"])


@EACH
def test_recomputed_passes_are_seen(criterion: Criterion) -> None:
    plain, saving = layers(), layers()
    one = watched(plain, criterion)
    other = Pruner(saving, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    with other.watch():
        checkpoint(saving, INPUTS, use_reentrant=False).sum().backward()
    for name, score in scores(one, criterion).items():
        torch.testing.assert_close(scores(other, criterion)[name], score)


@pytest.mark.parametrize("criterion", [APoZ(every=1), ActivationNorm(every=1)])
def test_several_backward_passes_are_one_look(criterion: Criterion) -> None:
    model = layers()
    pruner = Pruner(model, 0.3, criterion=criterion, structure=Channels(), schedule=None, example=INPUTS)
    with pruner.watch():
        loss = model(INPUTS).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    counts = {int(each["count"]) for each in pruner.state_dict()["statistics"].values()}
    assert counts == {len(INPUTS)}


@EACH
def test_layers_may_be_given_their_input_by_name(criterion: Criterion) -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(input=x)
            return x

    found = scores(watched(Named(*layers()), criterion), criterion)
    expected = scores(watched(layers(), criterion), criterion)
    assert all(torch.equal(score, expected[name]) for name, score in found.items())
