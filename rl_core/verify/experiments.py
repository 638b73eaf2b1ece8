"""The experiments, by the name of the method that they verify. Margins and seeds are those of the methods' pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from ope.data import InputError
from rl_core.families.token import TokenBatch, TokenMethod, credited, loss_and_gradient
from rl_core.methods.asymre import AsymRE
from rl_core.methods.bapo import BAPO, Bounds
from rl_core.methods.grpo import GRPO
from rl_core.methods.opmd import OPMD
from rl_core.methods.rec import REC, VARIANTS
from rl_core.methods.reinforce import REINFORCE
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.token import Schedule
from rl_core.verify import boosting, imitation, mirror, online, traces
from rl_core.verify.arms import Arms
from rl_core.verify.margins import SEEDS, Experiment, Margin, above, at_least, at_most, mean
from rl_core.verify.suite import SUITE
from rl_core.verify.token import TokenArm, passed_at


def addition(method: TokenMethod, seed: int, *, steps: int = 160, sync: int = 20) -> TokenArm:
    """The addition model of the pages: 32 prompts x 8 responses a step, the sampler refreshed every `sync` steps."""
    return TokenArm(method, "addition", Schedule(steps=steps, sync_interval=sync, seed=seed))


def fillers(method: TokenMethod, seed: int) -> TokenArm:
    """BAPO's task, on which failures are longer: 24 prompts x 8 responses a step, 80 steps, refreshed every 20."""
    return TokenArm(method, "fillers", Schedule(steps=80, prompts=24, sync_interval=20, seed=seed))


def _grpo(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    n = len(seeds)
    fresh = [addition(GRPO(), seed, steps=120, sync=1) for seed in seeds]
    stale = [addition(GRPO(), seed) for seed in seeds]
    plain = [addition(REINFORCE(), seed) for seed in seeds]
    rows = arms.run([*fresh, *stale, *plain])
    rises = [passed_at(one, 120) - passed_at(one, 0) for one in rows[:n]]
    kept = [passed_at(one, 160) - passed_at(one, 0) for one in rows[n : 2 * n]]
    return [
        at_least("on-policy: GRPO's rise of pass@1 in 120 steps, mean", mean(rises), 0.06, n),
        at_least("on-policy: the smallest of them", min(rises), 0.03),
        at_least("stale: GRPO's rise of pass@1 in 160 steps, mean", mean(kept), 0.05, n),
        at_most("stale: REINFORCE's pass@1 at step 80, the largest", max(passed_at(one, 80) for one in rows[2 * n :]), 0.20),
    ]


def _reinforce(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    rows = arms.run([addition(REINFORCE(), seed) for seed in seeds])
    return [at_most("stale: pass@1 at step 80, the largest", max(passed_at(one, 80) for one in rows), 0.20)]


STALE: Mapping[str, TokenMethod] = {
    "GRPO": GRPO(),
    "REC-OneSide-NoIS(0.2)": REC(),
    "REC-OneSide-NoIS(0.6, 2.0)": VARIANTS["REC-OneSide-NoIS(0.6, 2.0)"],
    "OPMD": OPMD(),
    "RED-Weight": VARIANTS["RED-Weight"],
}
"""Arms that must survive a stale sampler."""


def _rec(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    n = len(seeds)
    methods = [REINFORCE(), *STALE.values()]
    rows = arms.run([addition(method, seed) for method in methods for seed in seeds])
    by = {name: rows[n * (place + 1) : n * (place + 2)] for place, name in enumerate(STALE)}
    ends = {name: [passed_at(one, 160) for one in some] for name, some in by.items()}
    return [
        at_most("REINFORCE's pass@1 at step 80, the largest", max(passed_at(one, 80) for one in rows[:n]), 0.20),
        *(at_least(f"{name}'s pass@1 at step 160, the smallest", min(some), 0.40) for name, some in ends.items()),
        at_most(
            "GRPO and REC-OneSide-NoIS(0.2) apart, means", abs(mean(ends["GRPO"]) - mean(ends["REC-OneSide-NoIS(0.2)"])), 0.04, n
        ),
    ]


def _opmd(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    rows = arms.run([addition(OPMD(), seed) for seed in seeds])
    return [at_least("stale: pass@1 at step 160, the smallest", min(passed_at(one, 160) for one in rows), 0.40)]


MU, REWARD = np.array([0.3, 0.6, 0.1]), np.array([0.0, 0.8, 1.0])
"""The pages' three-armed bandit: who logged, and what each arm pays."""


def bandit(method: TokenMethod, steps: int = 4000, rate: float = 0.5) -> NDArray[np.float64]:
    """Where a softmax over the bandit's arms ends by exact expectations: arms as rows of one prompt in proportion to the log."""
    arm = np.repeat(np.arange(3), np.round(10 * MU).astype(int))
    batch = TokenBatch(REWARD[arm], np.zeros(len(arm)), np.ones((len(arm), 1), dtype=np.bool_), np.log(MU[arm])[:, None])
    given = credited(method, batch).advantage
    logits = np.zeros(3)
    for _ in range(steps):
        chance = np.exp(logits - logits.max())
        chance /= chance.sum()
        _, gradient = loss_and_gradient(method, replace(batch, advantage=given), np.log(chance)[arm][:, None])
        logits -= rate * (np.bincount(arm, gradient[:, 0], 3) - gradient.sum() * chance)
    chance = np.exp(logits - logits.max())
    return np.asarray(chance / chance.sum())


def _asymre(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    expected = {0.1: 0.80, 0.3: 0.82, 0.5: 0.832, 1.0: 0.7276}
    found = {shift: float(bandit(AsymRE(shift=-shift)) @ REWARD) for shift in expected}
    return [
        Margin(
            f"three arms, shift -{shift}: value", f"{value:.4f} +- 0.0005", f"{found[shift]:.4f}", abs(found[shift] - value) <= 5e-4
        )
        for shift, value in expected.items()
    ]


def synthetic(seed: int, deviation: float, *, swapped: bool = False) -> tuple[TokenBatch, NDArray[np.float64]]:
    """64 prompts x 8 responses, three in ten right, those half as long as others (twice, if swapped); log-ratios of a deviation."""
    rng = np.random.default_rng(seed)
    right = rng.random(512) < 0.3
    short, long = rng.integers(20, 41, 512), rng.integers(40, 81, 512)
    length = np.where(right != swapped, short, long)
    mask = np.arange(80) < length[:, None]
    behavior = np.full(mask.shape, -1.0)
    batch = TokenBatch(right.astype(float), np.repeat(np.arange(64), 8), mask, behavior)
    return batch, behavior + rng.normal(0, deviation, mask.shape)


def searched(method: BAPO, deviation: float, *, swapped: bool = False) -> tuple[Bounds, float]:
    """Bounds that a search finds on such a batch, and the share that it began at."""
    batch, logp = synthetic(0, deviation, swapped=swapped)
    stats = method.statistics(credited(method, batch), logp)
    positive, negative = float(stats["positive"][0]), float(stats["negative"][0])
    return method.search(stats), positive / (positive + negative)


def _bapo(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    return [*_controller(), *_lengths(arms, seeds)]


def _controller() -> list[Margin]:
    """Part 1 of the page: the search on synthetic batches."""
    margins = []
    pages = {
        ("value", 0.1): (0.331, 0.330),
        ("gradient", 0.1): (0.323, 0.361),
        ("value", 0.4): (0.302, 0.314),
        ("gradient", 0.4): (0.215, 0.396),
    }
    for (contribution, deviation), (before, after) in pages.items():
        found, begun = searched(BAPO(contribution=contribution), deviation)  # type: ignore[arg-type]
        near = abs(begun - before) <= 0.03 and abs(found.share - after) <= 0.03
        limits = (contribution, deviation) == ("gradient", 0.4) or (
            found.hit_limit and np.allclose((found.low, found.high), (0.9, 3.0))
        )
        margins.append(
            Margin(
                f"controller, {contribution}, deviation {deviation}", f"{before:.3f} -> {after:.3f} +- 0.03, at the limits",
                f"{begun:.3f} -> {found.share:.3f}, ({found.low:.2f}, {found.high:.2f})", near and limits,
            )
        )  # fmt: skip
        swapped, _ = searched(BAPO(contribution=contribution), 0.1, swapped=True)  # type: ignore[arg-type]
        if deviation == 0.1:
            margins.append(
                Margin(f"controller, {contribution}, lengths swapped", "no step", f"{swapped.steps} steps", swapped.steps == 0)
            )
    return margins


ARMS: Mapping[str, TokenMethod] = {
    "PPO [0.8, 1.2]": GRPO(),
    "BAPO value 0.5": BAPO(target=0.5),
    "BAPO gradient 0.5": BAPO(target=0.5, contribution="gradient"),
    "BAPO value 0.4": BAPO(target=0.4),
    "constant [0.6, 1.2]": GRPO(eps_low=0.4, eps_high=0.2),
    "constant [0.9, 3.0]": GRPO(eps_low=0.1, eps_high=2.0),
}
"""BAPO beside the constants that it must be compared with."""


def _lengths(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    """Part 2 of the page: a stale sampler, and failures that are longer."""
    n = len(seeds)
    rows = arms.run([fillers(method, seed) for method in ARMS.values() for seed in seeds])
    by: dict[str, list[Rows]] = {name: rows[n * place : n * (place + 1)] for place, name in enumerate(ARMS)}
    at40 = {name: [passed_at(one, 40) for one in some] for name, some in by.items()}
    ppo = at40["PPO [0.8, 1.2]"]
    moved = {name: mean([_moves(one) for one in by[name]]) for name in ARMS if name.startswith("BAPO")}
    same = max(abs(a - b) for a, b in zip(at40["BAPO value 0.4"], at40["constant [0.6, 1.2]"], strict=True))
    entropy = [
        bapo[-1]["entropy"] - other[-1]["entropy"] for bapo, other in zip(by["BAPO value 0.5"], by["PPO [0.8, 1.2]"], strict=True)
    ]
    margins = [
        at_most("value 0.4: share of updates on which bounds move", moved["BAPO value 0.4"], 0.05),
        at_most(
            "value 0.4: pass@1 at 40 from constant [0.6, 1.2]'s, the largest", same, 0.0 if moved["BAPO value 0.4"] == 0 else 0.03
        ),
        at_least("value 0.5: share of updates on which bounds move", moved["BAPO value 0.5"], 0.80),
        at_least("gradient 0.5: share of updates on which bounds move", moved["BAPO gradient 0.5"], 0.60),
    ]
    for name in ("BAPO value 0.5", "BAPO gradient 0.5"):
        gains = [a - b for a, b in zip(at40[name], ppo, strict=True)]
        margins += [
            at_least(f"{name}: pass@1 at 40 above PPO's, mean", mean(gains), 0.03, n),
            above(f"{name}: the smallest of them", min(gains)),
        ]
    best = max((name for name in ARMS if name.startswith("constant")), key=lambda name: mean(at40[name]))
    told = ", ".join(f"{mean(at40[name]):.3f} ({name})" for name in (best, "BAPO value 0.5", "BAPO gradient 0.5"))
    return [
        *margins,
        above("value 0.5: entropy at 80 above PPO's, the smallest", min(entropy)),
        Margin("beside its best constant bounds: pass@1 at 40", "is told, whichever is better", told, passed=True),
    ]


def _moves(rows: Rows) -> float:
    """Share of a run's updates on which the search took a step."""
    steps = [row["search_steps"] > 0 for row in rows if "search_steps" in row]
    return sum(steps) / len(steps)


def _ailboost(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    return [*boosting.margins(boosting.measured()), *imitation.margins(arms, seeds)]


def _trpo(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    return [*online.natural(arms, seeds), *traces.truncation(seeds), *traces.off_policy()]


def _mdpo(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    found = mirror.measured(mirror.tables(len(seeds)))
    return [
        *(
            (above if required == 0 else at_least)(f"MDPO (m=10) {name}, mean", found[name], required)
            for name, required in mirror.REQUIRED.items()
        ),
        at_most("MDPO (m=1) apart from the policy gradient, the largest chance", found["m=1 apart from policy gradient"], 1e-9),
        *(online.inner_steps(arms) if find_spec("mujoco") else []),
    ]


EXPERIMENTS: Mapping[str, Experiment] = {
    "REINFORCE": Experiment("a stale sampler and no clip: the policy collapses", SEEDS, _reinforce),
    "GRPO": Experiment("the addition model, on-policy and with a stale sampler", SEEDS, _grpo),
    "REC": Experiment("the addition model with a stale sampler: gates, regularisers and data weights beside GRPO", SEEDS, _rec),
    "OPMD": Experiment("the addition model with a stale sampler", SEEDS, _opmd),
    "AsymRE": Experiment("the three-armed bandit, in exact expectations", 1, _asymre),
    "BAPO": Experiment(
        "the controller on synthetic batches; sums after fillers, with longer failures and a stale sampler", SEEDS, _bapo
    ),
    **SUITE,
    "AILBoost": Experiment("random decision processes with exact occupancies; 80 rows of the pendulum's expert", SEEDS, _ailboost),
    "MDPO": Experiment("random decision processes with exact advantages and noise, beside policy gradient and PPO", 20, _mdpo),
    "TRPO": Experiment(
        "the analytic pendulum, NPG beside it; what a cut is worth there; off-policy values of random processes", SEEDS, _trpo
    ),
    "OffPolicyMDPO": Experiment("12,000 steps of the analytic pendulum", SEEDS, online.mirror_replay),
    "DAC": Experiment("80 rows of the pendulum's expert", SEEDS, online.judged),
}


def experiment(name: str) -> Experiment:
    """A method's experiment. Raises InputError where its page has none."""
    if name not in EXPERIMENTS:
        raise InputError(f"verify: found {name}, whose page has no experiment; expected one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
