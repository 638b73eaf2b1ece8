"""Cost of deciding and of learning: `python -m benchmarks.bandits [--rounds 1000000]`. One JSON line per figure.

Peers (Vowpal Wabbit's Python binding, LightGBM called bare) run beside ours, in the same process and on the same data, where they
are installed. Decisions: medians over many repetitions. Learning: one run each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bandits.batch import DecisionBatch
from bandits.features import FeatureSchema, Number
from bandits.learners import DR, IPS
from bandits.oracles import BoostedTrees
from bandits.policy import EpsilonGreedy, Floor, Policy, Softmax
from bandits.reward_models import fit_scorer, logged_features
from bandits.sampling import Salt, choose, quantise
from bandits.scorers import Linear
from ope.data import LoggedData
from ope.simulate import World, softmax

ACTIONS, FEATURES = 10, 20


def show(figure: str, **numbers: float | str) -> None:
    """One figure as one JSON line."""
    print(json.dumps({"figure": figure} | {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}), flush=True)


def microseconds(work: Callable[[], object], repeats: int = 2000, rounds: int = 15) -> float:
    """Median CPU microseconds of one call."""
    work()
    costs = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            work()
        costs.append((time.process_time() - start) / repeats * 1e6)
    return statistics.median(costs)


def deciding() -> None:
    """From ready arrays, and from a request's dictionaries, to a drawn action."""
    rng = np.random.default_rng(0)
    schema = FeatureSchema(action=tuple(Number(f"f{i}") for i in range(FEATURES)))
    request = [[{f"f{i}": float(rng.normal()) for i in range(FEATURES)} for _ in range(ACTIONS)]]
    scorer = Linear(np.zeros(1), np.empty((0, 0)), rng.normal(size=FEATURES))
    batch, salt = schema.batch([{}], request), Salt(1, b"k" * 32)

    def decide(policy: Policy, batch: DecisionBatch) -> int:
        shares = quantise(policy.propensities(batch)[0].tolist())
        return choose(shares, salt.uniform("tenant", "018f3c3e-7a1b-7cc2-9d6e-0123456789ab"))

    greedy, soft = EpsilonGreedy(scorer, 0.02), Floor(Softmax(scorer), 0.02)  # VW explores by epsilon, too
    show("decide from arrays", cpu_us=microseconds(lambda: decide(greedy, batch)), bound_us=15.0)
    show("decide from a request", cpu_us=microseconds(lambda: decide(greedy, schema.batch([{}], request)), 1000), bound_us=40.0)
    show("decide from arrays, softmax and floor", cpu_us=microseconds(lambda: decide(soft, batch)))
    if importlib.util.find_spec("vowpalwabbit"):
        vw: Any = _workspace("--cb_explore_adf --epsilon 0.02")
        lines = [f"|a {' '.join(f'{name}:{value:.6f}' for name, value in fields.items())}" for fields in request[0]]
        show("vw decide from text", cpu_us=microseconds(lambda: vw.predict(lines), 500))
        parsed = vw.parse(lines)
        show("vw decide, parsed", cpu_us=microseconds(lambda: vw.predict(parsed), 500))
    if importlib.util.find_spec("mabwiser"):
        from mabwiser.mab import MAB, LearningPolicy

        arms = list(range(ACTIONS))
        mab = MAB(arms, LearningPolicy.LinUCB(alpha=1.0))
        mab.fit(rng.integers(0, ACTIONS, 2000), rng.random(2000), rng.normal(size=(2000, FEATURES)))
        context = rng.normal(size=(1, FEATURES))
        show("mabwiser LinUCB decide", cpu_us=microseconds(lambda: mab.predict(context), 200))


def learning(rounds: int) -> None:
    """Softmax-linear learners and a boosted oracle on one simulated log, with the true value of what they learned."""
    world, rng = World.random(FEATURES, ACTIONS, 0), np.random.default_rng(1)
    context = world.contexts(rounds, rng)
    data = world.log(context, softmax(0.3 * context @ world.coefficient), rng)
    test = DecisionBatch.of(world.contexts(50_000, np.random.default_rng(9)), np.ones((50_000, ACTIONS), dtype=np.bool_))

    def value(propensities: Callable[[DecisionBatch], Any], rows: int = 50_000) -> float:
        part = test.rows(slice(0, rows))
        return float((propensities(part) * world.q(part.context)).sum(axis=1).mean())

    for learner in (IPS(), DR()):
        start = time.process_time()
        policy = learner.fit(data, k=ACTIONS)
        cpu = time.process_time() - start
        values = {"value": value(policy.propensities), "value_on_3000": value(policy.propensities, 3000)}
        name = f"learn {learner.name}"
        show(name, cpu_s=cpu, rounds_per_cpu_s=rounds / cpu, **values)
    if importlib.util.find_spec("vowpalwabbit"):
        vw_learning(data, min(rounds, 200_000), value)
    trees(data)


def vw_learning(data: LoggedData, rounds: int, value: Callable[..., float]) -> None:
    """VW's cb_adf on examples that were parsed before the clock starts; valued on 3,000 contexts."""
    for kind in ("ips", "mtr", "dr"):
        vw: Any = _workspace(f"--cb_explore_adf --epsilon 0 --cb_type {kind} -q sa")
        cpu = 0.0
        for start in range(0, rounds, 2000):
            examples = [vw.parse(_lines(data, row)) for row in range(start, start + 2000)]
            begun = time.process_time()
            for example in examples:
                vw.learn(example)
            cpu += time.process_time() - begun
            for example in examples:
                vw.finish_example(example)
        show(
            f"vw cb_adf {kind}",
            cpu_s=cpu,
            rounds_per_cpu_s=rounds / cpu,
            rounds=rounds,
            value_on_3000=value(lambda batch, vw=vw: _predicted(vw, batch), 3000),
        )


def trees(data: LoggedData) -> None:
    """Our oracle against LightGBM called bare, with the same settings, on the same matrix."""
    import lightgbm

    oracle = BoostedTrees()
    start = time.process_time()
    fit_scorer(oracle, data, ACTIONS)
    ours = time.process_time() - start
    features = logged_features(DecisionBatch.of_log(data, ACTIONS), data)
    settings = {
        "objective": "regression", "num_leaves": 31, "learning_rate": 0.1, "num_threads": 1, "verbosity": -1, "seed": 0,
        "deterministic": True, "force_row_wise": True, "min_data_in_leaf": 0, "min_data_in_bin": 1, "feature_pre_filter": False,
        "min_data_per_group": 1, "cat_smooth": 1.0,
        "min_sum_hessian_in_leaf": oracle.min_leaf * (1 - 1e-5),
    }  # fmt: skip
    start = time.process_time()
    lightgbm.train(settings, lightgbm.Dataset(features, data.reward, categorical_feature=[0], params=settings), oracle.trees)
    bare = time.process_time() - start
    show("boosted oracle", cpu_s=ours, bare_cpu_s=bare, ratio=ours / bare, bound_ratio=1.3)


def _predicted(workspace: Any, batch: DecisionBatch) -> Any:
    actions = [f"|a a{action}" for action in range(ACTIONS)]
    return np.array([workspace.predict([_shared(context), *actions]) for context in batch.context])


def _workspace(arguments: str) -> Any:
    import vowpalwabbit

    return vowpalwabbit.Workspace(f"{arguments} --quiet")


def _shared(context: Any) -> str:
    return "shared |s " + " ".join(f"f{i}:{x:.5f}" for i, x in enumerate(context))


def _lines(data: LoggedData, row: int) -> list[str]:
    assert data.context is not None
    label = f"0:{-data.reward[row]:.1f}:{data.propensity[row]:.6f} "
    return [_shared(data.context[row]), *(f"{label if a == data.action[row] else ''}|a a{a}" for a in range(ACTIONS))]


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1_000_000)
    options = parser.parse_args()
    deciding()
    learning(options.rounds)


if __name__ == "__main__":
    main()
