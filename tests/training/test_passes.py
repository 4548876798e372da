"""A fit is followed on every way that it takes: later backward passes, other batches, validation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningModule
from lit import trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Channels, OneShot, PerLayer, PruningCallback, Unstructured

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(IMAGES, torch.arange(16) % 5, torch.arange(16) % 2), 4)
CLASSES = "feeds log_softmax, which mixes all channels"


class Base(LightningModule):
    """A body, a head for labels, and one for domains."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.label, self.domain = nn.Linear(16, 5), nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Any:
        return self.label(self.body(images))

    def training_step(self, batch: Any, number: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def domain_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.domain(self.body(batch[0])), batch[2])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def callback(**options: Any) -> PruningCallback:
    defaults: dict[str, Any] = {
        "structure": Channels(),
        "selector": PerLayer(),
        "schedule": OneShot("1ep"),
        "compact": True,
    }
    return PruningCallback(0.5, **defaults | options)


def pruned(folder: Path, model: LightningModule, data: Any = DATA, **options: Any) -> PruningCallback:
    """Prune in a fit, and train and validate the compacted network in another one."""
    torch.manual_seed(0)
    validation = data if "validation_step" in vars(type(model)) else None
    trainer(folder, pruning := callback(), max_epochs=2, **options).fit(model, data, validation)
    trainer(folder, max_epochs=1, **options).fit(model, data, validation)
    assert pruning.report.proof is not None
    assert pruning.report.proof.precision == "float64"
    return pruning


class TwoBackwards(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.manual_backward(self.domain_loss(batch))
        optimizer.step()


class PastLightning(TwoBackwards):
    def training_step(self, batch: Any, number: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        self.domain_loss(batch).backward()
        optimizer.step()


class ClippedByHand(TwoBackwards):
    """What comes after the first backward pass does not run outside the loop, where there are no gradients."""

    def training_step(self, batch: Any, number: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.label.weight.grad.clamp_(-1, 1)
        self.manual_backward(self.domain_loss(batch))
        optimizer.step()


class Alternating(Base):
    def training_step(self, batch: Any, number: int) -> Tensor:
        return super().training_step(batch, number) if number % 2 == 0 else self.domain_loss(batch)


class Late(Base):
    """Adds the loss of domains from the second epoch on."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        loss = super().training_step(batch, number)
        return loss + self.domain_loss(batch) if self.current_epoch > 0 else loss


class LateSteps(Base):
    def training_step(self, batch: Any, number: int) -> Tensor:
        loss = super().training_step(batch, number)
        return loss + self.domain_loss(batch) if self.trainer.global_step > 4 else loss


class LastBatch(Base):
    def training_step(self, batch: Any, number: int) -> Tensor:
        return self.domain_loss(batch) if number == 3 else super().training_step(batch, number)


class Validating(Base):
    def validation_step(self, batch: Any, number: int) -> None:
        self.log("domain", self.domain_loss(batch))


class Directly(Base):
    """Calls ``forward`` past the module's hooks."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        return F.cross_entropy(self.forward(batch[0]), batch[1]) + self.domain_loss(batch)


class Both(Base):
    """Gives two outputs in training mode, and one in evaluation mode."""

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        return (self.label(features), self.domain(features)) if self.training else self.label(features)

    def training_step(self, batch: Any, number: int) -> Tensor:
        labels, domains = self(batch[0])
        return F.cross_entropy(labels, batch[1]) + F.cross_entropy(domains, batch[2])


class Queue(Base):
    """Keeps features of earlier batches, as contrastive losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(5, 8))

    def training_step(self, batch: Any, number: int) -> Tensor:
        keys = self(batch[0])
        self.queue = torch.cat([keys.detach().T, self.queue], 1)[:, :8].clone()
        return (keys @ self.queue).logsumexp(1).mean() + self.domain_loss(batch)


WAYS = [TwoBackwards, PastLightning, Alternating, Late, LateSteps, LastBatch, Validating, Directly, Both, Queue]


@pytest.mark.parametrize(("make", "sanity"), [*((way, 0) for way in WAYS), (Validating, 1)])
def test_every_way_of_a_fit_goes_on_after_compaction(tmp_path: Path, make: type[Base], sanity: int) -> None:
    pruning = pruned(tmp_path, model := make(), num_sanity_val_steps=sanity)
    assert (model.body[0].out_channels, model.label.in_features, model.domain.in_features) == (8, 8, 8)
    assert "body.0" not in pruning.report.frozen
    assert pruning.report.macs is not None


class OtherBatches(Validating):
    """Validates on other batches than it trains on."""

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("domain", F.cross_entropy(self.domain(self.body(batch["images"])), batch["domains"]))


@pytest.mark.parametrize("sanity", [0, 1])
def test_validation_is_followed_on_a_batch_of_its_own(tmp_path: Path, sanity: int) -> None:
    rows = [{"images": image, "domains": torch.tensor(number % 2)} for number, image in enumerate(IMAGES)]
    run = trainer(tmp_path, pruning := callback(), max_epochs=2, num_sanity_val_steps=sanity)
    if sanity:
        run.fit(model := OtherBatches(), DATA, DataLoader(rows, 4))
        assert (model.body[0].out_channels, model.domain.in_features) == (8, 8)
        assert pruning.report.frozen["domain.weight"] == CLASSES
    else:  # no batch of validation is seen in time: what only it runs keeps what it reads
        with pytest.raises(ValueError, match=r"body\.0: may be read by domain, which the example does not run"):
            run.fit(OtherBatches(), DATA, DataLoader(rows, 4))


class SecondLoader(Base):
    """Validates with the head of domains on a second loader."""

    def validation_step(self, batch: Any, number: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self.log("label", F.cross_entropy(self(batch[0]), batch[1]))
        else:
            self.log("domain", F.cross_entropy(self.domain(self.body(batch["images"])), batch["domains"]))


def test_validation_is_followed_on_each_loader(tmp_path: Path) -> None:
    rows = [{"images": image, "domains": torch.tensor(number % 2)} for number, image in enumerate(IMAGES)]
    run = trainer(tmp_path, pruning := callback(), max_epochs=2, num_sanity_val_steps=1)
    run.fit(model := SecondLoader(), DATA, [DATA, DataLoader(rows, 4)])
    assert (model.body[0].out_channels, model.domain.in_features) == (8, 8)
    assert pruning.report.frozen["domain.weight"] == CLASSES


def test_what_a_step_does_not_reach_outside_the_loop_keeps_what_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"body\.0: may be read by domain"):
        pruned(tmp_path, ClippedByHand())


# --- batches of any kind, in any precision


@dataclass
class Batch:
    images: Tensor
    labels: Tensor


class OfBatches(Base):
    def forward(self, batch: Batch) -> Any:
        return super().forward(batch.images)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        return (
            F.cross_entropy(self(batch).float(), batch.labels) + 0 * self.domain(self.body(batch.images)).sum()
        )


def batches(rows: Any) -> Batch:
    images, labels, _ = zip(*rows, strict=True)
    return Batch(torch.stack(images), torch.stack(labels))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_batches_of_any_kind_in_any_precision(tmp_path: Path, precision: str) -> None:
    dtype = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
    rows = TensorDataset(IMAGES.to(dtype), torch.arange(16) % 5, torch.arange(16) % 2)
    pruning = pruned(tmp_path, OfBatches(), DataLoader(rows, 4, collate_fn=batches), precision=precision)
    assert pruning.report.proof is not None
    assert pruning.report.proof.difference < 1e-9
    assert "in float64" in pruning.report.table()


# --- moving copies


class Copied(Base):
    """A mean teacher, which a hook or the step updates."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.automatic_optimization = way, True
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        teacher, body = list(self.teacher.parameters()), list(self.body.parameters())
        if self.way == "foreach":
            torch._foreach_lerp_(teacher, body, 0.1)
        elif self.way == "data":
            for own, other in zip(teacher, body, strict=True):
                own.data = 0.9 * own.data + 0.1 * other.data
        else:
            for own, other in zip(teacher, body, strict=True):
                own.mul_(0.9).add_(other, alpha=0.1)

    def training_step(self, batch: Any, number: int) -> Tensor:
        if self.way != "hook":
            self.update()
        wanted = self.label(self.teacher(batch[0])).detach()
        return (
            F.mse_loss(self(batch[0]), wanted) + super().training_step(batch, number) + self.domain_loss(batch)
        )

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self.way == "hook":
            self.update()


@pytest.mark.parametrize("way", ["hook", "data", "foreach", "step"])
def test_a_moving_copy_follows(tmp_path: Path, way: str) -> None:
    pruning = pruned(tmp_path, model := Copied(way))
    assert model.body[0].out_channels == model.teacher[0].out_channels == 8
    reason = "looks like a moving average of body: exclude it if it is none"
    assert pruning.report.frozen.get("teacher.0", reason) == reason
    model.update()


@pytest.mark.parametrize("way", ["hook", "foreach"])
def test_a_moving_copy_is_masked_as_what_it_follows(tmp_path: Path, way: str) -> None:
    pruning = callback(structure=Unstructured(), selector=PerLayer(), compact=False)
    trainer(tmp_path, pruning, max_epochs=2).fit(model := Copied(way), DATA)
    assert not any(name.startswith("teacher") for name in pruning.masks)
    assert (model.teacher[0].weight[~pruning.masks["body.0.weight"]] == 0).all()


def test_each_copy_follows_its_own_of_two_alike(tmp_path: Path) -> None:
    class Critics(Copied):
        def __init__(self) -> None:
            super().__init__("hook")
            self.second = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.second_teacher = copy.deepcopy(self.second).requires_grad_(False)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return super().training_step(batch, number) + self.label(self.second(batch[0])).square().mean()

    torch.manual_seed(0)
    pruning = callback(structure=Unstructured(), selector=PerLayer(), compact=False)
    trainer(tmp_path, pruning, max_epochs=2).fit(model := Critics(), DATA)
    for name in ("body", "second"):
        copied = model.teacher if name == "body" else model.second_teacher
        assert (copied[0].weight[~pruning.masks[f"{name}.0.weight"]] == 0).all()


def test_a_frozen_part_of_other_weights_is_no_copy(tmp_path: Path) -> None:
    class Taught(Copied):
        def __init__(self) -> None:
            super().__init__("hook")
            torch.manual_seed(1)
            self.teacher = copy.deepcopy(self.body).requires_grad_(False)
            for each in self.teacher.parameters():
                nn.init.normal_(each)
            self.wanted = nn.Linear(16, 5)

        def training_step(self, batch: Any, number: int) -> Tensor:
            wanted = self.wanted(self.teacher(batch[0]))
            return F.mse_loss(self(batch[0]), wanted) + self.domain_loss(batch)

        def update(self) -> None:
            pass

    before = copy.deepcopy((model := Taught()).teacher)
    pruning = callback(structure=Channels(exclude="teacher*"))
    trainer(tmp_path, pruning, max_epochs=2).fit(model, DATA)
    assert model.body[0].out_channels == 8
    assert pruning.report.frozen["teacher.0"] == "exclude names it"
    assert torch.equal(before[0].weight, model.teacher[0].weight)
