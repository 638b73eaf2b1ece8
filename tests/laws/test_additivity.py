"""Parts of a log add to the whole, in any order and however they were cut."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ope.accumulate
from ope import ESTIMATORS, ClusterSums, Moments, evaluate
from ope.accumulate import Candidate, accumulate
from ope.data import assign_folds
from ope.moments import counted
from ope.stack import Stack

from .logs import Case, random_case

ALL = [str(one) for one in ESTIMATORS]
FAR = 1000.0  # standard deviations between the rewards and zero


def stack_of(case: Case, **options) -> Stack:
    return accumulate(case.data, [Candidate("target", case.target, ESTIMATORS, case.q)], baseline=case.baseline, **options).stack


def reports(case: Case, **options):
    return evaluate(case.data, case.target, case.q, baseline=case.baseline, estimators=ALL, **options)


def assert_same(got: Stack, expected: Stack) -> None:
    assert got.values() == pytest.approx(expected.values(), rel=1e-12)
    assert got.stderrs() == pytest.approx(expected.stderrs(), rel=1e-6)


def random_parts(case: Case, parts: int, rng: np.random.Generator) -> list[Case]:
    label = rng.permutation(np.concatenate((np.arange(parts), rng.integers(0, parts, case.data.n - parts))))
    return [case.take(np.flatnonzero(label == part)) for part in range(parts)]


@given(seed=st.integers(0, 10_000), parts=st.integers(2, 8), shift=st.sampled_from([0.0, FAR]))
def test_stacks_of_random_parts_add_to_the_whole_in_any_order(seed, parts, shift):
    case, rng = random_case(200, 3, seed, shift=shift), np.random.default_rng(seed)
    stacks = [stack_of(part) for part in random_parts(case, parts, rng)]
    whole = stack_of(case)
    assert_same(reduce(add, stacks), whole)
    assert_same(reduce(add, [stacks[i] for i in rng.permutation(parts)]), whole)


@given(seed=st.integers(0, 10_000), parts=st.integers(1, 8))
def test_moments_of_random_parts_add_to_the_whole_in_any_grouping(seed, parts):
    rng = np.random.default_rng(seed)
    columns = FAR + rng.normal(size=(100, 3))
    pieces = [Moments.of(piece) for piece in np.array_split(rng.permutation(columns), parts)]
    right = reduce(lambda done, piece: piece + done, pieces[::-1], Moments.zero(3))
    for got in (reduce(add, pieces), right):
        assert got.n == 100
        assert got.mean == pytest.approx(columns.mean(axis=0), rel=1e-12)
        assert got.covariance() == pytest.approx(np.cov(columns.T) / 100, rel=1e-6, abs=1e-12)


def test_one_row_has_a_mean_and_no_covariance():
    one = Moments.of(np.array([[2.0, 5.0]]))
    assert one.mean.tolist() == [2, 5]
    assert np.isnan(one.covariance()).all()


def test_parts_of_one_row_each_add_to_the_whole():
    case = random_case(60, 3, 1, shift=FAR)
    assert_same(reduce(add, [stack_of(case.take([i])) for i in range(60)]), stack_of(case))


def test_stacks_of_other_estimates_do_not_add():
    case = random_case(20, 3, 2)
    fewer = accumulate(case.data, [Candidate("target", case.target, ESTIMATORS[1:2])]).stack
    with pytest.raises(ValueError, match="stacks differ"):
        stack_of(case) + fewer


def test_distant_rewards_keep_the_digits_of_the_standard_error():
    near, far = (reports(random_case(3000, 3, 3, shift=shift)) for shift in (0.0, FAR))
    for name in ("SNIPS", "DR", "SNDR", "DM", "beta-IPS", "Delta"):
        assert far[name].stderr == pytest.approx(near[name].stderr, rel=1e-6), f"{name} does not see a constant"
        moved = 0.0 if name == "Delta" else FAR
        assert far[name].value - near[name].value == pytest.approx(moved, abs=1e-9)


# Chunks


@pytest.mark.parametrize("chunk_bytes", [1, 2**18, 2**40])
def test_chunk_boundaries_do_not_matter(monkeypatch, chunk_bytes):
    case = random_case(15_000, 20, 4, shift=FAR)  # three chunks of 6,553 rows by default
    default = stack_of(case, block_seed=3)
    monkeypatch.setattr(ope.accumulate, "CHUNK_BYTES", chunk_bytes)
    other = stack_of(case, block_seed=3)
    assert_same(other, default)
    assert other.blocks == pytest.approx(default.blocks, rel=1e-12)


def test_many_chunks_give_the_moments_of_all_rows_at_once():
    case = random_case(15_000, 20, 5)
    rows = case.rows()
    columns = counted(np.concatenate([one.terms(rows) for one in ESTIMATORS], axis=1))
    whole, got = Moments.of(columns), stack_of(case).moments
    width = columns.shape[1] - 1
    assert got.n == 15_000
    assert got.mean[:width] == pytest.approx(whole.mean[:width], rel=1e-12, abs=1e-14)
    assert got.cross[:width, :width] == pytest.approx(whole.cross[:width, :width], rel=1e-9, abs=1e-7)


def test_blocks_of_the_bootstrap_sum_to_the_log():
    case = random_case(9000, 3, 6)
    stack = stack_of(case, block_seed=1)
    assert len(stack.blocks) == 4096
    assert stack.blocks.sum(axis=0) / 9000 == pytest.approx(stack.moments.mean, rel=1e-10)
    assert stack.blocks[:, -1].sum() == 9000


# Row order, clusters and sample weights


def test_row_order_does_not_matter():
    case = random_case(3000, 4, 7, cluster=np.random.default_rng(0).integers(0, 500, 3000))
    shuffled = case.take(np.random.default_rng(1).permutation(3000))
    assert_same(stack_of(shuffled), stack_of(case))
    assert_same(stack_of(shuffled.take(slice(None, None, -1))), stack_of(shuffled))


def test_clusters_of_one_row_are_no_clusters():
    case = random_case(3000, 4, 8)
    labels = np.random.default_rng(2).permutation(3000).astype(str)
    assert_same(stack_of(replace(case, data=replace(case.data, cluster=labels))), stack_of(case))


def test_names_of_clusters_do_not_matter():
    numbers = np.random.default_rng(3).integers(0, 300, 2000)
    case = random_case(2000, 4, 9)
    named = [replace(case, data=replace(case.data, cluster=label)) for label in (numbers, 7 - 3 * numbers, numbers.astype(str))]
    for other in named[1:]:
        assert_same(stack_of(other), stack_of(named[0]))


def test_cluster_sums_add_by_key():
    rng = np.random.default_rng(4)
    columns, user = counted(rng.normal(size=(500, 2))), rng.integers(0, 60, 500)
    whole = ClusterSums.of(columns, user)
    parts = [ClusterSums.of(columns[rows], user[rows]) for rows in np.array_split(rng.permutation(500), 5)]
    for order in (parts, parts[::-1]):
        got = reduce(add, order)
        assert got.cluster.tolist() == list(range(60))
        assert got.total == pytest.approx(whole.total, rel=1e-12, abs=1e-12)
    by_hand = np.stack([columns[user == label].sum(axis=0) for label in range(60)])
    assert whole.total == pytest.approx(by_hand, rel=1e-12, abs=1e-12)
    assert whole.moments().n == 60


def ratio_stderr(numerator: np.ndarray, count: np.ndarray) -> float:
    """Standard error of Σ numerator / Σ count over independent units, by hand."""
    units, residual = len(count), numerator - numerator.sum() / count.sum() * count
    return math.sqrt(units / (units - 1) * (residual**2).sum()) / count.sum()


def test_standard_error_of_clusters_of_unequal_size_is_that_of_a_ratio():
    user = np.random.default_rng(13).geometric(0.05, 1500)
    case = random_case(1500, 3, 13, shift=4.0, cluster=user)
    rows, size = case.rows(), np.bincount(user)[np.unique(user)]
    snips = (rows.weight * rows.reward).sum() / rows.weight.sum()
    for name, psi in {
        "IPS": rows.weight * rows.reward,
        "SNIPS": snips + rows.weight / rows.weight.mean() * (rows.reward - snips),
        "DR": rows.v + rows.weight * (rows.reward - rows.q_logged),
    }.items():
        total = np.bincount(user, weights=psi)[np.unique(user)]
        assert reports(case)[name].stderr == pytest.approx(ratio_stderr(total, size), rel=1e-10), name


def test_standard_error_of_weighted_rows_is_that_of_a_ratio():
    weight = np.random.default_rng(14).uniform(0.5, 6, 700)
    case = random_case(700, 3, 14, shift=4.0, sample_weight=weight)
    report, wr = reports(case), case.rows().weight * case.data.reward
    assert report["IPS"].value == pytest.approx((weight * wr).sum() / weight.sum(), rel=1e-12)
    assert report["IPS"].stderr == pytest.approx(ratio_stderr(weight * wr, weight), rel=1e-10)
    heavy = weight * case.rows().weight
    assert report.weights.ess == pytest.approx(heavy.sum() ** 2 / (heavy**2).sum(), rel=1e-12)
    assert report.weights.weight_mean == pytest.approx(heavy.sum() / weight.sum(), rel=1e-12)
    assert report.weights.max_share == pytest.approx(heavy.max() / heavy.sum(), rel=1e-12)


def test_copies_within_a_cluster_carry_no_information():
    case = random_case(800, 3, 10)
    thrice = case.take(np.repeat(np.arange(800), 3))
    clustered = replace(thrice, data=replace(thrice.data, cluster=np.repeat(np.arange(800), 3)))
    assert_same(stack_of(clustered), stack_of(case))
    naive = stack_of(thrice).stderrs() / stack_of(case).stderrs()
    assert naive == pytest.approx(math.sqrt(799 / 2399), rel=1e-9), "counted as rows, copies would promise far too much"


@given(seed=st.integers(0, 10_000))
def test_sample_weight_is_the_number_of_copies_of_a_row(seed):
    times = np.random.default_rng(seed).integers(1, 6, 300)
    case = random_case(300, 3, seed)
    weighted = replace(case, data=replace(case.data, sample_weight=times.astype(float)))
    copies = case.take(np.repeat(np.arange(300), times))
    assert stack_of(weighted).values() == pytest.approx(stack_of(copies).values(), rel=1e-12)
    clustered = replace(copies, data=replace(copies.data, cluster=np.repeat(np.arange(300), times)))
    assert_same(stack_of(weighted), stack_of(clustered))  # one observed row is one piece of evidence, however heavy


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_equal_sample_weights_change_nothing(scale):
    case = random_case(400, 3, 11)
    weighted = replace(case, data=replace(case.data, sample_weight=np.full(400, scale)))
    assert_same(stack_of(weighted), stack_of(case))
    assert reports(weighted)["IPS"].ess == pytest.approx(reports(case)["IPS"].ess, rel=1e-12)


def test_sample_weights_scale_together():
    weight = np.random.default_rng(5).uniform(0.5, 4, 400)
    one, ten = (random_case(400, 3, 12, sample_weight=weight * scale) for scale in (1, 10))
    assert_same(stack_of(ten), stack_of(one))


# Folds


@given(seed=st.integers(0, 10_000), folds=st.integers(2, 6), users=st.integers(6, 40))
def test_folds_keep_clusters_whole_and_are_even(seed, folds, users):
    user = np.concatenate((np.arange(users), np.random.default_rng(seed).integers(0, users, 100)))
    case = random_case(users + 100, 2, seed, cluster=user)
    fold = assign_folds(case.data, folds, seed)
    per_user = [np.unique(fold[user == one]) for one in range(users)]
    assert all(len(found) == 1 for found in per_user)
    sizes = np.bincount(np.concatenate(per_user), minlength=folds)
    assert sizes.max() - sizes.min() <= 1
