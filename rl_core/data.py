"""Files of transitions: D4RL's HDF5, Minari's, and Parquet of our own. What cannot be learned from is refused, with its row.

h5py and pyarrow load when a file of theirs is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ope.data import DataError, InputError
from rl_core.families.offline import Transitions, joined

Floats = NDArray[np.float32]

SUFFIXES = (".hdf5", ".h5", ".parquet")
MINARI = ("data/main_data.hdf5", "main_data.hdf5")
"""Where a folder of Minari keeps its file."""

SLACK = 1e-6
"""How far beyond 1 an action may be: rounding, which is cut off."""

SCALE = (
    "Scale them by the environment's bounds, 2·(action - low)/(high - low) - 1, and scale back when the policy acts: "
    "low + (action + 1)/2·(high - low)."
)
FINITE = "Drop the episode, or what is wrong with it; a number that is not known is not 0."
LENGTHS = "Write the file again: every row needs all fields."

REMARKS = b"propel.transitions"
"""Under which a Parquet file says what made it."""


def read(path: Path | str) -> Transitions:
    """The transitions of a file, or of a folder of Minari, float32. In HDF5 nobody wrote who acted, or how likely it was.

    Raises DataError, which names file, field and row, what is expected and what to do.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in MINARI if (path / name).is_file()]
        if not found:
            raise DataError("", "a folder", f"one of Minari, with {MINARI[0]}", "Name the data set's folder.", source=str(path))
        path = found[0]
    if path.suffix.lower() not in SUFFIXES:
        expected = f"a name that ends in {', '.join(SUFFIXES)}, or a folder of Minari"
        raise DataError("", f"a file named {path.name}", expected, "Convert it first.", source=str(path))
    if not path.is_file():
        raise DataError("", "no such file", "a file of transitions", "Check the path.", source=str(path))
    try:
        return _parquet(path) if path.suffix.lower() == ".parquet" else _hdf5(path)
    except DataError as error:
        raise error.located(str(path), {}) from None


def _hdf5(path: Path) -> Transitions:
    """By its layout: groups of episodes are Minari's."""
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        episodes = [name for name in file if name.startswith("episode_")]
        return _minari(file, episodes) if episodes else _d4rl(file)


def _d4rl(file: Any) -> Transitions:
    """Flat arrays (Fu et al. 2020, `qlearning_dataset`), but for the flags, which are two here.

    Without next_observations that of a row is the next row's observation, within an episode. The last row of a cut one has none and
    is dropped, so that the row before ends what is recorded; that of an ended one has none either, and stays for its reward.
    """
    obs, action = _matrix(file, "observations"), _matrix(file, "actions", bound=True)
    reward, over, cut = _numbers(file, "rewards"), _flags(file, "terminals"), _flags(file, "timeouts")
    given = _matrix(file, "next_observations") if "next_observations" in file else None
    count = len(obs)
    _same(count, actions=action, rewards=reward, terminals=over, timeouts=cut)
    if given is not None:
        _same(count, next_observations=given)
        if given.shape != obs.shape:
            raise DataError("next_observations", f"shape {given.shape}", f"{obs.shape}, as observations", "Write both alike.")
        return _made(obs, action, reward, given, over, cut)
    if not over[-1]:
        cut[-1] = 1.0  # what follows the file nobody knows
    kept = (cut == 0) | (over == 1)
    following = np.where(over[:, None] == 1, obs, np.roll(obs, -1, axis=0))
    before = np.roll(~kept, -1) & kept & (over == 0)  # its episode goes on in a row that is dropped
    if not kept.any():
        raise DataError("timeouts", "episodes of one row each", "longer ones", "Give next_observations.")
    ended = np.where(over == 1, cut, before.astype(np.float32))
    return _made(*(one[kept] for one in (obs, action, reward, following, over, ended)))


def _minari(file: Any, names: list[str]) -> Transitions:
    """A group per episode, in the order of their numbers; what is recorded of one that neither ends nor is cut ends there."""
    parts = []
    for name in sorted(names, key=lambda one: (len(one), one)):
        group = file[name]
        obs, action = _matrix(group, "observations"), _matrix(group, "actions", bound=True)
        reward, over, cut = _numbers(group, "rewards"), _flags(group, "terminations"), _flags(group, "truncations")
        if not len(action):
            continue
        _same(len(action), name, rewards=reward, terminations=over, truncations=cut)
        if len(obs) != len(action) + 1:
            raise DataError(f"{name}/observations", f"{len(obs)} rows", f"{len(action) + 1}, one more than actions", LENGTHS)
        if not over[-1]:
            cut[-1] = 1.0
        parts.append(_made(obs[:-1], action, reward, obs[1:], over, cut))
    if not parts:
        raise _empty()
    sizes = {part.sizes for part in parts}
    if len(sizes) > 1:
        raise DataError("observations", f"sizes {sorted(sizes)}", "the same in every episode", "Split the file by environment.")
    return joined(parts)


def _parquet(path: Path) -> Transitions:
    """Columns of lists obs, action, next_obs; of numbers reward, terminated, truncated; where known logp_behavior, policy."""
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    try:
        table = pq.read_table(path)
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if not table.num_rows:
        raise _empty()
    columns = {name: table[name] for name in table.column_names}
    obs, following = (_lists(columns, name) for name in ("obs", "next_obs"))
    action = _bounded("action", _lists(columns, "action"))
    if obs.shape != following.shape:
        raise DataError("next_obs", f"{following.shape[1]} numbers a row", f"{obs.shape[1]}, as obs has", LENGTHS)
    reward = _finite("reward", _column(columns, "reward"))
    flags = [_zero_or_one(name, _column(columns, name)) for name in ("terminated", "truncated")]
    data = _made(obs, action, reward, following, *flags)
    logp, policy = (_known(columns, name) for name in ("logp_behavior", "policy"))
    return Transitions(data.obs, data.action, data.reward, data.next_obs, data.terminated, data.truncated, logp, policy)


def remarks(path: Path) -> dict[str, Any]:
    """What a Parquet file says of how it was made; nothing for others."""
    if path.suffix.lower() != ".parquet":
        return {}
    import pyarrow.parquet as pq

    kept = pq.read_schema(path).metadata or {}
    return dict(json.loads(kept.get(REMARKS, b"{}")))


def write_parquet(path: Path, data: Transitions, told: Mapping[str, Any] | None = None) -> None:
    """A new file that `read` takes, whole or not at all. `told`: what made the data. Raises InputError where there is a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists() or path.suffix.lower() != ".parquet":
        raise InputError(f"--to: found {path}; expected the name of a new file that ends in .parquet")

    def lists(values: torch.Tensor) -> Any:
        flat = pa.array(values.float().reshape(-1).cpu().numpy())
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    columns = {"obs": lists(data.obs), "action": lists(data.action), "next_obs": lists(data.next_obs)}
    for name in ("reward", "terminated", "truncated", "logp_behavior", "policy"):
        values = getattr(data, name)
        if values is not None:  # NaN is what is not known
            columns[name] = pa.array(values.float().cpu().numpy(), from_pandas=name in ("logp_behavior", "policy"))
    table = pa.table(columns).replace_schema_metadata({REMARKS: json.dumps(dict(told or {})).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        pq.write_table(table, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _made(obs: Floats, action: Floats, reward: Floats, following: Floats, over: Floats, cut: Floats) -> Transitions:
    return Transitions(*(torch.from_numpy(np.ascontiguousarray(one)) for one in (obs, action, reward, following, over, cut)))


def _array(group: Any, name: str) -> tuple[str, NDArray[Any]]:
    """A data set of HDF5, and what errors call it. Raises DataError where it is missing, or a dictionary."""
    where = f"{group.name}/{name}".lstrip("/")
    if name not in group:
        raise DataError(where, f"fields {', '.join(group)}", name, "Write the file with all fields.")
    if not hasattr(group[name], "shape"):
        remedy = f"Join {', '.join(group[name])} to one array, and act on the same."
        raise DataError(where, "a dictionary", "an array (rows, numbers)", remedy)
    values = np.asarray(group[name][()])
    if values.dtype.kind not in "fiub":
        raise DataError(where, f"dtype {values.dtype}", "numbers", "Encode them.")
    return where, values


def _matrix(group: Any, name: str, *, bound: bool = False) -> Floats:
    """(n, d)."""
    where, values = _array(group, name)
    if values.ndim != 2:
        remedy = "Methods learn actions that are lists of numbers, not choices, from observations alike."
        raise DataError(where, f"shape {values.shape}", "(rows, numbers)", remedy)
    return _bounded(where, values) if bound else _finite(where, values)


def _numbers(group: Any, name: str) -> Floats:
    """(n,)."""
    where, values = _array(group, name)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(where, f"shape {values.shape}", "(rows,)", LENGTHS)
    return _finite(where, values)


def _flags(group: Any, name: str) -> Floats:
    """(n,) of 0 and 1."""
    where = f"{group.name}/{name}".lstrip("/")
    return _zero_or_one(where, _numbers(group, name))


def _column(columns: Mapping[str, Any], name: str) -> NDArray[Any]:
    """(n,) of Parquet. What is missing is NaN."""
    if name not in columns:
        raise DataError(name, f"columns {', '.join(columns)}", "a column of that name", "Write the file with all fields.")
    values = columns[name].to_numpy()
    if values.dtype == np.object_ and all(one is None or isinstance(one, bool) for one in values):
        values = np.array([np.nan if one is None else one for one in values], dtype=np.float64)
    if values.dtype.kind not in "fiub":
        raise DataError(name, f"dtype {columns[name].type}", "numbers", "Encode them.")
    return np.asarray(values)


def _lists(columns: Mapping[str, Any], name: str) -> Floats:
    """(n, d) of a column of lists, all as long as the first."""
    if name not in columns:
        raise DataError(name, f"columns {', '.join(columns)}", "a column of that name", "Write the file with all fields.")
    column = columns[name].combine_chunks()
    if not hasattr(column.type, "value_type") or not _numeric(column.type.value_type):
        raise DataError(name, f"type {column.type}", "lists of numbers", "Write one list per row.")
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    wrong = (lengths != lengths[0]) | (lengths < 1)
    if wrong.any():
        row = int(wrong.argmax())
        found = "null" if lengths[row] < 0 else f"{lengths[row]} numbers"
        raise DataError(name, found, f"{max(int(lengths[0]), 1)}, as in every row", LENGTHS, row=row)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return _finite(name, flat.reshape(len(lengths), -1))


def _numeric(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_floating(kind) or types.is_integer(kind))


def _known(columns: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """(n,) where there is such a column; NaN where it has nothing. Raises DataError for infinite numbers."""
    if name not in columns:
        return None
    values = _column(columns, name).astype(np.float32)
    _reject(name, np.isinf(values), values, "finite numbers, or none where it is not known", FINITE)
    return torch.from_numpy(values)


def _finite(name: str, values: NDArray[Any]) -> Floats:
    with np.errstate(over="ignore"):  # too large for float32 is infinite
        found = values.astype(np.float32)
    wrong = ~np.isfinite(found)
    _reject(name, wrong, values, "finite numbers", FINITE)
    return np.asarray(found)


def _bounded(name: str, values: NDArray[Any]) -> Floats:
    found = _finite(name, values)
    _reject(name, np.abs(found) > 1 + SLACK, found, "actions in [-1, 1]", SCALE)
    return np.asarray(np.clip(found, -1, 1))


def _zero_or_one(name: str, values: NDArray[Any]) -> Floats:
    found = _finite(name, values)
    _reject(name, (found != 0) & (found != 1), found, "0 or 1", "Say which rows end an episode, and which only its recording.")
    return found


def _reject(name: str, wrong: NDArray[np.bool_], values: NDArray[Any], expected: str, remedy: str) -> None:
    """Raises DataError for the first row that is wrong."""
    rows = wrong if wrong.ndim == 2 else wrong[:, None]
    if not rows.any():
        return
    row = int(rows.any(axis=1).argmax())
    entry = int(rows[row].argmax())
    found = float(values.reshape(rows.shape)[row, entry])
    raise DataError(name, f"{found:g}" + (f" in entry {entry}" if rows.shape[1] > 1 else ""), expected, remedy, row=row)


def _same(count: int, group: str = "", **fields: NDArray[Any]) -> None:
    """Raises DataError for fields of other lengths, or for none at all."""
    for name, values in fields.items():
        if len(values) != count:
            where = f"{group}/{name}" if group else name
            first = "actions" if group else "observations"
            raise DataError(where, f"{len(values)} rows", f"{count}, as {first} has", LENGTHS, row=min(len(values), count))
    if not count:
        raise _empty()


def _empty() -> DataError:
    return DataError("", "no rows", "at least one", "Record some episodes.")


def _unreadable(path: Path, error: Exception) -> DataError:
    first = str(error).splitlines()[0]
    expected = f"a complete {path.suffix.lower()} file"
    return DataError("", f"a file that cannot be read ({first})", expected, "Write or copy it again.", source=str(path))
