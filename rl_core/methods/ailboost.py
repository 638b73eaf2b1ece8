"""AILBoost: imitation as boosting of a mixture of policies, against a judge who tells the mixture from the expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ope.data import InputError
from rl_core.checks import at_least
from rl_core.families.imitation import JensenShannon, Plan, ReverseKL, Wasserstein
from rl_core.families.offline import OfflineMethod
from rl_core.loss import Loss
from rl_core.methods.sac import SAC
from rl_core.mixture import appended
from rl_core.paper import Paper

SLOW = SAC(actor_rate=1e-4, critic_rate=1e-4, temperature_rate=1e-4)
"""SAC with the rates of the official code."""


@dataclass(frozen=True)
class AILBoost:
    """Chang et al. 2024."""

    paper: ClassVar[Paper] = Paper(
        source="2404.08513",
        title="Adversarial Imitation Learning via Boosting",
        spec="ailboost",
        equations={
            "objective": "min KL(d‖e) over mixtures d = Σ_i w_i d^{π_i}, a learner drawn once per episode",
            "judge": "max -E_e[exp(-D)] - E_d[D] - λ·E (‖∇D(x)‖₂ - 1)², x = u·expert + (1 - u)·policy; at its best D = log(e/d)",
            "reward": "r(s, a) = D(s, a), of the present judge at every minibatch: -dKL/dα = E_{d^π}[D] - E_d[D]",
            "weights": "d ← (1 - α) d + α d^π: w_1 = (1 - α)^{T - 1}, w_i = α(1 - α)^{T - i}",
        },
        defaults={
            "alpha": "code: eta 0.05, the same in every round",
            "negative": "code: kept whatever its edge is",
            "divergence": "paper and code: reverse KL",
            "penalty": "code: 10",
            "bounded": "code: tanh",
            "judge_rate": "code: Adam 1e-4, as the policy's",
            "sac": "code: Adam 1e-4, discount 0.99, tau 0.005, target entropy -dim(A), temperature 1 to begin with (its log is 0)",
            "plan": "code, states: 1000 steps of the environment and a step of SAC every second one, 100 of the judge, 1000 rows "
            "of two episodes per learner, all alike in replay; 60 learners are this project's: they hold 95 % of the mass "
            "at alpha 0.05, the code's own cap is the room of replay",
        },
        differs={
            "learners": "the code stores references, so that all are the present policy; here each is a copy",
            "who is returned": "the code gives old weights to new learners (T < 60 at alpha 0.05); here a weight is its learner's",
            "full replay": "the code rolls the weights; here the learner with the least mass goes, the rest is made to add to 1",
            "blocks of rows": "the code counts on two episodes of 501 rows; here every row has the id of its learner",
            "shared arrays": "the code's replay writes into the judge's rows; here it has a copy",
            "spread": "the code clamps log σ to [-5, 2]; SAC's here to [-20, 2]",
            "noise": "rows are rolled with exploration, in paper, code and here, while the mixture acts by its means",
            "derivation": "the body of the paper was not read: the boosting step is forced by code, reviews and abstract",
        },
    )
    alpha: float = 0.05
    negative: Literal["keep", "skip"] = "keep"
    """What becomes of a learner whose mean D is not above the mixture's, for which no small step descends."""
    divergence: ReverseKL | JensenShannon | Wasserstein = ReverseKL()
    penalty: float = 10.0
    bounded: bool = True
    judge_rate: float = 1e-4
    sac: SAC = SLOW
    plan: Plan = Plan()

    def __post_init__(self) -> None:
        at_least(self, 0, "penalty", "judge_rate")
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha: found {self.alpha}; expected the share of the newest learner, above 0 and at most 1")

    @property
    def inner(self) -> OfflineMethod:
        """SAC, which goes on from learner to learner with its critics and optimisers."""
        return self.sac

    @property
    def returns(self) -> Literal["mixture", "last"]:
        """The mixture: boosting bounds its KL, not that of the last."""
        return "mixture"

    def objective(self, expert: Tensor, policy: Tensor) -> Loss:
        """The divergence's."""
        return self.divergence.objective(expert, policy)

    def reward(self, judged: Tensor) -> Tensor:
        """D itself, which may be negative everywhere."""
        return judged

    def weigh(self, weights: Tensor, edge: float) -> Tensor:
        """A step of size α towards the new learner."""
        return appended(weights, 0.0 if self.negative == "skip" and len(weights) and edge <= 0 else self.alpha)
