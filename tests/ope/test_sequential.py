"""Trajectory estimators: numbers by hand, their bandit limits, and a chain of tokens whose truth is a finite sum."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ope import DataError, InputError, LoggedData, Moments, evaluate
from ope.selection import select_sums, sharpe_ratio_at_k, top_k
from ope.sequential import (
    PDIS,
    PDWIS,
    SEQUENTIAL,
    WIS,
    SequentialDR,
    TrajectoryDR,
    TrajectoryIS,
    compare_trajectories,
    evaluate_trajectories,
    steps_of,
)
from ope.trajectories import Trajectories
from tests.once import once

seeds = st.integers(0, 2**32 - 1)
RUNS, N, STEPS, DISCOUNT = 1000, 400, 4, 0.9
MODEL_FREE = tuple(one for one in SEQUENTIAL if not one.needs.q)
STEPWISE = tuple(one for one in SEQUENTIAL if one != TrajectoryDR())


class Chain:
    """Tokens 0, 1, 2, each drawn given the one before; 0 ends. Tables (previous, next): row 0 is the start."""

    logging = np.array([[0.2, 0.4, 0.4], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])
    target = np.array([[0.1, 0.3, 0.6], [0.2, 0.3, 0.5], [0.4, 0.2, 0.4]])
    reward = np.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.6], [0.4, 0.8, 1.2]])

    @classmethod
    def value(cls, policy: np.ndarray) -> float:
        """Σ over all token sequences of probability times discounted return."""
        total = 0.0
        for tokens in product(range(3), repeat=STEPS):
            chance, earned, before = 1.0, 0.0, 0
            for t, token in enumerate(tokens):
                chance *= policy[before, token]
                earned += DISCOUNT**t * cls.reward[before, token]
                before = token
                if token == 0:
                    chance *= 3.0 ** -(STEPS - 1 - t)  # each sequence of this beginning comes that many times
                    break
            total += chance * earned
        return total

    @classmethod
    def models(cls, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """q (STEPS, previous, next) and v (STEPS, previous) of a policy, backwards."""
        q, v = np.zeros((STEPS, 3, 3)), np.zeros((STEPS + 1, 3))
        for t in reversed(range(STEPS)):
            q[t] = cls.reward + DISCOUNT * np.array([0.0, 1.0, 1.0]) * v[t + 1]
            v[t] = (policy * q[t]).sum(axis=1)
        return q, v[:-1]

    @classmethod
    def sample(cls, n: int, rng: np.random.Generator, luck: np.ndarray | float = 0.0, cluster: np.ndarray | None = None):
        """n trajectories, and per step the previous and next token. `luck` (n,) is added to the first reward."""
        before, token = np.zeros((2, n, STEPS), int)
        mask = np.ones((n, STEPS), bool)
        for t in range(STEPS):
            if t:
                before[:, t], mask[:, t] = token[:, t - 1], mask[:, t - 1] & (token[:, t - 1] > 0)
            token[:, t] = (rng.random((n, 1)) > cls.logging[before[:, t]].cumsum(axis=1)[:, :-1]).sum(axis=1)
        reward = cls.reward[before, token] + 0.3 * rng.normal(size=(n, STEPS))
        reward[:, 0] += luck
        logp = np.log(cls.logging[before, token])
        return SimpleNamespace(
            data=Trajectories(logp, reward, mask, cluster, DISCOUNT), before=before, token=token,
            logp=np.log(cls.target[before, token]),
        )  # fmt: skip

    @classmethod
    def at(cls, log: SimpleNamespace, policy: np.ndarray) -> dict[str, np.ndarray]:
        """The true q and v of a policy at the steps of a log, keyed as arguments."""
        q, v = cls.models(policy)
        return {"q": q[np.arange(STEPS), log.before, log.token], "v": v[np.arange(STEPS), log.before]}


TRUTH = Chain.value(Chain.target)


def random_log(seed: int, n: int = 30, steps: int = 5, clusters: int | None = None) -> SimpleNamespace:
    """Trajectories of unequal length, a target not far away, and models that are nobody's."""
    rng = np.random.default_rng(seed)
    mask = np.arange(steps) < rng.integers(1, steps + 1, n)[:, None]
    logp, change, reward, q, v = rng.normal(0, 0.4, (5, n, steps))
    cluster = None if clusters is None else np.arange(n) % clusters
    return SimpleNamespace(
        data=Trajectories(logp - 2, reward + 1, mask, cluster, 0.8), logp=logp - 2 + change, models={"q": q, "v": v}
    )


def values(data: Trajectories, logp: np.ndarray, estimators=STEPWISE, **models: np.ndarray) -> np.ndarray:
    """(value, stderr) of each estimator."""
    return np.array([(one.value, one.stderr) for one in evaluate_trajectories(data, logp, estimators, **models).estimates])


# by hand: ratios (2, 1/2) and (1/2), rewards (1, 4) and (2), discount 1/2; returns 3 and 2, last weights 1 and 1/2


def two(**changes) -> Trajectories:
    mask = np.array([[True, True], [True, False]])
    fields = {"logp_behavior": np.zeros((2, 2)), "reward": np.array([[1.0, 4.0], [2.0, 0.0]]), "mask": mask, "discount": 0.5}
    return Trajectories(**(fields | changes))


TWO_TARGET = np.log([[2.0, 0.5], [0.5, 1.0]])
STEP_MODEL = {"q": np.array([[1.0, 2.0], [1.0, 0.0]]), "v": np.array([[1.5, 1.0], [1.0, 0.0]])}
WHOLE_MODEL = {"q": np.array([2.5, 1.5]), "v": np.array([2.0, 1.0])}


@pytest.mark.parametrize(
    ("one", "models", "expected"),
    [
        (TrajectoryIS(), {}, (1 * 3 + 0.5 * 2) / 2),
        (PDIS(), {}, ((2 * 1 + 0.5 * 1 * 4) + 0.5 * 2) / 2),
        (WIS(), {}, (1 * 3 + 0.5 * 2) / (1 + 0.5)),
        (PDWIS(), {}, (2 * 1 + 0.5 * 2) / (2 + 0.5) + 0.5 * (1 * 4 + 0.5 * 0) / (1 + 0.5)),
        (SequentialDR(), STEP_MODEL, ((1.5 + 2 * (1 - 1) + 0.5 * (2 * 1 + 1 * (4 - 2))) + (1 + 0.5 * (2 - 1))) / 2),
        (TrajectoryDR(), WHOLE_MODEL, ((2 + 1 * (3 - 2.5)) + (1 + 0.5 * (2 - 1.5))) / 2),
    ],
    ids=str,
)
def test_two_trajectories_by_hand(one, models, expected):
    assert values(two(), TWO_TARGET, [one], **models)[0, 0] == pytest.approx(expected, rel=1e-12)


def test_the_summed_form_of_dr_is_the_recursion_of_the_paper():
    log = random_log(3)
    ratio, found = np.exp(log.logp - log.data.logp_behavior), np.zeros(log.data.n)
    for t in reversed(range(log.data.mask.shape[1])):
        step = log.models["v"][:, t] + ratio[:, t] * (log.data.reward[:, t] + 0.8 * found - log.models["q"][:, t])
        found = np.where(log.data.mask[:, t], step, 0.0)
    assert SequentialDR().terms(steps_of(log.data, log.logp, **log.models))[:, 0] == pytest.approx(found, rel=1e-12)


def test_one_step_is_the_bandit():
    rng = np.random.default_rng(5)
    logging, target = rng.dirichlet(np.ones(3), (2, 60))
    q, rows = rng.random((60, 3)), np.arange(60)
    action, reward = rng.integers(0, 3, 60), rng.random(60)
    bandit = evaluate(LoggedData(action, reward, logging[rows, action]), target, q, estimators=("IPS", "SNIPS", "DR"))
    ips, snips, dr = ((one.value, one.stderr) for one in bandit.values())
    data = Trajectories(np.log(logging[rows, action])[:, None], reward, np.ones((60, 1), bool))
    logp, whole = np.log(target[rows, action])[:, None], {"q": q[rows, action], "v": (target * q).sum(axis=1)}
    stepwise = {name: model[:, None] for name, model in whole.items()}
    expected = np.array([ips, ips, snips, snips, dr])
    assert values(data, logp, **stepwise) == pytest.approx(expected, rel=1e-10), "TrajectoryIS, PDIS, WIS, PDWIS, SequentialDR"
    assert values(data, logp, [TrajectoryDR()], **whole) == pytest.approx(np.array([dr]), rel=1e-10)
    assert evaluate_trajectories(data, logp).estimates[0].ess == pytest.approx(bandit.weights.ess, rel=1e-10)


@given(seed=seeds)
def test_on_policy_all_give_the_mean_return(seed):
    log = random_log(seed)
    earned = (log.data.reward * 0.8 ** np.arange(5)).sum(axis=1)
    found = values(log.data, log.data.logp_behavior, MODEL_FREE)
    assert found == pytest.approx(np.tile([earned.mean(), earned.std(ddof=1) / np.sqrt(30)], (4, 1)), rel=1e-9)
    same = {"q": log.models["q"], "v": log.models["q"]}  # a model that ignores the action cancels, as every weight is 1
    assert values(log.data, log.data.logp_behavior, [SequentialDR()], **same)[0, 0] == pytest.approx(earned.mean(), rel=1e-9)


@given(seed=seeds)
def test_dr_without_a_model_is_pdis_or_trajectory_is(seed):
    log = random_log(seed)
    nothing, nothing_whole = (dict.fromkeys("qv", np.zeros(shape)) for shape in ((30, 5), 30))
    dr, pdis, whole = (
        values(log.data, log.logp, [SequentialDR(), PDIS()], **nothing)[0], values(log.data, log.logp, [PDIS()])[0],
        values(log.data, log.logp, [TrajectoryDR(), TrajectoryIS()], **nothing_whole),
    )  # fmt: skip
    assert dr == pytest.approx(pdis, rel=1e-12)
    assert whole[0] == pytest.approx(whole[1], rel=1e-12)


@given(seed=seeds)
def test_a_reward_at_the_end_is_that_of_the_last_step_and_makes_pdis_trajectory_is(seed):
    log = random_log(seed)
    last, earned = log.data.mask.sum(axis=1) - 1, log.data.reward[:, 0]
    at_end = replace(log.data, reward=earned)
    assert (at_end.reward[np.arange(30), last] == earned).all()
    assert (at_end.reward != 0).sum(axis=1).max() == 1
    pdis, whole = values(at_end, log.logp, [PDIS(), TrajectoryIS()])
    assert pdis == pytest.approx(whole, rel=1e-12)


@given(seed=seeds, clusters=st.sampled_from([None, 10]))
def test_what_is_masked_out_does_not_matter_nor_does_the_order(seed, clusters):
    log = random_log(seed, clusters=clusters)
    expected = values(log.data, log.logp, **log.models)
    for garbage in (np.nan, -np.inf, 1e300):
        arrays = [np.where(log.data.mask, array, garbage) for array in (log.data.logp_behavior, log.data.reward, log.logp,
                                                                        log.models["q"], log.models["v"])]  # fmt: skip
        dirty = replace(log.data, logp_behavior=arrays[0], reward=arrays[1])
        assert (values(dirty, arrays[2], q=arrays[3], v=arrays[4]) == expected).all()
    order = np.random.default_rng(seed).permutation(30)
    models = {name: model[order] for name, model in log.models.items()}
    assert values(log.data.take(order), log.logp[order], **models) == pytest.approx(expected, rel=1e-9)


@given(seed=seeds, one=st.sampled_from(SEQUENTIAL))
def test_parts_add_to_the_whole_and_gradients_are_right(seed, one):
    log = random_log(seed)
    models = log.models if one.stepwise else {name: model[:, 0] for name, model in log.models.items()}

    def moments(rows: slice) -> Moments:
        part = {name: model[rows] for name, model in models.items()}
        return Moments.of(one.terms(steps_of(log.data.take(rows), log.logp[rows], **part)))

    whole, parts = moments(slice(None)), moments(slice(11)) + moments(slice(11, None))
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12)
    assert parts.cross == pytest.approx(whole.cross, rel=1e-9, abs=1e-9)
    estimate = values(log.data, log.logp, [one], **models)[0]
    assert (one.value(parts.mean), parts.stderr(one.gradient(parts.mean))) == pytest.approx(estimate, rel=1e-8)
    nudges = 1e-6 * np.eye(len(whole.mean))
    slopes = [(one.value(whole.mean + nudge) - one.value(whole.mean - nudge)) / 2e-6 for nudge in nudges]
    assert one.gradient(whole.mean) == pytest.approx(np.array(slopes), rel=1e-5, abs=1e-6)


def test_a_step_the_target_never_takes_ends_all_weight_however_likely_the_rest():
    data = Trajectories(np.full((2, 3), -9.0), np.ones((2, 3)), np.ones((2, 3), bool))
    logp = np.array([[-9.0, -np.inf, 0.0], [-9.0, -9.0, -9.0]])
    assert steps_of(data, logp).weight.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert values(data, logp, [PDIS()])[0, 0] == (1 + 3) / 2


def test_no_overlap_is_refused_and_a_bound_is_noted():
    log = random_log(1)
    none = evaluate_trajectories(log.data, np.where(log.data.mask, -np.inf, 0.0), MODEL_FREE).estimates
    assert {estimate.verdict for estimate in none} == {"refused"}
    assert "No overlap: the target never takes an action that was logged." in none[0].reasons
    assert "too few trajectories overlap" in none[2].reasons[-1]
    far = log.logp.copy()
    far[:3] += 30.0
    assert "3 trajectories reach the bound exp(20) on weights: what lies beyond it is lost." in (
        evaluate_trajectories(log.data, far).estimates[0].notes
    )


# the chain


def test_the_chain_is_solved_backwards_as_by_enumeration():
    for policy in (Chain.logging, Chain.target):
        assert Chain.models(policy)[1][0, 0] == pytest.approx(Chain.value(policy), rel=1e-12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return once(tmp_path_factory, "sequential", every_run)


def every_run() -> np.ndarray:
    """(value, low, high) of the stepwise estimators, then TrajectoryDR: (RUNS, 6, 3)."""
    rng, found = np.random.default_rng(11), np.empty((RUNS, 6, 3))
    for run in found:
        log = Chain.sample(N, rng)
        models = Chain.at(log, Chain.target)
        whole = {"q": 0.5 + 0.8 * log.token[:, 0], "v": np.full(N, 0.5 + 0.8 * Chain.target[0] @ np.arange(3))}
        estimates = [
            *evaluate_trajectories(log.data, log.logp, STEPWISE, **models).estimates,
            *evaluate_trajectories(log.data, log.logp, [TrajectoryDR()], **whole).estimates,
        ]
        run[:] = [(one.value, one.low, one.high) for one in estimates]
    return found


def covered(low: np.ndarray, high: np.ndarray) -> float:
    return float(np.mean((low <= TRUTH) & (high >= TRUTH)))


@pytest.mark.parametrize("index", range(6), ids=[str(one) for one in (*STEPWISE, TrajectoryDR())])
def test_intervals_cover_the_truth_and_values_are_unbiased(runs, index):
    value, low, high = runs[:, index].T
    assert 0.93 <= covered(low, high) <= 0.97, "of 1,000 runs: one standard error is 0.7 %, so three of them to either side"
    z = (value.mean() - TRUTH) / (value.std(ddof=1) / np.sqrt(RUNS))
    assert abs(z) < 4, "four standard errors; the O(1/N) bias of WIS and PDWIS is far below one"


def test_what_each_estimator_is_for(runs):
    is_, pdis, wis, pdwis, dr, whole_dr = runs[:, :, 0].std(axis=0)
    assert pdis < is_, "early rewards do not carry late weights"
    assert dr < 0.6 * pdis, "the true q leaves the noise of rewards"
    assert whole_dr < is_
    assert max(wis, pdwis) < is_


def test_clustered_intervals_cover_where_responses_of_a_prompt_share_luck():
    rng, prompts, size = np.random.default_rng(12), 60, 8
    cluster = np.repeat(np.arange(prompts), size)
    found = np.empty((RUNS, 3, 3))
    for run in found:
        log = Chain.sample(prompts * size, rng, luck=np.repeat(rng.normal(size=prompts), size), cluster=cluster)
        models = Chain.at(log, Chain.target)
        clustered = evaluate_trajectories(log.data, log.logp, [PDIS(), SequentialDR()], **models).estimates
        alone = evaluate_trajectories(replace(log.data, cluster=None), log.logp, [PDIS()]).estimates
        run[:] = [(one.value, one.low, one.high) for one in (*clustered, *alone)]
    assert clustered[0].n == 480
    assert clustered[0].notes[-1] == "60 clusters."
    pdis, dr, unclustered = (covered(low, high) for _, low, high in found.transpose(1, 2, 0))
    assert 0.93 <= pdis <= 0.97, "three standard errors, as above"
    assert 0.93 <= dr <= 0.97
    assert unclustered < 0.9


# candidates


def mixed(log: SimpleNamespace, share: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probabilities and true models of a policy between logging (0) and target (1)."""
    policy = (1 - share) * Chain.logging + share * Chain.target
    return np.log(policy[log.before, log.token]), Chain.at(log, policy)


@pytest.mark.parametrize("one", [PDIS(), WIS(), SequentialDR()], ids=str)
def test_candidates_are_valued_together_and_shortlisted(one):
    log = Chain.sample(3000, np.random.default_rng(13))
    shares = {"third": 0.3, "two thirds": 0.6, "all": 1.0}
    logps, models = zip(*(mixed(log, share) for share in shares.values()), strict=True)
    targets = dict(zip(shares, logps, strict=True))
    q, v = ({label: model[name] for label, model in zip(shares, models, strict=True)} for name in "qv")

    def compare(rows: slice):
        part = [{label: arrays[rows] for label, arrays in each.items()} for each in (targets, q, v)]
        return compare_trajectories(log.data.take(rows), part[0], one, q=part[1], v=part[2])

    both = compare(slice(None))
    for i, label in enumerate(targets):
        alone = values(log.data, targets[label], [one], q=q[label], v=v[label])[0]
        assert (both.values[i], np.sqrt(both.covariance[i, i])) == pytest.approx(alone, rel=1e-9)
    earned = (log.data.reward * DISCOUNT ** np.arange(STEPS)).sum(axis=1)
    assert both.baseline == pytest.approx(earned.mean(), rel=1e-12)
    columns = [one.terms(steps_of(log.data, targets[label], q[label], v[label])) for label in ("third", "all")]
    if one != WIS():  # of plain means, the covariance is that of the columns
        assert both.covariance[0, 2] == pytest.approx(np.cov(columns[0][:, 0], columns[1][:, 0])[0, 1] / 3000, rel=1e-9)
    assert (both.distances == both.distances.T).all()
    assert both.distances[0, 1] < both.distances[0, 2] < 1

    true = [Chain.value((1 - share) * Chain.logging + share * Chain.target) for share in shares.values()]
    assert top_k(both.values, true, Chain.value(Chain.logging), 2).candidates == (2, 1)
    assert sharpe_ratio_at_k(both.values, true, Chain.value(Chain.logging), 2) > 0
    a, b = compare(slice(1500)), compare(slice(1500, None))
    chosen = select_sums(a.labels, a.fold, b.fold, a.distances, by=one, sizes=(2,))
    assert chosen.estimator == str(one)
    assert chosen.ranking[0] == "all"
    assert chosen.baseline == b.baseline
    assert chosen.shortlists[0].gain > 0.05


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": np.ones((2, 2))}, "column 'mask': found float64 of shape (2, 2); expected booleans of shape (N, T)"),
        ({"mask": np.ones(2, bool)}, "column 'mask': found bool of shape (2,)"),
        ({"mask": np.ones((0, 2), bool)}, "column 'mask': found shape (0, 2); expected at least one trajectory of one step"),
        ({"mask": np.array([[True, True], [False, True]])}, "column 'mask', row 1: found a first step that does not count"),
        ({"mask": np.array([[True, True], [False, False]])}, "column 'mask', row 1: found a first step that does not count"),
        ({"logp_behavior": np.zeros((2, 3))}, "column 'logp_behavior': found shape (2, 3); expected shape (2, 2), as `mask`"),
        ({"logp_behavior": np.array([[0, -np.inf], [0, 0]])}, "column 'logp_behavior', row 0: found -inf; expected a finite"),
        ({"logp_behavior": np.array([["a", "b"]] * 2)}, "column 'logp_behavior': found dtype <U1; expected numbers"),
        ({"reward": np.array([[0, 0], [np.nan, 0]])}, "column 'reward', row 1: found nan; expected a finite number"),
        ({"reward": np.array([0, np.nan])}, "column 'reward', row 1: found nan; expected a finite number"),
        ({"reward": np.zeros(3)}, "column 'reward': found shape (3,); expected shape (2,)"),
        ({"reward": np.zeros((2, 3))}, "column 'reward': found shape (2, 3); expected shape (2, 2)"),
        ({"discount": 1.1}, "column 'discount': found 1.1; expected a number in [0, 1]"),
        ({"discount": np.nan}, "column 'discount': found nan; expected a number in [0, 1]"),
        ({"cluster": np.arange(3)}, "column 'cluster': found shape (3,); expected shape (2,)"),
        ({"cluster": np.array(["a", None])}, "column 'cluster', row 1: found a missing value"),
    ],
)
def test_arrays_that_no_sampler_logged_are_named(changes, message):
    with pytest.raises(DataError) as error:
        two(**changes)
    assert message in str(error.value)


def test_a_gap_in_the_mask_is_named():
    mask = np.array([[True, True, False], [True, False, True]])
    with pytest.raises(DataError, match="column 'mask', row 1: found a step that counts after one that does not"):
        Trajectories(np.zeros((2, 3)), np.zeros(2), mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logp_target": np.zeros(2)}, "column 'logp_target': found shape (2,); expected shape (2, 2)"),
        ({"logp_target": np.full((2, 2), "a")}, "column 'logp_target': found dtype <U1; expected numbers"),
        ({"logp_target": np.array([[0, np.nan], [0, 0]])}, "column 'logp_target', row 0: found nan"),
        ({"logp_target": np.array([[0, 0], [np.inf, 0]])}, "column 'logp_target', row 1: found inf"),
        ({"q": np.zeros((2, 2))}, "found one of q and v; expected both"),
        ({"v": np.zeros((2, 2))}, "found one of q and v; expected both"),
        ({"q": np.zeros((2, 2)), "v": np.zeros(2)}, "column 'v': found shape (2,); expected shape (2, 2)"),
        ({"q": np.zeros(2), "v": np.zeros((2, 2))}, "column 'v': found shape (2, 2); expected shape (2,)"),
        ({"q": np.full((2, 2), np.nan), "v": np.zeros((2, 2))}, "column 'q', row 0: found nan"),
        ({"estimators": [SequentialDR()]}, "SequentialDR needs a model; expected q and v of shape (N, T), one entry per step."),
        ({"estimators": [SequentialDR()], **WHOLE_MODEL}, "SequentialDR needs a model; expected q and v of shape (N, T)"),
        ({"estimators": [TrajectoryDR()], **STEP_MODEL}, "TrajectoryDR needs a model; expected q and v of shape (N,)"),
        ({"estimators": []}, "no estimator was asked for; expected at least one, such as PDIS()"),
        ({"level": 95}, "found level=95; expected a coverage between 0 and 1"),
    ],
)
def test_requests_that_cannot_be_met_are_named(arguments, message):
    with pytest.raises(InputError) as error:
        evaluate_trajectories(two(), **({"logp_target": TWO_TARGET} | arguments))
    assert message in str(error.value)


def test_a_comparison_needs_candidates_and_a_model_for_each():
    with pytest.raises(InputError, match="found no candidate; expected at least one"):
        compare_trajectories(two(), {}, PDIS())
    with pytest.raises(InputError, match=r"SequentialDR needs a model; expected q and v of shape \(N, T\)"):
        compare_trajectories(two(), {"a": TWO_TARGET}, SequentialDR(), q={"b": STEP_MODEL["q"]}, v={"b": STEP_MODEL["v"]})


def test_defaults_follow_from_the_models_given():
    def names(**models):
        return [one.estimator for one in evaluate_trajectories(two(), TWO_TARGET, **models).estimates]

    assert names() == ["TrajectoryIS", "PDIS", "WIS"]
    assert names(**STEP_MODEL) == ["TrajectoryIS", "PDIS", "WIS", "SequentialDR"]
    assert names(**WHOLE_MODEL) == ["TrajectoryIS", "PDIS", "WIS", "TrajectoryDR"]
