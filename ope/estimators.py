"""Off-policy estimators of a policy's value, each three short functions of the same per-row arrays.

An estimator turns rows into term columns, and the mean of the columns into a value. Its fields are its settings; it says
what it needs. A new one is a class here, a line in `ESTIMATORS` and a row in the law tests.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from ope.data import FloatArray, InputError
from ope.primitives import baselines, terms, weights

Limits: TypeAlias = tuple[float, float]


class Needs(NamedTuple):
    """What an estimator cannot do without, checked before any work. Every one needs the logged propensity."""

    q: bool = False
    """A reward model (n, k), and with it the target's whole vector."""
    baseline: bool = False
    """A second policy to compare with."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Everything that any estimator may look at, one entry per row, all (n,). Made once per log and target."""

    reward: FloatArray
    weight: FloatArray
    """w = π(a|x) / p"""
    q_logged: FloatArray
    """q(x, a) of the logged action; empty without a reward model."""
    v: FloatArray
    """Σ_a π(a|x) q(x, a); empty without a reward model."""
    weight_change: FloatArray
    """w_π - w_ρ against the baseline ρ; empty without one."""


class Smooth(Protocol):
    """A smooth function of means of columns: all that intervals, differences and shortlists ask of an estimator."""

    def value(self, mean: FloatArray) -> FloatArray:
        """Means (..., d) -> values (...): one estimate, or a thousand resamples at once."""
        ...

    def gradient(self, mean: FloatArray) -> FloatArray:
        """Gradient (d,) of the value at one mean (d,)."""
        ...


class Estimator(Smooth, Protocol):
    """A smooth function of means of per-row columns."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    consistent: ClassVar[bool]
    """True if right propensities alone make the estimate tend to the policy's value."""

    def terms(self, rows: Rows) -> FloatArray:
        """Columns (n, d)."""
        ...


@runtime_checkable
class Transforming(Protocol):
    """An estimator that gives some weights up: what they stood for is lost, or left to the model."""

    def transformed(self, weight: FloatArray) -> FloatArray:
        """Weights as they are used (n,), none above what they were."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """An estimator that is the plain mean of one column, whose rows can therefore be bounded."""

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        """Smallest and largest row where 0 <= w <= weight_bound and rewards and q lie in `reward_range`."""
        ...


def _label(self: Any) -> str:
    settings = ", ".join(_digits(getattr(self, field.name)) for field in fields(self))
    return f"{self.name}({settings})" if settings else str(self.name)


def _digits(setting: float) -> str:
    """As short as it can be without becoming another number: two settings never print alike."""
    short = f"{setting:g}"
    return short if float(short) == setting else repr(setting)


def mean_value(self: object, mean: FloatArray) -> FloatArray:
    """The value of an estimator that is the mean of one column: means (..., 1) -> (...)."""
    return mean[..., 0]


def mean_gradient(self: object, mean: FloatArray) -> FloatArray:
    """Its gradient (1,)."""
    return np.ones(1)


def _ips_limits(weight_bound: float, reward_range: Limits) -> Limits:
    low, high = reward_range
    return min(0.0, weight_bound * low), max(0.0, weight_bound * high)


def _dr_limits(weight_bound: float, reward_range: Limits) -> Limits:
    low, high = reward_range
    return low - weight_bound * (high - low), high + weight_bound * (high - low)


def _check_settings(self: Any) -> None:
    for field in fields(self):
        setting = getattr(self, field.name)
        if not setting >= 0:
            raise InputError(f"{type(self).__name__}({field.name}={setting}): expected a number of at least 0")


@dataclass(frozen=True)
class DM:
    """Σv / n: the reward model's word for it, with no protection where the model is wrong."""

    name: ClassVar[str] = "DM"
    needs: ClassVar[Needs] = Needs(q=True)
    consistent: ClassVar[bool] = False
    value, gradient, __str__ = mean_value, mean_gradient, _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.dm(rows.v)

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        return reward_range


@dataclass(frozen=True)
class IPS:
    """Σwr / n. Unbiased where the log supports the target; adding c to every reward adds c·mean(w)."""

    name: ClassVar[str] = "IPS"
    needs: ClassVar[Needs] = Needs()
    consistent: ClassVar[bool] = True
    value, gradient, __str__ = mean_value, mean_gradient, _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.ips(rows.weight, rows.reward)

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        return _ips_limits(weight_bound, reward_range)


@dataclass(frozen=True)
class ClippedIPS:
    """Σ min(w, L) r / n. For rewards of at least 0 it never exceeds IPS; bias -E_π[(1 - L/w)⁺ q] does not shrink with n."""

    high: float = 10.0
    name: ClassVar[str] = "cIPS"
    needs: ClassVar[Needs] = Needs()
    consistent: ClassVar[bool] = False
    value, gradient, __str__ = mean_value, mean_gradient, _label

    def __post_init__(self) -> None:
        _check_settings(self)

    def transformed(self, weight: FloatArray) -> FloatArray:
        return weights.clip(weight, high=self.high)

    def terms(self, rows: Rows) -> FloatArray:
        return terms.ips(self.transformed(rows.weight), rows.reward)

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        return _ips_limits(min(weight_bound, self.high), reward_range)


@dataclass(frozen=True)
class SNIPS:
    """Σwr / Σw. Bias O(1/n); adding c to every reward adds c to the value. Swaminathan & Joachims 2015."""

    name: ClassVar[str] = "SNIPS"
    needs: ClassVar[Needs] = Needs()
    consistent: ClassVar[bool] = True
    __str__ = _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.snips(rows.weight, rows.reward)

    def value(self, mean: FloatArray) -> FloatArray:
        return mean[..., 0] / mean[..., 1]

    def gradient(self, mean: FloatArray) -> FloatArray:
        return np.array((1.0, -self.value(mean))) / mean[1]


def _controlled_value(mean: FloatArray, centre: float) -> FloatArray:
    """E[wr] - b(E[w] - centre) of columns (w, wr, w², w²r), with the best constant b."""
    w, wr, w2, w2r = np.moveaxis(mean, -1, 0)
    value: FloatArray = wr - baselines.optimal_control_variate(w, wr, w2, w2r) * (w - centre)
    return value


def _controlled_gradient(mean: FloatArray, centre: float) -> FloatArray:
    w, wr, w2, _ = mean
    b = float(baselines.optimal_control_variate(*mean))
    variance = w2 - w * w
    b_gradient = np.zeros(4)
    if baselines.weights_vary(w, w2):  # where the weights do not vary, b is the constant 0
        b_gradient = np.array((2 * w * b - wr, -w, -b, 1.0)) / variance
    return np.array((-b, 1.0, 0.0, 0.0)) - (w - centre) * b_gradient


@dataclass(frozen=True)
class BetaIPS:
    """Σwr/n - b(Σw/n - 1) with b = cov(w, wr) / var(w): a constant baseline, chosen by the sums. Gupta et al. 2024."""

    name: ClassVar[str] = "beta-IPS"
    needs: ClassVar[Needs] = Needs()
    consistent: ClassVar[bool] = True
    __str__ = _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.control_variate(rows.weight, rows.reward)

    def value(self, mean: FloatArray) -> FloatArray:
        return _controlled_value(mean, 1.0)

    def gradient(self, mean: FloatArray) -> FloatArray:
        return _controlled_gradient(mean, 1.0)


@dataclass(frozen=True)
class Delta:
    """Σ(w_π - w_ρ)(r - b)/n: by how much the target beats the baseline ρ. Jeunen & Ustimenko 2024."""

    name: ClassVar[str] = "Delta"
    needs: ClassVar[Needs] = Needs(baseline=True)
    consistent: ClassVar[bool] = False  # for the difference it is; it does not estimate the policy's value
    __str__ = _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.control_variate(rows.weight_change, rows.reward)

    def value(self, mean: FloatArray) -> FloatArray:
        return _controlled_value(mean, 0.0)

    def gradient(self, mean: FloatArray) -> FloatArray:
        return _controlled_gradient(mean, 0.0)


@dataclass(frozen=True)
class DR:
    """Σ(v + w(r - q)) / n. Unbiased with right propensities, whatever the reward model. Dudik et al. 2011."""

    name: ClassVar[str] = "DR"
    needs: ClassVar[Needs] = Needs(q=True)
    consistent: ClassVar[bool] = True
    value, gradient, __str__ = mean_value, mean_gradient, _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.dr(rows.weight, rows.reward, rows.q_logged, rows.v)

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        return _dr_limits(weight_bound, reward_range)


@dataclass(frozen=True)
class SNDR:
    """Σv/n + Σw(r - q)/Σw. Bias O(1/n); equivariant to a constant added to rewards and model. Thomas & Brunskill 2016."""

    name: ClassVar[str] = "SNDR"
    needs: ClassVar[Needs] = Needs(q=True)
    consistent: ClassVar[bool] = True
    __str__ = _label

    def terms(self, rows: Rows) -> FloatArray:
        return terms.sndr(rows.weight, rows.reward, rows.q_logged, rows.v)

    def value(self, mean: FloatArray) -> FloatArray:
        return mean[..., 0] + mean[..., 1] / mean[..., 2]

    def gradient(self, mean: FloatArray) -> FloatArray:
        _, we, w = mean
        return np.array((1.0, 1.0 / w, -we / (w * w)))


@dataclass(frozen=True)
class SwitchDR:
    """Σ(v + w·1(w <= t)(r - q)) / n: the model alone where weights exceed t. Wang et al. 2017. t = inf is DR, 0 is DM."""

    threshold: float = 10.0
    name: ClassVar[str] = "Switch-DR"
    needs: ClassVar[Needs] = Needs(q=True)
    consistent: ClassVar[bool] = False
    value, gradient, __str__ = mean_value, mean_gradient, _label

    def __post_init__(self) -> None:
        _check_settings(self)

    def transformed(self, weight: FloatArray) -> FloatArray:
        return weights.truncate(weight, self.threshold)

    def terms(self, rows: Rows) -> FloatArray:
        return terms.dr(self.transformed(rows.weight), rows.reward, rows.q_logged, rows.v)

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        return _dr_limits(min(weight_bound, self.threshold), reward_range)


@dataclass(frozen=True)
class DRos:
    """Σ(v + L·w/(w² + L)·(r - q)) / n: optimistic shrinkage. Su et al. 2020. L = inf is DR, 0 is DM."""

    strength: float = 10.0
    name: ClassVar[str] = "DRos"
    needs: ClassVar[Needs] = Needs(q=True)
    consistent: ClassVar[bool] = False
    value, gradient, __str__ = mean_value, mean_gradient, _label

    def __post_init__(self) -> None:
        _check_settings(self)

    def transformed(self, weight: FloatArray) -> FloatArray:
        return weights.shrink(weight, self.strength)

    def terms(self, rows: Rows) -> FloatArray:
        return terms.dr(self.transformed(rows.weight), rows.reward, rows.q_logged, rows.v)

    def limits(self, weight_bound: float, reward_range: Limits) -> Limits:
        peak = min(weight_bound, math.sqrt(self.strength))  # L·w/(w² + L) rises up to sqrt(L)
        return _dr_limits(float(self.transformed(np.asarray(peak))), reward_range)


ESTIMATORS: tuple[Estimator, ...] = (
    DM(), IPS(), ClippedIPS(), SNIPS(), BetaIPS(), Delta(), DR(), SNDR(), SwitchDR(), DRos(),
)  # fmt: skip
"""One of each, with its default settings."""


def estimator(name: str | Estimator) -> Estimator:
    """An estimator from its printed name: `"DR"`, `"cIPS(5)"`; without a setting, its default.

    Raises InputError that lists the names and suggests the closest.
    """
    if isinstance(name, type):
        raise InputError(f"found the class {name.__name__}; expected an estimator, such as {name.__name__}()")
    if not isinstance(name, str):
        return name
    match = re.fullmatch(r"\s*([\w-]+?)\s*(?:\(\s*([^()]*?)\s*\))?\s*", name)
    by_name = {known.name.lower(): type(known) for known in ESTIMATORS}
    kind: Any = by_name.get(match[1].lower()) if match else None
    if match is None or kind is None:
        closest = difflib.get_close_matches(name.lower(), by_name, 1, 0.3)
        hint = f"; did you mean {by_name[closest[0]].name!r}?" if closest else ""
        raise InputError(f"unknown estimator {name!r}; expected one of {', '.join(known.name for known in ESTIMATORS)}{hint}")
    if match[2] is None:
        made: Estimator = kind()
        return made
    try:
        made = kind(*(float(setting) for setting in match[2].split(",")))
    except (TypeError, ValueError) as error:
        expected = ", ".join(f"{field.name} (a number)" for field in fields(kind)) or "no setting"
        raise InputError(f"estimator {name!r}: expected {expected}: {error}") from None
    return made
