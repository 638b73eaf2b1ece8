"""The mart: equal tables are equal bytes and one folder, whole or absent; what is refused has no number in it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ope.data import InputError
from pipelines.nightly import mart as marts
from pipelines.nightly.mart import Manifest, Meta, read_mart, write_mart
from pipelines.nightly.tables import TABLES
from tests.nightly.report_nights import REFUSED, TODAY, certificate, certified, difference, estimate, evaluated, shortlisted

META = Meta(date=TODAY, data_through=TODAY, built_at="2026-11-23T04:00:00.000000+00:00", code="0.1.0", lake_snapshot="ab" * 32)


def of(records: dict) -> dict[str, pa.Table]:
    return {name: TABLES[name].of(rows) for name, rows in records.items()}


def dated(date: str, built: str = META.built_at) -> Meta:
    return msgspec.structs.replace(META, date=date, data_through=date, built_at=built)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip_adds_the_tenant_and_keeps_every_row(tmp_path: Path) -> None:
    tables = of({**evaluated(), **certified("pass", "fail")})
    path = write_mart(tmp_path, "shop", tables, META)
    mart = read_mart(tmp_path, "shop")
    assert mart.folder == path
    assert set(mart.tables) == set(TABLES)
    for name, table in mart.tables.items():
        assert table.schema.names == ["tenant", *TABLES[name].columns]
        assert table.num_rows == (tables[name].num_rows if name in tables else 0)
    assert mart.tables["certificates"].drop_columns("tenant").equals(tables["certificates"])
    assert mart.records("certificates", verdict="fail") == [{"tenant": "shop"} | tables["certificates"].to_pylist()[1]]


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    path = write_mart(tmp_path, "shop", of(certified("pass")), META)
    made = json.loads((path / "manifest.json").read_text())
    assert {name: made[name] for name in ("date", "data_through", "built_at", "code", "lake_snapshot", "tenant")} == {
        "date": TODAY, "data_through": TODAY, "built_at": META.built_at, "code": "0.1.0", "lake_snapshot": "ab" * 32,
        "tenant": "shop",
    }  # fmt: skip
    assert made["snapshot_id"] == path.name
    for name, part in made["tables"].items():
        raw = (path / f"{name}.parquet").read_bytes()
        assert part == {
            "rows": pq.read_metadata(path / f"{name}.parquet").num_rows, "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }  # fmt: skip


def test_same_tables_are_the_same_bytes_and_the_same_folder_whatever_the_order_of_rows(tmp_path: Path) -> None:
    records = {**evaluated(), **certified("pass", "warn", "fail")}
    shuffled = {name: pa.concat_tables([table.slice(1), table.slice(0, 1)]) for name, table in of(records).items()}
    one = write_mart(tmp_path / "1", "shop", of(records), META)
    two = write_mart(tmp_path / "2", "shop", shuffled, dated(TODAY, "2027-01-01T00:00:00.000000+00:00"))
    assert one.name == two.name
    first, second = content(one), content(two)
    assert first.pop("manifest.json") != second.pop("manifest.json"), "the manifest alone knows when it was built"
    assert first == second
    other = write_mart(tmp_path / "1", "shop", of(certified("pass")), META)
    assert other.name != one.name
    assert one.exists(), "older folders are kept"


def test_a_folder_that_is_there_is_kept_and_verified(tmp_path: Path) -> None:
    path = write_mart(tmp_path, "shop", of(certified("pass")), META)
    before = content(path)
    assert write_mart(tmp_path, "shop", of(certified("pass")), dated(TODAY, "2027-01-01T00:00:00.000000+00:00")) == path
    assert content(path) == before
    (path / "certificates.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="table 'certificates'"):
        write_mart(tmp_path, "shop", of(certified("pass")), META)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, None])
def test_damaged_table_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = write_mart(tmp_path, "shop", of(evaluated()), META)
    file = path / "estimates.parquet"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    with pytest.raises(InputError, match=rf"table 'estimates'.*delete the folder and run `propel nightly --date {TODAY}` again"):
        read_mart(tmp_path, "shop")


def test_one_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = write_mart(tmp_path, "shop", of(evaluated()), META)
    raw = bytearray((path / "portfolio.parquet").read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / "portfolio.parquet").write_bytes(raw)
    with pytest.raises(InputError, match="table 'portfolio': found"):
        read_mart(tmp_path, "shop")


def test_altered_manifest_does_not_make_an_altered_table_good(tmp_path: Path) -> None:
    path = write_mart(tmp_path, "shop", of(evaluated()), META)
    made = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    parts = made.tables | {"portfolio": msgspec.structs.replace(made.tables["portfolio"], sha256="0" * 64)}
    (path / "manifest.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(made, tables=parts)))
    with pytest.raises(InputError, match="digests that do not make the folder's name"):
        read_mart(tmp_path, "shop")
    (path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: .*expected what the night wrote"):
        read_mart(tmp_path, "shop")


@pytest.mark.parametrize("at", range(3))
def test_a_crash_leaves_no_folder_and_the_next_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    whole = write_mart(tmp_path / "whole", "shop", of(evaluated()), META)
    before = write_mart(tmp_path / "part", "shop", of(certified("pass")), META)
    home, calls, real = before.parent, iter(range(10**6)), marts.write_durably

    def fails(path: Path, raw: bytes) -> None:
        if next(calls) == at * 5:
            raise RuntimeError
        real(path, raw)

    with monkeypatch.context() as patch:
        patch.setattr(marts, "write_durably", fails)
        with pytest.raises(RuntimeError):
            write_mart(tmp_path / "part", "shop", of(evaluated()), META)
    assert sorted(path.name for path in home.iterdir()) == sorted([before.name, "CURRENT"])
    assert read_mart(tmp_path / "part", "shop").folder == before, "readers see the last whole one"
    assert content(write_mart(tmp_path / "part", "shop", of(evaluated()), META)) == content(whole)


KILLED = """
import os, sys
from pathlib import Path
from pipelines.nightly import mart
from pipelines.nightly.tables import TABLES
step, real = sys.argv[2], getattr(mart, sys.argv[2])
calls = []
def killed(*arguments):
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return real(*arguments)
setattr(mart, step, killed)
meta = mart.Meta(date=sys.argv[4], data_through=None, built_at="", code="", lake_snapshot="")
support = TABLES["support"].of([{"dp": "ads", "policy": "p", "day": "", "action": str(i)} for i in range(100)])
mart.write_mart(Path(sys.argv[1]), "shop", {"support": support}, meta)
"""


@pytest.mark.parametrize(("step", "call"), [("write_durably", 4), ("sync", 1), ("sync", 2), ("replace_durably", 1)])
def test_killed_anywhere_the_folder_is_whole_or_absent_and_current_is_last(tmp_path: Path, step: str, call: int) -> None:
    before = write_mart(tmp_path, "shop", of(certified("pass")), META)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, step, str(call), TODAY], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -9
    assert read_mart(tmp_path, "shop").folder == before, "CURRENT is replaced last"
    new = [path for path in before.parent.glob(f"{TODAY}-*") if path != before]
    assert len(new) == (step == "replace_durably" or call == 2), "a folder appears by its renaming alone"
    support = [{"dp": "ads", "policy": "p", "day": "", "action": str(i)} for i in range(100)]
    path = write_mart(tmp_path, "shop", of({"support": support}), META)
    assert new in ([], [path])
    assert read_mart(tmp_path, "shop").folder == path
    assert not list(before.parent.glob(".*")), "what the killed run left is gone"


def test_current_names_the_latest_date_and_a_date_names_its_newest_folder(tmp_path: Path) -> None:
    early = write_mart(tmp_path, "shop", of(certified("pass")), dated("2026-11-20"))
    late = write_mart(tmp_path, "shop", of(certified("warn")), dated("2026-11-22"))
    again = write_mart(tmp_path, "shop", of(certified("fail")), dated("2026-11-20", "2026-11-24T00:00:00.000000+00:00"))
    assert read_mart(tmp_path, "shop").folder == late, "an older night that runs again does not take the pages back"
    assert read_mart(tmp_path, "shop", "2026-11-20").folder == again
    assert read_mart(tmp_path, "shop", early.name).folder == early
    with pytest.raises(InputError, match="found no reports of 2026-11-21; expected a night's: run `propel nightly` first"):
        read_mart(tmp_path, "shop", "2026-11-21")


def test_a_night_without_reports_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no reports; expected a night's: run `propel nightly` first"):
        read_mart(tmp_path, "shop")


def test_tenants_are_folders_of_their_own_whatever_their_names(tmp_path: Path) -> None:
    paths = [write_mart(tmp_path, name, of(certified("pass")), META) for name in ("../../up", "a/b", ".hidden", "x" * 128)]
    assert all(path.parent.parent == tmp_path for path in paths)
    assert read_mart(tmp_path, "../../up").records("certificates")[0]["tenant"] == "../../up"


def test_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "shop").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="expected a folder that can be written, with room for"):
        write_mart(tmp_path, "shop", of(certified("pass")), META)


def test_refused_numbers_are_null_moments_too_and_reasons_stay(tmp_path: Path) -> None:
    write_mart(tmp_path, "shop", of(evaluated()), META)
    mart = read_mart(tmp_path, "shop")
    for row in mart.records("estimates", policy="bad"):
        assert [row[name] for name in ("value", "stderr", "low", "high", "moments_n", "moments_mean", "moments_cross")] == [
            None
        ] * 7
        assert (row["reasons"], row["n"], row["ess"]) == (["Because it is refused."], 1000, 640)
    (row,) = mart.records("differences", policy="bad")
    assert [row[name] for name in ("value", "low", "high", "p_worse", "p_below_c")] == [None] * 5
    (kept,) = mart.records("differences", policy="good")
    assert (kept["value"], kept["p_worse"]) == (0.1, 0.0321)
    assert REFUSED not in [value for table in mart.tables.values() for row in table.to_pylist() for value in row.values()]


def test_what_a_refused_estimate_is_part_of_is_withheld(tmp_path: Path) -> None:
    """A difference that nobody refused gives the refused value away, beside the baseline's; so does a shortlist's number."""
    night = evaluated()
    night["differences"] = [difference("bad", REFUSED - 0.5, "trust")]
    night["portfolio"].append(night["portfolio"][0] | {"k": 3, "knee": False})
    night["portfolio_policies"] += [shortlisted(name, i, 0.6, k=3) for i, name in enumerate(("good", "fine", "bad"), 1)]
    night["portfolio_policies"].append(shortlisted("bad", 3, 0.6, decision="skip"))  # every portfolio says why others are not in it
    write_mart(tmp_path, "shop", of(night), META)
    mart = read_mart(tmp_path, "shop")
    (difference_,) = mart.records("differences")
    assert (difference_["value"], difference_["verdict"]) == (None, "refused")
    assert difference_["reasons"] == ["The estimate that it is made of is refused."]
    two, three = mart.records("portfolio")
    assert (two["gain"], two["p_any_harm"]) == (0.111, 0.123)
    assert (three["gain"], three["std"], three["p_any_harm"], three["violation"]) == (None, None, None, None)
    bad = mart.records("portfolio_policies", policy="bad")[1]
    assert [bad[name] for name in ("selected_on", "value", "difference", "p_worse", "p_below_c")] == [None] * 5
    assert bad["tv"] == 0.4
    assert [row["value"] for row in mart.records("portfolio_policies", policy="good")] == [0.6, 0.6]


def test_a_refused_segment_does_not_withhold_the_whole(tmp_path: Path) -> None:
    night = evaluated()
    night["estimates"] += [
        estimate("good", REFUSED, "refused", segment="country = fr"),
        estimate("good", REFUSED, "refused", metric="spend", window=1),
    ]
    night["decision_points"] = [{"dp": "ads", "reward": "click"}]
    write_mart(tmp_path, "shop", of(night), META)
    assert [row["value"] for row in read_mart(tmp_path, "shop").records("portfolio_policies")] == [0.55, 0.6]


def test_columns_that_an_older_step_did_not_write_are_null(tmp_path: Path) -> None:
    table = TABLES["certificates"].of([certificate()]).drop_columns(["signature", "ess"])
    write_mart(tmp_path, "shop", {"certificates": table}, META)
    (row,) = read_mart(tmp_path, "shop").records("certificates")
    assert (row["signature"], row["ess"], row["rows"]) == (None, None, 100)
