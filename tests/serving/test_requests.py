"""Any bytes are a request or a problem: nothing doubtful gets through, and nothing else is raised."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandits.policy import UNIFORM, Uniform
from serving.decide import Served
from serving.http import REWARD, SHOWN, _whole
from serving.problems import ProblemError
from serving.requests import Asked, asked, asked_many
from tests.serving.points import AD_LOAD, PLAIN_POINT, SETS_POINT, set_request

PLAIN = Served(PLAIN_POINT, Uniform(), UNIFORM).plain
SETS = Served(SETS_POINT, Uniform(), UNIFORM).plain

ALL_FIELDS = (
    b'{"decision_id":"d1","unit":"u","session":"s","parent":"p","context":{"amount":1.5,"device":"phone"},'
    b'"actions":[{"id":"a","features":{"x":1},"eligible":true,"reason":"r"},{"id":"b"}]}'
)
REWARD_BODY = b'{"decision_id":"d1","token":"t","name":"paid","value":0.5,"event_id":"e","observed_at":"2026-11-22T10:00:00Z"}'


def readers() -> dict[str, Callable[[bytes], Any]]:
    """Every way that bytes take into the service."""
    return {
        "general": asked,
        "plain": lambda raw: asked(raw, PLAIN),
        "plain sets": lambda raw: asked(raw, SETS),
        "batch": asked_many,
        "reward": lambda raw: _whole(raw, REWARD),
        "shown": lambda raw: _whole(raw, SHOWN),
    }


def refused(raw: bytes) -> str:
    """The problem that a decision's bytes are refused with, alike alone, read at once, and in a batch."""
    found = set()
    for read, body in ((asked, raw), (lambda body: asked(body, PLAIN), raw), (asked_many, b'{"decisions":[' + raw + b"]}")):
        with pytest.raises(ProblemError) as raised:
            read(body)
        assert raised.value.status in (400, 422)
        assert "\0" not in raised.value.detail
        raised.value.encoded()
        found.add(raised.value.name)
    return found.pop() if len(found) == 1 else "either"


def context(raw: bytes) -> bytes:
    return b'{"context":{"amount":' + raw + b"}}"


MALFORMED = {
    "empty": b"",
    "blank": b"  ",
    "NaN": context(b"NaN"),
    "infinite": context(b"Infinity"),
    "bad UTF-8": context(b'"\xff\xfe"'),
    "overlong UTF-8": context(b'"\xc0\xaf"'),
    "surrogate in UTF-8": context(b'"\xed\xa0\x80"'),
    "raw NUL": context(b'"a\0b"'),
    "escaped NUL": context(b'"a\\u0000b"'),
    "NUL in a key": b'{"context":{"a\\u0000":1}}',
    "raw newline": context(b'"a\nb"'),
    "lone surrogate": context(b'"\\ud800"'),
    "lone low surrogate": context(b'"\\udc00x"'),
    "leading zero": context(b"01"),
    "trailing comma": b'{"context":{},}',
    "single quotes": b"{'context':{}}",
    "comment": b'{"context":{}/**/}',
    "trailing garbage": b'{"context":{}}x',
    "two bodies": b'{"context":{}}{"context":{}}',
    "unclosed": b'{"context":{',
    "mark of byte order": b'\xef\xbb\xbf{"context":{}}',
    "UTF-16": '{"context":{}}'.encode("utf-16"),
    "deep lists": context(b"[" * 100_000 + b"]" * 100_000),
    "deep and unclosed": context(b"[" * 100_000),
    "deep objects": context(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "the same key twice": b'{"context":{},"context":{}}',
    "null and again": b'{"unit":null,"unit":null,"context":{}}',
    "twice in the context": b'{"context":{"a":1,"a":1}}',
    "twice, deep": b'{"context":{"a":[{"b":{"c":1,"c":2}}]}}',
    "twice in an action": b'{"context":{},"actions":[{"id":"a","id":"b"}]}',
    "twice in features": b'{"context":{},"actions":[{"id":"a","features":{"x":1,"x":2}}]}',
    "twice, once escaped": b'{"context":{"a":1,"\\u0061":2}}',
    "twice, one of the structs' escaped": b'{"context":{},"\\u0063ontext":{}}',
    "twice beside an escape": b'{"unit":"\\n","context":{"a":1,"a":1}}',
    "id twice": b'{"decision_id":"x","decision_id":"y","context":{}}',
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_json_or_says_a_key_twice_is_malformed(raw: bytes) -> None:
    assert refused(raw) in ("malformed", "either")


INVALID = {
    "1e999": context(b"1e999"),
    "an integer of 5,000 digits": context(b"9" * 5000),
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "no context": b"{}",
    "context null": b'{"context":null}',
    "context a list": b'{"context":[]}',
    "a number as id": b'{"decision_id":1,"context":{}}',
    "an unknown field": b'{"context":{},"extra":1}',
    "a misspelt field": b'{"context":{},"decisionId":"x"}',
    "an empty id": b'{"context":{},"decision_id":""}',
    "a long id": b'{"context":{},"decision_id":"' + b"x" * 129 + b'"}',
    "a long unit": b'{"context":{},"unit":"' + b"x" * 129 + b'"}',
    "actions an object": b'{"context":{},"actions":{}}',
    "no actions": b'{"context":{},"actions":[]}',
    "an action without id": b'{"context":{},"actions":[{}]}',
    "an action of text": b'{"context":{},"actions":["a"]}',
    "eligible a number": b'{"context":{},"actions":[{"id":"a","eligible":1}]}',
    "a long reason": b'{"context":{},"actions":[{"id":"a","reason":"' + b"x" * 129 + b'"}]}',
    "an action's unknown field": b'{"context":{},"actions":[{"id":"a","p":1}]}',
    "10,001 actions": b'{"context":{},"actions":[' + b",".join(b'{"id":"%d"}' % i for i in range(10_001)) + b"]}",
}


@pytest.mark.parametrize("raw", INVALID.values(), ids=INVALID)
def test_json_of_another_shape_is_invalid(raw: bytes) -> None:
    with pytest.raises(ProblemError) as raised:
        asked(raw.replace(b'"context":{}', b'"context":{"amount":1}'), None)
    assert (raised.value.name, raised.value.status) == ("invalid", 422)
    with pytest.raises(ProblemError):
        asked(raw.replace(b'"context":{}', b'"context":{"amount":1}'), PLAIN)


@pytest.mark.parametrize("escape", [b"\\u0000", b"\\u0041", b"A"])
def test_nesting_of_any_depth_is_a_request_or_a_problem(escape: bytes) -> None:
    for depth in (10, 200, 300, 450, 600, 800, *range(900, 1010, 10), 5000):
        for opening, closing in ((b"[", b"]"), (b'{"k":', b"}")):
            inner = opening * depth + b"1" + closing * depth
            for read, raw in (
                (asked, b'{"context":{"a":' + inner + b',"b":"' + escape + b'"}}'),
                (asked_many, b'{"decisions":[{"context":{"a":' + inner + b',"b":"' + escape + b'"}}]}'),
            ):
                _read(read, raw)


VALID = {
    "all fields": ALL_FIELDS,
    "least": b'{"context":{}}',
    "blanks": b' {\n"context"\t: { } }\r\n',
    "nulls": b'{"decision_id":null,"unit":null,"session":null,"parent":null,"context":{"a":null},"actions":null}',
    "unicode": '{"unit":"größe 漢字 🎈","context":{"ключ":"значение"}}'.encode(),
    "escapes": b'{"unit":"\\u00e9\\ud83c\\udf88 \\"q\\" \\\\ \\/","context":{"a\\tb":"\\n"}}',
    "an escaped key": b'{"\\u0063ontext":{"a":1}}',
    "a text that looks like an escape": b'{"context":{"a":"\\\\u0000"}}',
    "a quote in an escape": b'{"context":{"a":"\\u0022"}}',
    "numbers": b'{"context":{"a":-0.0,"b":1e-400,"c":18446744073709551615,"d":-9223372036854775808,"e":1E+2}}',
    "one key in different objects": b'{"context":{"a":{"a":{"a":1}},"b":[{"a":1},{"a":2}]}}',
}


@pytest.mark.parametrize("raw", VALID.values(), ids=VALID)
def test_what_is_good_is_read_alone_at_once_and_in_a_batch(raw: bytes) -> None:
    expected = json.loads(raw)
    for one in (asked(raw), asked(raw, PLAIN), *asked_many(b'{"decisions":[' + raw + b"," + raw + b"]}")):
        assert json.loads(msgspec.json.encode(one.request)) == expected
        assert json.loads(one.context) == expected["context"]
        assert json.loads(one.actions) == expected.get("actions")


def test_twenty_actions_of_numbers_are_read_at_once() -> None:
    raw = json.dumps(set_request(np.random.default_rng(0), unit="ü")).encode()
    assert asked(raw, SETS).plain
    assert not asked(raw).plain
    assert asked(raw, SETS)[1:3] == asked(raw)[1:3]


def _read(read: Callable[[bytes], Any], raw: bytes) -> bool:
    """Whether it is read. Anything but a ProblemError of 4xx fails the test."""
    try:
        found = read(raw)
    except ProblemError as problem:
        assert problem.status in (400, 422)  # noqa: PT017
        problem.encoded()
        return False
    for one in [found] if isinstance(found, Asked) else found if isinstance(found, list) else []:
        msgspec.json.decode(one.context), msgspec.json.decode(one.actions)
    return True


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_problems(raw: bytes) -> None:
    for read in readers().values():
        _read(read, raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)


@given(JSON, st.sampled_from(["context", "unit", "actions", "decision_id", "value", "action", "decisions"]))
def test_random_json_raises_nothing_but_problems(value: Any, name: str) -> None:
    for body in (value, {name: value}, {"context": {}, name: value}, {"decisions": [{"context": {}, name: value}]}):
        raw = json.dumps(body).encode()
        for read in readers().values():
            _read(read, raw)


PIECES = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\0",
    b"\xff",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b'"a":1,"a":1',
    b"null",
    b"-",
]


@given(st.integers(min_value=0, max_value=2**32))
def test_mutations_of_good_bodies_raise_nothing_but_problems(seed: int) -> None:
    rng = random.Random(seed)
    sets = json.dumps(set_request(np.random.default_rng(seed), 2)).encode()
    bodies = [ALL_FIELDS, REWARD_BODY, b'{"action":"a"}', sets, b'{"decisions":[' + ALL_FIELDS + b"]}"]
    for body in bodies:
        raw = bytearray(body)
        for _ in range(rng.randint(1, 4)):
            at, much = rng.randrange(len(raw) + 1), rng.choice((0, 1, 1, 5))
            raw[at : at + much] = rng.choice([*PIECES, raw[at : at + 9], bytes([rng.randrange(256)])])
        for read in readers().values():
            _read(read, bytes(raw))


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=6) | st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_a_key_is_found_twice_whatever_it_is_and_only_then(fields: dict[str, Any], data: st.DataObject) -> None:
    if any("\0" in str(one) for pair in fields.items() for one in pair):
        return
    escape = data.draw(st.booleans())
    pairs = [json.dumps(key, ensure_ascii=escape) + ":" + json.dumps(value, ensure_ascii=escape) for key, value in fields.items()]
    try:
        once, twice = (
            f'{{"context":{{{",".join(each)}}}}}'.encode() for each in (pairs, [*pairs, data.draw(st.sampled_from(pairs))])
        )
    except UnicodeEncodeError:  # a lone surrogate, which JSON cannot hold
        return
    if not any("\ud800" <= letter <= "\udfff" for pair in fields.items() for one in pair for letter in str(one)):
        assert _read(asked, once)
    assert not _read(asked, twice)


def test_features_that_may_be_missing_are_not_read_at_once() -> None:
    assert Served(AD_LOAD, Uniform(), UNIFORM).plain is None
