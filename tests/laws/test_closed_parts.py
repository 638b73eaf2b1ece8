"""A log that comes in parts which no cluster spans gives the same estimates, and only one part's clusters wait in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ope import ESTIMATORS, IPS, SNDR, InputError, evaluate
from ope.accumulate import Accumulator, Candidate, Part, accumulate
from ope.diagnostics import Thresholds, judge
from ope.estimate import Estimate
from ope.evaluation import Choice, estimates_of
from ope.intervals import Normal
from ope.selection import Fold, halves, mean_distances, select, select_sums

from .logs import Case, random_case


def part_of(case: Case, rows: np.ndarray, *, closed: bool) -> Part:
    some = case.take(rows)
    return Part(some.data, (Candidate("target", some.target, ESTIMATORS, some.q),), some.baseline, closed)


@given(seed=st.integers(0, 10_000), buckets=st.integers(1, 16), users=st.integers(20, 300), weighted=st.booleans())
def test_closed_parts_give_the_estimates_of_the_whole(seed, buckets, users, weighted):
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, 900)
    weights = {"sample_weight": rng.uniform(0.5, 3, 900)} if weighted else {}
    case = random_case(900, 3, seed, shift=5.0, cluster=user, **weights)
    whole = accumulate(case.data, [Candidate("target", case.target, ESTIMATORS, case.q)], baseline=case.baseline)
    sums = Accumulator(900)
    for bucket in rng.permutation(buckets):
        rows = np.flatnonzero(user % buckets == bucket)
        for some in np.array_split(rows, 2) if len(rows) > 1 else [rows]:  # a bucket may come in several parts itself
            if len(some):
                sums.add(part_of(case, some, closed=some[-1] == rows[-1]))
    parts = sums.result()
    assert parts.stack.moments.n == whole.stack.moments.n == len(np.unique(user))
    assert parts.stack.values() == pytest.approx(whole.stack.values(), rel=1e-12)
    assert parts.stack.stderrs() == pytest.approx(whole.stack.stderrs(), rel=1e-9)  # squares: digits lost to the shift
    assert parts.checks.calibration_p == pytest.approx(whole.checks.calibration_p, rel=1e-9)
    for got, expected in zip(parts.diagnostics(), whole.diagnostics(), strict=True):
        assert got.ess == pytest.approx(expected.ess, rel=1e-12)
        assert judge(parts.checks, got, Thresholds())[0] == judge(whole.checks, expected, Thresholds())[0]


def test_clusters_of_closed_parts_do_not_wait():
    case = random_case(600, 3, 1, cluster=np.repeat(np.arange(60), 10))
    sums, open_ = Accumulator(600), Accumulator(600)
    for start in range(0, 600, 100):
        rows = np.arange(start, start + 100)
        sums.add(part_of(case, rows, closed=True))
        open_.add(part_of(case, rows, closed=False))
    waiting = [sum(len(group.cluster) for group in one._grouping.groups()) if one._open else 0 for one in (sums, open_)]
    assert waiting == [0, 60]
    assert sums.result().stack.values() == pytest.approx(open_.result().stack.values(), rel=1e-12)


def test_the_bootstrap_keeps_clusters_of_closed_parts():
    case = random_case(600, 3, 2, cluster=np.repeat(np.arange(60), 10))
    blocks = []
    for closed in (False, True):
        sums = Accumulator(600, block_seed=3)
        for start in range(0, 600, 100):
            sums.add(part_of(case, np.arange(start, start + 100), closed=closed))
        blocks.append(sums.result().stack.blocks)
    assert len(blocks[0]) == 60
    np.testing.assert_array_equal(blocks[0], blocks[1])


def test_results_can_be_had_twice_and_rows_are_counted():
    case = random_case(100, 3, 3, cluster=np.repeat(np.arange(20), 5))
    sums = Accumulator(100, block_seed=1)
    with pytest.raises(InputError, match="parts of 0 rows in all; expected 100"):
        sums.result()
    sums.add(part_of(case, np.arange(100), closed=True))
    first, second = sums.result().stack, sums.result().stack
    np.testing.assert_array_equal(first.values(), second.values())
    np.testing.assert_array_equal(first.blocks, second.blocks)


def without(estimate: Estimate, numbers: Sequence[str]) -> Estimate:
    return dataclasses.replace(estimate, **dict.fromkeys(numbers, 0.0))


def test_estimates_of_several_candidates_are_those_of_each_alone():
    case = random_case(2000, 3, 4)
    choice = Choice(tuple(one for one in ESTIMATORS if not one.needs.baseline), Normal())
    targets = {"target": case.target, "baseline": case.baseline}
    sums = accumulate(case.data, [Candidate(name, target, choice.estimators, case.q) for name, target in targets.items()])
    for found, target in zip(estimates_of(sums, [choice, choice]), targets.values(), strict=True):
        alone = evaluate(case.data, target, case.q, estimators=choice.asked)
        for one, other in zip(found, alone.estimates, strict=True):
            numbers = ("value", "stderr", "low", "high", "ess")
            # not to the bit: matrix products of other shapes, with other limits on threads; a last bit has differed once
            expected = pytest.approx([getattr(other, name) for name in numbers], rel=1e-12)
            assert [getattr(one, name) for name in numbers] == expected
            assert without(one, numbers) == without(other, numbers)


def test_sums_select_as_rows_do():
    case = random_case(4000, 4, 5, cluster=np.arange(4000) // 2)
    targets = {"target": case.target, "other": case.baseline, "model": np.eye(4)[case.q.argmax(axis=1)] * 0.9 + 0.025}
    whole = select(case.data, targets, q=case.q, by="SNDR")
    folds, rows = [], halves(case.data)
    for some in rows:
        candidates = [Candidate(name, target[some], (SNDR(),), case.q[some]) for name, target in targets.items()]
        folds.append(Fold.of(accumulate(case.data.take(some), [*candidates, Candidate("logging", "logging", (IPS(),))])))
    distances = mean_distances([target[rows[0]] for target in targets.values()])
    sums = select_sums(list(targets), *folds, distances, by="SNDR")
    assert sums.ranking == whole.ranking
    assert sums.shortlists == whole.shortlists
    with pytest.raises(InputError, match="2 labels"):
        select_sums(list(targets)[:2], *folds, distances)
