"""PRDC: TD3 whose actor is held to the action of the nearest logged pair, anywhere in the data, not to that of the same row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ope.data import InputError
from rl_core.checks import at_least
from rl_core.families.offline import Draw, Learner, Stage, Transitions, mean_of
from rl_core.loss import Loss
from rl_core.methods.td3 import ORIGINS, Twin, twin_networks, twin_stages
from rl_core.methods.td3_bc import held
from rl_core.models.mlp import Sizes
from rl_core.paper import Paper
from rl_core.support import NearestPairs, nearest_pairs


@dataclass(frozen=True)
class PRDC:
    """Ran et al. 2023. With a large `state_weight` it is TD3+BC, with 0 it constrains actions alone."""

    paper: ClassVar[Paper] = Paper(
        source="2306.06569",
        title="Policy Regularization with Dataset Constraint for Offline Reinforcement Learning",
        spec="prdc",
        equations={
            "distance": "d(s, a) = min over logged (ŝ, â) of ‖[β·s; a] - [β·ŝ; â]‖",
            "actor": "α·mean Q_1(s, π(s)) / mean|Q_1(s, π(s))| - mean (π(s) - â*(s, π(s)))² over rows and dimensions",
            "critic": "TD3's",
        },
        defaults={
            "alpha": "code: 2.5; its README has 40 for HalfCheetah, 7.5 for AntMaze",
            "state_weight": "paper and README: 2.0; the code's command line 1.0",
            "norm": "code: squared; the paper writes the distance itself",
            "bandwidth": "paper and code: none, the nearest pair",
            "search": "code: a k-d tree; the same answer from any",
            **ORIGINS,
        },
        differs={
            "k": "the code's k asks SciPy for the k-th neighbour alone; here it is always the nearest",
            "the tree's precision": "the code's float64 neighbours turn the whole loss to float64; here they are cast",
        },
    )
    alpha: float = 2.5
    state_weight: float = 2.0
    """β."""
    norm: Literal["squared", "l2"] = "squared"
    bandwidth: float = 0.0
    """Of a Gaussian kernel that averages pairs, for logs of which no single action may be learned by heart."""
    search: Literal["auto", "tree", "tiles", "lists"] = "auto"
    twin: Twin = Twin()

    def __post_init__(self) -> None:
        at_least(self, 0.0, "alpha", "state_weight", "bandwidth")
        if self.norm == "l2" and self.bandwidth:
            raise InputError(f"norm, bandwidth: found l2 and {self.bandwidth}; expected squared, or 0: the distance is to one pair")

    @property
    def tau(self) -> float:
        """Share of the way that lagged copies move."""
        return self.twin.tau

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor and twin critics."""
        return twin_networks(sizes)

    def lagged(self) -> tuple[str, ...]:
        """Both."""
        return "actor", "critic"

    def stages(self) -> tuple[Stage, ...]:
        """TD3's."""
        return twin_stages(self.twin, self.actor)

    def prepare(self, data: Transitions) -> NearestPairs:
        """Index of all pairs, observations as they are scaled for the policy."""
        return nearest_pairs(data.obs, data.action, self.state_weight, search=self.search, bandwidth=self.bandwidth)

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Value of what the policy does, and how far that is from what was done nearby. No gradient through the search."""
        action = learner.nets["actor"](batch.obs)
        support: NearestPairs = learner.prepared
        with torch.no_grad():
            wanted = support.project(batch.obs, action, batch.row).to(action.dtype)
        squared = held(learner, batch.obs, action, wanted, self.alpha)
        if self.norm == "squared":
            return squared
        nearest = support.nearest(batch.obs, action.detach(), batch.row).to(action.dtype)
        apart = torch.linalg.vector_norm(support.query(batch.obs, action) - nearest, dim=1)
        return Loss((squared.terms[0], mean_of(apart)), squared.weights, squared.metrics)
