"""Conjugate beliefs about rewards: evidence adds, in any order and from any machine, and a discount shrinks it to the prior.

A belief is frozen: every verb returns a new one. This module loads NumPy alone. A row's weight says how many rows it
stands for: weight m is m repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ope.data import BoolArray, FloatArray, InputError, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class BetaBernoulli:
    """Success rates of k actions with Beta priors, for rewards in [0, 1]: θ_a ~ Beta(α_a, β_a), α += Σwr, β += Σw(1 - r).

    For rewards of 0 or 1 this is the exact posterior; a fraction counts as that much of a success (Agrawal & Goyal 2012
    round it at random instead, which adds the same on average).
    """

    alpha: FloatArray
    """(k,) the prior and the weight of successes; `beta` (k,) the prior and the weight of failures."""
    beta: FloatArray
    prior_alpha: float = 1.0
    prior_beta: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "prior_alpha", "prior_beta")
        _freeze(self, "alpha", (None,), above_zero=True)
        _freeze(self, "beta", self.alpha.shape, above_zero=True)

    @classmethod
    def prior(cls, k: int, alpha: float = 1.0, beta: float = 1.0) -> BetaBernoulli:
        """What is believed of k actions before any reward."""
        _check_size("k", k)
        return cls(np.full(k, float(alpha)), np.full(k, float(beta)), float(alpha), float(beta))

    def update(self, action: ArrayLike, reward: ArrayLike, weight: ArrayLike | None = None) -> BetaBernoulli:
        """After rows of action (n,) in 0..k-1, reward (n,) in [0, 1], weight (n,) >= 0. Raises InputError at the first other."""
        k = len(self.alpha)
        actions, rewards, weights = _checked_rows(k, action, reward, weight)
        _reject("reward", rewards, (rewards >= 0) & (rewards <= 1), "a reward in [0, 1]", "Scale it, or use `NormalMean`.")
        wins, losses = (np.bincount(actions, weights * each, minlength=k) for each in (rewards, 1 - rewards))
        return replace(self, alpha=self.alpha + wins, beta=self.beta + losses)

    def merge(self, other: BetaBernoulli) -> BetaBernoulli:
        """The evidence of both, their common prior counted once. Raises InputError where priors or sizes differ."""
        _check_alike(self, other)
        return replace(self, alpha=self.alpha + (other.alpha - self.prior_alpha), beta=self.beta + (other.beta - self.prior_beta))

    def discount(self, factor: ArrayLike) -> BetaBernoulli:
        """Evidence times `factor`, one number or one per action (k,), in [0, 1]: 0 is the prior, 1 changes nothing."""
        kept = _checked_factor(factor, self.alpha.shape)
        alpha = _towards(self.alpha, kept, self.prior_alpha)
        return replace(self, alpha=alpha, beta=_towards(self.beta, kept, self.prior_beta))

    def mean(self) -> FloatArray:
        """Expected success rates (k,)."""
        return self.alpha / (self.alpha + self.beta)

    def variance(self) -> FloatArray:
        """Their posterior variances (k,)."""
        mean = self.mean()
        return mean * (1 - mean) / (self.alpha + self.beta + 1)

    def sample(self, rng: np.random.Generator, draws: int) -> FloatArray:
        """Independent draws of all rates (draws, k)."""
        return rng.beta(self.alpha, self.beta, (draws, len(self.alpha)))


@dataclass(frozen=True, slots=True, eq=False)
class NormalMean:
    """Mean rewards of k actions, Normal with known noise: θ_a ~ N(shift_a / precision_a, 1 / precision_a).

    precision += Σw / σ² and shift += Σwr / σ², with σ² = `noise_variance` in squared units of the reward. Murphy 2007, section 2.
    """

    precision: FloatArray
    """(k,) of the prior and the rows, in 1 / reward²."""
    shift: FloatArray
    """(k,) precision times mean, in 1 / reward."""
    prior_mean: float = 0.0
    prior_precision: float = 1.0
    noise_variance: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "prior_precision", "noise_variance")
        _freeze(self, "precision", (None,), above_zero=True)
        _freeze(self, "shift", self.precision.shape)

    @classmethod
    def prior(cls, k: int, mean: float = 0.0, precision: float = 1.0, noise_variance: float = 1.0) -> NormalMean:
        """What is believed of k actions before any reward."""
        _check_size("k", k)
        each = np.full(k, float(precision))
        return cls(each, each * mean, float(mean), float(precision), float(noise_variance))

    def update(self, action: ArrayLike, reward: ArrayLike, weight: ArrayLike | None = None) -> NormalMean:
        """After rows of action (n,) in 0..k-1, reward (n,) finite, weight (n,) >= 0. Raises InputError at the first other."""
        k = len(self.precision)
        actions, rewards, weights = _checked_rows(k, action, reward, weight)
        precision = self.precision + np.bincount(actions, weights, minlength=k) / self.noise_variance
        shift = self.shift + np.bincount(actions, weights * rewards, minlength=k) / self.noise_variance
        return replace(self, precision=precision, shift=shift)

    def merge(self, other: NormalMean) -> NormalMean:
        """The evidence of both, their common prior counted once. Raises InputError where priors or sizes differ."""
        _check_alike(self, other)
        precision, shift = other.precision - self.prior_precision, other.shift - self.prior_precision * self.prior_mean
        return replace(self, precision=self.precision + precision, shift=self.shift + shift)

    def discount(self, factor: ArrayLike) -> NormalMean:
        """Evidence times `factor`, one number or one per action (k,), in [0, 1]: 0 is the prior, 1 changes nothing."""
        kept = _checked_factor(factor, self.shift.shape)
        precision = _towards(self.precision, kept, self.prior_precision)
        return replace(self, precision=precision, shift=_towards(self.shift, kept, self.prior_precision * self.prior_mean))

    def mean(self) -> FloatArray:
        """Expected mean rewards (k,)."""
        return self.shift / self.precision

    def variance(self) -> FloatArray:
        """Their posterior variances (k,); the noise of a single reward is not in them."""
        return 1 / self.precision

    def sample(self, rng: np.random.Generator, draws: int) -> FloatArray:
        """Independent draws of all means (draws, k)."""
        return rng.normal(self.mean(), np.sqrt(self.variance()), (draws, len(self.precision)))


@dataclass(frozen=True, slots=True, eq=False)
class BayesianLinear:
    """Linear regression with prior N(0, I / λ), λ = `prior_precision`, and known noise σ², in natural parameters.

    Λ = λI + X'WX / σ² and b = X'Wy / σ²; θ ~ N(Λ⁻¹b, Λ⁻¹). The mean is ridge regression with penalty λσ². Bishop 2006, 3.3.
    """

    precision: FloatArray
    """Λ (d, d), symmetric and positive definite."""
    shift: FloatArray
    """b (d,)"""
    prior_precision: float = 1.0
    noise_variance: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "prior_precision", "noise_variance")
        _freeze(self, "shift", (None,))
        _freeze(self, "precision", (len(self.shift),) * 2)
        asymmetry = float(np.abs(self.precision - self.precision.T).max())
        if asymmetry > 1e-9 * float(np.abs(self.precision).max()):  # more than sums in another order leave
            raise InputError(f"precision: found entries that differ from their mirror by {asymmetry:.3g}; expected symmetry")

    @classmethod
    def prior(cls, d: int, precision: float = 1.0, noise_variance: float = 1.0) -> BayesianLinear:
        """What is believed of d coefficients before any reward."""
        _check_size("d", d)
        return cls(np.eye(d) * precision, np.zeros(d), float(precision), float(noise_variance))

    def update(self, features: ArrayLike, reward: ArrayLike, weight: ArrayLike | None = None) -> BayesianLinear:
        """After rows of features (n, d) and reward (n,), finite, weight (n,) >= 0. Raises InputError at the first other."""
        X = _finite("features", features, (None, len(self.shift)), "Fill in missing features first.")
        y, weights = _checked_reward(len(X), reward, weight)
        Z = X * np.sqrt(weights)[:, None]  # Z'Z = X'WX, symmetric to the last bit
        shift = self.shift + X.T @ (weights * y) / self.noise_variance
        return replace(self, precision=self.precision + Z.T @ Z / self.noise_variance, shift=shift)

    def merge(self, other: BayesianLinear) -> BayesianLinear:
        """The evidence of both, their common prior counted once. Raises InputError where priors or sizes differ."""
        _check_alike(self, other)
        evidence = other.precision - self.prior_precision * np.eye(len(self.shift))
        return replace(self, precision=self.precision + evidence, shift=self.shift + other.shift)

    def discount(self, factor: float) -> BayesianLinear:
        """Evidence times `factor` in [0, 1]: 0 is the prior, 1 changes nothing."""
        kept = _checked_factor(factor, ())
        prior = self.prior_precision * np.eye(len(self.shift))
        return replace(self, precision=_towards(self.precision, kept, prior), shift=kept * self.shift)

    def mean(self) -> FloatArray:
        """Expected coefficients (d,)."""
        root = self._root()
        return np.linalg.solve(root.T, np.linalg.solve(root, self.shift))

    def covariance(self) -> FloatArray:
        """Their posterior covariance Λ⁻¹ (d, d)."""
        inverse = np.linalg.solve(self._root(), np.eye(len(self.shift)))
        return inverse.T @ inverse

    def predict(self, features: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Mean and variance, without noise, of x'θ, both (...), for features (..., d). Raises InputError for another width."""
        x = np.asarray(features, dtype=np.float64)
        if x.shape[-1:] != self.shift.shape:
            raise InputError(f"features: found shape {x.shape}; expected (..., {len(self.shift)})")
        # a dot product for each number, so that a row's bits do not depend on the rows around it
        spread = np.vecdot(x[..., None, :], np.linalg.inv(self._root()))  # L⁻¹x, whose squared length is x'Λ⁻¹x
        return np.vecdot(x, self.mean()), np.vecdot(spread, spread)

    def sample(self, rng: np.random.Generator, draws: int) -> FloatArray:
        """Independent draws of all coefficients (draws, d): Λ⁻¹b + L⁻ᵀz with Λ = LLᵀ and standard Normal z."""
        noise = rng.standard_normal((draws, len(self.shift)))
        return self.mean() + np.linalg.solve(self._root().T, noise.T).T

    def _root(self) -> FloatArray:
        """L (d, d), lower triangular, with LLᵀ = Λ. Raises InputError where Λ has no such root."""
        try:
            return np.linalg.cholesky(self.precision).astype(np.float64, copy=False)
        except np.linalg.LinAlgError:
            least = float(np.linalg.eigvalsh(self.precision)[0])
            raise InputError(
                f"precision: found a smallest eigenvalue of {least:.3g}; expected a positive definite matrix. "
                "Start from `BayesianLinear.prior`, with a larger precision"
            ) from None


def _towards(values: FloatArray, kept: FloatArray, prior: float | FloatArray) -> FloatArray:
    """prior + kept (values - prior), exact at both ends."""
    return kept * values + (1 - kept) * prior


def _freeze(belief: Any, name: str, shape: tuple[int | None, ...], *, above_zero: bool = False) -> None:
    """Store a read-only copy: an array that its owner goes on changing would change the belief."""
    array = _finite(name, getattr(belief, name), shape, "One entry per action or coefficient.").copy()
    _check_size(f"the size of {name}", array.size)
    if above_zero:
        _reject(name, array, array > 0, "a number above 0", f"Start from `{type(belief).__name__}.prior`.")
    array.setflags(write=False)
    object.__setattr__(belief, name, array)


def _finite(name: str, values: ArrayLike, shape: tuple[int | None, ...], remedy: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"{name}: found shape {array.shape}; expected ({wanted}). Pass one entry per row, action or coefficient")
    good = np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
    _reject(name, array, good, "finite numbers", remedy)
    return array


def _check_size(name: str, size: int) -> None:
    if size < 1:
        raise InputError(f"found {name} = {size}; expected at least 1")


def _check_positive(belief: Any, *names: str) -> None:
    for name in names:
        setting = getattr(belief, name)
        if not 0 < setting < np.inf:
            raise InputError(f"{type(belief).__name__}({name}={setting}): expected a finite number above 0")


def _check_alike(one: Any, other: Any) -> None:
    kinds = [(type(belief).__name__, len(getattr(belief, fields(belief)[0].name))) for belief in (one, other)]
    if kinds[0] != kinds[1]:
        found = " and ".join(f"{kind} of {size}" for kind, size in kinds)
        raise InputError(f"merge: found {found}; expected two beliefs of one kind and size")
    for name in (field.name for field in fields(one) if field.name.startswith(("prior", "noise"))):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            raise InputError(f"merge: found {name} {mine} and {theirs}; expected one. Update both from the same prior")


def _checked_factor(factor: ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    kept = np.asarray(factor, dtype=np.float64)
    if kept.shape not in ((), shape) or not np.all((kept >= 0) & (kept <= 1)):
        expected = "one number in [0, 1]" + (f", or one per action, shape {shape}" if shape else "")
        raise InputError(f"discount: found factor {factor!r}; expected {expected}")
    return kept


def _checked_rows(
    k: int, action: ArrayLike, reward: ArrayLike, weight: ArrayLike | None
) -> tuple[IntArray, FloatArray, FloatArray]:
    actions = np.asarray(action)
    if actions.ndim != 1 or (actions.size and actions.dtype.kind not in "iu"):
        raise InputError(f"action: found {actions.dtype} of shape {actions.shape}; expected integer indices (n,)")
    _reject("action", actions, (actions >= 0) & (actions < k), f"an index in 0..{k - 1}", "Map action labels to 0..k-1.")
    return actions.astype(np.int64), *_checked_reward(len(actions), reward, weight)


def _checked_reward(n: int, reward: ArrayLike, weight: ArrayLike | None) -> tuple[FloatArray, FloatArray]:
    rewards = _finite("reward", reward, (n,), "Leave out rows whose reward is not known yet.")
    if weight is None:
        return rewards, np.ones(n)
    weights = _finite("weight", weight, (n,), "One weight per row.")
    _reject("weight", weights, weights >= 0, "a weight of at least 0", "Evidence is taken back by `discount`.")
    return rewards, weights


def _reject(name: str, values: Any, good: BoolArray, expected: str, remedy: str) -> None:
    """Raise InputError at the first entry that is not good."""
    if not good.all():
        entry = int(np.argmin(good))
        raise InputError(f"{name}, entry {entry}: found {values[entry]}; expected {expected}. {remedy}")
