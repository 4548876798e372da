"""Time of a training step without pruning, with Lightning's ModelPruning, and with lightning_prune.

    python recipes/benchmarks/step.py --batch-size 64 --out FILE.json

The model is a ResNet-18 with a CIFAR stem and 90 % of its weights masked. The arms are the dense network,
ModelPruning's reparametrization, and each criterion of lightning_prune. Gradient statistics are gathered in
every step. The arms take turns step by step, in one process, so that a machine that slows down slows all arms
down. There are two figures, both medians over rounds: the time of an arm's step divided by that of the dense
step of the same round; and the time of the step divided by the time of the same step without its pruning calls,
which noise between steps does not affect. Criteria that need activations observe every step here. Their hooks
run within the forward and backward passes, so only the first figure contains the time of these observations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from shared import Table, arguments, save
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.models import resnet18

from lightning_prune import (
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    Criterion,
    Fisher,
    Gradient,
    Magnitude,
    Movement,
    Pruner,
    Random,
    Taylor,
    Wanda,
)

AMOUNT = 0.9
CRITERIA = (Magnitude(), Random(), Gradient(), Taylor(), Movement(), Fisher())
# These observe the activations of every step here, and of every tenth step by default.
LOOKING = (ActivationTaylor(every=1), ActivationNorm(every=1), APoZ(every=1), Wanda(every=1))


class Arm:
    """A network with its optimizer and the pruning calls of a training step.

    Args:
        device: Device of the network.
        criterion: Criterion of the Pruner; ``None`` for an arm without a Pruner.
        reparametrise: Whether masked weights are computed in every forward pass, as ModelPruning does.
    """

    def __init__(self, device: str, criterion: Criterion | None = None, reparametrise: bool = False) -> None:
        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)
        self.model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.model.maxpool = nn.Identity()
        self.model.to(device)
        self.pruner: Pruner | None = None
        if criterion is not None:
            self.pruner = Pruner(self.model, AMOUNT, criterion=Magnitude())
            self.pruner.prune(1.0)
            masks = self.pruner.state_dict()
            self.pruner = Pruner(self.model, AMOUNT, criterion=criterion)
            self.pruner.load_state_dict(masks)
        if reparametrise:
            modules = [each for each in self.model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
            prune.global_unstructured(
                [(each, "weight") for each in modules], prune.L1Unstructured, amount=AMOUNT
            )
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self._pruning = 0.0

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Run one training step, and return its seconds with and without the pruning calls."""
        pruner, begun, self._pruning = self.pruner, _now(images), 0.0
        self.optimizer.zero_grad()
        with nullcontext() if pruner is None else pruner.watch():
            F.cross_entropy(self.model(images), labels).backward()
        if pruner is not None:
            self._time(images, pruner.observe)
            self._time(images, lambda: pruner.store.apply_to_grads_(self.model.parameters()))
        self.optimizer.step()
        if pruner is not None:
            self._time(images, pruner.apply_)
        taken = _now(images) - begun
        return taken, taken - self._pruning

    def _time(self, images: torch.Tensor, call: Callable[[], None]) -> None:
        begun = _now(images)
        call()
        self._pruning += _now(images) - begun


def _now(images: torch.Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print a table and write JSON."""
    parser = arguments(__doc__, "step.json")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = {"dense": Arm(options.device), "ModelPruning": Arm(options.device, reparametrise=True)}
    arms |= {type(each).__name__: Arm(options.device, each) for each in CRITERIA + LOOKING}
    images = torch.randn(options.batch_size, 3, 32, 32, device=options.device)
    labels = torch.randint(10, (options.batch_size,), device=options.device)
    for arm in arms.values():
        arm.step(images, labels)
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    alone: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        taken = {name: arm.step(images, labels) for name, arm in arms.items()}
        for name, (whole, rest) in taken.items():
            ratios[name].append(whole / taken["dense"][0])
            alone[name].append(whole / rest)
    save(options.out, {"against dense": ratios, "against itself": alone})
    itself = "relative to itself without pruning calls"
    table = Table("arm", "step, relative to dense", "quartiles", itself, "quartiles")
    for name, found in ratios.items():
        row = [name]
        for figures in (found, alone[name]):
            low, median, high = statistics.quantiles(figures, n=4)
            row += [f"{median:.3f}", f"{low:.3f} to {high:.3f}"]
        table.row(*row)


if __name__ == "__main__":
    main()
