"""What is tried on a copy of a module outside the loop: its forward and its training_step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Lit, digits, fit, same, seeded, trainer
from torch import Tensor

from lightning_prune import Channels, Global, OneShot, OptimalBrainDamage, PruningCallback


class Reads(Lit):
    """Asks its Trainer, and its optimizer, in the middle of a pass."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 if self.trainer.max_epochs > 1 else 0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


OUTSIDE: dict[str, Any] = {
    "channels": lambda: PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"), compact=True),
    "multiply-adds": lambda: PruningCallback(0.5, selector=Global("macs"), schedule=OneShot("1ep")),
    "losses": lambda: PruningCallback(0.5, criterion=OptimalBrainDamage(batches=2), schedule=OneShot("1ep")),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_module_that_reads_from_its_trainer_can_be_looked_at_outside_a_fit(tmp_path: Path, case: str) -> None:
    found = []
    for make in (Lit, Reads):
        fit(tmp_path, model := seeded(make), pruning := OUTSIDE[case](), max_epochs=3)
        assert pruning.report.sparsity > 0
        found.append({**model.state_dict(), **pruning.masks})
    assert same(*found)


@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_what_a_step_makes_is_of_the_type_of_the_weights_outside_the_loop_too(
    tmp_path: Path, precision: Any, case: str
) -> None:
    class Makes(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            return super().training_step((images + 0.01 * torch.randn(images.shape), labels), batch_idx)

    fit(tmp_path, seeded(Makes), pruning := OUTSIDE[case](), max_epochs=3, precision=precision)
    assert pruning.report.sparsity > 0
    assert torch.get_default_dtype() == torch.float32


def test_a_step_that_runs_in_the_loop_alone_is_named_where_the_loss_is_asked_for(tmp_path: Path) -> None:
    class Counts(Lit):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.inside = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert vars(self).pop("inside", False)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, OUTSIDE["losses"]())
    with pytest.raises(ValueError, match=r"does not run outside the loop \(AssertionError\(.*, where the loss"):
        run.fit(Counts(), digits())
    assert run.global_step == 0


def test_a_module_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    class Streams(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = (number for number in range(3))

    run = trainer(tmp_path, OUTSIDE["channels"]())
    with pytest.raises(ValueError, match=r"Streams cannot be copied \(TypeError\(.*generator"):
        run.fit(Streams(), digits())
    assert run.global_step == 0
