"""Learners beside each other on one log: each learns on fold A and is valued on fold B, which none of them saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bandits.batch import DecisionBatch
from bandits.learners import LEARNERS, Learner, label, reward_range
from bandits.policy import Policy, Uniform
from bandits.reward_models import fit_scorer
from ope import Report, evaluate
from ope.data import FloatArray, InputError, LoggedData
from ope.estimators import Estimator
from ope.selection import halves

ESTIMATORS = ("IPS", "SNIPS", "DR", "Delta")


def compare(
    data: LoggedData,
    learners: Mapping[str, Learner],
    *,
    k: int,
    estimators: Sequence[str | Estimator] = ESTIMATORS,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Report]:
    """Reports on fold B of the logging policy, of uniform and of what each learner made of fold A. Delta is against the log.

    The reward model behind DR was fitted on fold A too. `progress` is told the learners done, and of how many.
    """
    fold_a, fold_b = (data.take(rows) for rows in halves(data, seed))
    batch = DecisionBatch.of_log(fold_b, k)
    q = fit_scorer(None, fold_a, k).scores(batch)
    value = [one for one in estimators if one != "DR"] if fold_b.propensities is None else list(estimators)
    reports = {
        "logging": evaluate(fold_b, "logging", q, baseline="logging", estimators=value),
        "uniform": report_on(fold_b, batch, Uniform(), q, estimators),
    }
    for done, (name, learner) in enumerate(learners.items(), 1):
        reports[name] = report_on(fold_b, batch, learner.fit(fold_a, k=k, seed=seed), q, estimators)
        progress(done, len(learners))
    return reports


def report_on(
    data: LoggedData, batch: DecisionBatch, policy: Policy, q: FloatArray, estimators: Sequence[str | Estimator]
) -> Report:
    """One policy's report on a log whose requests are `batch`."""
    return evaluate(data, policy.propensities(batch), q, baseline="logging", estimators=estimators)


def learners_named(names: Sequence[str] | None, reward: FloatArray) -> dict[str, Learner]:
    """Learners by their labels; for None all that can learn from such rewards. Raises InputError that lists the labels."""
    known = {label(learner): learner for learner in LEARNERS}
    for name in names or ():
        if name not in known:
            raise InputError(f"unknown learner {name!r}; expected one of {', '.join(known)}")
    if names is not None and not names:
        raise InputError(f"found no learner; expected some of {', '.join(known)}")
    if names is None:
        ranges = {name: reward_range(one) for name, one in known.items()}
        return {name: known[name] for name, (low, high) in ranges.items() if low <= reward.min() and reward.max() <= high}
    return {name: known[name] for name in names}
