"""What the data support: for an observation and an action, the nearest logged pair, how far it is, and how dense data are there.

A pair is the point [β·s; a], so that β says what a difference in observations costs beside one in actions: 0 ignores them, and with
a large one only the same observation counts. With a bandwidth the nearest pair becomes a kernel's mean of all, whose score is that
of the density estimate of the data: h²·∇log p_h(x) = Σ w_j x_j - x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ope.data import InputError

SAMPLE = 2000
"""Logged pairs at most whose distance to the nearest other one is looked at: some searches cost as much as there are pairs."""

TILE = 1 << 16
"""Rows of the data that are compared with all queries at once."""


class SupportModel(Protocol):
    """A model of which actions the data support where. obs (B, S), action (B, A)."""

    def project(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        """(B, A) the supported action that is meant by this one."""
        ...

    def distance(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        """(B,) how far the data are: the overlap diagnostic where no ratio of densities exists."""
        ...

    def score(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, A) gradient by the action of the log density."""
        ...

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,) of the pair."""
        ...

    def candidates(self, obs: Tensor, count: int) -> Tensor:
        """(B, count, A) actions that the data support there, the best first."""
        ...


class Search(Protocol):
    """Finds the nearest of N points for each of B queries (B, D)."""

    def nearest(self, query: Tensor, row: Tensor | None = None) -> Tensor:
        """(B,) number of a nearest point. `row`: number of the point that has the query's observation, where that is known."""
        ...


@dataclass(frozen=True)
class Tree:
    """SciPy's k-d tree, in float64: the CPU's engine up to some twenty dimensions."""

    tree: cKDTree

    @classmethod
    def of(cls, points: Tensor) -> Tree:
        """Built once."""
        return cls(cKDTree(points.double().cpu().numpy()))

    def nearest(self, query: Tensor, row: Tensor | None = None) -> Tensor:
        """(B,)."""
        _, found = self.tree.query(query.double().cpu().numpy())
        return torch.from_numpy(np.asarray(found)).to(query.device)


@dataclass(frozen=True)
class Tiles:
    """All of them, a tile at a time: exact, with shapes that do not depend on data. The GPU's engine."""

    points: Tensor

    def nearest(self, query: Tensor, row: Tensor | None = None) -> Tensor:
        """(B,), by |y|² - 2x·y, of which the winner's digits are not to be trusted: callers compute distances anew."""
        best = torch.full((len(query),), math.inf, device=query.device, dtype=query.dtype)
        found = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        for start in range(0, len(self.points), TILE):
            tile = self.points[start : start + TILE].to(query.dtype)
            lowest, place = torch.addmm((tile**2).sum(dim=1), query, tile.T, alpha=-2).min(dim=1)
            found = torch.where(lowest < best, start + place, found)
            best = torch.minimum(lowest, best)
        return found


@dataclass
class Lists:
    """For each row of the data its nearest rows by observation, searched alone; what they cannot certify is searched by `rest`.

    If the best joint distance is at most that of the farthest observation in the list, no row outside of it can be nearer.
    """

    points: Tensor
    neighbours: Tensor
    """(N, K) numbers of rows, the nearest first."""
    reach: Tensor
    """(N,) distance of the K-th observation, times β."""
    rest: Search
    asked: int = 0
    missed: int = 0

    @classmethod
    def of(cls, obs: Tensor, points: Tensor, rest: Search, count: int = 64) -> Lists:
        """`obs` (N, S): observations times β, the leading columns of `points`."""
        count = min(count, len(obs))
        far, near = cKDTree(obs.double().cpu().numpy()).query(obs.double().cpu().numpy(), k=[*range(1, count + 1)])
        whole = count == len(obs)
        reach = torch.full((len(obs),), math.inf) if whole else torch.from_numpy(far[:, -1]).to(points.dtype)
        return cls(points, torch.from_numpy(np.asarray(near, dtype=np.int64)).to(points.device), reach.to(points.device), rest)

    def nearest(self, query: Tensor, row: Tensor | None = None) -> Tensor:
        """(B,). Raises InputError without row numbers."""
        if row is None:
            raise InputError("found queries without row numbers; expected those of a batch from the data: lists are by row")
        near = self.neighbours[row]
        squared = ((self.points[near] - query[:, None]) ** 2).sum(dim=2)
        lowest, place = squared.min(dim=1)
        found = near.gather(1, place[:, None])[:, 0]
        missed = lowest.sqrt() > self.reach[row]
        self.asked, self.missed = self.asked + len(query), self.missed + int(missed.sum())
        if missed.any():
            found[missed] = self.rest.nearest(query[missed])
        return found


@dataclass(frozen=True)
class NearestPairs:
    """The data themselves as a model of their support. Made by `nearest_pairs`."""

    points: Tensor
    """(N, S + A): [β·s; a]."""
    obs_size: int
    state_weight: float
    """β."""
    search: Search
    bandwidth: float = 0.0
    """h of a Gaussian kernel; 0: the nearest pair alone."""

    def project(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        """(B, A) the nearest pair's action, or the kernel's mean."""
        query = self.query(obs, action)
        if self.bandwidth:
            return self._means(query)[:, self.obs_size :]
        return self.points[self.search.nearest(query, row)][:, self.obs_size :]

    def nearest(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        """(B, S + A) the nearest pair."""
        return self.points[self.search.nearest(self.query(obs, action), row)]

    def distance(self, obs: Tensor, action: Tensor, row: Tensor | None = None) -> Tensor:
        """(B,) to the nearest pair, from differences: an expanded square would lose the digits of small ones."""
        apart: Tensor = torch.linalg.vector_norm(self.query(obs, action) - self.nearest(obs, action, row), dim=1)
        return apart

    def score(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, A) of the kernel's density. Raises InputError without a bandwidth."""
        query = self.query(obs, action)
        return (self._means(query) - query)[:, self.obs_size :] / self.bandwidth**2

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,) of the kernel's density of [β·s; a]."""
        logs, size = self._logs(self.query(obs, action)), self.points.shape[1]
        constant = math.log(len(self.points)) + 0.5 * size * math.log(2 * math.pi * self.bandwidth**2)
        return torch.logsumexp(logs, dim=1) - constant

    def candidates(self, obs: Tensor, count: int) -> Tensor:
        """(B, count, A) actions of the rows with the nearest observations. Compares with all: meant for few queries."""
        states = self.points[:, : self.obs_size]
        _, place = torch.cdist(self.state_weight * obs, states).topk(count, dim=1, largest=False)
        return self.points[place][..., self.obs_size :]

    def query(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, S + A)."""
        return torch.cat((self.state_weight * obs, action), dim=1).to(self.points.dtype)

    def _logs(self, query: Tensor) -> Tensor:
        """(B, N) of the kernel."""
        if not self.bandwidth:
            raise InputError("found a bandwidth of 0, of which there is no density; expected one above 0")
        apart = query[:, None] - self.points if len(query) * self.points.numel() < 1 << 24 else None
        squared = torch.cdist(query, self.points) ** 2 if apart is None else (apart**2).sum(dim=2)
        return -squared / (2 * self.bandwidth**2)

    def _means(self, query: Tensor) -> Tensor:
        """(B, S + A) Σ w_j x_j."""
        return torch.softmax(self._logs(query), dim=1) @ self.points


def nearest_pairs(
    obs: Tensor, action: Tensor, state_weight: float, *, search: str = "auto", bandwidth: float = 0.0
) -> NearestPairs:
    """The support of data (N, S), (N, A), observations scaled as the policy sees them.

    `search`: "tree", "tiles", "lists", or "auto": the tree on a CPU, tiles on a GPU. Raises InputError for a weight below 0.
    """
    if state_weight < 0 or bandwidth < 0:
        raise InputError(f"found a state weight of {state_weight} and a bandwidth of {bandwidth}; expected at least 0")
    points = torch.cat((state_weight * obs, action), dim=1)
    kind = search if search != "auto" else "tree" if points.device.type == "cpu" else "tiles"
    engines: dict[str, Any] = {
        "tree": lambda: Tree.of(points),
        "tiles": lambda: Tiles(points),
        "lists": lambda: Lists.of(state_weight * obs, points, Tree.of(points) if points.device.type == "cpu" else Tiles(points)),
    }
    if kind not in engines:
        raise InputError(f"search: found {search!r}; expected auto, {', '.join(engines)}")
    return NearestPairs(points, obs.shape[1], state_weight, engines[kind](), bandwidth)


@dataclass(frozen=True)
class Overlap:
    """How far a policy's actions are from the data."""

    quantiles: dict[str, float]
    """Of the distances: their 50th, 90th and 99th percentile, and the largest."""
    limit: float
    """99th percentile of the distances of logged pairs, 2,000 of them at most, to the nearest other one."""
    beyond: float
    """Share of the policy's pairs that are farther than that."""

    @property
    def alarm(self) -> bool:
        """Whether more than one in twenty is: the policy acts where the data say nothing."""
        return self.beyond > 0.05


def overlap(support: NearestPairs, obs: Tensor, action: Tensor) -> Overlap:
    """Distances of a policy's actions to the data, beside those of the data to each other (PRDC's page, the overlap diagnostic)."""
    points = support.points.double().cpu().numpy()
    far, _ = cKDTree(points).query(points[:: math.ceil(len(points) / SAMPLE)], k=[2])
    limit = float(np.quantile(far[:, 0], 0.99))
    found = support.distance(obs, action).double().cpu().numpy()
    named = {f"{100 * q:g} %": float(np.quantile(found, q)) for q in (0.5, 0.9, 0.99)}
    return Overlap(named | {"largest": float(found.max())}, limit, float((found > limit).mean()))
