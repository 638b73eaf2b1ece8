"""The array library of the inputs, and the two things that the array API standard does not name."""

from __future__ import annotations

from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""A NumPy array, a torch tensor or any array of the array API standard."""


def namespace(*arrays: Array) -> Any:
    """Array API namespace shared by the inputs; Python scalars and None are skipped. Raises TypeError if they mix."""
    return array_api_compat.array_namespace(*arrays)


def same_shape(**arrays: Array) -> None:
    """Raise unless arrays share a library (TypeError) and a shape (ValueError): broadcasting by accident is how (n, n) is born."""
    namespace(*arrays.values())
    if len({tuple(array.shape) for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"shapes differ: {found}; expected one shape for all")


def stop_gradient(x: Array) -> Array:
    """The same values, through which no gradient flows. Torch tensors are detached; other arrays carry no gradient."""
    return x.detach() if array_api_compat.is_torch_array(x) else x


def as_float32(x: Array) -> Array:
    """`x` in float32 or better: half precisions are widened, float32 and float64 stay. Raises TypeError for non-floats."""
    xp = namespace(x)
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(f"found dtype {x.dtype}, expected a real floating dtype; convert before forming ratios")
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x
