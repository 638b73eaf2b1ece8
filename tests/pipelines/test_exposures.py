"""Exposure tables of feature-flag tools: what the column map makes of them, odd cells, odd files, and the truth."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from bandits.events import digest
from bandits.sampling import TOTAL
from ope import InputError
from ope.data import DataError
from pipelines.exporters import read_decisions, read_rewards
from pipelines.importers.events import Naming
from pipelines.importers.exposures import Exposures, time_of
from pipelines.imports import import_log
from propel import app
from tests.pipelines.dsjson_lines import Imported

SPLIT = {"control": 0.25, "new": 0.75}
NS = 1_683_356_889_000_000_000
"""2023-05-06T07:08:09Z."""


def import_table(source: Path, columns: Exposures, naming: Naming | None = None, **options: Any) -> Imported:
    to = source.with_name(f"{source.name}-events")
    report = import_log(source, to, naming or Naming(), kind="exposures", exposures=lambda: columns, **options)
    if not report.files:
        return Imported(report, [], [], to)
    return Imported(report, list(read_decisions(to)), list(read_rewards(to)), to)


def csv(folder: Path, *lines: str, name: str = "table.csv") -> Path:
    path = folder / name
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def test_every_field_of_a_row_by_hand(tmp_path: Path) -> None:
    table = csv(tmp_path, "variant,ok,who,at,id,flag,age,os,kept", "new,1,u7,2023-05-06T07:08:09Z,x1,checkout,33,ios,0.5")
    columns = Exposures(
        "variant", "ok", split=SPLIT, decision_id="id", unit="who", time="at", policy="flag", pass_probability="kept",
        context=("age", "os"),
    )  # fmt: skip
    found = import_table(table, columns, Naming("checkout", "shop", "paid", context=("age", "os")))
    (decision,), (reward,) = found.decisions, found.rewards
    assert (decision.decision_id, decision.unit, decision.policy, decision.decided_at_ns) == ("x1", "u7", "checkout", NS)
    assert (decision.tenant, decision.decision_point, decision.session, decision.kind) == ("shop", "checkout", None, "sampled")
    assert (decision.actions, decision.chosen, decision.propensity) == (("control", "new"), 1, 0.75)
    assert decision.share_vector().tolist() == [TOTAL // 4, TOTAL // 4 * 3]
    assert (decision.pass_probability, decision.excluded) == (0.5, ())
    assert bytes(decision.body) == b'{"actions":[{},{}],"context":{"age":33.0,"os":"ios"}}'
    assert decision.body_hash == digest(bytes(decision.body))
    assert (reward.decision_id, reward.name, reward.value, reward.observed_at_ns) == ("x1", "paid", 1.0, NS)
    (row,) = pl.read_parquet(found.folder / "log.parquet").to_dicts()
    assert (row["age"], row["os"], row["sample_weight"], row["action"]) == (33.0, "ios", 2.0, "new")
    assert list(found.report.missing) == ["eligible sets"]  # a table never has them
    assert found.report.problems == {}


def test_a_column_of_propensities_and_actions_as_the_table_shows_them(tmp_path: Path) -> None:
    table = csv(tmp_path, "action,p,reward", "b,0.2,1", "a,0.7,0", "c,0.1,", name="table.csv.gz")
    found = import_table(table, Exposures(reward="reward", propensity="p"))
    assert [decision.actions for decision in found.decisions] == [("a", "b", "c")] * 3
    assert [(decision.chosen, decision.propensity, decision.shares) for decision in found.decisions] == [
        (1, 0.2, b""),
        (0, 0.7, b""),
        (2, 0.1, b""),
    ]
    assert found.decisions[0].decision_id == digest(b"table.csv.gz:2").hex()  # line 1 is the header
    assert len({decision.decision_id for decision in found.decisions}) == 3
    assert set(found.report.missing) == {"eligible sets", "vectors", "units", "times", "rewards"}
    assert "1 of 3 decisions lack rewards" in found.report.missing["rewards"]
    assert found.report.rows == 2


FAULTS = [
    ("action", "other,0.5,1,u1,0", "'other'; expected one of a, b"),
    ("action", ",0.5,1,u1,0", "None"),
    ("propensity", "a,,1,u1,0", "never filled in"),
    ("propensity", "a,0,1,u1,0", "propensity 0"),
    ("propensity", "a,1.5,1,u1,0", "(0, 1]"),
    ("propensity", "a,nan,1,u1,0", "propensity nan"),
    ("number", "a,half,1,u1,0", "'half'; expected a number"),
    ("number", "a,0.5,yes,u1,0", "column 'reward': found 'yes'"),
    ("reward", "a,0.5,inf,u1,0", "reward inf"),
    ("time", "a,0.5,1,u1,noon", "'noon'"),
    ("time", "a,0.5,1,u1,inf", "'inf'"),
    ("time", "a,0.5,1,u1,nan", "'nan'"),
    ("time", "a,0.5,1,u1,1e999999999", "'1e999999999'"),
    ("time", "a,0.5,1,u1,100000000000000000000", "between 1678 and 2262"),
    ("id", "a,0.5,1," + "u" * 129 + ",0", "1 to 128"),
    ("csv", "a,0.5,1", "3 fields; expected 5"),
    ("csv", "a,0.5,1,u,1,0", "6 fields; expected 5"),
    ("csv", 'a,"0.5"x,1,u1,0', "expected a row of a CSV table"),
    ("id", "a,0.5,1,\udcff,0", "printable"),
    ("json", "a,0.5,1,u1,0,\udcff", "valid text"),
]


def test_every_kind_of_fault_is_counted_with_its_line_and_the_rest_imported(tmp_path: Path) -> None:
    lines = ["action,p,reward,user,time,note"]
    for _, bad, _ in FAULTS:
        cells = bad.split(",")
        lines += [f"{'ab'[len(lines) % 4 // 2]},0.5,1,u{len(lines)},0,", bad if len(cells) != 5 else f"{bad},"]
    lines = [line.replace("a,0.5,1,u,1,0", "a,0.5,1,u,1,0,7") for line in lines]
    path = tmp_path / "table.csv"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))  # \udcff is the byte 255
    columns = Exposures(reward="reward", propensity="p", unit="user", time="time", actions=("a", "b"), context=("note",))
    found = import_table(path, columns, Naming(context=("note",)))
    assert [decision.unit for decision in found.decisions] == [f"u{2 * place + 1}" for place in range(len(FAULTS))]
    expected: dict[str, list[int]] = {}
    for place, (kind, _, _) in enumerate(FAULTS):
        expected.setdefault(kind, []).append(2 * place + 3)  # counted with the header
    assert {kind: problems.lines for kind, problems in found.report.problems.items()} == expected


@pytest.mark.parametrize(("kind", "bad", "says"), FAULTS, ids=[f"{kind}-{place}" for place, (kind, _, _) in enumerate(FAULTS)])
def test_a_fault_says_what_was_found(tmp_path: Path, kind: str, bad: str, says: str) -> None:
    header = "action,p,reward,user,time" + (",note" if kind == "json" else "")
    path = tmp_path / "table.csv"
    good = "b,0.5,1,u0,0" + ("," if kind == "json" else "")
    path.write_bytes("\n".join([header, good, bad, good]).encode(errors="surrogateescape"))
    context = ("note",) if kind == "json" else ()
    columns = Exposures(reward="reward", propensity="p", unit="user", time="time", actions=("a", "b"), context=context)
    found = import_table(path, columns)
    assert len(found.decisions) == 2
    assert found.report.problems[kind].first.startswith("line 3: ")
    assert says in found.report.problems[kind].first


def test_actions_that_cannot_be_names_are_not_among_the_actions(tmp_path: Path) -> None:
    """One broken cell must not become an action that every row could have taken."""
    path = tmp_path / "table.csv"
    path.write_bytes(b"action,p\na,0.5\n\xff,0.5\nb,0.5\n\x07,0.5\n")
    found = import_table(path, Exposures(propensity="p"))
    assert [decision.actions for decision in found.decisions] == [("a", "b")] * 2
    assert found.report.problems["action"].lines == [3, 5]


@pytest.mark.parametrize(
    ("cell", "nanoseconds"),
    [
        ("2023-05-06T07:08:09Z", NS),
        ("2023-05-06 07:08:09", NS),  # no zone: UTC
        ("2023-05-06T09:08:09+02:00", NS),
        ("2023-05-06T07:08:09.123456789Z", NS + 123_456_789),
        ("1683356889", NS),
        (1_683_356_889, NS),
        (1_683_356_889.5, NS + 500_000_000),
        ("1683356889.123456789", NS + 123_456_789),  # more digits than a float64 holds
        (Decimal("1683356889.000000001"), NS + 1),
        (datetime(2023, 5, 6, 7, 8, 9, tzinfo=UTC), NS),
        (datetime(2023, 5, 6, 7, 8, 9), NS),
        (date(2023, 5, 6), NS - 25_689 * 10**9),
        ("-1", -(10**9)),
        (None, None),
    ],
)
def test_times(cell: Any, nanoseconds: int | None) -> None:
    assert time_of(cell) == nanoseconds


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    lines = ["variant,ok,who,at,age,os"] + [
        f"{'new' if row % 3 else 'control'},{row % 2},u{row % 5},2023-05-06T07:08:{row:02d}Z,{row + 0.5},{'ios' if row % 2 else ''}"
        for row in range(20)
    ]
    table = csv(tmp_path, *lines)
    frame = pl.read_csv(table).with_columns(pl.col("at").str.to_datetime(time_unit="ns", time_zone="UTC"))
    frame.write_parquet(tmp_path / "table.parquet")
    columns = Exposures("variant", "ok", split=SPLIT, unit="who", time="at", context=("age", "os"))
    found = [import_table(path, columns, Naming(context=("age", "os"))) for path in (table, tmp_path / "table.parquet")]
    logs = [pl.read_parquet(one.folder / "log.parquet").drop("decision_id") for one in found]
    assert logs[0].equals(logs[1])
    assert logs[0]["os"].null_count() == 10  # an empty cell is a missing one
    assert [bytes(d.body) for d in found[0].decisions] == [bytes(d.body) for d in found[1].decisions]


def test_odd_kinds_of_parquet_columns(tmp_path: Path) -> None:
    """Nanoseconds, decimals, dates, lists, floats that are no number: none of them stops the import."""
    table = pa.table(
        {
            "action": [0, 1, 1],
            "p": pa.array([Decimal("0.5")] * 3),
            "reward": [True, False, None],
            "at": pa.array([1_683_356_889_000_000_123, None, 0], pa.timestamp("ns")),
            "seconds": [1.5, float("nan"), float("inf")],
            "price": pa.array([Decimal("9.99"), None, Decimal("1.00")]),
            "day": pa.array([date(2024, 1, 2)] * 3),
            "tags": [["a"], [], None],
            "count": [2**60, 1, 2],
        }
    )
    pq.write_table(table, tmp_path / "table.parquet")
    columns = Exposures(reward="reward", propensity="p", time="at", context=("price", "day", "tags", "count"))
    found = import_table(tmp_path / "table.parquet", columns, Naming(context=columns.context))
    assert [decision.actions for decision in found.decisions] == [("0", "1")] * 3
    assert [decision.decided_at_ns for decision in found.decisions] == [NS, 0, 0]  # to the microsecond
    assert [reward.value for reward in found.rewards] == [1.0, 0.0]
    log = pl.read_parquet(found.folder / "log.parquet")
    assert log["price"].to_list() == [9.99, None]
    assert log["day"].to_list() == ["2024-01-02"] * 2
    assert log["tags"].to_list() == ['["a"]', "[]"]
    assert log["count"].to_list() == [float(2**60), 1.0]
    (tmp_path / "b").mkdir()
    pq.write_table(table, tmp_path / "b" / "table.parquet")
    found = import_table(tmp_path / "b" / "table.parquet", Exposures(propensity="p", time="seconds"))
    assert (len(found.decisions), found.report.problems["time"].lines) == (1, [2, 3])


def test_names_of_columns(tmp_path: Path) -> None:
    """A dot is part of a column's name, a byte order mark is not, and the log's own columns keep their names."""
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfaction,user.age,unit\na,33,x\nb,34,y\n")
    context = ("user.age", "unit")
    found = import_table(path, Exposures(split={"a": 0.5, "b": 0.5}, context=context), Naming(context=context))
    assert found.report.context == []  # no rewards, no log
    (tmp_path / "b").mkdir()
    path = csv(tmp_path / "b", "action,user.age,unit,ok", "a,33,x,1", "b,34,y,0")
    found = import_table(path, Exposures(reward="ok", split={"a": 0.5, "b": 0.5}, context=context), Naming(context=context))
    log = pl.read_parquet(found.folder / "log.parquet")
    assert found.report.context == ["user.age", "context.unit"]
    assert (log["user.age"].to_list(), log["context.unit"].to_list()) == ([33.0, 34.0], ["x", "y"])


def test_quoted_cells_and_line_numbers(tmp_path: Path) -> None:
    path = csv(tmp_path, "action,note,p", 'a,"two', 'lines",0.5', "", 'b,"a, comma",0.5', "c,x,2")
    found = import_table(path, Exposures(propensity="p", context=("note",)))
    assert [json.loads(bytes(d.body))["context"]["note"] for d in found.decisions] == ["two\nlines", "a, comma"]
    assert found.report.problems["propensity"].lines == [6]


def test_a_table_that_ends_too_early(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["action,p,id", *(f"a,0.5,{rng.bytes(20).hex()}" for _ in range(2000))]
    packed = csv(tmp_path, *lines, name="table.csv.gz")
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    found = import_table(packed, Exposures(propensity="p", decision_id="id"))
    assert 800 < len(found.decisions) < 1200  # about half of them
    assert [d.decision_id for d in found.decisions] == [line[6:] for line in lines[1 : len(found.decisions) + 1]]
    assert found.report.problems["truncated"].lines == [len(found.decisions) + 2]
    (tmp_path / "b").mkdir()
    plain = csv(tmp_path / "b", *lines[:3])
    plain.write_text(plain.read_text() + 'a,"0.5')
    found = import_table(plain, Exposures(propensity="p"))
    assert (len(found.decisions), found.report.problems["csv"].lines) == (2, [4])


@pytest.mark.parametrize(
    ("content", "name", "error"),
    [
        (b"", "table.csv", "no such column"),
        (b"action;p\na;0.5\n", "table.csv", "something else than commas"),
        (b"Action,p\na,0.5\n", "table.csv", "Did you mean 'Action'"),
        (b'action,"p"x\na,0.5\n', "table.csv", "no header"),
        (b"\x1f\x8bnothing", "table.csv.gz", "no header"),
        (gzip.compress(b"action,p\n" * 9, mtime=0)[:12], "table.csv.gz", "no header"),
        (b"action,p\n", "table.csv.gz", "no header"),
        (b"PAR1 and then nothing", "table.parquet", "complete Parquet file"),
    ],
)
def test_a_table_that_cannot_be_read_at_all(tmp_path: Path, content: bytes, name: str, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=error):
        import_table(tmp_path / name, Exposures(propensity="p"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_missing_column_names_the_file_and_what_is_there(tmp_path: Path) -> None:
    path = csv(tmp_path, "action,probability", "a,1")
    with pytest.raises(DataError, match=r"table.csv, column 'p'.*one of action, probability"):
        import_table(path, Exposures(propensity="p"))


def test_propensities_are_asked_for_not_filled_in() -> None:
    with pytest.raises(InputError, match=r"no propensities; expected .*--propensity.*`propel propensities`"):
        Exposures()
    with pytest.raises(InputError, match="both a split and a column"):
        Exposures(propensity="p", split=SPLIT)
    with pytest.raises(InputError, match="sum to 1"):
        Exposures(split={"a": 0.5, "b": 0.4})
    with pytest.raises(InputError, match="positive shares"):
        Exposures(split={"a": 1.0, "b": 0.0})


def ope(log: Path, *options: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, ["ope", "--log", str(log), "--policy", "uniform", "--json", *options])
    assert result.exit_code == 0, result.output
    return {record["estimator"]: record for record in json.loads(result.stdout)}


def test_a_split_covers_the_truth_users_are_clusters_and_thinned_rows_weigh_more(tmp_path: Path) -> None:
    """Users come back ten times in the variation they were given; of rows without success, one in five was kept."""
    rng, users = np.random.default_rng(3), 400
    variation = rng.random(users) < 0.75
    row = np.repeat(np.arange(users), 10)
    rate = (np.where(variation, 0.5, 0.3) + rng.choice([-0.25, 0.25], users))[row]  # users differ
    ok = rng.random(len(row)) < rate
    keep = ok | (rng.random(len(row)) < 0.2)
    kept = np.flatnonzero(keep).tolist()
    cells = [f"{'new' if variation[row[r]] else 'control'},{int(ok[r])},u{row[r]},{1.0 if ok[r] else 0.2}" for r in kept]
    lines = ["action,ok,user,kept", *cells]
    columns = Exposures(reward="ok", split=SPLIT, unit="user", pass_probability="kept")
    found = import_table(csv(tmp_path, *lines), columns)
    clustered = ope(found.folder / "log.parquet", "--estimators", "SNIPS")["SNIPS"]
    assert clustered["verdict"] == "trust"
    assert clustered["low"] < 0.4 < clustered["high"]  # half of 0.5 and 0.3
    assert "393 clusters." in clustered["notes"]  # seven users lost all ten rows
    frame = pl.read_parquet(found.folder / "log.parquet").drop("unit")
    frame.write_parquet(tmp_path / "plain.parquet")  # without the file's own remarks: rows alone, no weights
    plain = ope(tmp_path / "plain.parquet", "--estimators", "SNIPS", "--weight", "sample_weight")["SNIPS"]
    assert plain["value"] == pytest.approx(clustered["value"], rel=1e-12)
    assert plain["stderr"] < 0.8 * clustered["stderr"]  # the rows of a user are alike


def test_estimated_propensities_are_at_most_caution(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    lines = ["action,p,ok", *(f"{'ab'[int(rng.random() < 0.5)]},0.5,{int(rng.random() < 0.5)}" for _ in range(500))]
    table = csv(tmp_path, *lines)
    logged = import_table(table, Exposures(reward="ok", propensity="p"))
    (tmp_path / "b").mkdir()
    estimated = import_table(csv(tmp_path / "b", *lines), Exposures(reward="ok", propensity="p"), estimated=True)
    verdicts = [ope(one.folder / "log.parquet", "--estimators", "IPS")["IPS"]["verdict"] for one in (logged, estimated)]
    assert verdicts == ["trust", "caution"]
    assert "at most caution" in estimated.report.missing["propensities"]


def test_times_in_parts_of_a_second_are_told_by_their_size(tmp_path: Path) -> None:
    times = ["1683356889", "1683356889000", "1683356889000000", "1683356889000000000", "1683356889.5"]
    found = import_table(csv(tmp_path, "action,p,time", *[f"a,1,{time}" for time in times]), Exposures(propensity="p", time="time"))
    assert [decision.decided_at_ns for decision in found.decisions] == [1683356889 * 10**9] * 4 + [1683356889 * 10**9 + 5 * 10**8]


def test_outcomes_may_be_true_and_false(tmp_path: Path) -> None:
    found = import_table(csv(tmp_path, "action,p,ok", "a,1,true", "a,1,FALSE"), Exposures(propensity="p", reward="ok"))
    assert pl.read_parquet(found.folder / "log.parquet")["reward"].to_list() == [1.0, 0.0]


def test_a_split_in_per_cent_is_told_what_to_do() -> None:
    with pytest.raises(InputError, match="divide the percentages by 100"):
        Exposures(split={"a": 50.0, "b": 50.0})
