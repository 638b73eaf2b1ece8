"""From requests to arrays: one request and many are equal to the bit, encodings by hand, and what is refused."""

from __future__ import annotations

import hashlib
import math
import re

import msgspec
import numpy as np
import pytest

from bandits.features import Boolean, Category, FeatureSchema, Hashed, Number
from ope.data import InputError

N = 20_000
SCHEMA = FeatureSchema(
    context=(
        Number("age"),
        Number("amount", missing=10.0, centre=50.0, scale=7.0),
        Boolean("vip"),
        Boolean("returning", missing=False),
        Category("card", ("visa", "mc", "amex"), missing="level", unknown="level"),
        Category("channel", ("web", "app")),
        Hashed("issuer", 16),
    ),
    action=(
        Number("price"),
        Number("fee", missing=0.3, scale=3.0),
        Category("route", ("a", "b", "c"), unknown="level"),
        Boolean("secure"),
        Hashed("acquirer", 4),
    ),
    interactions=(("amount", "card"), ("card", "route"), ("price", "fee"), ("vip", "price")),
)
PLAIN = FeatureSchema(context=(Number("x"), Number("y")), action=(Number("p"), Number("q")))


def permuted(fields: dict, rng: np.random.Generator) -> dict:
    names = list(fields)
    return {names[i]: fields[names[i]] for i in rng.permutation(len(names))}


def request_context(rng: np.random.Generator) -> dict:
    fields = {
        "age": rng.choice([rng.normal(40, 17), int(rng.integers(18, 90))]).item(),
        "amount": [float(rng.lognormal(3)), int(rng.integers(1, 99)), None][rng.integers(3)],
        "vip": bool(rng.integers(2)),
        "returning": [True, False, None][rng.integers(3)],
        "card": ["visa", "mc", "amex", "diners", None][rng.integers(5)],
        "channel": ["web", "app"][rng.integers(2)],
        "issuer": [f"bank {rng.integers(500)}", None][int(rng.integers(10) == 0)],
    }
    optional = ("amount", "returning", "card", "issuer")
    dropped = {name for name in optional if fields[name] is None and rng.integers(2)}  # null and absent mean the same
    return permuted({name: value for name, value in fields.items() if name not in dropped}, rng)


def request_action(rng: np.random.Generator) -> dict:
    fields = {
        "price": float(rng.normal()),
        "fee": float(rng.uniform()),
        "route": ["a", "b", "c", "new"][rng.integers(4)],
        "secure": bool(rng.integers(2)),
        "acquirer": f"acq {rng.integers(50)}",
    }
    if rng.integers(4) == 0:
        del fields["fee"]
    return permuted(fields, rng)


def requests(n: int, longest: int = 4) -> tuple[list[dict], list[list[dict]]]:
    rng = np.random.default_rng(7)
    pool = [request_action(rng) for _ in range(2000)]
    actions = [[pool[i] for i in rng.integers(len(pool), size=rng.integers(1, longest + 1))] for _ in range(n)]
    return [request_context(rng) for _ in range(n)], actions


def assert_rows_alone_equal_the_batch(schema, contexts, actions):
    batch = schema.batch(contexts, actions)
    k = batch.eligible.shape[1]
    assert k == max(map(len, actions))
    for i, (context, members) in enumerate(zip(contexts, actions, strict=True)):
        one, m = schema.batch([context], [members]), len(members)
        assert one.full
        assert one.context.tobytes() == batch.context[i].tobytes(), f"row {i}"
        assert one.action_features.tobytes() == batch.action_features[i, :m].tobytes(), f"row {i}"
        assert batch.eligible[i].tolist() == [True] * m + [False] * (k - m)
        assert not batch.action_features[i, m:].any(), "padding is 0"
    return batch


def test_one_request_equals_its_row_of_a_batch_to_the_bit():
    batch = assert_rows_alone_equal_the_batch(SCHEMA, *requests(N))
    assert len(batch) == N
    assert not batch.full
    assert np.isfinite(batch.context).all()
    assert np.isfinite(batch.action_features).all()


def test_the_same_holds_where_every_feature_is_a_plain_number():
    rng = np.random.default_rng(3)
    sizes = (-200, 49)
    number = [lambda: float(rng.normal() * 10.0 ** rng.integers(*sizes)), lambda: int(rng.integers(-(2**62), 2**62)), lambda: -0.0]

    def fields(*names):
        return permuted({name: number[rng.integers(3)]() for name in names}, rng)

    contexts = [fields("x", "y") for _ in range(2000)]
    actions = [[fields("p", "q") for _ in range(rng.integers(1, 6))] for _ in range(2000)]
    batch = assert_rows_alone_equal_the_batch(PLAIN, contexts, actions)
    assert batch.context.tolist() == [[float(c["x"]), float(c["y"])] for c in contexts]
    assert batch.action_features[5, 0].tolist() == [float(actions[5][0]["p"]), float(actions[5][0]["q"])]


def test_the_order_of_keys_changes_nothing():
    contexts, actions = requests(300)
    rng = np.random.default_rng(1)
    again = SCHEMA.batch([permuted(c, rng) for c in contexts], [[permuted(a, rng) for a in members] for members in actions])
    batch = SCHEMA.batch(contexts, actions)
    assert again.context.tobytes() == batch.context.tobytes()
    assert again.action_features.tobytes() == batch.action_features.tobytes()


def test_columns_are_named_one_by_one():
    batch = SCHEMA.batch(*requests(5))
    assert batch.context.shape == (5, len(SCHEMA.context_columns))
    assert batch.action_features.shape[2] == len(SCHEMA.action_columns)
    # 1 + 2 + 1 + 2 + 5 + 2 + 16 columns, and 2 x 5 of the interaction; 1 + 2 + 4 + 1 + 4, and 5 x 4 + 1 x 2 + 1 x 1
    assert (len(SCHEMA.context_columns), len(SCHEMA.action_columns)) == (39, 35)
    for columns in (SCHEMA.context_columns, SCHEMA.action_columns):
        assert len(set(columns)) == len(columns)
    assert SCHEMA.context_columns[:11] == [
        *("age", "amount", "amount is missing", "vip", "returning", "returning is missing"),
        *("card = visa", "card = mc", "card = amex", "card is missing", "card is unknown"),
    ]
    assert SCHEMA.context_columns[-10:-5] == [f"amount x {column}" for column in SCHEMA.context_columns[6:11]]
    assert SCHEMA.action_columns[-3:] == ["price x fee", "price x fee is missing", "vip x price"]


def context_of(feature, value) -> list[float]:
    fields = {} if value == "absent" else {feature.name: value}
    return FeatureSchema(context=(feature,)).batch([fields], 1).context[0].tolist()


LEVELS = ("red", "green")


@pytest.mark.parametrize(
    ("feature", "value", "columns"),
    [
        (Number("x"), 2.5, [2.5]),
        (Number("x"), 3, [3.0]),
        (Number("x", centre=1.0, scale=4.0), 2, [0.25]),
        (Number("x", missing=9.0, centre=1.0, scale=4.0), 2.0, [0.25, 0.0]),
        (Number("x", missing=9.0, centre=1.0, scale=4.0), None, [2.0, 1.0]),
        (Number("x", missing=9.0, centre=1.0, scale=4.0), "absent", [2.0, 1.0]),
        (Number("x", missing=0.0), None, [0.0, 1.0]),
        (Boolean("x"), True, [1.0]),
        (Boolean("x"), False, [0.0]),
        (Boolean("x", missing=True), False, [0.0, 0.0]),
        (Boolean("x", missing=True), None, [1.0, 1.0]),
        (Boolean("x", missing=False), "absent", [0.0, 1.0]),
        (Category("x", LEVELS), "green", [0.0, 1.0]),
        (Category("x", LEVELS, unknown="level"), "blue", [0.0, 0.0, 1.0]),
        (Category("x", LEVELS, missing="level"), None, [0.0, 0.0, 1.0]),
        (Category("x", LEVELS, missing="level", unknown="level"), "absent", [0.0, 0.0, 1.0, 0.0]),
        (Category("x", LEVELS, missing="level", unknown="level"), "blue", [0.0, 0.0, 0.0, 1.0]),
        (Category("x", LEVELS, missing="level", unknown="level"), "red", [1.0, 0.0, 0.0, 0.0]),
        (Hashed("x", 3), None, [0.0, 0.0, 0.0]),
        (Hashed("x", 1), "anything", [1.0]),
    ],
)
def test_encodings_by_hand(feature, value, columns):
    assert context_of(feature, value) == columns
    assert len(feature.columns()) == len(columns)


@pytest.mark.parametrize(("name", "text", "bucket"), [("issuer", "bank 7", 17), ("bin", "", 943), ("bin", "é", 567)])
def test_hashing_is_blake2b_of_the_prefixed_name_and_text(name, text, bucket):
    found = context_of(Hashed(name, 1000), text)
    message = len(name.encode()).to_bytes(4, "big") + name.encode() + text.encode()
    assert found.index(1.0) == int(hashlib.blake2b(message, digest_size=8).hexdigest(), 16) % 1000 == bucket
    assert sum(found) == 1.0


def test_interactions_multiply_columns_and_may_cross_from_context_to_action():
    schema = FeatureSchema(
        context=(Number("x"), Category("c", LEVELS)),
        action=(Number("p"), Category("r", ("a", "b"))),
        interactions=(("x", "c"), ("c", "r"), ("p", "x"), ("p", "p")),
    )
    batch = schema.batch([{"x": 3.0, "c": "green"}], [[{"p": 5.0, "r": "a"}, {"p": -2, "r": "b"}]])
    assert batch.context.tolist() == [[3.0, 0.0, 1.0, 0.0, 3.0]]
    # p, r = a, r = b, then red x a, red x b, green x a, green x b, p x x, p x p
    assert batch.action_features.tolist() == [[[5, 1, 0, 0, 0, 1, 0, 15, 25], [-2, 0, 1, 0, 0, 0, 1, -6, 4]]]
    assert schema.action_columns[3:] == [
        *("c = red x r = a", "c = red x r = b", "c = green x r = a", "c = green x r = b"),
        *("p x x", "p x p"),
    ]


MIXED = {"age": 1, "vip": True, "channel": "web"}
ACTION = {"price": 1.0, "route": "a", "secure": True, "acquirer": "x"}
REFUSED = [
    ({"age": math.nan}, "'age'", "nan", "finite number"),
    ({"age": math.inf}, "'age'", "inf", "finite number"),
    ({"age": -math.inf}, "'age'", "-inf", "finite number"),
    ({"age": True}, "'age'", "True", "finite number"),
    ({"age": "12"}, "'age'", "'12'", "finite number"),
    ({"age": None}, "'age'", "nothing", "may not be missing"),
    ({"amount": math.nan}, "'amount'", "nan", "finite number"),
    ({"amount": False}, "'amount'", "False", "finite number"),
    ({"amount": "3"}, "'amount'", "'3'", "finite number"),
    ({"vip": 1}, "'vip'", "1", "true or false"),
    ({"vip": "true"}, "'vip'", "'true'", "true or false"),
    ({"vip": None}, "'vip'", "nothing", "true or false"),
    ({"returning": 0.0}, "'returning'", "0.0", "true or false"),
    ({"channel": "post"}, "'channel'", "'post'", "one of web, app"),
    ({"channel": None}, "'channel'", "nothing", "one of web, app"),
    ({"channel": 1}, "'channel'", "1", "one of web, app"),
    ({"channel": ["web"]}, "'channel'", "['web']", "one of web, app"),
    ({"card": 4}, "'card'", "4", "one of visa, mc, amex"),
    ({"issuer": 12}, "'issuer'", "12", "a text"),
    ({"ammount": 3.0}, "'ammount'", "not in the schema", "amount"),
]


@pytest.mark.parametrize(("changes", "feature", "found", "expected"), REFUSED)
def test_a_bad_context_names_row_feature_found_and_expected(changes, feature, found, expected):
    contexts = [MIXED, MIXED, MIXED | changes, MIXED]
    what = found if found == "not in the schema" else f"found {found}"
    message = rf"^row 2, context feature {feature}: {re.escape(what)}; expected .*{expected}"
    with pytest.raises(InputError, match=message):
        SCHEMA.batch(contexts, [[ACTION]] * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price": math.nan}, "'price': found nan; expected a finite number"),
        ({"fee": "x"}, "'fee': found 'x'; expected a finite number"),
        ({"route": None}, "'route': found nothing; expected one of a, b, c"),
        ({"fea": 1.0}, "'fea': not in the schema; expected .*'fee'"),
    ],
)
def test_a_bad_action_names_row_feature_found_and_expected(changes, message):
    with pytest.raises(InputError, match=f"^row 1, action feature {message}"):
        SCHEMA.batch([MIXED] * 2, [[ACTION], [ACTION, ACTION | changes]])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"x": math.nan, "y": 1}, "'x': found nan; expected a finite number"),
        ({"x": 1, "y": -math.inf}, "'y': found -inf; expected a finite number"),
        ({"x": True, "y": 1}, "'x': found True; expected a finite number"),
        ({"x": "1", "y": 1}, "'x': found '1'; expected a finite number"),
        ({"x": None, "y": 1}, "'x': found nothing; expected a finite number, which may not be missing"),
        ({"x": 1}, "'y': found nothing; expected a finite number, which may not be missing"),
        ({"x": 1, "y": 2, "z": 3}, r"'z': not in the schema; expected \['x', 'y'\]"),
    ],
)
def test_plain_numbers_are_checked_as_any(bad, message):
    action = {"p": 1, "q": 2}
    with pytest.raises(InputError, match=f"^row 3, context feature {message}"):
        PLAIN.batch([{"x": 1, "y": 2}] * 3 + [bad], [[action]] * 4)
    bad_action = {{"x": "p", "y": "q"}.get(name, name): value for name, value in bad.items()}
    renamed = message.replace("x'", "p'").replace("y'", "q'")
    with pytest.raises(InputError, match=f"^row 1, action feature {renamed}"):
        PLAIN.batch([{"x": 1, "y": 2}] * 2, [[action], [action, bad_action]])
    with pytest.raises(InputError, match=f"action feature {renamed}"):
        PLAIN.batch([{"x": 1, "y": 2}], [[action, bad_action]])


def test_counts_must_agree():
    with pytest.raises(InputError, match=r"^row 1: found no eligible action; expected at least one"):
        SCHEMA.batch([MIXED] * 3, [[ACTION], [], [ACTION]])
    with pytest.raises(InputError, match=r"^actions: found 1 sets for 2 contexts"):
        SCHEMA.batch([MIXED] * 2, [[ACTION]])
    with pytest.raises(InputError, match=r"^actions: found no features; expected \['price', "):
        SCHEMA.batch([MIXED], 3)


@pytest.mark.parametrize("k", [1, 10_000])
def test_one_action_and_ten_thousand_are_valid(k):
    batch = PLAIN.batch([{"x": 1, "y": 2}], [[{"p": j, "q": -j} for j in range(k)]])
    assert batch.action_features.shape == (1, k, 2)
    assert batch.full
    assert batch.action_features[0, -1].tolist() == [k - 1, 1 - k]
    counted = FeatureSchema(context=(Number("x"),)).batch([{"x": 1}] * 2, k)
    assert counted.eligible.shape == (2, k)
    assert counted.eligible.all()
    assert counted.action_features.shape == (2, k, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureSchema(context=(Number("x"),), action=(Boolean("x"),)), "found a name twice"),
        (lambda: FeatureSchema(context=(Number("x"),), interactions=(("x", "y"),)), "interactions: found 'y'"),
        (lambda: FeatureSchema(context=(Number("x", scale=0.0),)), "x: found scale 0"),
        (lambda: FeatureSchema(context=(Number("x", scale=-1.0),)), "x: found scale -1"),
        (lambda: FeatureSchema(context=(Category("x", ()),)), r"x: found levels \[\]"),
        (lambda: FeatureSchema(context=(Category("x", ("a", "a")),)), r"x: found levels \['a', 'a'\]"),
    ],
)
def test_schemas_that_contradict_themselves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schema_survives_json():
    text = msgspec.json.encode(SCHEMA)
    again = msgspec.json.decode(text, type=FeatureSchema)
    assert again == SCHEMA
    assert msgspec.json.encode(again) == text
    contexts, actions = requests(20)
    assert again.batch(contexts, actions).context.tobytes() == SCHEMA.batch(contexts, actions).context.tobytes()
