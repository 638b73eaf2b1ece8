"""DAC: adversarial imitation from replay, the judge against all that replay holds. It matches the buffer, not the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rl_core.checks import at_least
from rl_core.families.imitation import JensenShannon, Plan, ReverseKL, Wasserstein
from rl_core.families.offline import OfflineMethod
from rl_core.loss import Loss
from rl_core.methods.sac import SAC
from rl_core.mixture import appended
from rl_core.paper import Paper


@dataclass(frozen=True)
class DAC:
    """Kostrikov et al. 2019, as AILBoost's code has it."""

    paper: ClassVar[Paper] = Paper(
        source="1809.02925",
        title="Discriminator-Actor-Critic: Addressing Sample Inefficiency and Reward Bias in Adversarial Imitation Learning",
        spec="ailboost",
        equations={
            "judge": "max E_e[log σ(D)] + E_R[log σ(-D)] - λ·E (‖∇D(x)‖₂ - 1)², R all of replay, x = u·expert + (1 - u)·policy",
            "reward": "r(s, a) = D(s, a) = log σ(D) - log σ(-D), of the present judge at every minibatch",
            "weights": "every learner 1/T: α_T = 1/T",
        },
        defaults={
            "divergence": "AILBoost's code: js, cross-entropy with the expert as 1",
            "penalty": "AILBoost's code: 10",
            "bounded": "AILBoost's code: tanh",
            "judge_rate": "AILBoost's code: Adam 1e-4, as the policy's",
            "sac": "AILBoost's code: Adam 1e-4, discount 0.99, tau 0.005, target entropy -dim(A), temperature 1 to begin with",
            "plan": "AILBoost's code: a step of SAC every second step of the environment and one of the judge with each, "
            "uniform replay; it keeps no learners but the last",
        },
        differs={
            "learner": "the paper has TD3; AILBoost's code and this one SAC, that the two differ in nothing else",
            "absorbing states": "the paper's wrapper is in neither: environments that end are refused",
            "reward": "the paper's logit is unbounded; AILBoost's code and this one bound it by tanh",
        },
    )
    divergence: ReverseKL | JensenShannon | Wasserstein = JensenShannon()
    penalty: float = 10.0
    bounded: bool = True
    judge_rate: float = 1e-4
    sac: SAC = SAC(actor_rate=1e-4, critic_rate=1e-4, temperature_rate=1e-4)
    plan: Plan = Plan(judge_steps=0, judge_every=1, against="replay", learners=1)

    def __post_init__(self) -> None:
        at_least(self, 0, "penalty", "judge_rate")

    @property
    def inner(self) -> OfflineMethod:
        """SAC."""
        return self.sac

    @property
    def returns(self) -> Literal["mixture", "last"]:
        """The last policy."""
        return "last"

    def objective(self, expert: Tensor, policy: Tensor) -> Loss:
        """The divergence's."""
        return self.divergence.objective(expert, policy)

    def reward(self, judged: Tensor) -> Tensor:
        """D itself."""
        return judged

    def weigh(self, weights: Tensor, edge: float) -> Tensor:
        """All alike."""
        return appended(weights, 1 / (len(weights) + 1))
