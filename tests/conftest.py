"""Settings of all tests: a busy machine is no reason to fail, or to be slow."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from quick import draw_nothing, time_latency_quickly

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# tensors are small here: threads would mostly wait for each other
torch.set_num_threads(1)


class _Raises(logging.Handler):
    """Raises the error of a rule for an op, of which users are told as a reason."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


@pytest.fixture(autouse=True)
def rules_work(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test fail if the rule for an op does, but for those that are marked ``rule_fails``."""
    log, handler = logging.getLogger("lightning_prune.channels.graph.trace"), _Raises()
    log.setLevel(logging.INFO if "rule_fails" in request.keywords else logging.DEBUG)
    log.addHandler(handler)
    yield
    log.removeHandler(handler)


@pytest.fixture(autouse=True)
def quick_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the report at the end of each fit quick; tests marked ``renders`` look at its picture."""
    time_latency_quickly(monkeypatch.setattr)
    if "renders" not in request.keywords:
        draw_nothing(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Bring the environment back: a Trainer of several processes leaves its rank there."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
