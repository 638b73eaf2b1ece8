"""Settings of the whole suite: one Hypothesis profile, one thread (several stall a small machine that runs two workers)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy or torch are loaded, which many tests do without

settings.register_profile("propel", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("propel")
