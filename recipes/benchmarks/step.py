"""What pruning adds to a training step: dense, ModelPruning's reparametrisation, ours with each criterion.

    python recipes/benchmarks/step.py --batch-size 64 --out FILE.json

ResNet-18 with a CIFAR stem, 90 % of the weights masked, gradient statistics gathered in every step. The arms
take turns step by step, in one process, so that a machine that slows down slows all of them down. Two figures,
medians over rounds: an arm's step divided by the dense step of the same round; and its step divided by the same
step without the time spent in pruning calls, which noise between steps does not reach. Criteria of activations
look in every step here; hooks are part of the pass, so that the first figure alone tells what a look takes.
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
# a step in which activations are looked at; by default every tenth is one
LOOKING = (ActivationTaylor(every=1), ActivationNorm(every=1), APoZ(every=1), Wanda(every=1))


class Arm:
    """A network with its optimizer, and what pruning does around the step.

    Args:
        device: Where it trains.
        criterion: Ours; ``None`` for an arm without Pruner.
        reparametrise: Whether weights are computed from masks in every forward pass, as ModelPruning does.
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
        """Seconds of one training step with all that pruning does in it, and without that."""
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
    """Prints a table and writes JSON."""
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
