"""What baselines of control must reach: offline ones on narrow, wide, noisy and random data of the pendulum, online ones there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rl_core.families.offline import OfflineMethod
from rl_core.methods.awac import AWAC
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL
from rl_core.methods.iql import IQL
from rl_core.methods.ppo_control import ControlPPO
from rl_core.methods.prdc import PRDC
from rl_core.methods.sac import SAC
from rl_core.methods.td3 import TD3
from rl_core.methods.td3_bc import TD3BC
from rl_core.trainers.offline import OfflineSchedule
from rl_core.verify.arms import Arms
from rl_core.verify.control import PENDULUM, SMALL, TWIN, OfflineArm, OnlineArm, on_pendulum
from rl_core.verify.fitted import calibration
from rl_core.verify.margins import Experiment, Margin, at_least, at_most

PAIRS = 5
"""Of data and training, whose median counts: one draw of ten episodes may leave a region uncovered."""


@dataclass(frozen=True)
class Entry:
    """A row of the page's table: scores of its two seeds on each set."""

    method: OfflineMethod
    scores: Mapping[str, tuple[float, float]]
    schedule: OfflineSchedule = SMALL


SHORT = replace(SMALL, steps=3000)

TABLE: Mapping[str, Entry] = {
    "BC": Entry(
        on_pendulum(BC()), {"pend-exp10": (99, 101), "pend-mix10": (0, 3), "pend-eps60": (69, 71), "pend-rand": (-3, -3)}, SHORT
    ),
    "10 % BC": Entry(
        on_pendulum(BC(top=0.1)),
        {"pend-exp10": (-4, -2), "pend-mix10": (99, 101), "pend-eps60": (87, 60), "pend-rand": (13, 5)},
        SHORT,
    ),
    "TD3": Entry(TD3(TWIN), {"pend-mix10": (99, 100), "pend-eps60": (99, 99), "pend-rand": (100, 100)}),
    "TD3BC": Entry(TD3BC(twin=TWIN), {"pend-exp10": (100, 101), "pend-mix10": (8, 7), "pend-eps60": (88, 88), "pend-rand": (3, 6)}),
    "IQL": Entry(  # the page's cosine is over a million steps: over 6,000 it is not there
        replace(on_pendulum(IQL()), cosine=False),
        {"pend-exp10": (100, 100), "pend-mix10": (87, 87), "pend-eps60": (98, 98), "pend-rand": (84, 82)},
    ),
    "AWAC": Entry(
        on_pendulum(AWAC()), {"pend-exp10": (99, 100), "pend-mix10": (91, 92), "pend-eps60": (98, 99), "pend-rand": (87, 88)}
    ),
    "CQL": Entry(  # the worth of entropy in the scale of rewards, which are a tenth
        CQL(alpha=1.0, discount=0.98, actor_rate=3e-4, critic_rate=1e-3, temperature_rate=1e-3, temperature_start=0.1),
        {"pend-exp10": (15, 10), "pend-mix10": (93, 94), "pend-eps60": (101, 101), "pend-rand": (100, 99)},
    ),
}


def acceptance(arms: Arms, pairs: Sequence[int], names: Sequence[str]) -> list[Margin]:
    """Medians within 8 points of the page's, 15 where those are between 5 and 90."""
    margins = []
    for name in names:
        entry = TABLE[name]
        found = ends(arms, {name: entry.method}, list(entry.scores), pairs, "score", entry.schedule)
        for data, scores in entry.scores.items():
            page = sum(scores) / 2
            apart = 15 if 5 <= page <= 90 else 8
            median = found[name, data]
            margins.append(
                Margin(
                    f"{name} on {data}: median score", f"{min(scores) - apart:g} to {max(scores) + apart:g}", f"{median:.1f}",
                    min(scores) - apart <= median <= max(scores) + apart,
                )
            )  # fmt: skip
    return margins


def ends(
    arms: Arms,
    methods: Mapping[str, OfflineMethod],
    sets: Sequence[str],
    pairs: Sequence[int],
    measure: str = "return",
    schedule: OfflineSchedule = SMALL,
) -> dict[tuple[str, str], float]:
    """Median over pairs of a measure at the end, by method and data set."""
    wanted = [(name, data, pair) for name in methods for data in sets for pair in pairs]
    rows = arms.run([OfflineArm(methods[name], data, replace(schedule, seed=pair)) for name, data, pair in wanted])
    found: dict[tuple[str, str], list[float]] = {}
    for (name, data, _), one in zip(wanted, rows, strict=True):
        found.setdefault((name, data), []).append(one[-1][measure])
    return {key: statistics.median(values) for key, values in found.items()}


def _td3(arms: Arms, pairs: Sequence[int]) -> list[Margin]:
    narrow = ends(arms, {"TD3": TABLE["TD3"].method}, ["pend-exp10"], pairs, "score")["TD3", "pend-exp10"]
    return [at_most("TD3 on pend-exp10: median score", narrow, 50), *acceptance(arms, pairs, ["TD3"]), *calibration()]


def _prdc(arms: Arms, pairs: Sequence[int]) -> list[Margin]:
    methods: dict[str, OfflineMethod] = {"PRDC": PRDC(twin=TWIN), "TD3BC": TD3BC(twin=TWIN), "TD3": TD3(TWIN)}
    found = ends(arms, methods, ("pend-exp10", "pend-mix10"), pairs)
    return [
        at_least("PRDC on pend-exp10: median return", found["PRDC", "pend-exp10"], -300),
        at_least("PRDC on pend-mix10: median return", found["PRDC", "pend-mix10"], -300),
        at_most("TD3+BC on pend-mix10: median return", found["TD3BC", "pend-mix10"], -800),
        at_most("TD3 on pend-exp10: median return", found["TD3", "pend-exp10"], -500),
    ]


def _sac(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    method = SAC(discount=0.98, actor_rate=1e-3, critic_rate=1e-3, temperature_rate=1e-3)
    rows = arms.run([OnlineArm(method, PENDULUM, 8000, seed, reward_scale=0.1, evaluations=20) for seed in seeds])
    found = [statistics.mean(row["return"] for row in one[-10:]) for one in rows]
    return [at_least("the mean of a run's last 10 evaluations, the smallest", min(found), -250)]


def _ppo(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    wanted = [OnlineArm(ControlPPO(), "InvertedPendulum-v5", 40_960, seed, references=(0.0, 1000.0)) for seed in seeds]
    found = sorted(one[-1]["return"] for one in arms.run(wanted))
    return [at_least("MuJoCo's inverted pendulum: return at the end, all seeds but the worst", found[min(1, len(found) - 1)], 800)]


SUITE: Mapping[str, Experiment] = {
    "BC": Experiment("the pendulum's four data sets, and their best tenth", PAIRS, partial(acceptance, names=("BC", "10 % BC"))),
    "TD3": Experiment("the pendulum's data sets, of which the narrow one must defeat it; fitted Q evaluation there", PAIRS, _td3),
    **{
        name: Experiment("the analytic pendulum's four data sets", PAIRS, partial(acceptance, names=(name,)))
        for name in ("TD3BC", "IQL", "AWAC", "CQL")
    },
    "SAC": Experiment("8,000 steps of the analytic pendulum", 3, _sac),
    "ControlPPO": Experiment("40,960 steps of MuJoCo's inverted pendulum, which needs the extra mujoco", 3, _ppo),
    "PRDC": Experiment("the analytic pendulum, narrow and wide data, beside TD3+BC and TD3", 7, _prdc),
}
