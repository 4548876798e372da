"""One-stage detectors written anew, after the published designs of YOLO: blocks, necks, heads and decoding.

In training mode they return the maps of each level, in evaluation mode boxes and scores at all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.entry import Entry, images

CLASSES = 3
BINS = 4  # of the distribution of each side of a box


class Conv(nn.Module):
    """A convolution, a batch norm and SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions with a residual sum where the widths allow it."""

    def __init__(self, inputs: int, outputs: int, *, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(inputs, outputs // 2, 3), Conv(outputs // 2, outputs, 3)
        self.add = shortcut and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, or what the convolutions give."""
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


class DarknetBlock(nn.Sequential):
    """A stage of residual blocks, as in YOLOv3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(Conv(inputs, outputs, 3), Bottleneck(outputs, outputs), Bottleneck(outputs, outputs))


class C3(nn.Module):
    """A cross-stage partial block with three convolutions, as in YOLOv5."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.cv1, self.cv2, self.cv3 = Conv(inputs, inner), Conv(inputs, inner), Conv(2 * inner, outputs)
        self.m = nn.Sequential(Bottleneck(inner, inner), Bottleneck(inner, inner))

    def forward(self, x: Tensor) -> Tensor:
        """Return both ways joined."""
        joined: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return joined


class RepBlock(nn.Module):
    """Branches of 3x3, 1x1 and identity that are summed after their norms, as in YOLOv6."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.point = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum after ReLU."""
        kept = 0 if self.identity is None else self.identity(x)
        return F.relu(self.dense(x) + self.point(x) + kept)


class ELAN(nn.Module):
    """Layers of which every second output is joined, as in YOLOv7."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, inner), Conv(inputs, inner)
        self.chain = nn.ModuleList(
            nn.Sequential(Conv(inner, inner, 3), Conv(inner, inner, 3)) for _ in range(2)
        )
        self.cv3 = Conv(4 * inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return all ways joined."""
        ways = [self.cv1(x), self.cv2(x)]
        for each in self.chain:
            ways.append(each(ways[-1]))
        joined: Tensor = self.cv3(torch.cat(ways, 1))
        return joined


class C2f(nn.Module):
    """One convolution whose halves are a way of their own each, as in YOLOv8; inner blocks may be others.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        block: Makes an inner block of its numbers of channels.
    """

    def __init__(self, inputs: int, outputs: int, block: Callable[[int, int], nn.Module] = Bottleneck) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, 2 * self.c), Conv(4 * self.c, outputs)
        self.m = nn.ModuleList(block(self.c, self.c) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return all ways joined."""
        ways = list(self.cv1(x).chunk(2, 1))
        ways.extend(each(ways[-1]) for each in self.m)
        joined: Tensor = self.cv2(torch.cat(ways, 1))
        return joined


class C2fSplit(C2f):
    """The same, with a split into parts of a size in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        """Return all ways joined."""
        ways = list(self.cv1(x).split((self.c, self.c), 1))
        ways.extend(each(ways[-1]) for each in self.m)
        joined: Tensor = self.cv2(torch.cat(ways, 1))
        return joined


class RepELAN(nn.Module):
    """ELAN over blocks of C3, as in YOLOv9."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.c = inner
        self.cv1 = Conv(inputs, 2 * inner)
        self.cv2 = nn.Sequential(C3(inner, inner), Conv(inner, inner, 3))
        self.cv3 = nn.Sequential(C3(inner, inner), Conv(inner, inner, 3))
        self.cv4 = Conv(4 * inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return all ways joined."""
        ways = list(self.cv1(x).chunk(2, 1))
        ways.extend(each(ways[-1]) for each in (self.cv2, self.cv3))
        joined: Tensor = self.cv4(torch.cat(ways, 1))
        return joined


class Attention(nn.Module):
    """Attention over positions with keys of half the width and a convolution for positions, as in YOLOv10."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.key_dim = heads, width // heads, width // heads // 2
        self.scale = self.key_dim**-0.5
        self.qkv = nn.Sequential(
            nn.Conv2d(width, width + 2 * heads * self.key_dim, 1), nn.BatchNorm2d(2 * width)
        )
        self.pe = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width))
        self.proj = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return what positions take from each other."""
        batch, channels, height, width = x.shape
        sizes = (self.key_dim, self.key_dim, self.head_dim)
        q, k, v = self.qkv(x).view(batch, self.num_heads, sum(sizes), height * width).split(sizes, 2)
        weights = ((q.transpose(-2, -1) @ k) * self.scale).softmax(-1)
        mixed = (v @ weights.transpose(-2, -1)).view(batch, channels, height, width)
        found: Tensor = self.proj(mixed + self.pe(v.reshape(batch, channels, height, width)))
        return found


class C2PSA(nn.Module):
    """Half of the channels through attention and a feed-forward part, as in YOLOv10 and YOLO11."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = width // 2
        self.cv1, self.cv2 = Conv(width, 2 * self.c), Conv(2 * self.c, width)
        self.attn = Attention(self.c)
        self.ffn = nn.Sequential(Conv(self.c, 2 * self.c), nn.Conv2d(2 * self.c, self.c, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return both halves joined."""
        a, b = self.cv1(x).split((self.c, self.c), 1)
        b = b + self.attn(b)
        joined: Tensor = self.cv2(torch.cat((a, b + self.ffn(b)), 1))
        return joined


class SPPF(nn.Module):
    """Pooling over three sizes of windows, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return all sizes joined."""
        ways = [self.cv1(x)]
        for _ in range(3):
            ways.append(self.pool(ways[-1]))
        joined: Tensor = self.cv2(torch.cat(ways, 1))
        return joined


class Focus(nn.Module):
    """Every second pixel as a channel of its own, as in the first layer of YOLOv5 and YOLOX."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of half the size."""
        corners = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        halved: Tensor = self.conv(torch.cat(corners, 1))
        return halved


class AnchorHead(nn.Module):
    """One convolution a level for three anchors, decoded as in YOLOv3 to YOLOv7."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.no, self.na = CLASSES + 5, 3
        self.m = nn.ModuleList(nn.Conv2d(width, self.no * self.na, 1) for width in widths)

    def forward(self, levels: list[Tensor]) -> list[Tensor] | Tensor:
        """Return the maps of each level, or boxes and scores."""
        found, boxes = [], []
        for conv, level in zip(self.m, levels, strict=True):
            batch, _, height, width = level.shape
            y = conv(level).view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2).contiguous()
            found.append(y)
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack((columns, rows), 2).to(y)
            xy, wh, rest = y.sigmoid().split((2, 2, CLASSES + 1), 4)
            decoded = torch.cat((2 * xy + grid - 0.5, (2 * wh) ** 2, rest), 4)
            boxes.append(decoded.view(batch, -1, self.no))
        return found if self.training else torch.cat(boxes, 1)


class DistributionHead(nn.Module):
    """A way for boxes and one for classes at each level; sides are means of a distribution, as in YOLOv8.

    Args:
        widths: Numbers of channels of the levels.
        depthwise: Whether classes are found by depthwise convolutions, as in YOLO11.
    """

    def __init__(self, widths: list[int], *, depthwise: bool = False) -> None:
        super().__init__()
        inner, self.no = max(widths[0], 16), CLASSES + 4 * BINS
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(width, 16, 3), Conv(16, 16, 3), nn.Conv2d(16, 4 * BINS, 1)) for width in widths
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(
                *([Conv(width, width, 3, groups=width)] if depthwise else []),
                Conv(width, inner, 1 if depthwise else 3),
                nn.Conv2d(inner, CLASSES, 1),
            )
            for width in widths
        )
        self.bins: Tensor
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float))

    def forward(self, levels: list[Tensor]) -> list[Tensor] | Tensor:
        """Return the maps of each level, or boxes and scores."""
        found = [
            torch.cat((box(level), scores(level)), 1)
            for box, scores, level in zip(self.cv2, self.cv3, levels, strict=True)
        ]
        if self.training:
            return found
        joined = torch.cat([each.view(len(each), self.no, -1) for each in found], 2)
        sides, scores = joined.split((4 * BINS, CLASSES), 1)
        shares = sides.view(len(sides), 4, BINS, -1).transpose(2, 1).softmax(1)
        distances = (shares * self.bins.view(1, BINS, 1, 1)).sum(1)
        return torch.cat((distances, scores.sigmoid()), 1)


class DecoupledHead(nn.Module):
    """A stem a level and two ways after it without anchors, as in YOLOX."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.stems = nn.ModuleList(Conv(width, 16) for width in widths)
        self.cls_convs = nn.ModuleList(nn.Sequential(Conv(16, 16, 3), Conv(16, 16, 3)) for _ in widths)
        self.reg_convs = nn.ModuleList(nn.Sequential(Conv(16, 16, 3), Conv(16, 16, 3)) for _ in widths)
        self.cls_preds = nn.ModuleList(nn.Conv2d(16, CLASSES, 1) for _ in widths)
        self.reg_preds = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in widths)
        self.obj_preds = nn.ModuleList(nn.Conv2d(16, 1, 1) for _ in widths)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Return boxes and scores at all positions."""
        found = []
        for number, level in enumerate(levels):
            x = self.stems[number](level)
            kinds, boxes = self.cls_convs[number](x), self.reg_convs[number](x)
            parts = (
                self.reg_preds[number](boxes),
                self.obj_preds[number](boxes),
                self.cls_preds[number](kinds),
            )
            found.append(torch.cat(parts, 1).flatten(2))
        return torch.cat(found, 2).permute(0, 2, 1)


class Detector(nn.Module):
    """A backbone of three levels, a pyramid down and up, and a head.

    Args:
        block: Makes the block of a stage of its numbers of channels.
        head: Makes the head of the widths of the levels.
        stem: The first layer, from 3 to 8 channels; a convolution of stride 2 if ``None``.
        attention: Whether the last level goes through attention.
    """

    def __init__(
        self,
        block: Callable[[int, int], nn.Module],
        head: Callable[[list[int]], nn.Module],
        *,
        stem: nn.Module | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(stem or Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), block(16, 16))
        self.down3 = nn.Sequential(Conv(16, 32, 3, 2), block(32, 32))
        self.down4 = nn.Sequential(Conv(32, 48, 3, 2), block(48, 48), SPPF(48))
        self.attention = C2PSA(48) if attention else nn.Identity()
        self.up3, self.up2 = block(48 + 32, 32), block(32 + 16, 16)
        self.pan3, self.conv3 = block(16 + 32, 32), Conv(16, 16, 3, 2)
        self.pan4, self.conv4 = block(32 + 48, 48), Conv(32, 32, 3, 2)
        self.head = head([16, 32, 48])

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Return what the head does."""
        two = self.stem(x)
        three = self.down3(two)
        four = self.attention(self.down4(three))
        three = self.up3(torch.cat((F.interpolate(four, scale_factor=2.0), three), 1))
        two = self.up2(torch.cat((F.interpolate(three, scale_factor=2.0), two), 1))
        three = self.pan3(torch.cat((self.conv3(two), three), 1))
        four = self.pan4(torch.cat((self.conv4(three), four), 1))
        found: list[Tensor] | Tensor = self.head([two, three, four])
        return found


_KINDS: dict[str, Callable[[], nn.Module]] = {
    "after YOLOv3": partial(Detector, DarknetBlock, AnchorHead),
    "after YOLOv5": lambda: Detector(C3, AnchorHead, stem=Focus(8)),
    "after YOLOv6": partial(Detector, RepBlock, DistributionHead),
    "after YOLOv7": partial(Detector, ELAN, AnchorHead),
    "after YOLOv8": partial(Detector, C2f, DistributionHead),
    "after YOLOv8, split by an attribute": partial(Detector, C2fSplit, DistributionHead),
    "after YOLOv9": partial(Detector, RepELAN, DistributionHead),
    "after YOLOv10": partial(Detector, C2f, DistributionHead, attention=True),
    "after YOLO11": partial(
        Detector, partial(C2f, block=C3), partial(DistributionHead, depthwise=True), attention=True
    ),
    "after YOLOX": lambda: Detector(C3, DecoupledHead, stem=Focus(8)),
}

ENTRIES = {name: Entry(make, images(64)) for name, make in _KINDS.items()}
