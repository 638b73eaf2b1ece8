"""Gradients: against finite differences, past the bounds, and the identities that the papers state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from ope.primitives import _xp, baselines, divergences, reduce, returns, surrogates, terms, weights

tensor = partial(torch.tensor, dtype=torch.float64)

# Points away from every kink: weights clear of the thresholds 1 and 2, log-ratios inside ±20, chances off 0.
W, R = [0.3, 1.4, 2.7, 0.6], [1.0, -0.5, 2.0, 0.7]
Q, V, UNIT = [0.4, 0.1, 1.1, 0.9], [0.5, 0.3, 0.8, 0.2], [0.9, 0.2, 0.7, 0.4]
P, PI = [0.2, 0.5, 0.7, 0.9], [0.3, 0.4, 0.8, 0.1]
LOGP, LOGP_REF = [[-1.0, -0.4, -2.5], [-3.0, -0.7, -1.1]], [[-0.6, -0.9, -2.0], [-1.5, -1.6, -0.2]]
DIST, DIST_REF = [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], [[0.4, 0.35, 0.25], [0.2, 0.65, 0.15]]
MASK = torch.tensor([[True, False, True], [True, True, False]])
GROUP, ROWS = torch.tensor([4, 4, 9, 4]), torch.tensor([True, True, True, False])
MOMENTS = [[1.2], [0.6], [2.9], [1.1]]
RATIO, ADVANTAGE = [[0.5, 1.1, 2.5], [0.5, 1.1, 4.0]], [[1.0, 2.0, 1.5], [-1.0, -2.0, -1.5]]
ENDS = torch.tensor([[False, True, False], [False, False, True]])
CUT = torch.tensor([[False, False, True], [True, False, False]])


def two_terms(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return lambda values: reduce.divide(function(values, MASK, **kwargs))


SMOOTH: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "as_float32": (_xp.as_float32, [W]),
    "importance": (weights.importance, [PI, P]),
    "log_ratio": (weights.log_ratio, [LOGP, LOGP_REF]),
    "ratio": (weights.ratio, [LOGP, LOGP_REF]),
    "clip": (partial(weights.clip, low=0.5, high=2.0), [W]),
    "truncate": (partial(weights.truncate, threshold=1.0), [W]),
    "shrink": (partial(weights.shrink, strength=2.0), [W]),
    "shrink inf": (partial(weights.shrink, strength=float("inf")), [W]),
    "saturate": (partial(weights.saturate, strength=0.3), [W]),
    "exp_advantage": (partial(weights.exp_advantage, temperature=0.5, high=20.0), [R]),
    "per_decision": (weights.per_decision, [LOGP]),
    "sequence_ratio sum": (lambda x: weights.sequence_ratio(x, MASK, length_normalized=False), [LOGP]),
    "sequence_ratio mean": (lambda x: weights.sequence_ratio(x, MASK, length_normalized=True), [LOGP]),
    "effective_sample_size": (weights.effective_sample_size, [W]),
    "dm": (terms.dm, [V]),
    "ips": (terms.ips, [W, R]),
    "snips": (terms.snips, [W, R]),
    "control_variate": (terms.control_variate, [W, R]),
    "dr": (terms.dr, [W, R, Q, V]),
    "sndr": (terms.sndr, [W, R, Q, V]),
    "log_smoothing": (partial(terms.log_smoothing, strength=0.5), [W, UNIT]),
    "implicit_exploration": (partial(terms.implicit_exploration, floor=0.1), [PI, P, R]),
    "group_center": (lambda reward: baselines.group_center(reward, GROUP, ROWS), [R]),
    "leave_one_out": (lambda reward: baselines.leave_one_out(reward, GROUP, ROWS), [R]),
    "optimal_control_variate": (baselines.optimal_control_variate, MOMENTS),
    "k1": (divergences.k1, [LOGP, LOGP_REF]),
    "k2": (divergences.k2, [LOGP, LOGP_REF]),
    "k3": (divergences.k3, [LOGP, LOGP_REF]),
    "kl": (divergences.kl, [DIST, DIST_REF]),
    "entropy": (divergences.entropy, [DIST]),
    "total_variation": (divergences.total_variation, [DIST, DIST_REF]),
    "masked_sum": (lambda values: reduce.masked_sum(values, MASK, axis=-1), [LOGP]),
    "reduce_terms token": (two_terms(reduce.reduce_terms, scope="token"), [LOGP]),
    "reduce_terms sequence": (two_terms(reduce.reduce_terms, scope="sequence"), [LOGP]),
    "mask_outside": (partial(weights.mask_outside, low=0.5, high=2.0), [W]),
    "group_std": (lambda reward: baselines.group_std(reward, GROUP, ROWS, unbiased=True)[:2], [R]),  # not where it is 0
    "weighted_group_center": (lambda reward, w: baselines.weighted_group_center(reward, w, GROUP, ROWS), [R, W]),
    "group_soft_value": (lambda reward: baselines.group_soft_value(reward, GROUP, ROWS, 0.5), [R]),
    "reduce_terms sum": (two_terms(reduce.reduce_terms, scope="sequence_sum", length=5.0), [LOGP]),
    "expectile": (partial(divergences.expectile, level=0.7), [ADVANTAGE]),
    "gaussian_kl": (divergences.gaussian_kl, [LOGP, DIST, LOGP_REF, DIST_REF]),
    "mirror_step": (partial(surrogates.mirror_step, step=0.7), [DIST, ADVANTAGE]),
    "clipped": (partial(surrogates.clipped, low=0.8, high=1.2), [RATIO, ADVANTAGE]),
    "dual_clipped": (partial(surrogates.dual_clipped, low=0.8, high=1.2, bound=3.0), [RATIO, ADVANTAGE]),
    "reverse_sum": (returns.reverse_sum, [LOGP, RATIO]),
    "discounted": (lambda reward: returns.discounted(reward, ENDS, 0.9), [LOGP]),
    "temporal_difference": (lambda r, v, after: returns.temporal_difference(r, v, after, ENDS, 0.9), [LOGP, LOGP_REF, RATIO]),
    "gae": (lambda r, v, after: returns.gae(r, v, after, ENDS, CUT, 0.9, 0.8), [LOGP, LOGP_REF, RATIO]),
    "vtrace": (lambda w, r, v: returns.vtrace(w, r, v, v, ENDS, CUT, 0.9), [RATIO, LOGP, LOGP_REF]),
    "retrace": (lambda w, r, q: returns.retrace(w, r, q, q, ENDS, CUT, 0.9), [[[0.5, 0.6, 2.5], [0.5, 0.7, 4.0]], LOGP, LOGP_REF]),
    "divide": (lambda num, den: reduce.divide(terms.Terms(num, den)), [R, W]),
}


@pytest.mark.parametrize(("function", "inputs"), SMOOTH.values(), ids=SMOOTH)
def test_gradient_matches_finite_differences(function: Callable[..., Any], inputs: list[Any]) -> None:
    given = [tensor(values, requires_grad=True) for values in inputs]
    assert gradcheck(function, given)
    assert torch.autograd.grad(function(*given).square().sum(), given[0])[0].any()  # the check was not of a constant


def gradient(function: Callable[..., Any], *inputs: Any) -> list[Any]:
    given = [tensor(values, requires_grad=True) for values in inputs]
    return [found.tolist() for found in torch.autograd.grad(function(*given).sum(), given)]


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [  # inside the bound the derivative is the function's own; beyond it, exactly 0
        (partial(weights.clip, low=0.5, high=2.0), [[0.1, 1.0, 9.0]], [[0.0, 1.0, 0.0]]),
        (partial(weights.truncate, threshold=2.0), [[1.0, 9.0]], [[1.0, 0.0]]),
        (weights.log_ratio, [[-1.0, -50.0, -1.0], [-1.5, -1.0, -50.0]], [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]),
        (partial(weights.ratio, bound=1.0), [[-1.0, -5.0, -1.0], [-1.0, -1.0, -5.0]], [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]),
        (partial(weights.exp_advantage, temperature=0.5, high=20.0), [[0.0, 3.0]], [[2.0, 0.0]]),  # exp(3/.5) = 403
        (partial(weights.per_decision, bound=1.0), [[[0.0, 5.0]]], [[[1.0, 0.0]]]),
        (lambda x: weights.sequence_ratio(x, x > -99, length_normalized=False), [[[15.0, 9.0]]], [[[0.0, 0.0]]]),
        (divergences.k1, [[-50.0], [-1.0]], [[0.0], [0.0]]),
        (divergences.k2, [[-50.0], [-1.0]], [[0.0], [0.0]]),
        (divergences.k3, [[-50.0], [-1.0]], [[0.0], [0.0]]),
        (partial(weights.shrink, strength=0.0), [[0.0, 2.0]], None),
    ],
    ids=["clip", "truncate", "log_ratio", "ratio", "exp_advantage", "per_decision", "sequence_ratio", "k1", "k2", "k3", "shrink 0"],
)
def test_no_gradient_flows_beyond_the_bound(function: Callable[..., Any], inputs: list[Any], expected: Any) -> None:
    if expected is None:  # a constant: it does not depend on its input at all
        assert not function(tensor(inputs[0], requires_grad=True)).requires_grad
    else:
        assert gradient(function, *inputs) == expected


@pytest.mark.parametrize("function", [partial(weights.switch, threshold=1.0), _xp.stop_gradient], ids=["switch", "stop_gradient"])
def test_functions_that_carry_no_gradient(function: Callable[..., Any]) -> None:
    assert not function(tensor(W, requires_grad=True)).requires_grad


def test_shrink_stops_growing_at_the_root_of_its_strength() -> None:
    # d/dw L·w/(w² + L) = L(L - w²)/(w² + L)²: for L = 4, 4·3/25 at 1, 0 at 2, -4·5/169 at 3
    (found,) = gradient(partial(weights.shrink, strength=4.0), [1.0, 2.0, 3.0])
    assert found == pytest.approx([12 / 25, 0.0, -20 / 169], abs=1e-15)


# The table of KL estimators: a softmax over six actions, every action enumerated, so that expectations are sums.
LOGITS, REF = [0.3, -1.2, 0.8, 0.0, -0.4, 1.1], [-0.5, 0.4, 0.1, 0.9, -1.0, 0.2]


def expected_gradient(estimator: Callable[..., Any], weight: Callable[..., Any] | None = None) -> Any:
    """E over π of the estimator's gradient: the sampling probabilities are held fixed."""
    logits = tensor(LOGITS, requires_grad=True)
    logp, ref = torch.log_softmax(logits, 0), torch.log_softmax(tensor(REF), 0)
    each = estimator(logp, ref)
    if weight is not None:
        each = each * weight(logp, logp.detach())
    return torch.autograd.grad((logp.detach().exp() * each).sum(), logits)[0]


def divergence_gradient(*, reverse: bool) -> Any:
    """Gradient of KL(π‖ref), or of KL(ref‖π), written out from its definition."""
    logits = tensor(LOGITS, requires_grad=True)
    logp, ref = torch.log_softmax(logits, 0), torch.log_softmax(tensor(REF), 0)
    value = (logp.exp() * (logp - ref)).sum() if reverse else (ref.exp() * (ref - logp)).sum()
    return torch.autograd.grad(value, logits)[0]


def test_k1_as_a_loss_has_no_expected_gradient() -> None:
    torch.testing.assert_close(expected_gradient(divergences.k1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("estimator", "weight", "reverse"),
    [(divergences.k2, None, True), (divergences.k3, None, False), (divergences.k3, weights.ratio, True)],
    ids=["k2 gives KL(pi|ref)", "k3 gives KL(ref|pi)", "ratio times k3 gives KL(pi|ref)"],
)
def test_expected_gradients_of_the_kl_estimators(estimator: Callable[..., Any], weight: Any, reverse: bool) -> None:
    torch.testing.assert_close(expected_gradient(estimator, weight), divergence_gradient(reverse=reverse), rtol=1e-12, atol=1e-14)


def test_gradient_of_kl_over_distributions_is_the_definition() -> None:
    logits = tensor(LOGITS, requires_grad=True)
    value = divergences.kl(torch.softmax(logits, 0), torch.softmax(tensor(REF), 0))
    found = torch.autograd.grad(value, logits)[0]
    torch.testing.assert_close(found, divergence_gradient(reverse=True), rtol=1e-12, atol=1e-14)


def test_gradient_of_snips_is_the_centred_score() -> None:
    # V = sum w r / sum w with w = exp(logp - logp_behavior) moves by sum w (r - V) d logp / sum w
    logp = tensor([-1.0, -0.3, -2.0, -0.8], requires_grad=True)
    weight = weights.ratio(logp, tensor([-0.7, -0.9, -1.2, -0.8]))
    column = terms.snips(weight, tensor(R)).sum(0)
    value = reduce.divide(terms.Terms(column[0], column[1]))
    found = torch.autograd.grad(value, logp)[0]
    w = weight.detach()
    torch.testing.assert_close(found, w * (tensor(R) - value.detach()) / w.sum(), rtol=1e-12, atol=1e-15)


def test_on_policy_gradient_of_snips_is_the_group_centred_reward() -> None:
    logp = tensor([-1.0, -0.3, -2.0, -0.8], requires_grad=True)
    column = terms.snips(weights.ratio(logp, logp.detach()), tensor(R)).mean(0)
    found = torch.autograd.grad(column[0] / column[1], logp)[0]
    one_group, everyone = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(found, baselines.group_center(tensor(R), one_group, everyone) / 4, rtol=1e-12, atol=1e-15)


def test_a_constant_baseline_leaves_the_expected_ips_gradient_alone() -> None:
    # E over the log of w·grad log pi = grad of sum_a pi(a) = 0, every action enumerated
    logits, behavior = tensor(LOGITS, requires_grad=True), torch.log_softmax(tensor(REF), 0)
    weight = weights.ratio(torch.log_softmax(logits, 0), behavior)
    column = terms.ips(weight, torch.full((6,), 3.7, dtype=torch.float64))[:, 0]
    found = torch.autograd.grad((behavior.exp() * column).sum(), logits)[0]
    torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
