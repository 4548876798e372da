"""U-Nets written anew, after the published designs: for masks, for volumes, for sound, for diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.entry import Entry, images


def twice(inputs: int, outputs: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Return two convolutions with norms and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), norm(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. 2015, with padding; skips are joined.

    Args:
        bilinear: Whether images become larger by interpolation, not by transposed convolutions.
        norm: Makes the norm of a number of channels.
        gated: Whether skips go through the gates of Attention U-Net (Oktay et al. 2018).
    """

    def __init__(
        self,
        *,
        bilinear: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        gated: bool = False,
    ) -> None:
        super().__init__()
        widths = [8, 16, 32]
        self.first = twice(3, 8, norm)
        self.down = nn.ModuleList(twice(a, b, norm) for a, b in zip(widths, [*widths[1:], 48], strict=True))
        deep = list(zip([48, 32, 16], [32, 16, 8], strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(a, b, 1))
            if bilinear
            else nn.ConvTranspose2d(a, b, 2, 2)
            for a, b in deep
        )
        self.gates = nn.ModuleList(Gate(b) for _, b in deep) if gated else None
        self.join = nn.ModuleList(twice(2 * b, b, norm) for _, b in deep)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of each pixel."""
        skips = [self.first(x)]
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for number, (up, join) in enumerate(zip(self.up, self.join, strict=True)):
            y, skip = up(y), skips.pop()
            rows, columns = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
            y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            if self.gates is not None:
                skip = self.gates[number](y, skip)
            y = join(torch.cat([skip, y], 1))
        scores: Tensor = self.last(y)
        return scores


class Gate(nn.Module):
    """An attention gate: what passes of a skip, by what comes from below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.x = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width, width // 2, 1)
        self.psi = nn.Sequential(nn.Conv2d(width // 2, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """Return the skip times its gate."""
        gated: Tensor = skip * self.psi(F.relu(self.g(below) + self.x(skip)))
        return gated


class NestedUNet(nn.Module):
    """U-Net++ of Zhou et al. 2018: each level joins all that came before it, and has a result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [8, 16, 32]
        self.nodes = nn.ModuleDict()
        for row, width in enumerate(self.widths):
            self.nodes[f"{row}_0"] = twice(self.widths[row - 1] if row else 3, width)
            for column in range(1, len(self.widths) - row):
                self.nodes[f"{row}_{column}"] = twice(width * column + self.widths[row + 1], width)
        self.results = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in self.widths[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the scores of each depth."""
        grid: dict[tuple[int, int], Tensor] = {}
        for row in range(len(self.widths)):
            x = self.nodes[f"{row}_0"](F.max_pool2d(x, 2) if row else x)
            grid[row, 0] = x
        for column in range(1, len(self.widths)):
            for row in range(len(self.widths) - column):
                below = F.interpolate(grid[row + 1, column - 1], scale_factor=2.0, mode="bilinear")
                ways = [grid[row, each] for each in range(column)]
                grid[row, column] = self.nodes[f"{row}_{column}"](torch.cat([*ways, below], 1))
        return [result(grid[0, number + 1]) for number, result in enumerate(self.results)]


class SegNet(nn.Module):
    """SegNet of Badrinarayanan et al. 2017: what was the largest goes back to its place."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([twice(3, 8), twice(8, 16)])
        self.unpool = nn.MaxUnpool2d(2)
        self.up = nn.ModuleList([twice(16, 8), twice(8, 8)])
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of each pixel."""
        places = []
        for down in self.down:
            x, place = F.max_pool2d(down(x), 2, return_indices=True)
            places.append(place)
        for up in self.up:
            x = up(self.unpool(x, places.pop()))
        scores: Tensor = self.last(x)
        return scores


class VolumeUNet(nn.Module):
    """A U-Net for volumes with instance norms and residual sums, after Isensee et al. (nnU-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self._block(1, 8)
        self.down = nn.ModuleList([self._block(8, 16, 2), self._block(16, 32, 2)])
        self.short = nn.ModuleList([nn.Conv3d(8, 16, 1, 2), nn.Conv3d(16, 32, 1, 2)])
        self.up = nn.ModuleList([nn.ConvTranspose3d(32, 16, 2, 2), nn.ConvTranspose3d(16, 8, 2, 2)])
        self.join = nn.ModuleList([self._block(32, 16), self._block(16, 8)])
        self.results = nn.ModuleList([nn.Conv3d(16, 2, 1), nn.Conv3d(8, 2, 1)])

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, stride, 1),
            nn.InstanceNorm3d(outputs, affine=True),
            nn.LeakyReLU(0.01),
        )

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Return the scores of each voxel, in training mode those of all levels."""
        skips = [self.first(x)]
        for down, short in zip(self.down, self.short, strict=True):
            skips.append(down(skips[-1]) + short(skips[-1]))
        y, found = skips.pop(), []
        for up, join, result in zip(self.up, self.join, self.results, strict=True):
            y = join(torch.cat((up(y), skips.pop()), 1))
            found.append(result(y))
        return found if self.training else found[-1]


class SoundUNet(nn.Module):
    """A U-Net for waves: gated convolutions, an LSTM at the bottom, after Demucs (Defossez et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 8, 4, 2), nn.ReLU(), nn.Conv1d(b, 2 * b, 1), nn.GLU(1))
            for a, b in ((1, 8), (8, 16))
        )
        self.lstm, self.linear = nn.LSTM(16, 16, 2, bidirectional=True), nn.Linear(32, 16)
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, 2 * a, 3, padding=1), nn.GLU(1), nn.ConvTranspose1d(a, b, 8, 4, 2))
            for a, b in ((16, 8), (8, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the waves of two sources."""
        skips = []
        for each in self.encoder:
            x = each(x)
            skips.append(x)
        y: Tensor = self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        for number, each in enumerate(self.decoder):
            y = each(y + skips.pop())
            y = F.relu(y) if number == 0 else y
        return y


class TimedBlock(nn.Module):
    """A residual block with group norms that takes an embedding of the time."""

    def __init__(self, inputs: int, outputs: int, times: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(times, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the sum."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        total: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(y)))
        return total


class PositionAttention(nn.Module):
    """Attention over the positions of an image, with a residual sum."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, width)
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        batch, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width).unbind(1)
        q, k, v = (each.transpose(-2, -1) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -1)
        total: Tensor = x + self.proj(mixed.reshape(batch, -1, height, width))
        return total


class DiffusionUNet(nn.Module):
    """The U-Net of denoising diffusion (Ho et al. 2020): times, group norms, attention at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.smaller = TimedBlock(16, 16, 32), nn.Conv2d(16, 16, 3, 2, 1)
        self.down2, self.attention = TimedBlock(16, 32, 32), PositionAttention(32)
        self.middle = TimedBlock(32, 32, 32)
        self.up1, self.larger = TimedBlock(64, 32, 32), nn.Conv2d(32, 16, 3, padding=1)
        self.up2 = TimedBlock(32, 16, 32)
        self.last = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the noise."""
        rates = torch.exp(torch.arange(8, device=x.device) * -(math.log(10000) / 8))
        angles = time.to(x)[:, None] * rates.to(x)
        embedded = self.times(torch.cat((angles.sin(), angles.cos()), 1))
        one = self.down1(self.first(x), embedded)
        two = self.attention(self.down2(self.smaller(one), embedded))
        y = self.up1(torch.cat((self.middle(two, embedded), two), 1), embedded)
        y = self.larger(F.interpolate(y, scale_factor=2.0))
        noise: Tensor = self.last(self.up2(torch.cat((y, one), 1), embedded))
        return noise


_PICTURES = images(32)

ENTRIES = {
    "U-Net": Entry(UNet, _PICTURES),
    "U-Net, bilinear": Entry(partial(UNet, bilinear=True), _PICTURES),
    "U-Net, group norms": Entry(partial(UNet, norm=partial(nn.GroupNorm, 4)), _PICTURES),
    "Attention U-Net": Entry(partial(UNet, gated=True), _PICTURES),
    "U-Net++": Entry(NestedUNet, _PICTURES),
    "SegNet": Entry(SegNet, _PICTURES),
    "nnU-Net": Entry(VolumeUNet, lambda: torch.randn(1, 1, 16, 16, 16)),
    "Demucs": Entry(SoundUNet, lambda: torch.randn(1, 1, 256)),
    "diffusion U-Net": Entry(DiffusionUNet, lambda: (torch.randn(2, 3, 16, 16), torch.tensor([3, 40]))),
}
