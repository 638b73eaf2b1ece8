"""What an imported log says of a policy is true: intervals cover, slots are clusters, vectors and labels are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ope.simulate import World, sample_actions, softmax
from tests.pipelines.dsjson_lines import import_lines, ope, slotted


def world_lines(world: World, n: int, rng: np.random.Generator, *, drop: bool) -> list[dict[str, Any]]:
    """Decisions among three by a policy that explores; where `drop`, three of four decisions without a reward were thrown away."""
    context = world.contexts(n, rng)
    logging = 0.2 + 0.4 * softmax(context @ world.coefficient)  # no weight above 5/3
    action = sample_actions(logging, rng)
    reward = rng.random(n) < world.q(context)[np.arange(n), action]
    kept = np.ones(n, dtype=bool) if not drop else reward | (rng.random(n) < 0.25)
    k = logging.shape[1]
    lines = []
    for row in np.flatnonzero(kept).tolist():
        order = [int(action[row]), *(j for j in range(k) if j != action[row])]
        lines.append(
            {
                "_label_cost": -float(reward[row]),
                "_label_probability": logging[row, action[row]],
                "_label_Action": order[0] + 1,
                "_labelIndex": order[0],
                "EventId": f"e{row}",
                "a": [j + 1 for j in order],
                "p": logging[row, order].tolist(),
                "c": {"X": {"x0": context[row, 0], "x1": context[row, 1]}, "_multi": [{"_tag": f"t{j}"} for j in range(k)]},
                "pdrop": 0.0 if reward[row] or not drop else 0.75,
            }
        )
    return lines


@pytest.mark.parametrize("drop", [False, True])
def test_imported_logs_cover_the_true_value(tmp_path: Path, drop: bool) -> None:
    world, rng = World.random(2, 3, seed=4), np.random.default_rng(5)
    truth = world.value(lambda x: np.full((len(x), 3), 1 / 3))
    records = []
    for number in range(20):
        found = import_lines(tmp_path, world_lines(world, 400, rng, drop=drop), name=f"log{number}")
        records.append(ope(found.folder / "log.parquet", "--estimators", "SNIPS"))
    values, covered = zip(*((r["SNIPS"]["value"], r["SNIPS"]["low"] <= truth <= r["SNIPS"]["high"]) for r in records), strict=True)
    # 20 intervals of 95 %: fewer than 16 that cover would happen three times in a thousand.
    assert sum(covered) >= 16
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / 20**0.5
    if drop:  # without the weights the value is far off: rewards are kept four times as often
        weightless = pl.read_parquet(found.folder / "log.parquet")
        assert weightless["sample_weight"].unique().sort().to_list() == [1.0, 4.0]
        weight = 1 / 3 / weightless["propensity"].to_numpy()
        assert np.average(weightless["reward"].to_numpy(), weights=weight) > truth + 0.15


def test_slots_of_one_event_are_one_cluster(tmp_path: Path) -> None:
    """Both slots of an event earn the same: 300 events know as much as 300 rows, not 600."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(300):
        cost = -float(rng.random() < 0.4)
        outcomes = [{"_id": name, "_a": rng.permutation(3).tolist(), "_p": [1 / 3] * 3, "_label_cost": cost} for name in ("u", "v")]
        lines.append(slotted(f"s{number}", _outcomes=outcomes))
    found = import_lines(tmp_path, lines)
    clustered = ope(found.folder / "log.parquet", "--estimators", "IPS")["IPS"]
    assert (clustered["n"], "300 clusters." in clustered["notes"]) == (600, True)
    by_event = pl.read_parquet(found.folder / "log.parquet").group_by("unit").agg(pl.col("reward").mean())["reward"].to_numpy()
    assert clustered["stderr"] == pytest.approx(by_event.std() / 300**0.5, rel=0.01)  # uniform logging: all weights are 1


def test_the_log_knows_its_vectors_and_its_labels(tmp_path: Path) -> None:
    """Eligible sets of different sizes: uniform is over each row's own, DR uses the whole vector."""
    rng = np.random.default_rng(5)
    lines = world_lines(World.random(2, 3, seed=4), 300, rng, drop=False)
    for number in range(300):  # the third was not on offer
        taken, x = int(rng.random() < 0.3), rng.normal(size=2)
        p = [0.3, 0.7] if taken else [0.7, 0.3]
        context = {"X": {"x0": x[0], "x1": x[1]}, "_multi": [{"_tag": f"t{j}"} for j in range(3)]}
        lines.append({"EventId": f"two{number}", "a": [taken + 1, 2 - taken], "p": p, "c": context})
        lines[-1] |= {"_label_cost": -float(rng.random() < 0.5), "_label_Action": taken + 1}
    found = import_lines(tmp_path, lines)
    assert (found.report.rows, found.report.problems) == (600, {})
    estimates = ope(found.folder / "log.parquet", "--context", "X.x0,X.x1")
    log = pl.read_parquet(found.folder / "log.parquet")
    by_hand = (log["reward"] / log["eligible"].list.len() / log["propensity"]).mean()
    assert estimates["IPS"]["value"] == pytest.approx(by_hand, rel=1e-12)
    assert "DR" in estimates
    assert estimates["IPS"]["verdict"] == "trust"
    assert log["propensities"].list.sum().to_list() == [1.0] * 600
    assert log["propensities"].list.len().to_list() == log["eligible"].list.len().to_list()
