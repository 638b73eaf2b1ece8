"""From a request to a decision: exact propensities, in order, replayable, and told of exactly as they were drawn from."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import chi2

from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.events import Decision, request_hash
from bandits.policy import UNIFORM, EpsilonGreedy, Floor, InverseGap, Policy, Softmax, Uniform
from bandits.sampling import TOTAL, Salt, choose
from bandits.scorers import Linear
from ope.data import InputError
from pipelines.nightly.bodies import features_of
from serving.access import Secret
from serving.decide import Decider, Served, answer, decide
from serving.problems import ProblemError
from serving.requests import asked
from tests.nightly.events import table
from tests.serving.points import AD_LOAD, PLAIN_POINT, ROUTES_POINT, SETS_POINT, linear, route_request, set_request

SALT = Salt(3, bytes(range(32)))
SECRET = Secret(bytes(32))
NOW = 1_800_000_000 * 10**9

UNIFORM_HERE = Served(AD_LOAD, Uniform(), UNIFORM)
SETS = Served(SETS_POINT, linear(SETS_POINT), "linear@1")
ROUTES = Served(ROUTES_POINT, linear(ROUTES_POINT), "linear@2")


def decided(request: dict[str, Any], served: Served = UNIFORM_HERE, tenant: str = "shop", *, at_once: bool = True) -> Decision:
    """`at_once`: read as a single request is, where its decision point allows; else as one of a batch is."""
    raw = json.dumps(request).encode()
    return decide(asked(raw, served.plain if at_once else None), tenant, served, Decider(SALT, SECRET.unit, lambda: NOW))


def shares(decision: Decision) -> list[int]:
    return list(struct.unpack(f"<{len(decision.actions)}I", decision.shares))


def requests(seed: int = 0) -> list[tuple[dict[str, Any], Served]]:
    """Of every kind of decision point, with and without masks, sets of 1 to 50."""
    rng = np.random.default_rng(seed)
    found: list[tuple[dict[str, Any], Served]] = [(set_request(rng, int(size)), SETS) for size in (1, 2, 7, 20, 50)]
    found += [(route_request(*names), ROUTES) for names in ("abcd", "dcba", "ca", "b")]
    contexts: list[dict[str, Any]] = [{}, {"device": "phone"}, {"minutes_in_session": 3, "device": None}, {"device": "watch"}]
    return found + [({"context": context}, UNIFORM_HERE) for context in contexts]


@pytest.mark.parametrize(
    "names", [{}, {"unit": "u1"}, {"unit": "u1", "session": "s", "parent": "p"}, {"unit": None, "session": None}]
)
def test_the_hash_is_that_of_the_whole_request_in_canonical_json(names: dict[str, Any]) -> None:
    for request, served in requests():
        made = decided(request | names | {"decision_id": "d1"}, served)
        expected = request_hash(
            served.point.name, names.get("unit"), names.get("session"), names.get("parent"),  # type: ignore[arg-type]
            request["context"], request.get("actions"),
        )  # fmt: skip
        assert made.request_hash == expected
        assert decided(request | names | {"decision_id": "d2"}, served).request_hash == expected  # of what was asked, not its id


def test_what_differs_in_a_request_differs_in_its_hash() -> None:
    base = route_request("a", "b", unit="u", session="s", parent="p")
    changed = [base | {key: "other"} for key in ("unit", "session", "parent")]
    changed += [route_request("b", "a", unit="u", session="s", parent="p"), base | {"context": {"amount": 1}}]
    changed += [base | {"context": {"amount": 1.0}}]  # 1 and 1.0 are different JSON
    changed += [base | {"actions": [{**one, "eligible": True} for one in base["actions"]]}]
    assert len({decided(one, ROUTES).request_hash for one in [base, *changed]}) == len(changed) + 1
    shuffled = dict(reversed(list(base.items())))
    assert decided(shuffled, ROUTES).request_hash == decided(base, ROUTES).request_hash  # order of keys says nothing


def test_a_request_is_the_same_decision_however_it_is_read() -> None:
    """A retry of a single request within a batch finds its first answer: same hash, body and shares, numbers whole or not."""
    assert SETS.plain is not None
    found = [*requests(6), (set_request(np.random.default_rng(1), 3) | {"context": {f"x{i}": i for i in range(10)}}, SETS)]
    masked = set_request(np.random.default_rng(2), 4)
    masked["actions"][2] |= {"eligible": False, "reason": "sold"}
    for request, served in [*found, (masked, SETS), (set_request(np.random.default_rng(3), 2, session=None, parent="p"), SETS)]:
        one, other = (decided(request | {"decision_id": "d", "unit": "u"}, served, at_once=at_once) for at_once in (True, False))
        assert msgspec.json.encode(one) == msgspec.json.encode(other)


def test_what_one_way_of_reading_refuses_so_does_the_other() -> None:
    plain = Served(PLAIN_POINT, Uniform(), UNIFORM)
    assert plain.plain is not None
    for actions in ([], [{"id": "a", "eligible": False, "reason": "r" * 129}, {"id": "b"}]):
        for at_once in (True, False):
            with pytest.raises((InputError, ProblemError)):
                decided({"context": {"amount": 1.0}, "actions": actions}, plain, at_once=at_once)


def test_propensities_are_exact_shares_of_the_policys_distribution() -> None:
    for request, served in requests(1):
        made = decided(request, served)
        told = answer(made, "token")
        assert sum(shares(made)) == TOTAL
        assert list(told.propensities.values()) == [share / TOTAL for share in shares(made)]
        assert sum(told.propensities.values()) == 1.0  # multiples of 2^-31 add without rounding
        assert told.propensity == told.propensities[told.action] == shares(made)[made.chosen] / TOTAL
        assert (told.kind, told.policy, told.decision_id) == ("sampled", served.reference, made.decision_id)


def test_shares_are_those_of_the_policy_on_the_requests_own_arrays() -> None:
    rng = np.random.default_rng(2)
    request = set_request(rng)
    batch = SETS_POINT.features.batch([request["context"]], [[one["features"] for one in request["actions"]]])
    expected = SETS.policy.propensities(batch)[0]
    assert np.abs(np.array(shares(decided(request, SETS))) / TOTAL - expected).max() <= 20 / TOTAL  # the largest takes what is left


def test_every_decision_replays_from_its_salt_and_id() -> None:
    for request, served in requests(2):
        for number in range(20):
            made = decided(request | {"decision_id": f"d{number}"}, served)
            assert made.chosen == choose(shares(made), SALT.uniform("shop", made.decision_id))
            assert (made.seed_epoch, made.decided_at_ns) == (SALT.epoch, NOW)


def test_it_is_a_pure_function_of_request_policy_salt_and_clock() -> None:
    for request, served in requests(3):
        first, second = (decided(request | {"decision_id": "same", "unit": "u"}, served) for _ in range(2))
        assert msgspec.json.encode(first) == msgspec.json.encode(second)
        assert answer(first, "t") == answer(second, "t")


def test_ids_are_made_where_none_is_given_and_differ() -> None:
    ids = {decided({"context": {}} | more).decision_id for more in ({}, {"decision_id": None}) for _ in range(50)}
    assert len(ids) == 100  # 74 random bits each
    assert all(len(one) == 36 and one[14] == "7" for one in ids)


def test_a_policy_without_a_floor_gets_the_decision_points() -> None:
    sharp = Served(ROUTES_POINT, Softmax(Linear(np.array([50.0, 0.0, 0.0, 0.0]), np.empty((0, 0)), np.zeros(3))), "sharp@1")
    for names in ("abcd", "ab", "bd"):
        least = min(shares(decided(route_request(*names), sharp)))
        assert least >= int(ROUTES_POINT.exploration_floor / len(names) * TOTAL)  # of those that are eligible
    greater = Floor(Uniform(), 0.5)
    assert Served(ROUTES_POINT, greater, "x@1").policy is greater


def test_what_is_not_offered_or_not_eligible_is_excluded_with_its_reason() -> None:
    request = route_request("d", "b", "a")
    request["actions"][0] |= {"eligible": False, "reason": "out of stock"}
    request["actions"][1] |= {"eligible": True, "reason": "said of no use"}
    made = decided(request, ROUTES)
    assert made.actions == ("a", "b")
    assert dict(made.excluded) == {"d": "out of stock", "c": "not offered"}
    assert set(answer(made, "t").propensities) == {"a", "b"}
    request["actions"][0].pop("reason")
    assert dict(decided(request, ROUTES).excluded)["d"] == "not eligible"


def test_actions_stand_in_the_catalogues_order_and_in_a_requests_own() -> None:
    assert decided(route_request("d", "a", "c"), ROUTES).actions == ("a", "c", "d")
    assert decided({"context": {}}).actions == AD_LOAD.actions.catalogue
    made = decided({"context": {}, "actions": [{"id": "ads-3"}, {"id": "ads-1"}]})
    assert (made.actions, sum(shares(made))) == (("ads-1", "ads-3"), TOTAL)
    request = set_request(np.random.default_rng(0), 3)
    request["actions"].reverse()
    assert decided(request, SETS).actions == ("item-2", "item-1", "item-0")


def test_a_masked_catalogue_is_the_policy_on_what_is_eligible() -> None:
    request = route_request("a", "c", "d")
    made = decided(request, ROUTES)
    features = ROUTES_POINT.features.batch([request["context"]], [[one["features"] for one in request["actions"]]])
    wide = np.zeros((1, 4, 3))
    wide[0, [0, 2, 3]] = features.action_features[0]
    mask = np.array([[True, False, True, True]])
    expected = ROUTES.policy.propensities(DecisionBatch.of(features.context, mask, wide))[0, [0, 2, 3]]
    assert np.abs(np.array(shares(made)) / TOTAL - expected).max() <= 4 / TOTAL


def _changed(request: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return request | changes


ERRORS: list[tuple[str, dict[str, Any], Served, str]] = [
    ("nothing offered", {"context": {f"x{i}": 0.0 for i in range(10)}}, SETS, "actions: found none; expected at least one"),
    ("no features", {"context": {"amount": 1.0}}, ROUTES, "expected each with its features"),
    (
        "nothing eligible", {"context": {}, "actions": [{"id": "ads-1", "eligible": False}]}, UNIFORM_HERE,
        "found none of 1 eligible",
    ),
    ("unknown action", {"context": {}, "actions": [{"id": "ads-9"}]}, UNIFORM_HERE, "found 'ads-9'; expected actions of the"),
    ("repeated action", {"context": {}, "actions": [{"id": "ads-1"}] * 2}, UNIFORM_HERE, "found an id twice"),
    ("unknown feature", {"context": {"minute": 1}}, UNIFORM_HERE, "context feature 'minute': not in the schema"),
    ("missing feature", _changed(route_request("a"), context={}), ROUTES, "feature 'amount': found nothing"),
    ("wrong feature", _changed(route_request("a"), context={"amount": "1"}), ROUTES, "feature 'amount': found '1'"),
    ("missing action feature", {"context": {"amount": 1.0}, "actions": [{"id": "a"}]}, ROUTES, "feature 'price': found nothing"),
    ("features undeclared", {"context": {}, "actions": [{"id": "ads-1", "features": {"x": 1}}]}, UNIFORM_HERE, "found features"),
    ("too many actions", set_request(np.random.default_rng(0), 51), SETS, "found 51; expected at most 50"),
    ("unprintable id", {"context": {}, "decision_id": "a\nb"}, UNIFORM_HERE, "decision_id: found 'a\\nb'"),
    ("unprintable unit", {"context": {}, "unit": "\x1b[2J"}, UNIFORM_HERE, "unit: found"),
    ("unprintable action", {"context": {"amount": 1.0}, "actions": [{"id": "a\n"}]}, ROUTES, "expected actions of the catalogue"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "served", "said"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_what_cannot_be_decided_on_is_said(request_: dict[str, Any], served: Served, said: str) -> None:
    with pytest.raises(InputError) as raised:
        decided(request_, served)
    assert said in str(raised.value)


@pytest.mark.parametrize("served", [SETS, ROUTES, UNIFORM_HERE], ids=["sets", "catalogue", "plain"])
def test_the_night_reads_the_same_columns_back(served: Served) -> None:
    point = served.point
    made = [
        (request, decided(request | {"decision_id": f"d{i}"}, served))
        for i, (request, at) in enumerate(requests(4))
        if at is served
    ]
    records = [{name: getattr(one, name) for name in Decision.__struct_fields__} for _, one in made]
    for record in records:
        record |= {"body": bytes(record["body"]), "excluded": list(record["excluded"])}
    columns, wrong = features_of(table("decisions", records), point, ())
    assert wrong == {}
    for row, (request, one) in enumerate(made):
        of_action = {action["id"]: action.get("features", {}) for action in request.get("actions", ())}
        features = [[of_action[action] for action in one.actions]] if point.features.action else len(one.actions)
        batch = point.features.batch([request["context"]], features)
        assert [columns[f"x.{name}"][row].as_py() for name in point.features.context_columns] == batch.context[0].tolist()
        places = [served.places.get(action, at) for at, action in enumerate(one.actions)]
        for at, place in enumerate(places):
            found = [columns[f"f.{place}.{name}"][row].as_py() for name in point.features.action_columns]
            assert found == batch.action_features[0, at].tolist()
        one.check_body()


def test_of_a_unit_only_a_keyed_hash_is_kept() -> None:
    unit = "maria.rossi@example.org"
    made = decided({"context": {}, "unit": unit, "decision_id": "d"})
    record = msgspec.json.encode(made)
    assert unit.encode() not in record
    assert made.unit == SECRET.unit("shop", unit) != Secret(bytes([1] * 32)).unit("shop", unit)
    assert made.unit != decided({"context": {}, "unit": unit}, tenant="bank").unit  # the same person elsewhere is another one
    assert decided({"context": {}, "decision_id": "alone"}).unit == "alone"


def _policies(point: DecisionPoint) -> list[Policy]:
    scorers = [
        Linear(np.random.default_rng(seed).normal(size=1), np.empty((0, 0)), np.random.default_rng(seed).normal(size=4))
        for seed in range(5)
    ]
    return [
        Softmax(scorers[0]), Softmax(scorers[1], 0.3), EpsilonGreedy(scorers[2], 0.2), InverseGap(scorers[3], 10.0),
        Floor(Softmax(scorers[4], 2.0), 0.5),
    ]  # fmt: skip


def test_draws_are_those_of_the_stated_propensities() -> None:
    """T18, small: 20,000 draws of 5 policies; the sampler's frequencies and a uniform policy's weights are as the shares say."""
    draws, request = 4000, set_request(np.random.default_rng(5), 6)
    g = freedom = 0.0
    weights = []
    for number, policy in enumerate(_policies(SETS_POINT)):
        served = Served(SETS_POINT, policy, f"p{number}@1")
        made = decided(request, served)
        at = [choose(shares(made), SALT.uniform("shop", f"p{number}-{i}")) for i in range(draws)]
        assert [decided(request | {"decision_id": f"p{number}-{i}"}, served).chosen for i in range(200)] == at[:200]
        p = np.array(shares(made)) / TOTAL
        count = np.bincount(at, minlength=len(p))
        some = count > 0
        g += 2 * float((count[some] * np.log(count[some] / (draws * p[some]))).sum())
        freedom += len(p) - 1
        weights.append(1 / len(p) / p[at])
    p_value = float(chi2.sf(g, freedom))
    weight = np.concatenate(weights)
    error = (weight.mean() - 1) / (weight.std() / np.sqrt(len(weight)))
    told = f"G {g:.1f} on {freedom:.0f}, p {p_value:.3f}; mean weight {weight.mean():.4f}, {error:+.2f} SE of 1"
    print(f"T18 salt {SALT.key.hex()[:8]}: {told}")  # noqa: T201
    assert p_value > 1e-4
    assert abs(error) < 4
