"""Networks in their CIFAR variants, for images of 3x32x32, and the mapping of their names."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models import vgg16_bn as imagenet_vgg16_bn
from torchvision.models.resnet import BasicBlock


class CifarResNet(nn.Module):
    """ResNet for 32x32 images, He et al. 2016: 3 stages of widths 16, 32, 64, with 1x1 projection shortcuts.

    Args:
        blocks: Number of basic blocks per stage; the depth is ``6 * blocks + 2``.
        classes: Number of outputs.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(inputs: int, width: int, blocks: int) -> nn.Sequential:
    stride, shortcut = 1, None
    if inputs != width:
        stride = 2
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    first = BasicBlock(inputs, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def resnet20(classes: int) -> nn.Module:
    """Return ResNet-20: 0.27 M parameters, 41 M multiply-adds."""
    return CifarResNet(3, classes)


def resnet56(classes: int) -> nn.Module:
    """Return ResNet-56: 0.86 M parameters, 126 M multiply-adds."""
    return CifarResNet(9, classes)


def vgg16_bn(classes: int) -> nn.Module:
    """Return VGG-16 with batch norm and one linear layer: 14.7 M parameters, 314 M multiply-adds."""
    features = imagenet_vgg16_bn().features
    return nn.Sequential(
        OrderedDict(features=features, flatten=nn.Flatten(), classifier=nn.Linear(512, classes))
    )


def cifar_cnn(classes: int) -> nn.Module:
    """Return a network of three convolutions and two linear layers: 0.36 M parameters, 10 M multiply-adds."""
    layers: list[nn.Module] = []
    for inputs, width in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    head = (nn.Flatten(), nn.Linear(64 * 4 * 4, 256), nn.ReLU(), nn.Linear(256, classes))
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), classifier=nn.Sequential(*head)))


NETWORKS = {"cifar_cnn": cifar_cnn, "resnet20": resnet20, "resnet56": resnet56, "vgg16_bn": vgg16_bn}
