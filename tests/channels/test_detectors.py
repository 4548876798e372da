"""Networks in which values decide shapes: what detectors find, rows that are chosen by their scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningModule
from lit import seeded, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import Channels, PerLayer, Pruner, PruningCallback, Steps, compact, load_compact
from lightning_prune.core.probes import relative_difference
from lightning_prune.core.tensors import reachable_tensors

WIDTH = 32


def backbone(out_channels: int | list[int] = WIDTH) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, 2, 1),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
    )
    net.out_channels = out_channels
    return net


def detector(name: str) -> nn.Module:
    """A small detector of torchvision."""
    detection = pytest.importorskip("torchvision.models.detection")
    anchors = detection.anchor_utils.AnchorGenerator(((8, 16),), ((1.0,),))
    sizes = {"min_size": 32, "max_size": 32}
    any_score = {"score_thresh": 0.0}
    few = {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_detections_per_img": 4}
    roi = {"rpn_anchor_generator": anchors, **sizes, **few}
    pool = pytest.importorskip("torchvision.ops").MultiScaleRoIAlign(["0"], 3, 2)
    made: dict[str, Callable[[], nn.Module]] = {
        "FasterRCNN": lambda: detection.FasterRCNN(backbone(), 3, box_roi_pool=pool, **roi),
        "MaskRCNN": lambda: detection.MaskRCNN(backbone(), 3, box_roi_pool=pool, mask_roi_pool=pool, **roi),
        "RetinaNet": lambda: detection.RetinaNet(backbone(), 3, anchor_generator=anchors, **any_score, **sizes),
        "FCOS": lambda: detection.FCOS(
            backbone(),
            3,
            anchor_generator=detection.anchor_utils.AnchorGenerator(((8,),), ((1.0,),)),
            **any_score,
            **sizes,
        ),
        "SSD": lambda: detection.ssd.SSD(
            backbone([WIDTH]), detection.anchor_utils.DefaultBoxGenerator([[2]]), (32, 32), 3
        ),
    }
    return made[name]()


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 32, 32, generator=generator) for _ in range(count)]


def targets(count: int = 2) -> list[dict[str, Tensor]]:
    box = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}
    return [box | {"masks": torch.ones(1, 32, 32, dtype=torch.uint8)} for _ in range(count)]


# the layers whose outputs say which boxes there are
_RPN = {"rpn.head.bbox_pred", "rpn.head.cls_logits"}
_BOXES = {"roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.cls_score"}
_HEADS = {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"}
DETECTORS = {
    "FasterRCNN": _RPN | _BOXES,
    "MaskRCNN": _RPN | _BOXES | {"roi_heads.mask_predictor.mask_fcn_logits"},
    "RetinaNet": _HEADS,
    "FCOS": _HEADS,
    "SSD": {"head.classification_head.module_list.0", "head.regression_head.module_list.0"},
}


class Detector(LightningModule):
    """Losses in training, boxes in validation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = detector(name)

    def forward(self, pictures: list[Tensor]) -> Any:
        return self.net(pictures)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.net(*batch).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = torch.cat([found["scores"] for found in self(batch[0])])
        self.log("scores", scores.sum(), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


def loader() -> DataLoader[Any]:
    pairs = list(zip(images(), targets(), strict=True))
    return DataLoader(pairs, 2, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_prunes_in_a_fit(tmp_path: Path, name: str) -> None:
    model = seeded(lambda: Detector(name))
    dense = {key: each.shape for key, each in model.named_parameters()}
    callback = PruningCallback(
        0.5, structure=Channels(), selector=PerLayer(), schedule=Steps({"1ep": 1.0}), compact=True
    )
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(model, loader(), loader())
    report = callback.report
    assert {key for key in report.frozen if key in dense} == {f"net.{each}.weight" for each in DETECTORS[name]}
    assert report.proof.passes >= 2
    assert model.net.backbone[0].weight.shape[0] == WIDTH // 2
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_compact(tmp_path / "small.ckpt", Detector(name))
    with torch.no_grad():
        before, after = (each.eval()(images()) for each in (model, again))
    assert relative_difference(reachable_tensors(before), reachable_tensors(after)) == 0


def halved(net: nn.Module, example: Any, *arguments: Any) -> tuple[dict[str, int], nn.Module, list[Tensor]]:
    """Prune half of each group and compact; the outputs for these arguments are those of the masked network.

    Returns:
        The sizes of the groups, the smaller network, and its outputs in double precision.
    """
    pruner = Pruner(net, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    small = compact(copy.deepcopy(net), pruner.masks, example)
    with torch.no_grad():
        before, after = (reachable_tensors(each.double()(*arguments)) for each in (net, small))
    assert relative_difference(before, after) < 1e-12
    return {group.name: group.size for group in pruner.groups}, small, after


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_those_of_the_masked_network(name: str) -> None:
    net = seeded(lambda: detector(name)).double().eval()
    example = ([each.double() for each in images()],)
    *_, found = halved(net, example, *example)
    assert len(found[0])  # it has found something


class Chosen(nn.Module):
    """A head on the rows whose score is above a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.score = nn.Linear(8, 1)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.body(rows)
        return self.head(rows[self.score(rows)[:, 0] > self.limit])


def test_what_follows_a_choice_by_values_goes() -> None:
    net = seeded(lambda: Chosen(0.0))
    pruner = Pruner(net, 0.5, structure=Channels(), schedule=None, example=torch.randn(64, 6))
    assert {group.name: group.size for group in pruner.groups} == {"body.0": 8, "head.0": 12}


def test_a_layer_that_gets_no_rows_stays() -> None:
    net = seeded(lambda: Chosen(1e6))
    with pytest.raises(ValueError, match=r"body\.0.*may be read by head\.0, which the example does not run"):
        Pruner(net, 0.5, structure=Channels(), schedule=None, example=torch.randn(64, 6))


class Detr(nn.Module):
    """A small DETR: in training its objects are matched with the targets by their costs."""

    def __init__(self, width: int = 16, objects: int = 4, kinds: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.project = nn.Conv2d(12, width, 1)
        self.transformer = nn.Transformer(width, 2, 1, 1, 24, batch_first=True)
        self.places, self.queries = nn.Embedding(16, width), nn.Embedding(objects, width)
        self.kinds = nn.Linear(width, kinds + 1)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, pictures: Tensor, wanted: list[dict[str, Tensor]] | None = None) -> Any:
        read = self.project(self.backbone(pictures)).flatten(2).transpose(1, 2) + self.places.weight
        objects = self.transformer(read, self.queries.weight.expand(len(pictures), -1, -1))
        kinds, boxes = self.kinds(objects), self.boxes(objects).sigmoid()
        return (kinds, boxes) if wanted is None else self.loss(kinds, boxes, wanted)

    def loss(self, kinds: Tensor, boxes: Tensor, wanted: list[dict[str, Tensor]]) -> Tensor:
        optimize = pytest.importorskip("scipy.optimize")
        total = kinds.new_zeros(())
        for logits, places, target in zip(kinds, boxes, wanted, strict=True):
            cost = torch.cdist(places, target["boxes"], p=1) - logits.softmax(-1)[:, target["labels"]]
            rows, columns = optimize.linear_sum_assignment(cost.detach().numpy())
            labels = torch.full((len(logits),), logits.shape[-1] - 1)
            labels[rows] = target["labels"][columns]
            matched = F.l1_loss(places[rows], target["boxes"][columns].to(places))
            total = total + F.cross_entropy(logits, labels) + matched
        return total


def test_a_detr_is_cut_in_backbone_heads_units_and_width() -> None:
    net = seeded(Detr).eval()
    pictures = torch.stack(images())
    wanted = [{"boxes": torch.rand(2, 4), "labels": torch.tensor([0, 1])} for _ in pictures]
    example = [(pictures,), (pictures, wanted)]
    sizes, small, _ = halved(net, example, pictures.double())
    assert sizes == {
        "backbone.0": 8,
        "backbone.2": 12,
        "project": 16,
        "transformer.encoder.layers.0.self_attn": 2,
        "transformer.encoder.layers.0.linear1": 24,
        "transformer.decoder.layers.0.self_attn": 2,
        "transformer.decoder.layers.0.multihead_attn": 2,
        "transformer.decoder.layers.0.linear1": 24,
        "boxes.0": 16,
    }
    assert small.queries.weight.shape == (4, 8)


class Experts(nn.Module):
    """A mixture of experts: each gets the rows that the router sends it."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.read, self.router = nn.Linear(6, 8), nn.Linear(8, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(experts)
        )
        self.out = nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.read(rows)
        shares, chosen = self.router(rows).softmax(-1).topk(2)
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            mixed.index_add_(0, row, expert(rows[row]) * shares[row, place, None])
        return self.out(rows + mixed)


def test_experts_lose_units_whatever_rows_they_get() -> None:
    rows = torch.randn(32, 6)
    sizes, *_ = halved(seeded(Experts), rows, rows.double())
    assert sizes == {"read": 8, "experts.0.0": 10, "experts.1.0": 10, "experts.2.0": 10}


class Strict(Chosen):
    """A step that takes targets of single precision alone."""

    def forward(self, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        found = super().forward(rows)
        if wanted is None:
            return found
        if wanted.dtype != torch.float32:
            raise TypeError("wanted must be of single precision")
        return (found.sum() - wanted) ** 2


def test_a_further_pass_may_fix_a_type() -> None:
    net = seeded(lambda: Strict(0.0))
    rows = torch.randn(64, 6)
    example = [(rows,), (rows, torch.ones(()))]
    pruner = Pruner(net, 0.5, structure=Channels(), schedule=None, example=example)
    assert {group.name: group.size for group in pruner.groups} == {"body.0": 8, "head.0": 12}
