"""Settings of the whole suite: one Hypothesis profile, one torch thread (the default stalls a busy small machine)."""

from __future__ import annotations

import importlib.util

from hypothesis import HealthCheck, settings

settings.register_profile("propel", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("propel")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)
