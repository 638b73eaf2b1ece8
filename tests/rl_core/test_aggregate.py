"""Scores of runs as one number: by hand, and how often the interval holds what other seeds would give."""

from __future__ import annotations

import numpy as np
import pytest

from ope.data import InputError
from rl_core.aggregate import interquartile_mean, stratified_interval


def test_the_middle_half_by_hand() -> None:
    assert interquartile_mean([[1.0], [2.0], [3.0], [100.0]]) == 2.5
    assert interquartile_mean([[7.0, 1.0], [5.0, 3.0], [-90.0, 4.0], [6.0, 80.0]]) == 4.5  # 3, 4, 5, 6
    assert interquartile_mean([[1.0], [2.0], [6.0]]) == 3.0  # a quarter of three is none
    assert interquartile_mean([[0.0, 1.0, 2.0, 3.0, 50.0]]) == 2.0


def test_an_interval_by_hand() -> None:
    low, high = stratified_interval([[0.0], [1.0]], level=0.9)  # 0, 1/2 and 1 with chances 1/4, 1/2, 1/4
    assert (low, high) == (0.0, 1.0)
    low, high = stratified_interval([[0.0], [1.0]], level=0.4)
    assert (low, high) == (0.5, 0.5)
    assert stratified_interval([[3.0, 8.0], [3.0, 8.0]]) == (5.5, 5.5)  # tasks differ and runs do not: nothing is unsure


def test_runs_are_drawn_within_their_task() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 4)) + np.array([0.0, 100.0, 200.0, 300.0])
    low, high = stratified_interval(scores)
    assert 90 < low < interquartile_mean(scores) < high < 210
    assert high - low < 2  # tasks are not drawn: their distances would make it a hundred wide
    assert stratified_interval(scores, seed=3) == stratified_interval(scores, seed=3)


@pytest.mark.parametrize(("runs", "tasks", "least", "most"), [(10, 6, 0.88, 0.98), (10, 1, 0.90, 0.98), (3, 1, 0.70, 0.84)])
def test_how_often_intervals_hold_the_truth(runs: int, tasks: int, least: float, most: float) -> None:
    """Tasks of other levels and spreads; the truth is that of very many runs. Three runs are too few to know a spread."""
    rng = np.random.default_rng(1)
    level, spread = np.linspace(0, 100, tasks), np.linspace(4, 20, tasks)
    truth = interquartile_mean(rng.normal(level, spread, (200_000, tasks)))
    drawn = (rng.normal(level, spread, (runs, tasks)) for _ in range(400))
    held = [low <= truth <= high for low, high in (stratified_interval(one, resamples=400) for one in drawn)]
    assert least <= np.mean(held) <= most


@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], [[1.0], [np.nan]]])
def test_other_scores_are_refused(scores: object) -> None:
    with pytest.raises(InputError, match="expected finite ones"):
        interquartile_mean(scores)  # type: ignore[arg-type]


def test_one_run_has_no_interval() -> None:
    with pytest.raises(InputError, match="found 1 runs"):
        stratified_interval([[1.0, 2.0]])
