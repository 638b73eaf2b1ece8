"""The join against a short model of it, on two engines, in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandits.decision_point import RewardRule, parse_decision_point
from bandits.events import canonical
from pipelines.nightly.bodies import features_of
from pipelines.nightly.ingest import DECISIONS
from pipelines.nightly.join import joined, parameters, relations
from pipelines.nightly.merging import distinct_rewards, distinct_shown
from tests.nightly.events import POINT, SECOND, decision, reward, shown, start, table

SQL = Path("pipelines/sql/join.sql").read_text()
DATABASE = duckdb.connect(config={"threads": 1})
CUTOFF = start() + 5000 * SECOND


class Outcome(NamedTuple):
    """What the model says of one reward of one decision."""

    value: float | None
    state: str
    delay: int | None
    events: int
    early: int
    late: int
    refused: int
    conflicts: int
    reversed: int


def model(decided: int, events: Sequence[dict[str, Any]], rule: RewardRule, cutoff: int) -> Outcome:
    """One decision: its window, its observations, the rule's way to make one number of them."""
    first: dict[tuple[str, float], tuple[int, int]] = {}
    for event in events:
        key, time = (event["event_id"], event["value"] + 0.0), (event["observed_at_ns"], event["received_at_ns"])
        first[key] = min(first.get(key, time), time)
    by_event: dict[str, list[tuple[int, int, float]]] = {}
    for (event_id, value), time in first.items():
        by_event.setdefault(event_id, []).append((*time, value))
    window, tolerance = int(rule.window_seconds * SECOND), int(rule.clock_tolerance_seconds * SECOND)
    counting, late, refused, conflicts = [], 0, 0, 0
    for event_id, seen in by_event.items():
        good = []
        for observed, received, value in sorted(seen):
            if not rule.least <= value <= rule.high:
                refused += 1
            elif not -tolerance <= observed - decided <= window:
                late += 1
            else:
                good.append((observed, received, event_id, value))
        conflicts += len(good) > 1
        counting += good if len(good) == 1 else {"exclude": [], "first": good[:1], "last": good[-1:]}[rule.conflict]
    conflict = conflicts > 0 and rule.conflict == "exclude"
    counting.sort()
    values = [value for *_, value in counting]
    makers = {
        "first": lambda: values[0],
        "last": lambda: values[-1],
        "sum": lambda: sum(values),
        "max": lambda: max(values),
        "min": lambda: min(values),
    }
    mature = decided + window <= cutoff
    observed_value = makers[rule.aggregation]() if values and not conflict else None
    conflict = conflict or (observed_value is not None and not rule.low <= observed_value <= rule.high)
    observed_value = None if conflict else observed_value
    fallback = None if conflict or values else rule.at_maturity
    state = "conflict" if conflict else "observed" if values else "default" if rule.at_maturity is not None else "unknown"
    return Outcome(
        value=(observed_value if values else fallback) if mature else None,
        state=state if mature else "pending",
        delay=min((observed - decided for observed, *_ in counting), default=None),
        events=len(values),
        early=sum(observed < decided for observed, *_ in counting),
        late=late,
        refused=refused,
        conflicts=conflicts,
        reversed=sum(value < 0 for value in values) if rule.reversible else 0,
    )


rules = st.builds(
    RewardRule,
    name=st.just("reward"),
    low=st.sampled_from([0.0, -1.0]),
    high=st.just(2.0),
    window_seconds=st.sampled_from([100.0, 3600.0]),
    aggregation=st.sampled_from(["first", "last", "sum", "max", "min"]),
    default=st.sampled_from([0.0, 1.0, "unknown"]),
    conflict=st.sampled_from(["exclude", "first", "last"]),
    clock_tolerance_seconds=st.sampled_from([0.0, 5.0]),
)
observations = st.builds(
    lambda id_, event, value, at, later, name: (
        reward(id_, value, at=at, event_id=event, name=name) | {"received_at_ns": start() + (at + later) * SECOND}
    ),
    st.sampled_from(["d0", "d1", "d2", "nobody"]),
    st.sampled_from(["", "one", "two"]),
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 0.2, -1.0, 5.0]),
    st.sampled_from([994, 996, 1000, 1001, 1100, 1101, 1500, 4600, 4601]),
    st.sampled_from([0, 1, 900]),
    st.sampled_from(["reward", "reward", "other"]),
)
DECIDED = {"d0": 1000, "d1": 1001, "d2": 1500}


def decisions() -> pa.Table:
    rows = table("decisions", [decision(id_, at=at) for id_, at in DECIDED.items()])
    return rows.append_column("unit_hash", pa.array(range(3))).select(DECISIONS.names)


def found(rows: pa.Table) -> dict[str, Outcome]:
    return {row["decision_id"]: Outcome(*(row[f"{name}.reward"] for name in Outcome._fields)) for row in rows.to_pylist()}


def attributed(events: Sequence[dict[str, Any]]) -> pa.Table:
    rewards = table("rewards", events)
    return distinct_rewards(rewards.append_column("attributed_id", rewards["decision_id"]))


@settings(max_examples=60, deadline=None)
@given(rule=rules, events=st.lists(observations, max_size=12), shuffle=st.randoms(use_true_random=False))
def test_join_is_its_model_in_any_order_on_two_engines(
    rule: RewardRule, events: list[dict[str, Any]], shuffle: random.Random
) -> None:
    point = parse_decision_point(POINT)
    point = type(point)(name="point", actions=point.actions, rewards=(rule,))
    expected = {
        id_: model(start() + at * SECOND, [e for e in events if (e["decision_id"], e["name"]) == (id_, "reward")], rule, CUTOFF)
        for id_, at in DECIDED.items()
    }
    rows, unreadable = joined(decisions(), attributed(events), None, point, CUTOFF, database=DATABASE)
    assert not unreadable
    for id_, outcome in found(rows).items():
        assert outcome.value == pytest.approx(expected[id_].value, abs=1e-12)  # the model sums left to right, too
        assert outcome._replace(value=None) == expected[id_]._replace(value=None), id_
    for (_, value, *others), theirs in zip(on_sqlite(attributed(events), rule), found(rows).values(), strict=True):
        assert value == pytest.approx(theirs.value, abs=1e-12)
        assert others == list(theirs[1:])
    again = [*events, *events[:3]]
    shuffle.shuffle(again)
    assert joined(decisions(), attributed(again), None, point, CUTOFF, database=DATABASE)[0].equals(rows)


def on_sqlite(rewards: pa.Table, rule: RewardRule) -> list[tuple[Any, ...]]:
    """What the same text says on SQLite, a row per decision."""
    connection = apsw.Connection(":memory:")
    connection.execute("create table decisions (row, decision_id, decided_at_ns)")
    connection.execute("create table rewards (place, attributed_id, name, observed_at_ns, value, event, version, alone)")
    for row, (id_, at) in enumerate(DECIDED.items()):
        connection.execute("insert into decisions values (?, ?, ?)", (row, id_, start() + at * SECOND))
    for one in relations(decisions(), rewards)["rewards"].to_pylist():
        names = ("place", "attributed_id", "name", "observed_at_ns", "value", "event", "version", "alone")
        connection.execute("insert into rewards values (?, ?, ?, ?, ?, ?, ?, ?)", tuple(one[name] for name in names))
    return sorted(connection.execute(SQL, parameters(rule, CUTOFF)))


def test_unknown_is_not_zero_until_the_window_closes() -> None:
    point = parse_decision_point(POINT)
    closes = start() + (1500 + 3600) * SECOND
    for cutoff, value, state in ((closes - 1, None, "pending"), (closes, 0.0, "default")):
        outcome = found(joined(decisions(), None, None, point, cutoff, database=DATABASE)[0])["d2"]
        assert (outcome.value, outcome.state) == (value, state)


@pytest.mark.parametrize(
    ("conflict", "values", "value", "state"),
    [
        ("last", {0: 1.0, 4000: 0.5}, 1.0, "observed"),  # the correction came after the window: as if it never came
        ("last", {0: 1.0, 10: 99.0}, 1.0, "observed"),  # out of range: refused, as if it never came
        ("first", {0: 99.0, 10: 1.0}, 1.0, "observed"),
        ("exclude", {0: 1.0, 10: 99.0}, 1.0, "observed"),
        ("exclude", {0: 1.0, 10: 0.5}, None, "conflict"),
        ("last", {0: 1.0, 10: 0.5}, 0.5, "observed"),
        ("first", {0: 1.0, 10: 0.5}, 1.0, "observed"),
    ],
)
def test_only_values_that_would_count_contradict_each_other(
    conflict: Any, values: dict[int, float], value: float | None, state: str
) -> None:
    point = parse_decision_point(f'{POINT}conflict = "{conflict}"\n')
    events = [reward("d0", one, at=1000 + later) for later, one in values.items()]
    outcome = found(joined(decisions(), attributed(events), None, point, CUTOFF, database=DATABASE)[0])["d0"]
    assert (outcome.value, outcome.state) == (value, state)


@pytest.mark.parametrize(
    ("values", "value", "state"), [((4.0, 4.0, 4.0), None, "conflict"), ((-1.0,), None, "conflict"), ((4.0, -1.0), 3.0, "observed")]
)
def test_a_sum_outside_the_declared_range_is_no_value(values: tuple[float, ...], value: float | None, state: str) -> None:
    point = parse_decision_point(f'{POINT}aggregation = "sum"\n')
    events = [reward("d0", one, at=1001 + i, event_id=f"{i}") for i, one in enumerate(values)]
    outcome = found(joined(decisions(), attributed(events), None, point, CUTOFF, database=DATABASE)[0])["d0"]
    assert (outcome.value, outcome.state) == (value, state)


def test_the_last_word_on_what_was_shown_counts_and_nobody_else_is_guessed() -> None:
    events = table("shown", [shown("d0", "b", at=5), shown("d0", "a", at=9), shown("d1", None, at=3), shown("nobody", "a")])
    rows, _ = joined(
        decisions(),
        None,
        distinct_shown(events.append_column("attributed_id", events["decision_id"])),
        parse_decision_point(POINT),
        CUTOFF,
        database=DATABASE,
    )
    assert rows["shown"].to_pylist() == ["as_sampled", "none", "unknown"]


def test_decisions_whose_features_do_not_fit_are_named_and_left_out() -> None:
    point = parse_decision_point(POINT + '[features]\ncontext = [{type = "number", name = "age"}]\n')
    records = [decision("d0", context={"age": 3}), decision("d1", context={"age": "old"}), decision("d2", context={"user": {}})]
    rows, unreadable = joined(
        table("decisions", records).append_column("unit_hash", pa.array(range(3))),
        None,
        None,
        point,
        CUTOFF,
        segments=("age",),
        database=DATABASE,
    )
    assert rows["x.age"].to_pylist() == [3.0]
    assert rows["s.age"].to_pylist() == ["3"]
    assert [id_ for id_, _ in unreadable] == ["d1", "d2"]
    assert "'old'" in unreadable[0][1]


@pytest.mark.parametrize(
    "body", [b"[]", b"not JSON", b'{"context":3}', b'{"actions":[{}],"context":{"age":1}}', b'{"actions":{},"context":[]}']
)
def test_a_body_that_is_no_request_is_named_too(body: bytes) -> None:
    features = 'context = [{type = "number", name = "age"}]\naction = [{type = "number", name = "fee"}]'
    point = parse_decision_point(f"{POINT}[features]\n{features}\n")
    rows = table("decisions", [decision("d0", body=body)]).append_column("unit_hash", pa.array([1]))
    joined_rows, unreadable = joined(rows, None, None, point, CUTOFF, database=DATABASE)
    assert (joined_rows.num_rows, [id_ for id_, _ in unreadable]) == (0, ["d0"])


def test_action_features_stand_where_the_catalogue_has_their_action() -> None:
    point = parse_decision_point(POINT + '[features]\naction = [{type = "number", name = "fee"}]\n')
    body = canonical({"actions": [{"fee": 3.0}, {"fee": 1.0}], "context": {}})
    one = decision("d0") | {"actions": ["c", "a"], "shares": 2 * (2**30).to_bytes(4, "little"), "body": body}
    rows = table("decisions", [one]).append_column("unit_hash", pa.array([1]))
    found, _ = joined(rows, None, None, point, CUTOFF, database=DATABASE)
    assert [found[f"f.{j}.fee"].to_pylist() for j in range(3)] == [[1.0], [0.0], [3.0]]
    assert found["action"].to_pylist() == [2]


def test_features_read_at_once_are_those_read_one_by_one() -> None:
    names = ("age", "b c", "größe")
    point = parse_decision_point(
        POINT + "[features]\ncontext = [" + ",".join(f'{{type = "number", name = "{name}"}}' for name in names) + "]\n"
    )
    contexts = [{"age": 3, "b c": -0.1, "größe": 1e-300, "more": "text"}, {"age": 2**53 + 1, "b c": 0.1 + 0.2, "größe": 12345.678}]
    rows = table("decisions", [decision(f"d{i}", context=context) for i, context in enumerate(contexts)])
    rows = rows.append_column("unit_hash", pa.array(range(2)))
    at_once, _ = features_of(rows, point, ())
    one_by_one, _ = features_of(rows, point, ("more",))
    for name in names:
        assert at_once[f"x.{name}"].equals(one_by_one[f"x.{name}"])
    expected = point.features.batch([{name: context[name] for name in names} for context in contexts], 3).context
    assert np.stack([at_once[f"x.{name}"] for name in names], axis=1).tolist() == expected.tolist()


def test_shares_are_laid_out_by_the_catalogue() -> None:
    wide = decision("d0", chosen=1) | {
        "actions": ["c", "a"],
        "shares": (2**29).to_bytes(4, "little") + (3 * 2**29).to_bytes(4, "little"),
    }
    wide |= {"propensity": 0.75}
    rows, _ = joined(
        table("decisions", [wide]).append_column("unit_hash", pa.array([1])),
        None,
        None,
        parse_decision_point(POINT),
        CUTOFF,
        database=DATABASE,
    )
    assert [rows[f"share.{j}"].to_pylist() for j in range(3)] == [[3 * 2**29], [None], [2**29]]
    assert rows["action"].to_pylist() == [0]
    assert np.asarray(rows["vector"]).tolist() == [True]
