"""The state of the process that ops depend on and change: random generators and the default type of numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ProcessState:
    """Random states and the default dtype, as they were at one time.

    Args:
        generators: Random state of each device.
        python: Random state of Python's ``random``.
        arrays: Random state of numpy.
        dtype: The default floating-point type.
    """

    generators: Mapping[torch.device, Tensor]
    python: Any
    arrays: Any
    dtype: torch.dtype

    @classmethod
    def now(cls, devices: Iterable[torch.device] = ()) -> ProcessState:
        """Return the present state.

        Args:
            devices: CUDA devices whose generators count, beside that of the CPU.
        """
        generators = {torch.device("cpu"): torch.get_rng_state()}
        generators |= {each: torch.cuda.get_rng_state(each) for each in devices}
        return cls(generators, random.getstate(), numpy.random.get_state(), torch.get_default_dtype())

    def restore(self) -> None:
        """Set the process to this state."""
        for device, state in self.generators.items():
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
        random.setstate(self.python)
        numpy.random.set_state(self.arrays)
        torch.set_default_dtype(self.dtype)
