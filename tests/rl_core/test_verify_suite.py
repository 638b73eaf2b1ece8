"""Acceptance of the offline baselines: which medians pass, by the page's table, and from which runs they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rl_core.verify import suite
from rl_core.verify.arms import Arms

BANDS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "BC": {"pend-exp10": (91, 109), "pend-mix10": (-8, 11), "pend-eps60": (54, 86), "pend-rand": (-11, 5)},
    "10 % BC": {"pend-exp10": (-12, 6), "pend-mix10": (91, 109), "pend-eps60": (45, 102), "pend-rand": (-10, 28)},
    "TD3": {"pend-mix10": (91, 108), "pend-eps60": (91, 107), "pend-rand": (92, 108)},
    "TD3BC": {"pend-exp10": (92, 109), "pend-mix10": (-8, 23), "pend-eps60": (73, 103), "pend-rand": (-5, 14)},
    "IQL": {"pend-exp10": (92, 108), "pend-mix10": (72, 102), "pend-eps60": (90, 106), "pend-rand": (67, 99)},
    "AWAC": {"pend-exp10": (91, 108), "pend-mix10": (83, 100), "pend-eps60": (90, 107), "pend-rand": (72, 103)},
    "CQL": {"pend-exp10": (-5, 30), "pend-mix10": (85, 102), "pend-eps60": (93, 109), "pend-rand": (91, 108)},
}
"""From 8 points below the lower of the page's two seeds to 8 above the higher; 15 where their mean is between 5 and 90."""
EACH = pytest.mark.parametrize("name", BANDS)
PAIRS = range(5)


class Answers(Arms):
    """Scores that are given by data set and pair, after a first evaluation that does not count."""

    def __init__(self, score: Callable[[str, int], float]) -> None:
        super().__init__(Path())
        self.score, self.asked = score, list[Any]()

    def run(self, arms: Any) -> Any:
        wanted = list(arms)
        self.asked += wanted
        return [
            [{"score": 1e6, "return": 1e6}, {"score": self.score(one.data, one.schedule.seed), "return": -1e6}] for one in wanted
        ]


def passed(name: str, score: Callable[[str, int], float]) -> dict[str, bool]:
    """By data set."""
    found = suite.acceptance(Answers(score), PAIRS, [name])
    assert [one.name for one in found] == [f"{name} on {data}: median score" for data in BANDS[name]]
    return dict(zip(BANDS[name], (one.passed for one in found), strict=True))


@EACH
def test_medians_within_the_band_pass_and_those_outside_do_not(name: str) -> None:
    bands = BANDS[name]
    for inside in (lambda low, high: low, lambda low, high: high, lambda low, high: (low + high) / 2):
        assert all(passed(name, lambda data, pair, of=inside: of(*bands[data])).values())
    for outside in (lambda low, high: low - 0.1, lambda low, high: high + 0.1, lambda low, high: float("nan")):
        assert not any(passed(name, lambda data, pair, of=outside: of(*bands[data])).values())


@EACH
def test_each_set_is_judged_by_its_own_scores(name: str) -> None:
    for wrong in BANDS[name]:
        found = passed(name, lambda data, pair, wrong=wrong: sum(BANDS[name][data]) / 2 + 100 * (data == wrong))
        assert found == {data: data != wrong for data in BANDS[name]}


@EACH
def test_it_is_the_median_of_the_pairs_that_counts(name: str) -> None:
    """Two pairs may be anywhere, three may not; and neither the mean, nor the best, nor the first of them decides."""
    middle = {data: sum(band) / 2 for data, band in BANDS[name].items()}
    for few in ({0, 1}, {0, 4}, {3, 4}):
        assert all(passed(name, lambda data, pair, few=few: middle[data] + 500 * (pair in few)).values())
        assert not any(passed(name, lambda data, pair, few=few: middle[data] + 500 * (pair not in few)).values())


@EACH
def test_every_pair_of_every_set_is_a_run_of_the_pages_method(name: str) -> None:
    arms = Answers(lambda data, pair: 0.0)
    suite.acceptance(arms, PAIRS, [name])
    assert sorted((one.data, one.schedule.seed) for one in arms.asked) == sorted(
        (data, pair) for data in BANDS[name] for pair in PAIRS
    )
    assert {one.method for one in arms.asked} == {suite.TABLE[name].method}
    assert {one.schedule.steps for one in arms.asked} == {3000 if "BC" in name and name != "TD3BC" else 6000}
    assert type(suite.TABLE[name].method).__name__ == name.removeprefix("10 % ")


def test_every_row_of_the_table_is_looked_at_by_its_method() -> None:
    assert set(BANDS) == set(suite.TABLE)
    arms = Answers(lambda data, pair: 0.0)
    for method, names in {"BC": ("BC", "10 % BC"), **{name: (name,) for name in ("TD3BC", "IQL", "AWAC", "CQL")}}.items():
        found = suite.SUITE[method].margins(arms, PAIRS)
        assert [one.name for one in found] == [f"{name} on {data}: median score" for name in names for data in BANDS[name]]
