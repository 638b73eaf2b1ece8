"""The lake: what is listed is there, byte for byte, or named; what was listed once stays as it was."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.nightly.lake import CURRENT, Lake, LakeError, slug

ROWS = pa.table({"decision_id": ["a", "b"], "value": [1.0, 2.0]})


def test_equal_rows_equal_bytes_equal_name(tmp_path: Path) -> None:
    one = Lake(tmp_path / "one").write("rows", ROWS, point="p", day="2026-11-22", id_column="decision_id")
    other = Lake(tmp_path / "two").write("rows", ROWS, point="p", day="2026-11-22", id_column="decision_id")
    assert one == other
    assert (one.low, one.high, one.rows) == ("a", "b", 2)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_partition_is_named_and_refused(tmp_path: Path, damage: str) -> None:
    lake = Lake(tmp_path)
    lake.commit([lake.write("rows", ROWS)])
    path = tmp_path / lake.snapshot().entries[0].path
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    {"cut": lambda: path.write_bytes(raw[:-9]), "flip": lambda: path.write_bytes(raw), "gone": path.unlink}[damage]()
    fresh = Lake(tmp_path)
    with pytest.raises(LakeError, match=rf"{path.name}: "):
        fresh.read(fresh.snapshot().entries[0])


def test_a_damaged_list_is_named_and_refused(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    id_ = lake.commit([lake.write("rows", ROWS)]).id
    path = tmp_path / "manifests" / f"{id_}.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"rows":2', b'"rows":3'))
    with pytest.raises(LakeError, match="SHA-256 is not its name"):
        lake.snapshot()


def test_a_written_partition_counts_only_once_it_is_committed(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    lake.write("rows", ROWS)
    assert lake.snapshot().entries == ()
    assert not (tmp_path / CURRENT).exists()


def test_snapshots_never_change_and_places_have_revisions(tmp_path: Path) -> None:
    lake = Lake(tmp_path)
    first = lake.commit([lake.write("rows", ROWS, day="2026-11-22")])
    second = lake.commit([lake.write("rows", ROWS.slice(0, 1), day="2026-11-22")])
    assert [entry.revision for entry in (*first.entries, *second.entries)] == [1, 2]
    assert lake.snapshot(first.id) == first
    assert lake.read(first.entries[0]).equals(ROWS)
    assert lake.commit([second.entries[0]]) == second


def test_sweeping_deletes_what_no_kept_list_names(tmp_path: Path) -> None:
    lake = Lake(tmp_path, keep=1)
    old = lake.commit([lake.write("rows", ROWS)]).entries[0]
    new = lake.commit([lake.write("rows", ROWS.slice(0, 1))]).entries[0]
    stray = lake.write("rows", ROWS.slice(1, 1))
    assert lake.sweep() == 3
    assert [(tmp_path / one.path).exists() for one in (old, new, stray)] == [False, True, False]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "x" * 128, "ü" * 128, "50 % off"])
def test_any_name_is_one_folder_inside(name: str) -> None:
    assert "/" not in slug(name)
    assert not slug(name).startswith(".")
    assert len(slug(name)) <= 100
    assert slug(name) != slug(name + "x") if len(name) < 128 else True
