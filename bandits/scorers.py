"""Scores of actions, from which policies are made: linear, perceptrons, boosted trees, or several. Frozen arrays and settings.

One row scores to the same bits as a million, and as one padded to a longer set: every score is a dot product of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from bandits.batch import DecisionBatch
from ope.data import FloatArray, InputError, checked_finite

LARGEST_LOGIT = 36.0
"""The log-odds of 1 - 2e-16, beyond which float64 cannot tell a probability from 1."""


class Scorer(Protocol):
    """A number for every action of every request: the higher, the better."""

    kind: ClassVar[str]

    def scores(self, batch: DecisionBatch) -> FloatArray:
        """Scores (n, k); what stands at ineligible actions is ignored."""
        ...


def frozen(values: FloatArray, order: Literal["C", "F"] = "C") -> FloatArray:
    """A read-only copy of its own strides: others would add in another order, and a policy never changes."""
    copy = np.array(values, dtype=np.float64, order=order)
    copy.setflags(write=False)
    return copy


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """bias_a + x·W_a + φ(x, a)·u, as it is or through the logistic function."""

    bias: FloatArray
    """(k,), or (1,) for all alike where actions have no names"""
    context_weights: FloatArray
    """W (d, k), or (0, 0)"""
    action_weights: FloatArray
    """u (p,), or (0,)"""
    link: Literal["identity", "logistic"] = "identity"
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        if self.link not in ("identity", "logistic"):
            raise InputError(f"found link={self.link!r}; expected 'identity' or 'logistic'")
        for name in ("bias", "action_weights"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        object.__setattr__(self, "context_weights", frozen(self.context_weights, order="F"))

    def scores(self, batch: DecisionBatch) -> FloatArray:
        """Scores (n, k). Raises InputError where the batch has other features or actions than the weights."""
        try:
            if len(self.action_weights):
                result = np.vecdot(batch.action_features, self.action_weights)
                result += self.bias
            else:
                result = np.zeros((len(batch), 1)) + self.bias
            if self.context_weights.size:
                result = result + np.vecdot(batch.context[:, None, :], self.context_weights.T)
        except ValueError:
            raise self._mismatch(batch) from None
        if result.shape != batch.eligible.shape or (not len(self.action_weights) and batch.action_features.shape[2]):
            result = self._alike(result, batch)
        return 1 / (1 + np.exp(-np.clip(result, -700, 700))) if self.link == "logistic" else result

    def _alike(self, result: FloatArray, batch: DecisionBatch) -> FloatArray:
        """One bias for all actions is a column that widens; anything else that does not fit is a mistake."""
        if len(self.bias) > 1 or self.context_weights.size or batch.action_features.shape[2] != len(self.action_weights):
            raise self._mismatch(batch)
        return np.repeat(result, batch.eligible.shape[1], axis=1)

    def _mismatch(self, batch: DecisionBatch) -> InputError:
        d, k, p = batch.context.shape[1], batch.eligible.shape[1], batch.action_features.shape[2]
        return InputError(
            f"found {d} context features, {k} actions, {p} action features; expected weights for {len(self.context_weights)}, "
            f"{len(self.bias)} and {len(self.action_weights)}: score with the schema that the policy was fitted on"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Perceptron:
    """Layers h ↦ f(h·W + b) of the context, the last without f, so that scores may bend: `rl_core.one_step` learns some."""

    weights: tuple[FloatArray, ...]
    """W (in, out) of every layer: d goes into the first, k come out of the last"""
    biases: tuple[FloatArray, ...]
    """b (out,) of every layer"""
    activation: Literal["relu", "tanh"] = "tanh"
    """f"""
    kind: ClassVar[str] = "perceptron"

    def __post_init__(self) -> None:
        if self.activation not in ("relu", "tanh"):
            raise InputError(f"found activation={self.activation!r}; expected 'relu' or 'tanh'")
        # By columns, as `Linear` has its weights: each output is a dot product along memory.
        object.__setattr__(self, "weights", tuple(frozen(weight, order="F") for weight in self.weights))
        object.__setattr__(self, "biases", tuple(frozen(bias) for bias in self.biases))
        found = [(weight.shape, bias.shape) for weight, bias in zip(self.weights, self.biases, strict=False)]
        good = len(self.weights) == len(self.biases) > 0
        good = good and all(len(w) == 2 and w[1] > 0 and b == w[1:] for w, b in found)
        if not good or any(before[1] != after[0] for (before, _), (after, _) in pairwise(found)):
            raise InputError(
                f"found {len(self.weights)} weights and {len(self.biases)} biases, of shapes {found}; "
                "expected as many of both, at least one: (in, out) and (out,), where what goes out of a layer goes into the next"
            )

    def scores(self, batch: DecisionBatch) -> FloatArray:
        """Scores (n, k). Raises InputError where the batch has other features or actions than the layers."""
        d, k, p = batch.context.shape[1], batch.eligible.shape[1], batch.action_features.shape[2]
        inputs, outputs = len(self.weights[0]), len(self.biases[-1])
        if (d, k, p) != (inputs, outputs, 0):
            raise InputError(
                f"found {d} context features, {k} actions, {p} action features; expected {inputs}, {outputs} and 0: "
                "score with the schema that the policy was fitted on"
            )
        hidden: FloatArray = np.ascontiguousarray(batch.context)  # other strides would add in another order
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer and self.activation == "tanh":
                np.tanh(hidden, out=hidden)
            elif layer:
                np.maximum(hidden, 0.0, out=hidden)
            # A dot product for each output, which knows nothing of other rows: the bits of a matrix product depend on their number.
            hidden = np.vecdot(hidden[:, None, :], weight.T)
            hidden += bias
        return hidden


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """LightGBM trees on (action index, context, action features), all actions of a batch as one matrix."""

    model: str
    """LightGBM text"""
    _booster: list[Any] = field(init=False, repr=False, default_factory=list)
    """What LightGBM made of it, once it was asked for: it goes when the policy goes."""
    kind: ClassVar[str] = "trees"

    def scores(self, batch: DecisionBatch) -> FloatArray:
        """Scores (n, k). One thread, since a service scores many requests at once."""
        if not self._booster:
            from bandits.oracles import lightgbm_module

            self._booster.append(lightgbm_module().Booster(model_str=self.model))
        features = joint_features(batch)
        flat = self._booster[0].predict(features.reshape(-1, features.shape[-1]), num_threads=1)
        return np.asarray(flat, dtype=np.float64).reshape(features.shape[:2])


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A map of predictions, linear between knots x (m,), increasing, and y (m,), non-decreasing, and constant beyond them."""

    x: FloatArray
    y: FloatArray
    log_odds: bool = False
    """True if knots are log-odds: a Platt map is a straight line of log-odds, so two knots hold it exactly."""

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            knots = checked_finite(name, getattr(self, name), (None,), "One entry per knot.").copy()
            knots.setflags(write=False)
            object.__setattr__(self, name, knots)
        if self.x.shape != self.y.shape or len(self.x) == 0 or np.any(np.diff(self.x) <= 0) or np.any(np.diff(self.y) < 0):
            raise InputError(f"found knots x {self.x}, y {self.y}; expected equal lengths, x increasing and y non-decreasing")

    def __call__(self, predicted: ArrayLike) -> FloatArray:
        """Calibrated predictions, of the shape of `predicted`. Raises InputError for log-odds of what is no probability."""
        values = np.asarray(predicted, dtype=np.float64)
        if not self.log_odds:
            return np.interp(values, self.x, self.y)
        # By numpy alone: scipy would double the time that a process takes to start and to answer a policy's golden requests.
        odds = np.interp(log_odds(values), self.x, self.y)
        with np.errstate(over="ignore"):  # of log-odds below -700: the probability is 0
            calibrated: FloatArray = 1 / (1 + np.exp(-odds))
        return calibrated


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """Scores through a map that was learned from outcomes, so that they are mean rewards and not only a ranking."""

    scorer: Scorer
    calibration: Calibration
    kind: ClassVar[str] = "calibrated"

    def scores(self, batch: DecisionBatch) -> FloatArray:
        """Scores (n, k)"""
        return self.calibration(self.scorer.scores(batch))


def joint_features(batch: DecisionBatch) -> FloatArray:
    """(action index, context, action features) of every action (n, k, 1 + d + p)."""
    n, k = batch.eligible.shape
    context = np.broadcast_to(batch.context[:, None, :], (n, k, batch.context.shape[1]))
    index = np.broadcast_to(np.arange(k, dtype=np.float64)[None, :, None], (n, k, 1))
    return np.concatenate((index, context, batch.action_features), axis=2)


def log_odds(probability: FloatArray) -> FloatArray:
    """log(p / (1 - p)), within ±LARGEST_LOGIT. Raises InputError for what is no probability."""
    if not np.all((probability >= 0) & (probability <= 1)):
        raise InputError("found predictions outside [0, 1]; expected probabilities. Use isotonic calibration for others")
    with np.errstate(divide="ignore"):  # of 0 and 1: they are clipped
        odds: FloatArray = np.log(probability) - np.log1p(-probability)
    return np.clip(odds, -LARGEST_LOGIT, LARGEST_LOGIT)
