"""Settings of all tests: a busy machine is no reason to fail, or to be slow."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# tensors are small here: threads would mostly wait for each other
torch.set_num_threads(1)
