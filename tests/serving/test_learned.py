"""A perceptron that torch learned from a bandit's log decides in the service, which knows no torch: exactly, and to be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import torch

from bandits.decision_point import parse_decision_point
from bandits.events import Decision
from bandits.log.files import log_files
from bandits.log.port import Kind
from bandits.log.replay import judges, replay
from bandits.policy import Floor
from bandits.registry import Registry
from bandits.salts import read_salts
from bandits.sampling import TOTAL, quantise_rows
from ope import evaluate
from rl_core.methods.mdpo import MDPO
from rl_core.one_step import learn_choices
from tests.rl_core.crossed_logs import WORLD, batch_of, logged
from tests.serving.recomputed import recomputed
from tests.serving.server import make, running

POINT = (
    'name = "cross"\nexploration_floor = 0.1\n[actions]\ncatalogue = ["left", "right"]\n'
    '[[rewards]]\nname = "paid"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = 60.0\n'
    '[features]\ncontext = [{type = "number", name = "x1"}, {type = "number", name = "x2"}]\n'
)
SINGLE, BATCHES, SIZE = 100, 4, 500


def test_what_an_mlp_learned_from_a_log_serves(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    point = parse_decision_point(POINT)
    learned = learn_choices(logged(4000, seed=0), MDPO(step=3.0), steps=200, rate=1e-2, width=16)
    policy, held_out = Floor(learned, point.exploration_floor), logged(20_000, seed=100)
    assert held_out.context is not None
    forecast = evaluate(held_out, policy.propensities(batch_of(held_out.context)), estimators=("SNIPS",))["SNIPS"]

    config, key = make(tmp_path / "shop", points={"cross": POINT})
    registry = Registry(config.parent / "registry")
    digest = registry.register(
        policy, point, name="mdpo", golden=batch_of(held_out.context[:50]), metrics={"SNIPS": forecast.value}
    )
    registry.promote(digest, who="tests", why="forecast")
    reference = registry.load(digest).reference

    context = WORLD.contexts(SINGLE + BATCHES * SIZE, np.random.default_rng(7))
    requests = [{"decision_id": f"d{at}", "context": {"x1": x1, "x2": x2}} for at, (x1, x2) in enumerate(context.tolist())]
    with running(config, key) as server:
        answers = [server.decide(one, point="cross").json for one in requests[:SINGLE]]
        for start in range(SINGLE, len(requests), SIZE):
            told = server.ask("POST", "/v1/cross/decisions:batch", {"decisions": requests[start : start + SIZE]})
            assert told.status == 200, told.body
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text(), "what serves needs no torch"
        stored = server.stored()
    assert {one["policy"] for one in answers} == {reference}
    assert recomputed(stored, registry, point) == {reference}

    decisions = {
        one.decision_id: one for one in (msgspec.json.decode(s.record, type=Decision) for s in stored if s.kind == Kind.DECISION)
    }
    ordered = [decisions[str(one["decision_id"])] for one in requests]
    assert len(decisions) == len(requests)
    shares = np.array([one.share_vector() for one in ordered])
    vectors = policy.propensities(batch_of(context))
    assert (shares == quantise_rows(vectors, np.ones(vectors.shape, dtype=bool))).all(), (
        "of the policy that was learned, to the bit"
    )
    assert np.abs(shares / TOTAL - vectors).max() <= 2 / TOTAL
    assert vectors.min() >= point.exploration_floor / 2
    assert [one["propensities"] for one in answers] == [
        dict(zip(("left", "right"), (row / TOTAL).tolist(), strict=True)) for row in shares[:SINGLE]
    ]

    salts = read_salts(config.parent / "data" / "salts.toml")
    again = replay(log_files(config.parent / "data" / "log"), salts, judges(registry, [point]))
    assert (again.sampled, again.actions, again.vectors) == (len(requests),) * 3, again.wrong
    assert (again.missing, again.unreadable) == ({}, 0)

    chosen = np.array([one.chosen for one in ordered])
    earned = WORLD.q(context)[np.arange(len(chosen)), chosen]
    error = np.hypot(earned.std() / np.sqrt(len(earned)), forecast.stderr)
    assert abs(earned.mean() - forecast.value) < 4 * error, "it earns what the log said it would"
    assert earned.mean() > 0.65, "linear policies: at most 0.575, before the floor"
    assert json.loads((registry.path(digest) / "policy.json").read_text())["policy"]["scorer"]["kind"] == "perceptron"
