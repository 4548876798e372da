"""Time and peak memory of a global pruning event, compared with torch.nn.utils.prune; its time by network size.

    python recipes/benchmarks/event.py --out FILE.json

Both arms remove the 80 % of the weights with the least magnitude in the whole network. For the times they take
turns in one process; times are medians, and the ratio is that of the medians. For the peak memory each arm and
size runs in a new process, in which freed memory is returned to the system at once; the memory that is resident
before the event is subtracted (Linux only).

Last, events that remove channels of linear layers with 2,000 each, by the same criterion: half of the channels,
or as many as make half of the multiply-adds. The analysis that finds channels comes before, and is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from resident import apart, forget_peak, give_back_freed, peak, resident
from shared import Table, arguments, save
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18

from lightning_prune import Channels, Global, Magnitude, Pruner

AMOUNT = 0.8
GROWTH = (1, 4, 16, 64, 250, 500)
WIDTH = 2000
LAYERS = (2, 5, 10, 25)
BUDGETS: tuple[Literal["units", "macs"], ...] = ("units", "macs")


def network(millions: int) -> nn.Module:
    """Return ResNet-18 for 11 M weights, otherwise square linear layers of about 4 M weights each."""
    if millions == 11:
        model: nn.Module = resnet18()
        return model
    layers = max(1, millions // 4)
    width = round((millions * 1e6 / layers) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def ours(model: nn.Module) -> Callable[[], None]:
    """Return a function that scores, selects and masks, for one event only, since masks only grow."""
    pruner = Pruner(model, AMOUNT)
    return lambda: pruner.prune(1.0)


def incumbent(model: nn.Module) -> Callable[[], None]:
    """Return a function that prunes as Lightning's ModelPruning does."""
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return lambda: prune.global_unstructured(layers, prune.L1Unstructured, amount=AMOUNT)


ARMS = {"ours": ours, "global_unstructured": incumbent}


def seconds(arm: str, millions: int) -> float:
    """Return the seconds of one event on a new network.

    Args:
        arm: Name of the arm.
        millions: Size of the network, in millions of weights.
    """
    event = ARMS[arm](network(millions))
    begun = time.perf_counter()
    event()
    return time.perf_counter() - begun


def added(arm: str, millions: int) -> float:
    """Return the bytes per weight that an event adds at its peak, the masks that it leaves included."""
    return apart(_peak, arm, millions)


def _peak(arm: str, millions: int) -> float:
    torch.set_num_threads(2)
    give_back_freed()
    model = network(millions)
    size = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    ARMS[arm](network(1))()  # allocate what libraries allocate once
    before = resident()
    forget_peak()
    event = ARMS[arm](model)
    event()
    return (peak() - before) / size


def compare(millions: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of both arms, their ratio, and the bytes per weight of each arm."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds + 1):
        for arm, taken in times.items():
            taken.append(seconds(arm, millions))
    row = {"millions": float(millions)}
    for arm, taken in times.items():
        row[f"{arm} s"] = statistics.median(taken[1:])  # the first round is a warm-up
        row[f"{arm} bytes a weight"] = added(arm, millions)
    row["ratio"] = row["global_unstructured s"] / row["ours s"]
    return row


def seconds_of_channels(layers: int, budget: Literal["units", "macs"]) -> float:
    """Return the seconds of one event that removes half of a budget by channels, on a new network.

    Args:
        layers: Number of layers with ``WIDTH`` channels each.
        budget: The selector's budget.
    """
    pairs = (each for _ in range(layers) for each in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    model = nn.Sequential(*pairs, nn.Linear(WIDTH, 10))
    pruner = Pruner(
        model,
        0.5,
        criterion=Magnitude(),
        structure=Channels(),
        selector=Global(budget=budget),
        example=torch.ones(1, WIDTH),
    )
    begun = time.perf_counter()
    pruner.prune(1.0)
    return time.perf_counter() - begun


def main() -> None:
    """Print all tables and write JSON."""
    parser = arguments(__doc__, "event.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="*", default=[11, 120])
    parser.add_argument("--growth", type=int, nargs="*", default=GROWTH)
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS, help="of events of channels")
    options = parser.parse_args()
    torch.set_num_threads(2)
    table = Table("weights", "ours", "global_unstructured", "ratio", "ours, peak", "global_unstructured, peak")
    compared = []
    for millions in options.sizes:
        row = compare(millions, options.rounds)
        compared.append(row)
        times = f"{row['ours s']:.3f} s", f"{row['global_unstructured s']:.2f} s", f"{row['ratio']:.1f}"
        peaks = (f"{row[f'{arm} bytes a weight']:.1f} bytes a weight" for arm in ARMS)
        table.row(f"{millions} M", *times, *peaks)
    print()
    table = Table("weights", "ours", "ns a weight")
    grown = []
    for millions in options.growth:
        taken = [seconds("ours", millions) for _ in range(options.rounds)]
        median = statistics.median(taken)
        grown.append({"millions": millions, "seconds": median})
        table.row(f"{millions} M", f"{median:.3f} s", f"{1000 * median / millions:.1f}")
    print()
    table = Table("channels", "weights", *(f"half of the {budget}" for budget in BUDGETS), "macs, us a channel")
    of_channels = []
    for layers in options.layers:
        medians = [
            statistics.median(seconds_of_channels(layers, budget) for _ in range(options.rounds))
            for budget in BUDGETS
        ]
        channels = layers * WIDTH
        of_channels.append(
            {"channels": channels}
            | {f"half of the {budget}": median for budget, median in zip(BUDGETS, medians, strict=True)}
        )
        taken_each = (f"{median:.3f} s" for median in medians)
        rate = f"{1e6 * medians[-1] / channels:.1f}"
        table.row(f"{channels:,}", f"{channels * WIDTH / 1e6:.0f} M", *taken_each, rate)
    save(options.out, {"compared": compared, "grown": grown, "channels": of_channels})


if __name__ == "__main__":
    main()
