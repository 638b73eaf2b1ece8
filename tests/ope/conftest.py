"""The three array libraries in which every primitive must give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

array_api_strict.set_array_api_strict_flags(api_version="2025.12")

LIBRARIES = {"numpy": np.asarray, "torch": torch.asarray, "array_api_strict": array_api_strict.asarray}


@pytest.fixture(params=list(LIBRARIES))
def asarray(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Build an array of the library under test from nested lists; Python floats become float64 in all three."""
    build = LIBRARIES[request.param]

    def convert(values: Any) -> Any:
        return build(np.array(values))

    return convert
