"""A million decisions replay: actions from shares and ids, shares from contexts and the policy's bytes, 100.000 % of both."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from bandits.batch import DecisionBatch
from bandits.events import Decision, canonical, digest, request_hash
from bandits.features import Boolean, Category, FeatureSchema, Hashed, Number
from bandits.forms import from_bytes, from_form, to_bytes, to_form
from bandits.policy import UCB, Bagging, Cap, FastCB, Floor, GuardRail, InverseGap, Mixture, Softmax, Thompson
from bandits.posteriors import BayesianLinear
from bandits.sampling import TOTAL, Salt, choose, choose_rows, quantise, quantise_rows
from bandits.scorers import Linear
from ope.data import InputError

N, K, D, P = 1_000_000, 5, 4, 3
SALT = Salt(4, b"a secret of thirty-two bytes ...")


def scorer(seed: int, link: str = "identity") -> Linear:
    rng = np.random.default_rng(seed)
    return Linear(rng.normal(size=K) / 4, rng.normal(size=(D, K)) / 4, rng.normal(size=P) / 4, link)


def belief() -> BayesianLinear:
    rng = np.random.default_rng(9)
    features = rng.normal(size=(50, P))
    return BayesianLinear.prior(P).update(features, features @ [0.3, -0.2, 0.1] + rng.normal(size=50))


SERVED = Floor(
    Mixture((InverseGap(scorer(1), 30.0), Softmax(scorer(2), 0.2), Bagging((scorer(3), scorer(4)))), (0.6, 0.3, 0.1)), 0.05
)
OTHERS = {
    "softmax": Softmax(scorer(5), 0.1),
    "fast_cb": FastCB(scorer(6, "logistic"), 20.0),
    "thompson": Floor(Thompson(belief(), 200, seed=2), 0.02),
    "ucb": UCB(belief(), 1.0, 0.02),
    "guard rail": GuardRail(InverseGap(scorer(7), 9.0), scorer(8), 0.1),
    "cap": Cap(Softmax(scorer(9), 0.05), np.array([1.0, 0.4, 0.3, 0.5, 0.2])),
}


@dataclass(frozen=True)
class Log:
    """What is kept of n decisions."""

    batch: DecisionBatch
    ids: list[str]
    shares: np.ndarray
    chosen: np.ndarray


def request_arrays(n: int) -> DecisionBatch:
    rng = np.random.default_rng(0)
    eligible = rng.random(size=(n, K)) < 0.7
    eligible[:, 0] = True
    eligible[::50, 1:] = False  # a single action among others
    return DecisionBatch.of(rng.standard_normal((n, D)), eligible, rng.standard_normal((n, K, P)))


def draws(ids: list[str], salt: Salt = SALT) -> np.ndarray:
    return np.fromiter((salt.uniform("acme", id_) for id_ in ids), dtype=np.int64, count=len(ids))


def replayed(policy, batch: DecisionBatch, size: int, n: int) -> np.ndarray:
    """Shares of the first n rows, decided `size` at a time."""
    parts = (batch.rows(slice(start, min(start + size, n))) for start in range(0, n, size))
    return np.concatenate([quantise_rows(policy.propensities(part), part.eligible) for part in parts])


def rebuilt(policy):
    return from_form(from_bytes(*to_bytes(to_form(policy))))


@pytest.fixture(scope="module")
def log() -> Log:
    batch, ids = request_arrays(N), [f"payment-{i}" for i in range(N)]
    shares = replayed(SERVED, batch, 10_000, N)
    return Log(batch, ids, shares, choose_rows(shares, draws(ids)))


def test_l1_every_action_recomputes_from_shares_and_id(log):
    u = draws(log.ids)
    again = (u[:, None] >= np.cumsum(log.shares, axis=1)).sum(axis=1)  # the first action whose cumulative share exceeds u
    assert (again == log.chosen).sum() == N
    assert (log.shares.sum(axis=1) == TOTAL).all()
    assert log.batch.eligible[np.arange(N), log.chosen].all(), "an ineligible action was never taken"
    assert log.shares[log.batch.eligible].min() >= 0.05 / K * TOTAL - 1, "the floor of .05 is in every share"
    other = choose_rows(log.shares[:10_000], draws(log.ids[:10_000], Salt(5, b"another secret of enough bytes")))
    assert (other != log.chosen[:10_000]).mean() > 0.2, "with another salt they would not recompute"


def test_l1_holds_for_single_decisions_read_back_from_their_records(log):
    for i in range(0, N, N // 2000):
        record = msgspec.json.decode(msgspec.json.encode(decision(log, i)), type=Decision)
        shares, u = record.share_vector().tolist(), SALT.uniform(record.tenant, record.decision_id)
        assert record.chosen == choose(shares, u)
        assert record.actions[record.chosen] == f"a{log.chosen[i]}"
        assert record.propensity == log.shares[i, log.chosen[i]] / TOTAL


def decision(log: Log, i: int) -> Decision:
    mask = log.batch.eligible[i]
    eligible, shares = np.flatnonzero(mask), log.shares[i][mask]
    chosen = int(np.searchsorted(eligible, log.chosen[i]))
    context = log.batch.context[i].tolist()
    body = canonical({"context": context, "actions": log.batch.action_features[i][mask].tolist()})
    return Decision(
        tenant="acme",
        decision_point="route",
        decision_id=log.ids[i],
        decided_at_ns=i,
        unit=f"card-{i % 97}",
        policy="served@1",
        seed_epoch=SALT.epoch,
        actions=tuple(f"a{j}" for j in eligible),
        excluded=tuple((f"a{j}", "mask") for j in np.flatnonzero(~mask)),
        shares=shares.astype("<u4").tobytes(),
        propensity=int(shares[chosen]) / TOTAL,
        chosen=chosen,
        body=msgspec.Raw(body),
        body_hash=digest(body),
        request_hash=request_hash("route", f"card-{i % 97}", None, None, context, []),
    )


@pytest.mark.parametrize(("size", "n"), [(7, 70_000), (1000, N), (100_000, N)])
def test_l2_every_share_recomputes_from_contexts_and_the_policys_bytes(log, size, n):
    shares = replayed(rebuilt(SERVED), log.batch, size, n)
    assert (shares == log.shares[:n]).all(axis=1).sum() == n


def test_l2_holds_for_single_requests(log):
    policy = rebuilt(SERVED)
    for i in range(0, N, N // 2000):
        vector = policy.propensities(log.batch.rows(slice(i, i + 1)))[0]
        mask = log.batch.eligible[i]
        assert quantise(vector[mask].tolist()) == log.shares[i][mask].tolist(), f"row {i}"


def test_l2_holds_from_the_bodies_of_records():
    """Decided in batches of 500 with padding; replayed one by one from what the records hold: body, actions, shares, policy."""
    schema = FeatureSchema(
        context=(Number("amount", missing=10.0), Category("card", ("visa", "amex"), unknown="level")),
        action=(Number("fee"), Boolean("local", missing=False), Hashed("route", 8)),
        interactions=(("amount", "fee"), ("card", "local")),
    )
    rng, width = np.random.default_rng(3), len(schema.action_columns)
    policy = Floor(InverseGap(Linear(np.zeros(1), np.empty((0, 0)), rng.normal(size=width) / 4), 30.0), 0.05)
    n, replay = 20_000, rebuilt(policy)
    contexts = [
        {"card": ("visa", "amex", "jcb")[i % 3]} | ({} if i % 5 == 0 else {"amount": float(rng.lognormal())}) for i in range(n)
    ]
    offers = [
        [{"fee": float(rng.normal()), "local": bool(rng.random() < 0.5), "route": f"r{rng.integers(40)}"} for _ in range(1 + i % 7)]
        for i in range(n)
    ]
    records = []
    for start in range(0, n, 500):
        part = slice(start, start + 500)
        batch = schema.batch(contexts[part], offers[part])
        shares = quantise_rows(policy.propensities(batch), batch.eligible)
        for row, (context, offer) in enumerate(zip(contexts[part], offers[part], strict=True)):
            mine, id_ = shares[row, : len(offer)], f"payment-{start + row}"
            chosen = choose(mine.tolist(), SALT.uniform("acme", id_))
            body = canonical({"context": context, "actions": offer})
            records.append(
                Decision(
                    tenant="acme",
                    decision_point="route",
                    decision_id=id_,
                    decided_at_ns=start + row,
                    unit="card-1",
                    policy="served@2",
                    seed_epoch=SALT.epoch,
                    actions=tuple(f"a{j}" for j in range(len(offer))),
                    shares=mine.astype("<u4").tobytes(),
                    propensity=int(mine[chosen]) / TOTAL,
                    chosen=chosen,
                    body=msgspec.Raw(body),
                    body_hash=digest(body),
                    request_hash=request_hash("route", "card-1", None, None, context, offer),
                )
            )
    for line in map(msgspec.json.encode, records):
        record = msgspec.json.decode(line, type=Decision)
        record.check_body()
        body = msgspec.json.decode(record.body)
        batch = schema.batch([body["context"]], [body["actions"]])
        shares = quantise(replay.propensities(batch)[0].tolist())
        assert shares == record.share_vector().tolist()
        assert record.chosen == choose(shares, SALT.uniform(record.tenant, record.decision_id))


def test_a_body_that_was_changed_is_noticed(log):
    record = decision(log, 5)
    record.check_body()
    changed = msgspec.structs.replace(record, body=msgspec.Raw(bytes(record.body).replace(b"context", b"contexT")))
    with pytest.raises(InputError, match="found a body that differs from its hash"):
        changed.check_body()


def test_l2_would_see_another_policy(log):
    other = Floor(Mixture(SERVED.policy.policies, (0.6, 0.3 - 1e-8, 0.1 + 1e-8)), 0.05)
    different = (replayed(other, log.batch, 1000, 10_000) != log.shares[:10_000]).any(axis=1)
    assert different.mean() > 0.5, "one part in 10^8 shows in shares of 2^31"


@pytest.mark.parametrize("policy", OTHERS.values(), ids=OTHERS)
def test_propensities_agree_to_the_bit_however_requests_are_cut(policy):
    batch, again = request_arrays(2000), rebuilt(policy)
    whole = policy.propensities(batch)
    for size in (1, 7, 1000):
        parts = [again.propensities(batch.rows(slice(start, start + size))) for start in range(0, 2000, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes(), f"{size} at a time"
        assert (replayed(again, batch, size, 2000) == quantise_rows(whole, batch.eligible)).all()
