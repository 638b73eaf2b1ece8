"""Off-policy learners: a log in, a new policy out. Frozen settings; `fit` returns and never mutates.

Each maximises a value that `ope` estimates, or regresses the reward and acts on it. Linear ones look at the context where actions
are known by name, and at the action features where a log has some (which may hold interactions with the context). Policies come
back without a floor: put one on (`policy.Floor`) before they serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from bandits.batch import DecisionBatch
from bandits.oracles import BoostedTrees, Probability, logistic
from bandits.policy import Greedy, Policy, Softmax
from bandits.reward_models import cross_fitted, fit_scorer
from bandits.softmax_linear import Objective, lower_bound, maximise, mean_value, problem_of, regression_direction
from ope import evaluate
from ope.data import FloatArray, InputError, LoggedData, assign_folds

HELD_OUT = 4
"""One fold of this many is kept to choose a setting by its SNIPS value."""


class Learner(Protocol):
    """Settings of one way to learn."""

    name: ClassVar[str]

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A policy for the log's decision point. `k`: number of actions where the log does not say it."""
        ...


@dataclass(frozen=True, slots=True)
class IPS:
    """Softmax-linear policy that maximises Σ π(a_i|x_i)/p_i·r_i / n - penalty. Strehl et al. 2010."""

    l2: float = 0.1
    """Penalty l2/(2n)·|θ|², rewards in units of their spread, features standardised."""
    iterations: int = 60
    name: ClassVar[str] = "IPS"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax-linear policy."""
        return _softmax_linear(data, k, data.reward, None, mean_value, self.l2, self.iterations)


@dataclass(frozen=True, slots=True)
class BanditNet:
    """IPS on rewards less a constant λ, chosen by held-out SNIPS: its fixed point maximises SNIPS itself. Joachims et al. 2018."""

    shifts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """λ as shares of the way from the smallest to the largest reward."""
    l2: float = 0.1
    iterations: int = 60
    name: ClassVar[str] = "BanditNet"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax-linear policy."""
        low, high, width = float(data.reward.min()), float(data.reward.max()), _width(data, k)

        def fit(part: LoggedData, share: float) -> Policy:
            return _softmax_linear(
                part, width, part.reward - (low + share * (high - low)), None, mean_value, self.l2, self.iterations
            )

        return fit(data, _chosen(self.shifts, fit, data, k, seed))


@dataclass(frozen=True, slots=True)
class POEM:
    """Σ min(w, clip)·r / n less λ standard errors of it, λ chosen by held-out SNIPS. Swaminathan & Joachims 2015."""

    clip: float = 20.0
    penalties: tuple[float, ...] = (0.0, 0.1, 1.0, 3.0)
    l2: float = 0.1
    iterations: int = 60
    name: ClassVar[str] = "POEM"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax-linear policy."""
        width = _width(data, k)

        def fit(part: LoggedData, penalty: float) -> Policy:
            objective = lower_bound(penalty) if penalty else mean_value
            return _softmax_linear(part, width, part.reward, None, objective, self.l2, self.iterations, self.clip)

        return fit(data, _chosen(self.penalties, fit, data, k, seed))


@dataclass(frozen=True, slots=True)
class LSLin:
    """Logarithmic smoothing in its linear form: Σ π(a_i|x_i)·log(1 + l·r_i/p_i)/l / n - |θ|²/(2ln). Sakhi et al. 2024.

    Rewards of at least 0. The smoothing grows only as the logarithm of 1/p, so small propensities do not rule.
    """

    smoothing: float | None = None
    """l, in units of 1/reward; by default 1/sqrt(n), n the sum of weights."""
    iterations: int = 60
    name: ClassVar[str] = "LS-LIN"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax-linear policy. Raises InputError for a negative reward."""
        if data.reward.min() < 0:
            raise InputError(
                f"LS-LIN: found a reward of {data.reward.min():g}; logarithmic smoothing expects rewards of at least 0: shift them"
            )
        rows = data.n if data.sample_weight is None else float(data.sample_weight.sum())
        smoothing = 1 / np.sqrt(rows) if self.smoothing is None else self.smoothing
        payoff = data.propensity * np.log1p(smoothing * data.reward / data.propensity) / smoothing
        spread = _spread(data)
        return _softmax_linear(data, k, payoff, None, mean_value, 1 / (smoothing * spread), self.iterations)


@dataclass(frozen=True, slots=True)
class DR:
    """Softmax-linear policy that maximises the doubly robust value, with a cross-fitted oracle of the reward, by default ridge."""

    oracle: Any = None
    l2: float = 0.1
    iterations: int = 60
    folds: int = 3
    name: ClassVar[str] = "DR"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax-linear policy."""
        q = cross_fitted(self.oracle, data, _width(data, k), self.folds, seed)
        return _softmax_linear(data, k, data.reward, q, mean_value, self.l2, self.iterations)


@dataclass(frozen=True, slots=True)
class Pessimistic:
    """Maximises the doubly robust value less z standard errors: prefers what the log knows. Jin et al. 2021."""

    oracle: Any = None
    z: float = 1.645
    l2: float = 0.1
    iterations: int = 60
    folds: int = 3
    name: ClassVar[str] = "pessimistic"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax-linear policy."""
        q = cross_fitted(self.oracle, data, _width(data, k), self.folds, seed)
        return _softmax_linear(data, k, data.reward, q, lower_bound(self.z), self.l2, self.iterations)


@dataclass(frozen=True, slots=True)
class OracleGreedy:
    """Regress the reward on context and action, then take the best. `oracle`: what `reward_models.fit_scorer` takes."""

    oracle: Any = None
    name: ClassVar[str] = "oracle-greedy"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A greedy policy."""
        return Greedy(fit_scorer(self.oracle, data, _width(data, k)))


@dataclass(frozen=True, slots=True)
class OracleSoftmax:
    """Regress the reward, then act in proportion to exp(prediction / temperature)."""

    oracle: Any = None
    temperature: float = 0.05
    """In units of the spread of the rewards."""
    calibration: Literal["isotonic", "platt"] | None = None
    """Of predictions for rows that the model had not seen, to mean rewards, before the softmax."""
    name: ClassVar[str] = "oracle-softmax"

    def fit(self, data: LoggedData, *, k: int | None = None, seed: int = 0) -> Policy:
        """A softmax policy."""
        scorer = fit_scorer(self.oracle, data, _width(data, k), calibration=self.calibration, seed=seed)
        return Softmax(scorer, self.temperature * _spread(data))


LEARNERS: tuple[Learner, ...] = (
    IPS(), BanditNet(), POEM(), LSLin(), DR(), Pessimistic(), OracleGreedy(), OracleSoftmax(),
    OracleGreedy(logistic()), OracleSoftmax(logistic()), OracleGreedy(BoostedTrees()), OracleSoftmax(BoostedTrees()),
)  # fmt: skip
"""One of each, with its default settings; oracles with ridge and logistic regression and with trees."""


_ORACLE_NAMES = {"BoostedTrees": "trees", "Probability": "logistic", "Ridge": "ridge"}


def label(learner: Learner) -> str:
    """Its name, with the oracle where that is not the default."""
    kind = type(_regressor(learner)).__name__
    return learner.name if kind == "NoneType" else f"{learner.name} ({_ORACLE_NAMES.get(kind, kind)})"


def reward_range(learner: Learner) -> tuple[float, float]:
    """Between which rewards must lie for it to learn from them; (-inf, inf) for most."""
    regressor = _regressor(learner)
    if isinstance(regressor, BoostedTrees) and regressor.objective == "logistic":
        return 0.0, 1.0
    if isinstance(regressor, Probability) and regressor.reward_range is not None:
        return regressor.reward_range
    return (0.0 if isinstance(learner, LSLin) else -np.inf), np.inf


def _regressor(learner: Learner) -> Any:
    """The last step of its oracle, or None."""
    oracle: Any = getattr(learner, "oracle", None)
    return oracle.steps[-1][1] if hasattr(oracle, "steps") else oracle


def _softmax_linear(
    data: LoggedData,
    k: int | None,
    payoff: FloatArray,
    q: FloatArray | None,
    objective: Objective,
    l2: float,
    iterations: int,
    clip: float = np.inf,
) -> Policy:
    """Maximise over softmax-linear policies; with a model `q`, the payoff of a row is what the model missed."""
    width, spread = _width(data, k), _spread(data)
    residual = payoff if q is None else payoff - q[np.arange(data.n), data.action]
    problem, scorer = problem_of(data, width, residual / spread, None if q is None else q / spread, clip)  # whatever the unit
    theta = maximise(
        problem, objective, l2 / problem.total, regression_direction(problem, data.reward / spread), iterations=iterations
    )
    return Softmax(scorer(theta))


def _chosen(settings: tuple[float, ...], fit: Any, data: LoggedData, k: int | None, seed: int) -> float:
    """The setting whose policy, fitted without one fold, has the highest SNIPS value on it."""
    fold = assign_folds(data, HELD_OUT, seed)
    train, test = data.take(fold > 0), data.take(fold == 0)
    batch = DecisionBatch.of_log(test, _width(data, k))
    values = [evaluate(test, fit(train, s).propensities(batch), estimators=("SNIPS",))["SNIPS"].value for s in settings]
    return settings[int(np.argmax(np.nan_to_num(values, nan=-np.inf)))]


def _width(data: LoggedData, k: int | None) -> int:
    return int(DecisionBatch.of_log(data.take(slice(0, 1)), max(k or 0, int(data.action.max()) + 1)).eligible.shape[1])


def _spread(data: LoggedData) -> float:
    """Standard deviation of the rewards, weights counted, or 1 where they do not vary."""
    if data.reward.max() == data.reward.min():
        return 1.0
    centre = np.average(data.reward, weights=data.sample_weight)
    return float(np.sqrt(np.average((data.reward - centre) ** 2, weights=data.sample_weight)))
