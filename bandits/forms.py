"""The serialisable form of a policy: a JSON document of kinds and settings, and arrays beside it. Equal policies, equal bytes.

Nothing here runs code from a file: a document names kinds out of a fixed list, arrays are plain numbers.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bandits.events import canonical
from bandits.policy import POLICIES, Policy
from bandits.posteriors import BayesianLinear, BetaBernoulli, NormalMean
from bandits.scorers import Calibrated, Calibration, Linear, Perceptron, Trees
from ope.data import InputError

KINDS: dict[str, type[Any]] = {
    **{policy.kind: policy for policy in POLICIES},
    "linear": Linear,
    "perceptron": Perceptron,
    "trees": Trees,
    "calibrated": Calibrated,
    "calibration": Calibration,
    "beta_bernoulli": BetaBernoulli,
    "normal_mean": NormalMean,
    "bayesian_linear": BayesianLinear,
}
"""Everything that a form may name."""

PARTS = {
    "scorer": "scores", "scorers": "scores", "guard": "scores",
    "policy": "propensities", "policies": "propensities", "posterior": "sample",
    "calibration": "log_odds",
}  # fmt: skip
"""Settings that are parts themselves, and what such a part must be able to do."""

_NAMES = {kind: name for name, kind in KINDS.items()}


class Form(NamedTuple):
    """A policy as data."""

    document: dict[str, Any]
    """Nested {"kind": ..., setting: value}; an array is {"array": its name}."""
    arrays: dict[str, NDArray[Any]]


def to_form(policy: Policy) -> Form:
    """The form of a policy. Raises InputError for a part that is not of a known kind."""
    arrays: dict[str, NDArray[Any]] = {}
    return Form(_encode(policy, "policy", arrays), arrays)


def from_form(form: Form) -> Policy:
    """The policy of a form. Raises InputError for an unknown kind, setting or array."""
    if not isinstance(form.document, dict):
        raise InputError(f"policy: found a {type(form.document).__name__}; expected a document with a kind")
    policy = _decode(form.document, "policy", form.arrays)
    if type(policy) not in POLICIES:
        raise InputError(f"policy: found kind {form.document.get('kind')!r}; expected one of {', '.join(p.kind for p in POLICIES)}")
    return policy


def to_bytes(form: Form) -> tuple[bytes, bytes]:
    """(canonical JSON, npz) of a form: the same bytes for the same policy, on any day."""
    return canonical(form.document), write_arrays(form.arrays)


def from_bytes(document: bytes, arrays: bytes) -> Form:
    """The form in these bytes. Raises InputError where they are not JSON and a plain npz."""
    try:
        return Form(msgspec.json.decode(document, type=dict[str, Any]), read_arrays(arrays))
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(f"found bytes that hold no policy ({error}); expected JSON and an npz without pickles") from None


def write_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An npz of plain arrays: the same bytes for the same arrays, whatever their order."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(sorted(arrays.items())))  # type: ignore[arg-type]
    return buffer.getvalue()


def read_arrays(raw: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an npz. Raises InputError for anything but numbers, stored as they are.

    Members are never inflated: a few bytes could become gigabytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as members:
            listed = members.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in listed) or sum(m.file_size for m in listed) > len(raw):
            raise InputError("found compressed arrays; expected an npz whose members are stored as they are")
        with np.load(io.BytesIO(raw), allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"found bytes that hold no arrays ({error}); expected an npz without pickles") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise InputError(f"array {name!r}: found {getattr(array, 'dtype', 'raw bytes')}; expected numbers")
    return arrays


def _encode(value: Any, place: str, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, np.ndarray):
        arrays[place] = value if value.flags.f_contiguous else np.ascontiguousarray(value)
        return {"array": place}
    if is_dataclass(value):
        if type(value) not in _NAMES:
            raise InputError(
                f"{place}: found a {type(value).__name__}, which has no form; expected one of {', '.join(KINDS)}. "
                "A reward model that is neither linear nor BoostedTrees decides in memory only"
            )
        settings = {f.name: _encode(getattr(value, f.name), f"{place}.{f.name}", arrays) for f in _written(type(value))}
        return {"kind": _NAMES[type(value)], **settings}
    if isinstance(value, tuple):
        return [_encode(item, f"{place}.{index}", arrays) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"{place}: found a {type(value).__name__}; expected numbers, text, arrays or known parts")


def _decode(value: Any, place: str, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, f"{place}.{index}", arrays) for index, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if set(value) == {"array"}:
        if not isinstance(value["array"], str) or value["array"] not in arrays:
            raise InputError(f"{place}: found no array {value['array']!r}; expected one of {', '.join(sorted(arrays))}")
        return arrays[value["array"]]
    name = value.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"{place}: found kind {value.get('kind')!r}; expected one of {', '.join(KINDS)}")
    settings = {name: _decode(item, f"{place}.{name}", arrays) for name, item in value.items() if name != "kind"}
    known = {f.name: f for f in _written(kind)}
    if settings.keys() - known:
        raise InputError(f"{place}: found setting {min(settings.keys() - known)!r}; expected {', '.join(sorted(known))}")
    for name in PARTS.keys() & settings.keys():
        parts = settings[name] if isinstance(settings[name], tuple) else (settings[name],)
        if not parts or not all(hasattr(part, PARTS[name]) for part in parts):
            raise InputError(f"{place}.{name}: found {value[name]!r}; expected a part with a kind")
    try:
        part = kind(**{name: setting for name, setting in settings.items() if known[name].init})
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}") from None
    for name in settings:
        expected = getattr(part, name)
        if not known[name].init and settings[name] != expected:
            raise InputError(f"{place}.{name}: found {settings[name]!r}; expected {expected!r}, which follows from the rest")
    return part


def _written(kind: type[Any]) -> list[Field[Any]]:
    """Settings that a form holds: those that the constructor takes, and what follows from them for readers to see."""
    return [f for f in fields(kind) if not f.name.startswith("_")]
