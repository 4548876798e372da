"""Examples in every form, also mappings of keywords as Hugging Face's inputs are, wherever one is taken."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningDataModule, LightningModule
from lit import trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import (
    Channels,
    Global,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    compact,
    export_onnx,
    measure,
    oneshot,
    sensitivity,
)

IDS = torch.arange(14).view(2, 7)
INPUTS = {"input_ids": IDS, "attention_mask": (IDS < 12).long()}
FORMS: dict[str, Any] = {
    "tuple": (IDS, INPUTS["attention_mask"]),
    "mapping": INPUTS,
    "BatchEncoding": UserDict(INPUTS),  # Hugging Face's is one
    "in another order": {"scale": 1.0, "labels": None, **dict(reversed(INPUTS.items()))},
    "several": [INPUTS, {name: value[:1] for name, value in INPUTS.items()}],
}
HALF: dict[str, Any] = {"structure": Channels(), "selector": Global(budget="macs")}


class Classifier(LightningModule):
    """Takes keywords, and gives a loss where there are labels."""

    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.embedding, self.one, self.two = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.example_input_array = example

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        hidden = self.embedding(input_ids) * attention_mask[..., None] * scale
        scores = self.two(self.one(hidden).relu().mean(1))
        return scores if labels is None else F.cross_entropy(scores, labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("form", FORMS)
def test_an_example_has_any_form_wherever_one_is_taken(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    example, model = FORMS[form], Classifier()
    pruner = Pruner(model, 0.5, schedule=None, example=example, **HALF)
    pruner.prune(1.0)
    kept = int(pruner.masks["one.weight"].any(1).sum())
    small = compact(model, pruner.masks, example)
    assert small.one.out_features == kept < 12
    macs = 7 * 8 * 12 + 12 * 3
    assert measure(model, pruner.masks, example).macs == macs
    assert PruningCallback(0.5, **HALF).plan(model, example).macs == macs
    if form == "in another order":  # takes seconds
        assert export_onnx(small.eval(), tmp_path / "small.onnx", example) > 0
    assert sensitivity(model, lambda _: 1.0, ratios=(0.5,), structure=Channels(), example=example).values


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader([INPUTS | {"labels": torch.tensor([0, 2])}] * 4, batch_size=None)


@pytest.mark.filterwarnings("ignore:Reconstruct. .* rows of calibration data:UserWarning")
@pytest.mark.parametrize("example", [None, INPUTS], ids=["of the batch", "of the module"])
def test_keywords_are_the_example_in_a_fit_and_at_once(tmp_path: Path, example: Any) -> None:
    for run_it in (lambda run, model: run.fit(model, Data()), lambda run, model: oneshot(run, model, Data())):
        torch.manual_seed(0)
        pruning = PruningCallback(
            0.5, structure=Channels(), selector=PerLayer(), schedule=OneShot("2st"), compact=True
        )
        run_it(trainer(tmp_path, pruning, max_epochs=1), model := Classifier(example))
        assert model.one.out_features == 6
        assert pruning.report.macs == 7 * 4 * 6 + 6 * 3
