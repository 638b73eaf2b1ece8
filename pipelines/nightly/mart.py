"""The reports mart: a night's tables as one folder that never changes, `reports/{tenant}/{snapshot id}/`.

The same content is the same folder, since the snapshot id is the date and a digest of the tables. A folder appears whole or not at
all, and `CURRENT`, replaced last, names the one that pages show. What is refused has no number here, and so nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bandits.durable import sync, write_durably
from ope.data import BoolArray, InputError
from pipelines.nightly.lake import CURRENT, file_digest, replace_durably, slug
from pipelines.nightly.tables import TABLES

MANIFEST = "manifest.json"

SHOWN = ("trust", "caution")
"""Verdicts of numbers that may be shown."""

HEADLINE_FOLD, CHOICE_FOLD = "B", "A"
"""Units that value; units that chose, whose values are therefore optimistic."""

WHOLE = "all"
"""The segment that is everybody."""

_WITHHELD = {
    "estimates": ("moments_n", "moments_mean", "moments_cross", "value", "stderr", "low", "high"),
    "differences": ("value", "stderr", "low", "high", "p_worse", "p_below_c"),
    "portfolio": ("gain", "std", "p_any_harm", "violation"),
    "portfolio_policies": ("value", "difference", "p_worse", "p_below_c"),
}
"""Numbers of a table that must not outlive a refusal."""


class Part(msgspec.Struct, frozen=True):
    """A table's file, as it must be."""

    rows: int
    bytes: int
    sha256: str


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """Where a night's tables come from."""

    date: str
    data_through: str | None
    """Last day that has decisions; None where none of the days looked at has."""
    built_at: str
    """UTC. The only thing here that two builds of the same content differ in."""
    code: str
    """Version of Propel."""
    lake_snapshot: str
    """Digest of the lake's list of partitions."""


class Manifest(Meta, frozen=True, kw_only=True):
    """`manifest.json`."""

    tenant: str
    snapshot_id: str
    time_zone: str = "UTC"
    tables: dict[str, Part]


@dataclass(frozen=True, slots=True, eq=False)
class Mart:
    """A night's tables, verified."""

    folder: Path
    manifest: Manifest
    tables: Mapping[str, pa.Table]

    def records(self, table: str, **equal: Any) -> list[dict[str, Any]]:
        """Rows of a table whose columns have these values, in the order of their key."""
        rows: list[dict[str, Any]] = self.tables[table].to_pylist()
        return [row for row in rows if all(row[name] == value for name, value in equal.items())]


def write_mart(folder: Path, tenant: str, tables: Mapping[str, pa.Table], meta: Meta) -> Path:
    """The folder of a night's tables, on the disk, and `CURRENT` naming it unless that names a later date.

    `tables`: those of `TABLES`, without `tenant`; what is missing is empty. A folder of the same content is verified and kept.
    Raises InputError where the disk does not take it, or where the folder that is there was altered.
    """
    home = folder / slug(tenant)
    content = {name: _bytes(table) for name, table in _finished(tenant, tables).items()}
    parts = {name: Part(rows, len(raw), hashlib.sha256(raw).hexdigest()) for name, (rows, raw) in content.items()}
    id_ = _id(meta.date, parts)
    manifest = Manifest(**msgspec.structs.asdict(meta), tenant=tenant, snapshot_id=id_, tables=parts)
    files = {_file(name): raw for name, (_, raw) in content.items()} | {
        MANIFEST: msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    }
    try:
        if (home / id_).exists():
            read_mart(folder, tenant, id_)
        else:
            _write_folder(home, id_, files)
        current = _current(home)
        if current is None or current[:10] <= meta.date or not (home / current).is_dir():
            replace_durably(home / CURRENT, f"{id_}\n".encode())
    except OSError as error:
        raise InputError(
            f"{home / id_}: {error.strerror}; expected a folder that can be written, with room for "
            f"{sum(map(len, files.values())):,} bytes: make room and run the night again"
        ) from None
    return home / id_


def read_mart(folder: Path, tenant: str, snapshot: str | None = None) -> Mart:
    """A night's tables: those that `CURRENT` names, those of a snapshot id, or the newest ones of an ISO date.

    Raises InputError where there are none, and one that names the table where it is not what was written.
    """
    home = folder / slug(tenant)
    path = home / (snapshot if snapshot is not None and len(snapshot) > 10 else _newest(home, snapshot))
    manifest = _manifest(path)
    return Mart(path, manifest, {name: _read(path, name, manifest) for name in TABLES})


def _write_folder(home: Path, id_: str, files: Mapping[str, bytes]) -> None:
    """All files under a name that nobody reads, on the disk and compared, then renamed."""
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(".*.part"):  # by whoever was killed here
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    part = home / f".{id_}.part"
    part.mkdir()
    try:
        for name, raw in files.items():
            write_durably(part / name, raw)
            if file_digest(part / name) != hashlib.sha256(raw).hexdigest():
                raise InputError(f"{home / id_ / name}: what was read back is not what was written; check the disk")
        sync(part)
        part.rename(home / id_)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync(home)


def _finished(tenant: str, tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Every table with its columns, sorted by its key, refused numbers withheld, `tenant` first."""
    found = {name: _conformed(name, tables.get(name)) for name in TABLES}
    return {
        name: table.add_column(0, pa.field("tenant", pa.string()), pa.array([tenant] * table.num_rows, pa.string()))
        for name, table in _withheld(found).items()
    }


def _conformed(name: str, table: pa.Table | None) -> pa.Table:
    schema, keys = TABLES[name].schema, TABLES[name].keys
    if table is None:
        return schema.empty_table()
    columns = [table[one.name] if one.name in table.column_names else pa.nulls(table.num_rows, one.type) for one in schema]
    named = pa.table(columns, names=schema.names).cast(schema)
    return named.sort_by([(key, "ascending") for key in schema.names[:keys]]).combine_chunks()


def _withheld(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Tables without the numbers of what is refused, and without numbers that were made from those.

    A shortlist is not described where one of its policies is refused: its numbers would be made of that one too.
    """
    estimates, policies = tables["estimates"], tables["portfolio_policies"]
    refused = {key for key, bad in zip(_keys(estimates, 7), ~_shown(estimates), strict=True) if bad}
    chosen = _of_portfolio(tables, refused)
    value = np.array([(*key[:3], key[4]) in chosen for key in _keys(policies, 5)], dtype=bool)
    selected = np.array([(key[0], key[1], CHOICE_FOLD, key[4]) in chosen for key in _keys(policies, 5)], dtype=bool)
    members = zip(_keys(policies, 5), policies["rank"].to_pylist(), value, strict=True)
    lists = {key[:4] for key, rank, bad in members if bad and rank is not None and rank <= key[3]}
    tables = tables | {"differences": _refused_with(tables["differences"], refused)}
    hidden = {
        "estimates": ~_shown(estimates),
        "differences": ~_shown(tables["differences"]),
        "portfolio": _among(tables["portfolio"], 4, lists),
        "portfolio_policies": value,
    }
    result = tables | {name: _without(tables[name], names, hidden[name]) for name, names in _WITHHELD.items()}
    return result | {"portfolio_policies": _without(result["portfolio_policies"], ("selected_on",), selected)}


def _refused_with(differences: pa.Table, refused: set[tuple[Any, ...]]) -> pa.Table:
    """Differences, refused where the estimate is that they are made of."""
    made = _among(differences, 7, refused) & _shown(differences)
    verdicts = pc.if_else(pa.array(made), "refused", differences["verdict"])
    reasons = [
        [*(of or ()), "The estimate that it is made of is refused."] if bad else of
        for of, bad in zip(differences["reasons"].to_pylist(), made, strict=True)
    ]
    columns = {"verdict": verdicts, "reasons": pa.array(reasons, differences.schema.field("reasons").type)}
    for name, column in columns.items():
        differences = differences.set_column(differences.column_names.index(name), name, column)
    return differences


def _of_portfolio(tables: Mapping[str, pa.Table], refused: set[tuple[Any, ...]]) -> set[tuple[str, str, str, str]]:
    """(evaluation, estimator, fold, policy) whose estimate of the first reward over the longest window is refused."""
    reward = {row["dp"]: row["reward"] for row in tables["decision_points"].to_pylist()}
    metric = {row["evaluation_id"]: reward.get(row["dp"]) for row in tables["evaluations"].to_pylist()}
    longest: dict[str, int] = {}
    for evaluation, *_, window in _keys(tables["estimates"], 7):
        longest[evaluation] = max(window, longest.get(evaluation, 0))
    return {
        (evaluation, estimator, fold, policy)
        for evaluation, policy, estimator, name, segment, fold, window in refused
        if segment == WHOLE and window == longest[evaluation] and metric.get(evaluation) in (None, name)
    }


def _shown(table: pa.Table) -> BoolArray:
    return np.asarray(pc.is_in(table["verdict"], pa.array(SHOWN)).to_numpy(), dtype=bool)


def _keys(table: pa.Table, count: int) -> list[tuple[Any, ...]]:
    return list(zip(*(table.column(i).to_pylist() for i in range(count)), strict=True))


def _among(table: pa.Table, count: int, keys: Iterable[tuple[Any, ...]]) -> BoolArray:
    keys = set(keys)
    return np.array([key in keys for key in _keys(table, count)], dtype=bool)


def _without(table: pa.Table, names: Iterable[str], hidden: BoolArray) -> pa.Table:
    """Null in these columns of the hidden rows."""
    for name in names:
        place, kind = table.column_names.index(name), table.schema.field(name).type
        kept = [None if bad else value for value, bad in zip(table[name].to_pylist(), hidden, strict=True)]
        table = table.set_column(place, name, pa.array(kept, kind))
    return table


def _bytes(table: pa.Table) -> tuple[int, bytes]:
    """Rows, and a Parquet file: the same rows are the same bytes."""
    raw = io.BytesIO()
    pq.write_table(table, raw, compression="zstd")
    return table.num_rows, raw.getvalue()


def _id(date: str, parts: Mapping[str, Part]) -> str:
    listed = "".join(f"{name} {part.sha256}\n" for name, part in sorted(parts.items()))
    return f"{date}-{hashlib.sha256(listed.encode()).hexdigest()[:12]}"


def _file(table: str) -> str:
    return f"{table}.parquet"


def _current(home: Path) -> str | None:
    pointer = home / CURRENT
    return pointer.read_text().strip() if pointer.exists() else None


def _newest(home: Path, date: str | None) -> str:
    """What `CURRENT` names, if it is of the date, else the last built of the date."""
    current = _current(home)
    if current is not None and date in (None, current[:10]):
        return current
    built = [(_manifest(path).built_at, path.name) for path in sorted(home.glob(f"{date}-*")) if date is not None]
    if not built:
        raise InputError(f"{home}: found no reports{f' of {date}' if date else ''}; expected a night's: run `propel nightly` first")
    return max(built)[1]


def _manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise InputError(f"{path / MANIFEST}: {error.strerror}; expected a night's reports: run `propel nightly` first") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{path / MANIFEST}: {error}; expected what the night wrote: {_again(path)}") from None
    if manifest.snapshot_id != path.name or _id(manifest.date, manifest.tables) != path.name:
        raise InputError(f"{path / MANIFEST}: found digests that do not make the folder's name; {_again(path)}")
    return manifest


def _read(path: Path, name: str, manifest: Manifest) -> pa.Table:
    if name not in manifest.tables:  # written before there was such a table
        return _finished(manifest.tenant, {})[name]
    file, part = path / _file(name), manifest.tables[name]
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: table {name!r}: {error.strerror}; {_again(path)}") from None
    if hashlib.sha256(raw).hexdigest() != part.sha256:
        raise InputError(
            f"{file}: table {name!r}: found {len(raw):,} bytes that are not those listed ({part.bytes:,} bytes, SHA-256 "
            f"{part.sha256[:16]}...); it was altered: {_again(path)}"
        )
    # by this thread alone: one of Arrow's own may let go of the bytes while the process ends, and that aborts it
    with pq.ParquetFile(io.BytesIO(raw), pre_buffer=False) as file:
        return file.read(use_threads=False)


def _again(path: Path) -> str:
    return f"delete the folder and run `propel nightly --date {path.name[:10]}` again"
