"""Measures linear layers with zeros in the CSR format on a CPU: by how much each is faster than the dense one.

    python recipes/benchmarks/sparse_kernels.py

Each layer runs in turn with the same one as ``use_sparse_kernels`` would convert it, on one thread. Times are
medians of processor time, which other processes disturb less than they do the clock.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from shared import Table, arguments, save
from torch import Tensor, nn

from lightning_prune import NofM, Pruner
from lightning_prune.core.probes import relative_difference
from lightning_prune.export.sparse_kernels import as_csr

PATTERNS: dict[str, dict[str, Any]] = {
    "90 %": {"target": 0.9},
    "95 %": {"target": 0.95},
    "99 %": {"target": 0.99},
    "2:4": {"selector": NofM(2, 4)},
}


@torch.no_grad()
def main() -> None:
    """Measure each size, number of rows and pattern, and print and save the results."""
    parser = arguments(__doc__ or "", out="sparse_kernels.json")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("inputs = outputs", "rows", "zeros", "dense, ms", "CSR, ms", "times faster", "difference")
    results = []
    for size in options.sizes:
        for name, parts in PATTERNS.items():
            torch.manual_seed(0)
            dense = nn.Linear(size, size)
            Pruner(dense, schedule=None, **parts).prune(1.0)
            sparse = copy.deepcopy(dense)
            as_csr(sparse)
            for rows in options.rows:
                given = torch.randn(rows, size)
                before, after = processor_times([dense, sparse], given, options.seconds)
                difference = relative_difference([dense(given)], [sparse(given)])
                shown = (f"{1000 * before:.3g}", f"{1000 * after:.3g}", f"{before / after:.2f}")
                table.row(size, rows, name, *shown, f"{difference:.0e}")
                results.append({"size": size, "rows": rows, "zeros": name, "dense": before, "sparse": after})
    save(options.out, results)


def processor_times(layers: Sequence[nn.Module], given: Tensor, seconds: float) -> list[float]:
    """Return the median seconds of processor time of each layer, over rounds in which each runs once."""
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 6 or time.perf_counter() < end:
        rounds.append([])
        for layer in layers:
            before = time.process_time()
            layer(given)
            rounds[-1].append(time.process_time() - before)
    return [median(each) for each in zip(*rounds[1:], strict=True)]


if __name__ == "__main__":
    main()
