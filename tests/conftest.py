"""Settings of all tests: a busy machine is no reason to fail, or to be slow."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from quick import render_nothing, time_latency_quickly

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# tensors are small here: threads would mostly wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the report at the end of each fit quick; tests marked ``renders`` look at its picture."""
    time_latency_quickly(monkeypatch.setattr)
    if "renders" not in request.keywords:
        render_nothing(monkeypatch.setattr)
