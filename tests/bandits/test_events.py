"""The wire contract: version 1 reads forever, ids print, fields agree, equal requests have equal hashes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandits.events import Decision, Reward, Shown, canonical, digest, request_hash
from ope.data import InputError

FIXTURE = Path(__file__).parent / "fixtures" / "events_v1.jsonl"
RELEASED = "93b4ab348c24535360b8aab0993841cdaba8d1819260952456ca6200fe039370"
LINES = FIXTURE.read_bytes().splitlines()
KINDS = (Decision, Decision, Reward, Reward, Shown, Shown)
BODY = b'{"actions":{"a1":{"price":2.5}},"context":{"amount":12.5,"card":"visa","note":null,"vip":true}}'
SHARED = {
    "tenant": "acme",
    "decision_point": "route",
    "decided_at_ns": 1720000000123456789,
    "unit": "u-9",
    "parent": None,
    "policy": "igw@5f2c",
    "seed_epoch": 7,
    "actions": ("a1", "a2", "ü 3"),
    "body": msgspec.Raw(BODY),
    "body_hash": bytes.fromhex("7d065b0e1607ad6447ec7186e9268b5a"),
    "request_hash": bytes.fromhex("7e888253ec64017edfedfe175e686b97"),
}
SAMPLED = SHARED | {
    "decision_id": "0190f5a2-7c3e-7d44-9b1a-2f6c8e0d1a2b",
    "session": "s-1",
    "experiment": "x1",
    "arm": "b",
    "excluded": (("a4", "breaker"),),
    "shares": bytes.fromhex("000000400000002000000020"),  # 2^30, 2^29, 2^29, little-endian
    "propensity": 0.25,
    "chosen": 2,
}
IMPORTED = SHARED | {
    "decision_id": "imported-1",
    "session": None,
    "kind": "fallback",
    "shares": b"",
    "propensity": 0.1,
    "chosen": 0,
    "pass_probability": 0.5,
}
TIMES = {"observed_at_ns": 1720000001000000000, "received_at_ns": 1720000002000000000}
OF_IMPORT = {"tenant": "acme", "decision_id": "imported-1", **TIMES}
EVENTS = (
    Decision(**SAMPLED),
    Decision(**IMPORTED),
    Reward(**OF_IMPORT, name="authorised", value=-0.75),
    Reward(**OF_IMPORT, name="authorised", event_id="r-2", value=1.0),
    Shown(**OF_IMPORT, action=None),
    Shown(**OF_IMPORT, action="a2"),
)
REQUEST = {
    "decision_point": "route",
    "unit": "u-9",
    "session": "s-1",
    "parent": None,
    "context": {"card": "visa", "amount": 12.5, "vip": True, "note": None},
    "actions": {"a1": {"price": 2.5}},
}
IDS = [
    (kind, name)
    for kind, names in (
        (Decision, ("tenant", "decision_point", "decision_id", "unit", "session", "parent", "policy", "experiment", "arm")),
        (Reward, ("tenant", "decision_id", "name")),
        (Shown, ("tenant", "decision_id", "action")),
    )
    for name in names
]
FIELDS = {Decision: SAMPLED, Reward: {**OF_IMPORT, "name": "authorised", "value": 1.0}, Shown: {**OF_IMPORT, "action": "a2"}}
each_id = pytest.mark.parametrize(("kind", "name"), IDS, ids=[f"{kind.__name__}.{name}" for kind, name in IDS])


def wire(kind, /, **changes) -> bytes:
    """JSON of an event with fields changed, written without building the event."""
    document = json.loads(msgspec.json.encode(kind(**FIELDS[kind])))
    return json.dumps(document | changes).encode()


@pytest.mark.parametrize(("line", "event"), list(zip(LINES, EVENTS, strict=True)))
def test_version_1_reads_to_the_same_values_and_writes_the_same_bytes(line, event):
    decoded = msgspec.json.decode(line, type=type(event))
    assert decoded.schema_version == 1
    for name in event.__struct_fields__:
        found, expected = getattr(decoded, name), getattr(event, name)
        assert (bytes(found) == bytes(expected)) if name == "body" else (found == expected), name
    assert msgspec.json.encode(decoded) == line == msgspec.json.encode(event)


def test_the_fixture_is_the_one_that_was_released():
    assert hashlib.sha256(FIXTURE.read_bytes()).hexdigest() == RELEASED, "a released fixture never changes: add a new file"


@pytest.mark.parametrize(("line", "kind"), list(zip(LINES, KINDS, strict=True)))
def test_fields_of_a_later_version_are_read_over(line, kind):
    later = line.replace(b'{"schema_version":1', b'{"later":{"deep":[1]},"schema_version":2', 1)[:-1] + b',"last":null}'
    decoded = msgspec.json.decode(later, type=kind)
    assert decoded.schema_version == 2, "a reader sees which version wrote the record"
    assert decoded.tenant == "acme"
    assert decoded.decision_id in {SAMPLED["decision_id"], "imported-1"}


def test_optional_fields_of_version_1_may_be_absent():
    document = json.loads(LINES[0])
    optional = ("schema_version", "session", "parent", "experiment", "arm", "kind", "excluded", "pass_probability")
    for name in optional:
        del document[name]
    decoded = msgspec.json.decode(json.dumps(document).encode(), type=Decision)
    assert (decoded.schema_version, decoded.kind, decoded.excluded, decoded.pass_probability) == (1, "sampled", (), 1.0)
    assert (decoded.session, decoded.parent, decoded.experiment, decoded.arm) == (None,) * 4
    for name in set(document) & set(Decision.__struct_fields__):
        shorter = {key: value for key, value in document.items() if key != name}
        with pytest.raises(msgspec.ValidationError, match=f"`{name}`"):
            msgspec.json.decode(json.dumps(shorter).encode(), type=Decision)


@each_id
@pytest.mark.parametrize("text", ["x", "é" * 128, "a b/c~{}\"'\\"], ids=["1", "128", "marks"])
def test_ids_of_1_to_128_printable_characters_pass(kind, name, text):
    assert getattr(msgspec.json.decode(wire(kind, **{name: text}), type=kind), name) == text
    assert getattr(kind(**FIELDS[kind] | {name: text}), name) == text


@each_id
@pytest.mark.parametrize("text", ["", "x" * 129], ids=["0", "129"])
def test_ids_of_other_lengths_are_refused_with_the_field(kind, name, text):
    with pytest.raises(msgspec.ValidationError, match=rf"\$\.{name}"):
        msgspec.json.decode(wire(kind, **{name: text}), type=kind)


@each_id
@pytest.mark.parametrize("text", ["a\nb", "\x00", "a\x1b[31m", "a\x7f", "\u202e", "a\tb"])
def test_ids_that_do_not_print_are_refused_with_the_field(kind, name, text):
    with pytest.raises(msgspec.ValidationError, match=f"^{name}: found .*printable"):
        msgspec.json.decode(wire(kind, **{name: text}), type=kind)
    with pytest.raises(ValueError, match=f"^{name}: found .*printable"):
        kind(**FIELDS[kind] | {name: text})


@each_id
def test_a_lone_surrogate_is_no_character(kind, name):
    with pytest.raises(ValueError, match=f"^{name}: found .*printable"):
        kind(**FIELDS[kind] | {name: "a\ud800"})
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(wire(kind, **{name: "a\ud800"}), type=kind)


def test_actions_are_ids_and_event_ids_may_be_empty():
    for text in ("", "x" * 129, "a\nb"):
        with pytest.raises(msgspec.ValidationError, match="actions"):
            msgspec.json.decode(wire(Decision, actions=["a1", text, "a3"]), type=Decision)
    with pytest.raises(msgspec.ValidationError, match="event_id"):
        msgspec.json.decode(wire(Reward, event_id="x" * 129), type=Reward)
    with pytest.raises(ValueError, match="event_id"):
        Reward(**FIELDS[Reward], event_id="a\n")


CONTRADICTIONS = {
    "chosen past the end": ({"chosen": 3}, "chosen: found 3"),
    "chosen negative": ({"chosen": -1}, "chosen: found -1"),
    "propensity not its share": ({"propensity": 0.5}, r"propensity: found 0\.5; expected its share, 0\.25"),
    "propensity off by one bit": ({"propensity": math.nextafter(0.25, 1)}, "propensity: found 0.25"),
    "propensity 0": ({"propensity": 0.0}, "propensity"),
    "propensity above 1": ({"propensity": 1.5}, "propensity"),
    "kept with probability 0": ({"pass_probability": 0.0}, "pass_probability"),
    "kept with probability 2": ({"pass_probability": 2.0}, "pass_probability"),
    "duplicate actions": ({"actions": ("a1", "a2", "a1")}, "actions: found one twice"),
    "a share too few": ({"shares": np.array([2**30, 2**30], "<u4").tobytes()}, "shares: found 2 "),
    "shares one short": ({"shares": np.array([2**30 - 1, 2**29, 2**29], "<u4").tobytes()}, "shares: found 3 summing to 2147483647"),
    "shares one over": ({"shares": np.array([2**30 + 1, 2**29, 2**29], "<u4").tobytes()}, "shares: found 3 summing to 2147483649"),
    "shares in the other byte order": ({"shares": np.array([2**30, 2**29, 2**29], ">u4").tobytes()}, "shares"),
}


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_fields_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Decision(**SAMPLED | changes)
    encoded = {key: json.loads(msgspec.json.encode(value)) for key, value in changes.items()}
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.json.decode(wire(Decision, **encoded), type=Decision)


def test_a_propensity_without_a_vector_is_taken_as_it_is():
    assert Decision(**IMPORTED | {"propensity": 0.3}).propensity == 0.3
    assert Decision(**IMPORTED).share_vector().size == 0
    assert Decision(**SAMPLED).share_vector().tolist() == [2**30, 2**29, 2**29]
    one = Decision(**SAMPLED | {"actions": ("a1",), "shares": (2**31).to_bytes(4, "little"), "propensity": 1.0, "chosen": 0})
    assert one.share_vector().tolist() == [2**31], "one action holds all 2^31 shares in a u32"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_are_finite(value):
    with pytest.raises(ValueError, match=r"^value: found"):
        Reward(**FIELDS[Reward] | {"value": value})


@pytest.mark.parametrize("kind", ["sample", "", "SAMPLED", None])
def test_a_decision_is_of_a_known_kind(kind):
    with pytest.raises(msgspec.ValidationError, match=r"\$\.kind"):
        msgspec.json.decode(wire(Decision, kind=kind), type=Decision)


@pytest.mark.parametrize("event", EVENTS)
def test_events_do_not_change(event):
    with pytest.raises(AttributeError):
        event.tenant = "other"


leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | st.text(max_size=5)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4))


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in sorted(value, reverse=True)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(values)
def test_key_order_and_spacing_do_not_matter_at_any_depth(value):
    spaced = json.loads(json.dumps(reordered(value), indent=3))
    assert canonical(spaced) == canonical(reordered(value)) == canonical(value)
    assert json.loads(canonical(value)) == value


@given(values, values)
def test_unequal_values_have_unequal_bytes(one, other):
    if json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True):
        assert canonical(one) != canonical(other)


def test_canonical_bytes_by_hand():
    value = {"b": [1, 2.5, {"z": None, "a": True}], "a": "é\n", "": ()}
    assert canonical(value) == '{"":[],"a":"é\\n","b":[1,2.5,{"a":true,"z":null}]}'.encode()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused_with_their_path(bad):
    for value, path in (
        ({"context": {"amount": bad}}, r"context\.amount"),
        ({"actions": [{"x": 1.0}, {"x": bad}]}, r"actions\[1\]\.x"),
        ([[0.0], [1.0, bad]], r"\[1\]\[1\]"),
        ((bad,), r"\[0\]"),
        (bad, "value"),
    ):
        with pytest.raises(InputError, match=f"^{path}: found .*finite"):
            canonical(value)


@pytest.mark.parametrize("value", [1j, object(), {1: 2}, np.float64(1.0)], ids=["complex", "object", "number as key", "NumPy"])
def test_values_that_json_does_not_have_are_refused(value):
    with pytest.raises(InputError, match="JSON does not have"):
        canonical({"a": value})


def test_hashes_are_those_that_were_released():
    assert digest(b"").hex() == "cae66941d9efbd404e4d88758ea67670", "BLAKE2b-128 of nothing"
    assert digest(BODY) == SHARED["body_hash"]
    assert request_hash(**REQUEST) == SHARED["request_hash"]
    independent = json.dumps(REQUEST, sort_keys=True, separators=(",", ":")).encode()
    assert request_hash(**REQUEST) == hashlib.blake2b(independent, digest_size=16).digest()
    assert request_hash("p", "u", None, None, {}, []).hex() == "7133c43c89ee631f59a151efa3210822"


def test_every_part_of_a_request_is_in_its_hash():
    others = {
        "decision_point": "route2",
        "unit": "u-8",
        "session": None,
        "parent": "s-1",
        "context": REQUEST["context"] | {"amount": 12.75},
        "actions": {"a1": {"price": 2.75}},
    }
    hashes = [request_hash(**REQUEST | {name: value}) for name, value in others.items()]
    assert len({request_hash(**REQUEST), *hashes}) == 7, "each of six parts makes a hash of its own"
    swapped = request_hash(**REQUEST | {"session": None, "parent": "s-1"})
    assert swapped not in {request_hash(**REQUEST), *hashes}
