"""Whole nights: any number of buckets, sets that come with each request, several rewards and segments, late news."""

from __future__ import annotations

import datetime as dt
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bandits.events import canonical, digest
from bandits.registry import Registry
from bandits.sampling import TOTAL, quantise
from pipelines import charts
from pipelines.nightly.ingest import ingest
from pipelines.nightly.lake import Lake, open_lake
from pipelines.nightly.mart import Mart, read_mart
from pipelines.nightly.run import STEPS, nightly
from pipelines.nightly.settings import Night, Settings, read_settings
from pipelines.nightly.sources import inbox
from pipelines.nightly.window import Window
from tests.nightly.events import DAY, decision, folder, reward, settings
from tests.nightly.small_nights import FIRST, SETTINGS, feed

NIGHT = dt.date.fromisoformat(DAY)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look at numbers; test_report draws charts and looks at them."""
    monkeypatch.setattr(charts, "drawn", lambda specs: dict.fromkeys(specs, ""))


def mart_of(config: Settings, run: Any) -> Mart:
    return read_mart(config.folder / "reports", config.tenant, Path(run.report).name)


def steps_of(config: Settings) -> Lake:
    """The lake after a night's steps but the report."""
    lake, night = open_lake(config), Night.of(FIRST, config)
    lake.commit(ingest(config, lake, lake.snapshot(), inbox(config.path(config.file.lake.inbox))).entries)
    for step in STEPS.values():
        lake.commit(step(night, config, lake, lake.snapshot(), lambda done, total: None))
    return lake


def numbers(lake: Lake, table: str, *names: str) -> list[list[float]]:
    """Numbers of a table, candidates named without their digests: those name the lake's files, too."""
    key = ("policy", "estimator", "metric", "segment", "fold", "window", "k")
    rows = [row for entry in lake.snapshot().find(table) for row in lake.read(entry).to_pylist()]
    rows.sort(key=lambda row: [str(row.get(name)).split("@")[0] for name in key])
    return [[np.nan if row[name] is None else row[name] for name in names] for row in rows]


def test_1_4_and_16_buckets_give_the_same_estimates(tmp_path: Path) -> None:
    """From events to selection; what is learned from is the same to the bit."""
    found, learned = [], []
    for buckets in (1, 4, 16):
        config = feed(tmp_path / f"{buckets}", 1500, settings=SETTINGS.replace("buckets = 2", f"buckets = {buckets}"))
        lake = steps_of(config)
        found.append(
            (
                numbers(lake, "estimates", "value", "stderr", "low", "high", "ess", "weight_z", "weight_mean", "n", "clusters"),
                numbers(lake, "differences", "value", "stderr", "p_worse"),
                numbers(lake, "portfolio_policies", "selected_on", "value", "difference", "tv"),
                numbers(lake, "certificates", "weight_mean", "weight_p", "calibration_chi2", "join_rate"),
            )
        )
        window = Window.of(Night.of(FIRST, config), config, lake, lake.snapshot(), config.points[0])
        learned.append(window.learn_log("value"))
    assert [len(table) for table in found[0]] == [3 * 4 * 2, 2 * 4 * 2, 2, 1]
    for (one, other), table in itertools.product(itertools.pairwise(found), range(4)):
        np.testing.assert_allclose(one[table], other[table], rtol=1e-12, atol=1e-12)
    for (one, other), name in itertools.product(
        itertools.pairwise(learned), ("action", "reward", "propensity", "context", "eligible", "cluster")
    ):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


ROUTES = """
name = "point"
exploration_floor = 0.2
[actions]
per_request = true
[[rewards]]
name = "accepted"
low = 0.0
high = 1.0
window_seconds = 600.0
[[rewards]]
name = "cost"
low = 0.0
high = 5.0
window_seconds = 600.0
aggregation = "sum"
default = "unknown"
[features]
context = [{type = "number", name = "amount"}, {type = "category", name = "country", levels = ["de", "fr"]}]
action = [{type = "number", name = "fee"}]
interactions = [["amount", "fee"]]
"""
ROUTE_SETTINGS = """
[train]
learners = ["oracle-softmax"]
least_rows = 200
days = 1
[evaluate]
windows = [1]
segments = ["country"]
[join]
lookback_days = 1
cutoff_hours = 1.0
"""


def payment(rng: np.random.Generator, i: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One of two to four routes, the cheap ones accepted less often where amounts are high."""
    size = int(rng.integers(2, 5))
    routes = [f"route-{one}" for one in rng.permutation(6)[:size]]
    fees, amount = rng.random(size).round(3), round(float(rng.random()), 3)
    vector = 0.8 * rng.dirichlet(np.ones(size)) + 0.2 / size
    shares = quantise(vector.tolist())
    chosen = int(rng.choice(size, p=np.array(shares) / TOTAL))
    accepted = bool(rng.random() < 0.3 + 0.6 * fees[chosen] * amount)
    body = canonical(
        {"actions": [{"fee": fee} for fee in fees.tolist()], "context": {"amount": amount, "country": "de" if i % 3 else "fr"}}
    )
    record = decision(f"p{i:05d}", at=i * 20, unit=f"card-{i % 700}") | {
        "actions": routes, "shares": b"".join(share.to_bytes(4, "little") for share in shares), "chosen": chosen,
        "propensity": shares[chosen] / TOTAL, "body": body, "body_hash": digest(body), "request_hash": digest(body),
    }  # fmt: skip
    events = [reward(f"p{i:05d}", 1.0, name="accepted", at=i * 20 + 30)] if accepted else []
    if i % 2:
        events += [reward(f"p{i:05d}", 0.5 + 0.1 * (i % 3), name="cost", at=i * 20 + 40, event_id=f"{j}") for j in range(2)]
        events += [reward(f"p{i:05d}", -0.5, name="cost", at=i * 20 + 50, event_id="back")]
    return record, events


def test_sets_that_come_with_requests_two_rewards_and_segments(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    payments = [payment(rng, i) for i in range(4000)]
    config = settings(tmp_path, point=ROUTES, more=ROUTE_SETTINGS)
    folder(tmp_path / "inbox" / "one", [record for record, _ in payments], [event for _, events in payments for event in events])
    mart = mart_of(config, nightly(NIGHT, config))
    (certificate,) = mart.records("certificates")
    assert certificate["verdict"] == "pass", certificate["reasons"]
    rows = mart.records("estimates")
    assert {row["metric"] for row in rows} == {"accepted", "cost"}
    assert {row["segment"] for row in rows} == {"all", "country=de", "country=fr"}
    trained = {row["policy"].split("@")[0] for row in rows} - {"logging"}
    assert trained == {f"{name}-{DAY}" for name in ("oracle-softmax", "uniform")}
    cost = [
        row for row in rows if (row["metric"], row["policy"], row["estimator"], row["segment"]) == ("cost", "logging", "IPS", "all")
    ]
    # twice a half or more, a half of it taken back; unknown where nothing came: every second payment
    assert all(row["low"] < 0.7 < row["high"] for row in cost)
    assert all(400 < row["n"] < 600 for row in cost)
    difference = [
        row
        for row in mart.records("differences")
        if (row["metric"], row["estimator"], row["segment"], row["fold"]) == ("accepted", "DR", "all", "B")
    ]
    best = max(difference, key=lambda row: row["value"])
    assert best["low"] > 0  # fees help: a policy that looks at them is better than one that draws at random


def test_a_late_reward_changes_later_reports_and_is_told(tmp_path: Path) -> None:
    config = feed(tmp_path / "feed")
    first = mart_of(config, nightly(FIRST, config))
    late = [reward("261121-00-00000001", 2.0, at=30, day=FIRST.isoformat(), tenant="feed", name="value", event_id="again")]
    folder(tmp_path / "feed" / "inbox" / "late", rewards=late)
    second = mart_of(config, nightly(FIRST, config))
    assert first.manifest.snapshot_id != second.manifest.snapshot_id
    assert [(row["day"], row["revision"]) for row in second.records("revisions")] == [(FIRST.isoformat(), 2)]
    assert first.records("revisions") == []
    again = read_mart(config.folder / "reports", config.tenant, first.manifest.snapshot_id)
    assert again.records("estimates") == first.records("estimates")


@pytest.mark.parametrize("choice", ["exclude", "include"])
def test_rows_without_a_passed_certificate_are_out_or_labelled_everywhere(tmp_path: Path, choice: str) -> None:
    """A logger that wrote the wrong chance of one load: its day fails, and whatever stands on it says so."""
    config = feed(tmp_path / "feed", 1500, settings=SETTINGS.replace("[evaluate]", f'[evaluate]\nuncertified = "{choice}"'))
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "feed" / "inbox" / "first" / "decisions.parquet"
    table = pq.read_table(path)
    taken = np.array(table["chosen"].to_numpy())
    kept = ~((taken == 2) & (np.arange(len(taken)) % 2 == 0))  # every second row of one load is lost
    pq.write_table(table.filter(pa.array(kept)), path)
    mart = mart_of(config, nightly(FIRST, config))
    assert {row["verdict"] for row in mart.records("certificates")} == {"fail"}
    (evaluation,) = mart.records("evaluations")
    assert evaluation["rows_certified"] == 0
    if choice == "exclude":
        assert evaluation["rows_used"] == 0
        assert mart.records("estimates") == []
    else:
        assert mart.records("estimates")
        assert {row["certified"] for row in mart.records("estimates")} == {False}
        assert "trust" not in {row["verdict"] for table in ("estimates", "differences") for row in mart.records(table)}


def test_what_a_pruned_registry_lacks_is_learned_again(tmp_path: Path) -> None:
    config = feed(tmp_path / "feed")
    first = [numbers(steps_of(config), "estimates", "value")]
    digests = set(Registry(tmp_path / "feed" / "registry").listed())
    Registry(tmp_path / "feed" / "registry").prune(0)
    again = read_settings(_with(tmp_path / "feed" / "propel.toml", "[evaluate]", "[evaluate]\nlevel = 0.9"))
    assert [numbers(steps_of(again), "estimates", "value")] == first
    assert set(Registry(tmp_path / "feed" / "registry").listed()) == digests


def _with(path: Path, old: str, new: str) -> Path:
    path.write_text(path.read_text().replace(old, new))
    return path
