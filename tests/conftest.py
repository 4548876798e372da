"""Settings of all tests: a busy machine is no reason to fail, or to be slow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure

from lightning_prune.report import cost

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# tensors are small here: threads would mostly wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time latency in three rounds; draw figures, but render them only in tests that are marked ``renders``.

    Every fit ends with a report: without this, half of the suite's time is spent in pictures that nobody sees.
    """
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    if "renders" not in request.keywords:

        def touch(figure: Figure, path: Any, **options: Any) -> None:
            Path(path).touch()

        monkeypatch.setattr(Figure, "savefig", touch)
