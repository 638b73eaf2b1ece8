"""DSJSON in and out: hand-checked lines, every kind of fault with its line number, round trips, mutants, and the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandits.events import Decision, digest, request_hash
from bandits.sampling import TOTAL
from ope import InputError
from pipelines.exporters import to_dsjson
from pipelines.importers.dsjson import read_dsjson
from pipelines.importers.events import Naming, Outcome, Problem, Row
from tests.pipelines.dsjson_lines import Imported, encoded, import_file, import_lines, observation, ope, single, slotted

NS = 1_683_356_889_000_000_000
"""2023-05-06T07:08:09Z: 19,483 days and 25,689 seconds after 1970."""


def test_every_field_of_a_decision_by_hand(tmp_path: Path) -> None:
    found = import_lines(tmp_path, [single()], Naming("tea", "cafe", "tip", "Guest.age"))
    context = {"Guest": {"age": 41, "tier": "gold"}}
    actions = [{"T": {"price": 3}}, {"T": {"price": 5}}, {"T": {}}]  # tags became ids
    body = b'{"actions":[{"T":{"price":3}},{"T":{"price":5}},{"T":{}}],"context":{"Guest":{"age":41,"tier":"gold"}}}'
    (decision,) = found.decisions
    assert decision == Decision(
        tenant="cafe",
        decision_point="tea",
        decision_id="e1",
        decided_at_ns=NS + 123_456_700,  # seven digits of a second
        unit="41",
        policy="vw@m7",
        seed_epoch=-1,  # drawn elsewhere: does not replay
        actions=("mint", "oolong", "sencha"),  # in the order of _multi, not of a
        shares=np.array([TOTAL // 8, TOTAL // 8 * 5, TOTAL // 4], dtype="<u4").tobytes(),
        propensity=0.25,
        chosen=2,
        body=decision.body,
        body_hash=digest(body),
        request_hash=request_hash("tea", "41", None, None, context, actions),
    )
    assert bytes(decision.body) == body
    assert int(decision.share_vector().sum()) == TOTAL
    (reward,) = found.rewards
    assert (reward.decision_id, reward.name, reward.value, reward.event_id) == ("e1", "tip", 1.5, "")  # minus the cost
    assert (reward.observed_at_ns, reward.received_at_ns, reward.tenant) == (NS + 123_456_700, NS + 123_456_700, "cafe")
    assert (found.report.missing, found.report.problems, found.report.actions) == ({}, {}, 3)
    assert found.report.largest_change == 0  # eighths are shares of 2^31


def test_every_field_of_a_line_with_slots_by_hand(tmp_path: Path) -> None:
    found = import_lines(tmp_path, [slotted()])
    top, side = found.decisions
    assert (top.decision_id, side.decision_id, top.session, side.session) == ("s1:top", "s1:side", "s1", "s1")
    assert (top.unit, side.unit) == ("s1", "s1")  # slots of one event are not independent
    assert (top.actions, top.actions[top.chosen], top.propensity) == (("mint", "oolong", "sencha"), "oolong", 0.5)
    assert top.share_vector().tolist() == [TOTAL // 8 * 3, TOTAL // 2, TOTAL // 8]
    assert (side.actions, side.actions[side.chosen], side.propensity) == (("mint", "sencha"), "sencha", 0.75)
    assert side.share_vector().tolist() == [TOTAL // 4, TOTAL // 4 * 3]
    assert (top.excluded, side.excluded) == ((), (("oolong", "not offered"),))
    assert (top.decided_at_ns, top.policy, top.kind, top.pass_probability) == (NS, "vw", "sampled", 1.0)
    assert json.loads(bytes(side.body)) == {
        "actions": [{"price": 3}, {"price": 4}],
        "context": {"Guest": {"age": 41}, "slot": {"_id": "side", "size": 1}},
    }
    assert [(reward.decision_id, reward.value) for reward in found.rewards] == [("s1:top", 0.0), ("s1:side", 2.0)]
    assert str(found.rewards[0].value) == "0.0"  # not -0.0
    log = pl.read_parquet(found.folder / "log.parquet")
    assert log["slot.size"].to_list() == [2.0, 1.0]
    assert log["unit"].to_list() == ["s1", "s1"]


def test_actions_without_tags_are_numbered_and_label_alone_is_enough(tmp_path: Path) -> None:
    context = {"_multi": [{"x": 1}, {"x": 2}]}
    vector = single("v", c=context, a=[2, 1], p=[0.75, 0.25], _label_probability=0.75, _label_Action=2, _labelIndex=1)
    alone = single("w", c=context, a=None, p=None, _label_probability=0.1, _label_Action=None, _labelIndex=1)
    found = import_lines(tmp_path, [vector, alone])
    assert [decision.actions for decision in found.decisions] == [("1", "2")] * 2
    assert [decision.chosen for decision in found.decisions] == [1, 1]
    assert [decision.propensity for decision in found.decisions] == [0.75, 0.1]
    assert (found.decisions[1].shares, found.decisions[1].share_vector().size) == (b"", 0)
    assert "1 of 2 decisions lack whole vectors" in found.report.missing["vectors"]


def test_what_a_line_does_not_say_is_reported_as_missing(tmp_path: Path) -> None:
    found = import_lines(tmp_path, [single(Timestamp=None, EventId=None, _label_cost=None, Version=None, VWState=None)])
    (decision,) = found.decisions
    assert decision.decision_id == digest(b"log.dsjson:1").hex()  # the same at every import
    assert (decision.decided_at_ns, decision.policy, decision.unit) == (0, "vw", decision.decision_id)
    assert set(found.report.missing) == {"units", "times", "rewards"}
    assert found.rewards == []
    assert (found.report.rows, found.report.files) == (0, ["decisions.parquet", "report.json", "rewards.parquet"])


def test_personalizer_extras_and_a_byte_order_mark(tmp_path: Path) -> None:
    extras = {"DeferredAction": False, "_original_label_cost": -3, "o": [{"v": 1.5, "EventId": "e1", "ActionTaken": False}]}
    found = import_lines(tmp_path, [b"\xef\xbb\xbf" + encoded(single(**extras)), b"\r\n", encoded(single("e2")).rstrip()])
    assert ([decision.decision_id for decision in found.decisions], found.report.problems) == (["e1", "e2"], {})


def test_probability_of_being_kept_in_the_label(tmp_path: Path) -> None:
    """The converter of the reinforcement-learning client: 0.25 times a probability of 0.4 of being kept, in float32."""
    product = float(np.float32(0.25) * np.float32(0.4))
    lines = [single(_label_probability=product), single("e2")]
    plain = import_lines(tmp_path, lines)
    assert [decision.decision_id for decision in plain.decisions] == ["e2"]
    assert "--pass-in-label" in plain.report.problems["propensity"].first
    found = import_lines(tmp_path, lines, name="told", pass_in_label=True)
    assert [decision.propensity for decision in found.decisions] == [0.25, 0.25]
    assert [decision.pass_probability for decision in found.decisions] == pytest.approx([0.4, 1.0], rel=1e-7)
    assert pl.read_parquet(found.folder / "log.parquet")["sample_weight"].to_list() == pytest.approx([2.5, 1.0], rel=1e-7)


def test_observations_alone_and_late(tmp_path: Path) -> None:
    found = import_lines(tmp_path, [single(), observation(), observation("gone", EnqueuedTimeUtc=None)])
    assert (found.report.observations, found.report.late, found.report.rewards) == (2, 1, 3)
    assert [(r.decision_id, r.value, r.event_id) for r in found.rewards] == [
        ("e1", 1.5, ""),
        ("e1", 2.5, "line 2"),  # beside the reward of the line, not added to it
        ("gone", 2.5, "line 3"),
    ]
    assert found.rewards[1].observed_at_ns == NS + 3_111_000_000_000  # 51 minutes 51 seconds later
    assert found.rewards[2].observed_at_ns == 0
    assert pl.read_parquet(found.folder / "log.parquet")["reward"].to_list() == [1.5]


def test_lines_not_to_be_learned_from_are_kept_out_of_the_log(tmp_path: Path) -> None:
    other = [{"_tag": "earl grey"}, {"_tag": "assam"}]
    quiet = single("quiet", _skipLearn=True, c={"_multi": other}, a=[1, 2], p=[0.25, 0.75], _label_Action=1, _labelIndex=0)
    found = import_lines(tmp_path, [single(), quiet, slotted(_skipLearn=True)])
    assert dict(found.report.kinds) == {"sampled": 1, "shadow": 3}
    assert (found.report.rows, found.report.actions) == (1, 5)
    assert pl.read_parquet(found.folder / "log.parquet")["decision_id"].to_list() == ["e1"]
    estimates = ope(found.folder / "log.parquet", "--estimators", "IPS", "--force", code=3)  # one row is refused
    # A third over a quarter, times 1.5: three actions, not the five of the folder.
    assert estimates["IPS"]["value"] == pytest.approx(1 / 3 / 0.25 * 1.5)


GOOD = single()
FAULTS: list[tuple[str, Any, str]] = [
    ("json", b'{"a":[1,2\n', "expected one JSON object"),
    ("json", encoded(single())[:-1] + b" x\n", "trailing"),
    ("json", b'{"EventId": NaN}\n', "invalid"),
    ("json", encoded(single()).replace(b'"gold"', b'"\xff\xfe"'), "utf-8"),
    ("json", encoded(single()).replace(b'"e1"', b'"\xff"'), "utf-8"),
    ("json", encoded(single()).replace(b'"mint"', b'"\xff"'), "utf-8"),
    ("json", encoded(single()).replace(b'"gold"', rb'"\ud800"'), "malformed"),
    ("json", encoded(single()).replace(b"41", b"1" + b"0" * 5000), "out of range"),
    ("json", encoded(single()).replace(b"41", b"1e999"), "out of range"),
    ("json", encoded(single()).replace(b"41", b"[" * 100_000 + b"]" * 100_000), "recursion"),
    ("field", single(Version=[1]), "$.Version"),
    ("field", [1, 2], "array"),
    ("field", single(a=3), "$.a"),
    ("field", single(_label_Action="2"), "_label_Action"),
    ("version", single(Version="2"), "'2'; expected 1"),
    ("kind", {"_label_ca": {"cost": 1, "pdf_value": 0.1, "action": 3.2}, "EventId": "x", "c": {"x": 1}}, "continuous"),
    ("kind", {"EventId": "x", "ActionTaken": True}, "no actions in c._multi"),
    ("kind", single(c={"_multi": []}), "no actions"),
    ("kind", slotted(c={"_multi": [{"_slot_id": 0}, {"_slot_id": 1}], "_slots": [{}, {}]}), "slate"),
    ("pdrop", single(pdrop=1), "below 1"),
    ("pdrop", single(pdrop=-0.1), "below 1"),
    ("action", single(_label_Action=4, _labelIndex=3), "outside the set [3, 1, 2]"),
    ("action", single(_label_Action=0, _labelIndex=-1), "outside the set"),
    ("action", single(_labelIndex=1), "_label_Action 3 beside _labelIndex 1"),
    ("action", single(_label_Action=None, _labelIndex=None, a=[], p=[]), "no action taken"),
    ("action", single(_label_Action=None, _labelIndex=None, a=None), "no action taken"),
    ("action", single(a=[3, 1, 4]), "different ones"),
    ("action", single(a=[3, 1, 1]), "different ones"),
    ("action", single(c={"_multi": [{"_tag": 5}, {}, {}]}), "_tag 5"),
    ("action", slotted(_outcomes=[]), "empty _outcomes"),
    ("action", slotted(_outcomes=[{"_a": [], "_p": []}, {"_a": [1], "_p": [1]}]), "slot 0: found no actions"),
    ("action", slotted(_outcomes=[{"_a": [1], "_p": [1]}, {"_a": [3], "_p": [1]}]), "different ones"),
    ("slots", slotted(_outcomes=[{"_a": [1], "_p": [1]}]), "1 outcomes of 2 slots"),
    ("slots", slotted(c=slotted()["c"] | {"slot": 1}), "another name"),
    ("propensity", slotted(_outcomes=[{"_a": [1]}, {"_a": [0], "_p": [1]}]), "no _p"),
    ("propensity", single(p=None, _label_probability=None), "neither p nor _label_probability"),
    ("propensity", single(p=None, _label_probability=0), "propensity 0"),
    ("propensity", single(p=None, _label_probability=1.1), "(0, 1]"),
    ("propensity", single(_label_probability=0.3), "0.3 beside 0.25"),
    ("propensity", single(p=[0, 0.375, 0.625], _label_probability=0), "found propensity 0"),
    ("propensity", single(p=[1e-11, 0.375, 0.625], _label_probability=1e-11), "above 2^-31"),
    ("probabilities", single(p=[0.25, 0.75]), "2 probabilities of 3 actions"),
    ("probabilities", single(p=[0.25, 0.125, 0.5]), "sum to 0.875"),
    ("probabilities", single(p=[0.25, -0.125, 0.875]), "none negative"),
    ("time", single(Timestamp="yesterday"), "'yesterday'"),
    ("time", single(Timestamp="2500-01-01T00:00:00Z"), "between 1678 and 2262"),
    ("time", observation(EnqueuedTimeUtc="25:00"), "'25:00'"),
    ("id", single("\x1b[31mred"), "printable"),
    ("id", single("x" * 129), "1 to 128"),
    ("id", single(c={"_multi": [{"_tag": "a\nb"}, {"_tag": "b"}, {"_tag": "c"}]}), "action 'a\\nb'"),
    ("id", single(a=[1, 3], p=[0.25, 0.75], _label_Action=1, _labelIndex=0, c={"_multi": [{"_tag": t} for t in ("a", "\t", "c")]}),
     "action '\\t'"),
    ("id", observation(EventId=None), "without EventId"),
    ("id", observation("\x00"), "printable"),
    ("reward", single(_label_cost=1e101), "below 1e+100"),
    ("reward", observation(RewardValue=-1e101), "below 1e+100"),
    ("duplicate", single("e0"), "'e0' again"),
]  # fmt: skip


def test_every_kind_of_fault_is_counted_with_its_line_and_the_rest_imported(tmp_path: Path) -> None:
    """A good line stands before each bad one: line 2i + 1 is good, line 2i + 2 bad."""
    lines = [line for place, (_, bad, _) in enumerate(FAULTS) for line in (single(f"e{place}"), bad)]
    found = import_lines(tmp_path, lines)
    assert [decision.decision_id for decision in found.decisions] == [f"e{place}" for place in range(len(FAULTS))]
    expected: dict[str, list[int]] = {}
    for place, (kind, _, _) in enumerate(FAULTS):
        expected.setdefault(kind, []).append(2 * place + 2)
    assert {kind: problems.lines for kind, problems in found.report.problems.items()} == expected
    assert {kind: problems.count for kind, problems in found.report.problems.items()} == {k: len(v) for k, v in expected.items()}
    assert all(problems.first.startswith(f"line {problems.lines[0]}: ") for problems in found.report.problems.values())
    assert (found.report.rejected, found.report.lines) == (len(FAULTS), 2 * len(FAULTS))


@pytest.mark.parametrize(("kind", "line", "says"), FAULTS, ids=[f"{kind}-{place}" for place, (kind, _, _) in enumerate(FAULTS)])
def test_a_fault_says_what_was_found(tmp_path: Path, kind: str, line: Any, says: str) -> None:
    found = import_lines(tmp_path, [single("e0"), line])
    first = found.report.problems[kind].first
    assert says in first
    assert "expected" in first or kind == "json"
    assert len(first) < 330  # a message is a sentence, not the line


def test_numbers_and_depths_that_columns_cannot_hold_stay_in_the_events(tmp_path: Path) -> None:
    """2^62 is not a float64, and 600 names deep is no column: neither stops the import."""
    context: Any = {"n": 2**62, "big": 10**30, "reward": 1, "_multi": [{}, {}, {}]}
    context["deep"] = leaf = {}
    for _ in range(600):
        leaf["x"] = leaf = {}
    leaf["x"] = 1
    found = import_lines(
        tmp_path, [single("a", c=context), single("b", c=context | {"n": "many"}), single("c", c=context | {"n": 3})]
    )
    assert (len(found.decisions), found.report.problems) == (3, {})
    assert found.report.context == ["n", "big", "context.reward"]  # the log's own reward keeps its name
    log = pl.read_parquet(found.folder / "log.parquet")
    assert log["n"].to_list() == [str(2**62), "many", "3"]  # one text makes a column of texts
    found = import_lines(tmp_path, [single("a", c=context)], name="numbers")
    assert pl.read_parquet(found.folder / "log.parquet")["n"].to_list() == [float(2**62)]


def test_problems_are_told_in_the_order_of_the_lines(tmp_path: Path) -> None:
    """One is found by the line alone, the other where vectors are checked together, later."""
    bad_vector, bad_label = single(p=[0, 0.375, 0.625], _label_probability=0), single(_label_probability=0.3)
    found = import_lines(tmp_path, [bad_vector, bad_label, single()])
    assert found.report.problems["propensity"].lines == [1, 2]
    assert found.report.problems["propensity"].first.startswith("line 1:")


def test_a_file_that_ends_within_a_line(tmp_path: Path) -> None:
    text = encoded(single()) + encoded(single("e2"))
    found = import_lines(tmp_path, [text[:-20]])
    assert ([d.decision_id for d in found.decisions], found.report.problems["truncated"].lines) == (["e1"], [2])
    whole = import_lines(tmp_path, [text[:-1]], name="whole")  # only the line feed is missing
    assert (len(whole.decisions), whole.report.problems) == (2, {})


@pytest.mark.parametrize("spoil", ["cut", "changed", "header"])
def test_a_compressed_file_that_ends_or_breaks(tmp_path: Path, spoil: str) -> None:
    rng = np.random.default_rng(0)
    lines = [single(rng.bytes(30).hex()) for _ in range(3000)]
    whole = import_lines(tmp_path, lines, name="whole.gz")
    assert (len(whole.decisions), whole.report.problems) == (3000, {})
    packed = (tmp_path / "whole.gz.dsjson").read_bytes()
    middle = len(packed) // 2
    spoilt = {
        "cut": packed[:middle],
        "changed": packed[:middle] + bytes(256) + packed[middle + 256 :],
        "header": packed + b"\x1f\x8bnonsense",  # a second member that is none
    }[spoil]
    (tmp_path / "spoilt.dsjson.gz").write_bytes(spoilt)
    found = import_file(tmp_path / "spoilt.dsjson.gz", tmp_path / "spoilt")
    kept = len(found.decisions)
    assert {"cut": 1000 < kept < 2000, "changed": 1000 < kept <= 3000, "header": kept == 3000}[spoil]
    assert found.decisions[:1000] == whole.decisions[:1000]
    assert found.report.problems["truncated"].count == 1
    if spoil != "changed":  # a change is noticed at once, or by the checksum at the end
        assert found.report.problems["truncated"].lines == [kept + 1]
    assert "ends or breaks here" in found.report.problems["truncated"].first


# Round trips


TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=("Cc", "Cs", "Zs", "Cf", "Cn")), max_size=5)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
FEATURES = st.dictionaries(st.sampled_from(["f", "g", "_note"]), st.one_of(VALUES, st.lists(VALUES, max_size=2)), max_size=3)
COSTS = st.one_of(st.none(), st.floats(-1e6, 1e6))


@st.composite
def vectors(draw: st.DrawFn, k: int) -> list[float]:
    """Probabilities, the first of them positive, and some of the others 0."""
    weights = [draw(st.integers(1, 1000)), *(draw(st.integers(0, 1000)) for _ in range(k - 1))]
    return [weight / sum(weights) for weight in weights]


@st.composite
def dsjson_lines(draw: st.DrawFn, number: int) -> dict[str, Any]:
    k = draw(st.integers(1, 5))
    tags = draw(st.booleans())
    multi = [draw(FEATURES) | ({"_tag": f"t{j}"} if tags else {}) for j in range(k)]
    line: dict[str, Any] = {"Version": "1", "EventId": f"e{number}", "c": draw(FEATURES) | {"_multi": multi}}
    if draw(st.booleans()):
        line["Timestamp"] = f"2024-02-29T12:34:56.{draw(st.integers(0, 10**7 - 1)):07d}Z"
    line |= draw(st.sampled_from([{}, {"_skipLearn": True}, {"VWState": {"m": "model"}}]))
    line["pdrop"] = draw(st.floats(0, 0.999))
    if draw(st.booleans()):  # one decision
        order = draw(st.permutations(range(1, k + 1)))[: draw(st.integers(1, k))]
        p = draw(vectors(len(order)))
        line |= {"a": order, "p": p, "_label_probability": p[0], "_label_Action": order[0], "_labelIndex": order[0] - 1}
        cost = draw(COSTS)
        return line if cost is None else line | {"_label_cost": cost}
    line["_outcomes"], line["c"]["_slots"] = [], []
    for slot in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(k)))[: draw(st.integers(1, k))]
        line["_outcomes"].append({"_id": f"slot{slot}", "_a": order, "_p": draw(vectors(len(order))), "_label_cost": draw(COSTS)})
        line["c"]["_slots"].append(draw(FEATURES))
    return line


@given(st.data())
def test_dsjson_to_events_to_dsjson_keeps_everything(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("trip")
    lines = [data.draw(dsjson_lines(number)) for number in range(data.draw(st.integers(1, 5)))]
    lines += [observation("e0"), observation("gone", EnqueuedTimeUtc=None)]
    first = import_lines(folder, lines)
    assert first.report.problems == {}
    path = folder / ("back.dsjson.gz" if data.draw(st.booleans()) else "back.dsjson")
    assert to_dsjson(first.folder, path) == len(lines)
    second = import_file(path, folder / "again")
    assert second.report.problems == {}

    def comparable(decision: Decision) -> Any:
        record = msgspec.structs.asdict(decision)
        del record["excluded"]  # what no slot offered has no features, and is not written
        return record | {"body": bytes(decision.body), "pass_probability": pytest.approx(decision.pass_probability, rel=1e-12)}

    # Shares of 2^31 are exact as floating-point numbers and sum to exactly one: not even the last of them changes.
    assert [comparable(decision) for decision in second.decisions] == [comparable(decision) for decision in first.decisions]
    stated = [p for line in lines if "c" in line for p in (o["_p"][0] for o in line.get("_outcomes", [{"_p": line.get("p")}]))]
    # Rounding down costs less than one share each; the largest takes what the others lose.
    assert np.abs(np.array([d.propensity for d in first.decisions]) - stated).max() <= 5 / TOTAL
    assert first.report.largest_change <= 5 / TOTAL

    def outcomes(found: Imported) -> list[tuple[str, float, int, bool]]:
        return [(reward.decision_id, reward.value, reward.observed_at_ns, bool(reward.event_id)) for reward in found.rewards]

    assert outcomes(second) == outcomes(first)


def test_an_exported_line_by_hand(tmp_path: Path) -> None:
    found = import_lines(tmp_path, [single(pdrop=0.5, _skipLearn=True), slotted(), observation("x")])
    assert to_dsjson(found.folder, tmp_path / "back.dsjson") == 3
    back = [json.loads(line) for line in (tmp_path / "back.dsjson").read_text().splitlines()]
    assert back[0] == single(pdrop=0.5, _skipLearn=True, Timestamp="2023-05-06T07:08:09.1234567Z")
    outcomes = [{name: value for name, value in outcome.items() if name != "_o"} for outcome in slotted()["_outcomes"]]
    slots = [{"_id": "top", "size": 2}, {"_id": "side", "size": 1}]  # side may choose what top left: no _inc needed
    assert back[1] == slotted(c=slotted()["c"] | {"_slots": slots}, _outcomes=outcomes)
    assert back[2] == observation("x")


def test_an_exported_slot_says_what_it_chose_among_where_that_is_not_what_was_left(tmp_path: Path) -> None:
    outcomes = [{"_id": "top", "_a": [2, 0], "_p": [0.5, 0.5]}, {"_id": "side", "_a": [1, 0], "_p": [0.5, 0.5]}]
    found = import_lines(tmp_path, [slotted(_outcomes=outcomes)])
    to_dsjson(found.folder, tmp_path / "back.dsjson")
    back = json.loads((tmp_path / "back.dsjson").read_text())
    tags = [action["_tag"] for action in back["c"]["_multi"]]
    assert sorted(tags) == ["mint", "oolong", "sencha"]
    assert [tags[j] for j in back["c"]["_slots"][0]["_inc"]] == ["mint", "sencha"]
    assert "_inc" not in back["c"]["_slots"][1]
    assert [tags[outcome["_a"][0]] for outcome in back["_outcomes"]] == ["sencha", "oolong"]


# Mutants


def mutants(count: int, seed: int) -> list[bytes]:
    """Valid lines with a few bytes changed, left out, doubled or cut off, or with one value replaced by an odd one."""
    rng = np.random.default_rng(seed)
    odd = [None, True, -1, 0, 3, 2**63, 10**25, 1e308, 0.5, "", "x", "\ud800", "\x1b", [], [0], {}, {"x": []}, [[[]]], [None]]
    made = []
    for number in range(count):
        make = (single, slotted, observation)[number % 3]
        line = make(f"m{number}", pdrop=0.25) if make is not observation else make(f"m{number}")
        if number % 2:
            text = bytearray(encoded(line)[:-1])
            for _ in range(rng.integers(1, 4)):
                place = int(rng.integers(len(text)))
                how = rng.integers(5)
                if how == 0:
                    text[place] = rng.integers(256)
                elif how == 1:
                    del text[place : place + int(rng.integers(1, 6))]
                elif how == 2:
                    text[place:place] = text[place : place + int(rng.integers(1, 6))]
                elif how == 3:
                    text[place:place] = bytes(rng.choice(list(b'0123456789"{}[]:,.-e\\'), 2).tolist())
                elif rng.random() < 0.2:
                    del text[place:]
                if not text:
                    break
            made.append((bytes(text).replace(b"\n", b" ").strip() or b"?") + b"\n")
        else:
            node: Any = line
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = keys[int(rng.integers(len(keys)))]
                if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
                    break
                node = node[key]
            node[key] = odd[int(rng.integers(len(odd)))]
            made.append(encoded(line))
    return made


def test_mutants_are_imported_or_accounted_for_and_what_came_through_goes_out_again(tmp_path: Path) -> None:
    lines = mutants(6000, seed=0)
    source = tmp_path / "log.dsjson"
    source.write_bytes(b"".join(lines))
    items = list(read_dsjson(source, Naming(unit="Guest.age")))
    assert {item.line for item in items} == set(range(1, 6001))  # each line became something
    kinds = [sum(isinstance(item, kind) for item in items) for kind in (Row, Outcome, Problem)]
    assert min(kinds) > 500  # neither all spoilt nor all harmless
    found = import_file(source, tmp_path / "events", Naming(unit="Guest.age"))
    assert found.report.decisions + found.report.observations + found.report.rejected == len(items)
    assert len(found.decisions) == found.report.decisions  # Decision and Reward check themselves when they are read
    assert len(found.rewards) == found.report.rewards
    to_dsjson(found.folder, tmp_path / "back.dsjson")
    again = import_file(tmp_path / "back.dsjson", tmp_path / "again", Naming(unit="Guest.age"))
    assert again.report.problems == {}
    assert [d.decision_id for d in again.decisions] == [d.decision_id for d in found.decisions]
    assert [d.shares for d in again.decisions] == [d.shares for d in found.decisions]
    assert (again.report.observations, again.report.rewards) == (found.report.observations, found.report.rewards)


def test_each_mutant_alone_raises_nothing_but_input_errors(tmp_path: Path) -> None:
    source = tmp_path / "log.dsjson"
    for line in mutants(150, seed=1):
        source.write_bytes(line[:-1])
        try:
            report = import_file(source, tmp_path / "events").report
        except InputError:
            pytest.fail("a line that cannot be imported is reported, not raised")
        assert report.decisions + report.observations + report.rejected > 0
        assert report.lines == 1
        if report.files:
            assert (tmp_path / "events" / "report.json").is_file()
            for path in (tmp_path / "events").iterdir():
                path.unlink()
