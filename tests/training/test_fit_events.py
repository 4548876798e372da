"""What a fit refuses or warns of when it begins, and whether the advice works when it is taken."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from lit import Lit, fit, seeded
from torch import Tensor

from lightning_prune import (
    Criterion,
    Cubic,
    Guard,
    Magnitude,
    OneShot,
    ParticleFilter,
    PruningCallback,
    Schedule,
    Selector,
    Steps,
    Taylor,
)

PARTICLES = ParticleFilter(population=2, rounds=1)
WEIGHTS = "a criterion that looks at weights"
SCORES = "a selector that goes by scores"


def reached(folder: Path, model: Lit, options: dict[str, Any], **parts: Any) -> float:
    pruning = PruningCallback(0.5, **parts)
    fit(folder, model, pruning, **options)
    return round(pruning.sparsity, 3)


# --- events that come too early


@pytest.mark.parametrize(
    ("parts", "names", "instead"),
    [
        ({"criterion": Taylor()}, r"Taylor\(\)", WEIGHTS),
        ({"selector": PARTICLES}, r"ParticleFilter\(.*\)", SCORES),
        ({"criterion": Taylor(), "selector": PARTICLES}, r"Taylor.* and Particle.*", f"{WEIGHTS} and {SCORES}"),
    ],
)
def test_the_part_that_needs_training_steps_is_named(
    tmp_path: Path, parts: dict[str, Criterion | Selector], names: str, instead: str
) -> None:
    message = rf"when {names} cannot have seen a training step: start later, or choose {instead}\."
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Lit(), PruningCallback(0.5, schedule=OneShot("0ep"), **parts))
    assert reached(tmp_path, seeded(Lit), {}, schedule=OneShot("0ep")) == 0.5
    assert reached(tmp_path, seeded(Lit), {}, schedule=OneShot("1st"), **parts) == 0.5


WITHIN = r"validate within the epoch \(val_check_interval\), or train for more than an epoch\."


@pytest.mark.parametrize(
    ("schedule", "options", "advice", "follow"),
    [
        (OneShot("2st"), {}, 'start at "5st" or later', [(OneShot("5st"), {}), (OneShot("6st"), {})]),
        (OneShot("0ep"), {}, 'start at "1ep" or later', [(OneShot("1ep"), {})]),
        (OneShot("1st"), {"val_check_interval": 3}, 'start at "3st" or later', [(OneShot("3st"), {})]),
        (
            OneShot("50%"),
            {"max_epochs": 1},
            WITHIN,
            [(OneShot("50%"), {"val_check_interval": 2}), (OneShot("50%"), {"max_epochs": 2})],
        ),
        (OneShot("50%"), {"max_epochs": -1, "max_steps": 4}, WITHIN, [(OneShot("50%"), {"max_steps": 12})]),
    ],
)
def test_the_first_moment_for_a_guard_is_named(
    tmp_path: Path, schedule: Schedule, options: dict[str, Any], advice: str, follow: list[Any]
) -> None:
    parts = {"guard": Guard("acc", max_drop=1.0)}
    with pytest.raises(ValueError, match=f"can have seen a metric of the dense network: {advice}"):
        fit(tmp_path, Lit(), PruningCallback(0.5, schedule=schedule, **parts), **options)
    for other, more in follow:
        assert reached(tmp_path, seeded(Lit), options | more, schedule=other, **parts) == 0.5


# --- ramps that are a single event


@pytest.mark.parametrize(
    ("schedule", "options", "follow"),
    [
        (Cubic(), {"max_epochs": 3}, Cubic("2st", "12st", "2st")),
        (Cubic(), {"max_epochs": 1}, Cubic("0st", "4st", "1st")),
        (Cubic(start="2st"), {"max_epochs": 2}, Cubic("2st", "7st", "2st")),
        (Cubic("1ep", "2ep"), {"max_epochs": 3}, Cubic("1ep", "3ep")),
        (Steps({"20%": 0.5, "60%": 1.0}), {"max_epochs": 2}, Steps({"2st": 0.5, "6st": 1.0})),
    ],
)
def test_a_ramp_that_removes_all_at_once_warns(
    tmp_path: Path, schedule: Schedule, options: dict[str, Any], follow: Schedule
) -> None:
    with pytest.warns(UserWarning, match=r"prunes all at once in this fit: .* all its moments in steps"):
        assert reached(tmp_path, seeded(Lit), options, schedule=schedule) == 0.5
    longer = options | {"max_epochs": options["max_epochs"] + 1}
    assert reached(tmp_path, seeded(Lit), longer, schedule=follow) == 0.5


# --- manual optimization


class ByHand(Lit):
    """Calls the backward pass of the loss itself."""

    through_lightning = False
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.back(self.factor * self.loss(batch))
        optimizer.step()

    def back(self, loss: Tensor) -> None:
        loss.backward()


class ThroughLightning(ByHand):
    def back(self, loss: Tensor) -> None:
        self.manual_backward(loss)


class Infinite(ThroughLightning):
    factor = float("nan")


@pytest.mark.filterwarnings("ignore:The fit ended before the last pruning event:UserWarning")
def test_gradients_that_are_not_seen_are_explained(tmp_path: Path) -> None:
    parts = {"criterion": Taylor(), "schedule": OneShot("1ep")}
    with pytest.warns(UserWarning, match=r"no finite step yet\. Under manual .* call self\.manual_backward"):
        assert reached(tmp_path, seeded(ByHand), {}, **parts) == 0
    assert reached(tmp_path, seeded(ThroughLightning), {}, **parts) == 0.5
    with pytest.warns(UserWarning, match=r"no finite step yet\.$"):  # the advice is followed already
        fit(tmp_path, seeded(Infinite), PruningCallback(0.5, **parts))


class Raw(ThroughLightning):
    """Steps an optimizer that Lightning does not see step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.back(self.loss(batch))
        optimizer.step()


def test_steps_that_lightning_does_not_count_are_explained(tmp_path: Path) -> None:
    parts = {"criterion": Magnitude(), "schedule": OneShot("8st")}
    with pytest.warns(UserWarning, match=r"target is not reached\. .* step what self\.optimizers\(\) returns"):
        assert reached(tmp_path, seeded(Raw), {}, **parts) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert reached(tmp_path, seeded(ThroughLightning), {}, **parts) == 0.5
