"""A bandit's log as decisions of one step: a method of the online family learns from it, and what it learned serves without torch.

The logging policy stands where the policy of the last batch does, with the vectors that it logged. MDPO is then inverse propensity
scoring under an exact KL to the logging policy, ControlPPO the clipped form of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn

from bandits.policy import Softmax
from bandits.scorers import Perceptron
from ope.data import DataError, FloatArray, InputError, IntArray, LoggedData
from ope.primitives.divergences import k3
from rl_core.families.offline import mean_of
from rl_core.families.online import CreditedRows, OnlineMethod, Plan, WithUpdate
from rl_core.loss import Loss, total
from rl_core.methods.mdpo import MDPO
from rl_core.models.distributions import Categorical
from rl_core.models.mlp import Sizes
from rl_core.models.policies import ChoicePolicy

NEAR = 1e-3
"""Mean KL, in nats, between the logging policy and the one that learning begins with."""


def learn_choices(
    data: LoggedData,
    method: OnlineMethod = MDPO(),  # noqa: B008  # frozen
    *,
    steps: int = 500,
    rate: float = 3e-3,
    width: int = 32,
    layers: int = 2,
    seed: int = 0,
    progress: float = 0.0,
) -> Softmax:
    """A softmax of a perceptron, by `steps` steps of Adam on the method's `policy_loss`. Put a floor on it before it serves.

    Advantages are rewards less their mean, standardised over the rows that the method's plan says; minibatches, the bound on
    gradients, `anneal` and `kl_stop` are the plan's, too. Before that the network is fitted to the logged vectors, in at most as
    many steps again: a method that is held near the last policy by clips alone must begin there.

    `progress` in [0, 1]: of the method's own schedule; MDPO's weight of the KL is 1 / (step·(1 - progress)). Sample weights count:
    of n rows, a row stands for its share of the weights, rounded up or down at random. Features that never vary get no weight.

    Raises InputError for a log without contexts or whole vectors, with vectors that hold a 0, with action features, with sets of
    actions that differ; and for a method that moves the policy by itself.
    """
    for name, value, least in (("steps", steps, 1), ("width", width, 1), ("layers", layers, 0), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: found {value}; expected at least {least}")
    if not (rate > 0 and 0 <= progress <= 1):
        raise InputError(f"rate, progress: found {rate}, {progress}; expected above 0, and from 0 to 1")
    if isinstance(method, WithUpdate):
        raise InputError(
            f"found {type(method).__name__}, which moves the policy by itself, around the one that acted; expected a method whose "
            "loss alone says where to, such as MDPO or ControlPPO"
        )
    context, vectors = checked(data)
    rows = weighted(data, seed)
    centre, scale = scaling(context[rows])
    batch, old = credited((context[rows] - centre) / scale, data.action[rows], data.reward[rows], vectors[rows])
    batch = batch.standardised() if method.plan.standardize == "batch" else batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = ChoicePolicy(Sizes(context.shape[1], vectors.shape[1], width, layers)).double()
    draw = Generator().manual_seed(seed + 1)
    _begin(policy, batch, old, method.plan, steps, rate, draw)
    _learn(policy, method, batch, old, steps, rate, progress, draw)
    return Softmax(exported(policy, centre, scale))


def exported(policy: ChoicePolicy, centre: FloatArray | None = None, scale: FloatArray | None = None) -> Perceptron:
    """The logits of a policy as a scorer on NumPy alone, in float64.

    centre, scale (S,): what its observations were shifted and divided by, which goes into the first layer; an infinite scale takes
    an observation out. Raises InputError for a body that is not linear layers with tanh, or with ReLU, between them.
    """
    linear, between = list(policy.body)[::2], list(policy.body)[1::2]
    layers = [one for one in linear if isinstance(one, nn.Linear)]
    activation: Literal["relu", "tanh"] = "relu" if between and isinstance(between[0], nn.ReLU) else "tanh"
    wanted = nn.ReLU if activation == "relu" else nn.Tanh
    if not len(layers) == len(linear) == len(between) + 1 or not all(isinstance(one, wanted) for one in between):
        raise InputError(f"found a body {policy.body}; expected linear layers with tanh, or with ReLU, between them")
    weights = [np.asarray(one.weight.detach().cpu().double().numpy().T) for one in layers]
    biases = [np.asarray(one.bias.detach().cpu().double().numpy()) for one in layers]
    if scale is not None:
        weights[0] = weights[0] / scale[:, None]
    if centre is not None:
        biases[0] = biases[0] - centre @ weights[0]
    return Perceptron(tuple(weights), tuple(biases), activation)


def checked(data: LoggedData) -> tuple[FloatArray, FloatArray]:
    """Contexts (n, d) and logged vectors (n, k). Raises DataError where no policy of contexts alone can be learned from the log."""
    if data.context is None or not data.context.shape[1]:
        raise DataError("context", "none", "features (n, d)", "Without any the best policy is one action: see `bandits.learners`.")
    if data.action_features is not None and data.action_features.shape[2]:
        raise DataError(
            "action_features", f"{data.action_features.shape[2]} of each action", "none: perceptrons score from the context alone",
            "Put what is known of fixed actions into the context, or learn with `bandits.learners`.",
        )  # fmt: skip
    if data.eligible is not None and not data.eligible.all():
        row, action = (int(one) for one in np.argwhere(~data.eligible)[0])
        raise DataError(
            "eligible", f"action {action} not eligible", "every action in every row, so that vectors are of one set", "Learn with "
            "`bandits.learners`, which know sets that differ; or `take` the rows of one set, and leave out the columns of others.",
            row=row,
        )  # fmt: skip
    if data.propensities is None:
        raise DataError(
            "propensities", "none", "the whole vectors of the logging policy (n, k)", "Log all shares, as the service does; or "
            "learn with `bandits.learners`, which need the logged action's propensity alone.",
        )  # fmt: skip
    if not data.propensities.min() > 0:
        row, action = (int(one) for one in np.argwhere(data.propensities <= 0)[0])
        raise DataError(
            "propensities", f"0 for action {action}", "above 0 for every action: what was never done teaches nothing", "Log with a "
            "floor (`bandits.policy.Floor`), or leave out the columns of actions that were not to be had.", row=row,
        )  # fmt: skip
    return data.context, data.propensities


def weighted(data: LoggedData, seed: int) -> IntArray:
    """Numbers of rows (n,), row i floor or ceil(n·w_i / Σw) times, by systematic resampling: of equal weights each row once."""
    if data.sample_weight is None:
        return np.arange(data.n)
    edges = np.cumsum(data.sample_weight) * (data.n / data.sample_weight.sum())
    points = np.arange(data.n) + np.random.default_rng(seed).random()
    return np.minimum(np.searchsorted(edges, points), data.n - 1)


def scaling(context: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and spread (d,) of features (n, d); infinite where nothing varies: no weight of it was learned, so it gets none."""
    centre, spread = context.mean(axis=0), context.std(axis=0)
    return centre, np.where(spread > 1e-9 * np.abs(centre), spread, np.inf)


def credited(context: FloatArray, action: IntArray, reward: FloatArray, vectors: FloatArray) -> tuple[CreditedRows, Categorical]:
    """Decisions as rows with credit, and who took them: rewards less their mean, since an episode ends with its only one."""
    old = Categorical(torch.as_tensor(vectors).log())
    one_hot = nn.functional.one_hot(torch.as_tensor(action), vectors.shape[1]).double()
    earned = torch.as_tensor(reward)
    mean = earned.mean().expand_as(earned)
    return CreditedRows(torch.as_tensor(context), one_hot, old.logp(one_hot), earned - mean, earned, mean), old


def _begin(
    policy: ChoicePolicy, batch: CreditedRows, old: Categorical, plan: Plan, steps: int, rate: float, draw: Generator
) -> None:
    """Fit the network to who acted, as far as it can be."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for rows in _parts(len(batch), plan.minibatch, steps, draw):
        apart = mean_of(old.rows(rows).kl(policy(batch.obs[rows])))
        if float(apart.num.detach() / apart.den) < NEAR:
            return
        _ascend(policy, optimizer, total(Loss((apart,), (-1.0,), {})), plan.grad_clip)


def _learn(
    policy: ChoicePolicy, method: OnlineMethod, batch: CreditedRows, old: Categorical, steps: int, rate: float, progress: float,
    draw: Generator,
) -> None:  # fmt: skip
    """The method's steps, as its trainer takes them on a batch; there is no value function, since nothing follows."""
    plan = method.plan
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate, eps=1e-5)
    for step, rows in enumerate(_parts(len(batch), plan.minibatch, steps, draw)):
        part = batch.rows(rows)
        part = part.standardised() if plan.standardize == "minibatch" else part
        new = policy(part.obs)
        if plan.kl_stop is not None and float(k3(part.logp_behavior, new.logp(part.action).detach()).mean()) > 1.5 * plan.kl_stop:
            return
        if plan.anneal:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        _ascend(policy, optimizer, total(method.policy_loss(part, new, old.rows(rows), progress)), plan.grad_clip)


def _ascend(policy: ChoicePolicy, optimizer: torch.optim.Optimizer, value: Tensor, clip: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    (-value).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(policy.parameters(), clip)
    optimizer.step()


def _parts(count: int, size: int | None, steps: int, draw: Generator) -> Iterator[Any]:
    """Rows of so many steps: all of them, or parts of one order after the other, in which every row is once."""
    left = steps
    while left:
        parts = [slice(None)] if size is None or size >= count else torch.split(torch.randperm(count, generator=draw), size)
        yield from parts[:left]
        left -= len(parts[:left])
