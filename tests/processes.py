"""Scripts that fit in two processes."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_script(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder whose fits start a second process.

    Args:
        name: The script's file name.
        arguments: Its arguments.
    """
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
    ours = {"PYTHONPATH": os.pathsep.join(sys.path), "MASTER_PORT": str(free_port())}
    return subprocess.run(
        command, env=os.environ | ours, check=False, timeout=300, capture_output=True, text=True
    )


def free_port() -> int:
    """Return a free port that no outgoing connection is given, as may one that the system picks.

    Lightning listens on its port only after the second process has started, seconds later.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) != 0:
                return port
