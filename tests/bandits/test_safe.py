"""The safe policy: the default action and the floor, exactly; frozen in one step; and a rollback leads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from bandits.batch import DecisionBatch
from bandits.decision_point import Actions, DecisionPoint, parse_decision_point
from bandits.features import FeatureSchema, Number
from bandits.registry import Pointer
from bandits.safe import freeze_safe, safe_policy
from ope.data import InputError
from tests.bandits.test_registry import POINT as ROUTE
from tests.bandits.test_registry import registry

POINT = replace(ROUTE, default_action="b")

OF_ACTIONS = replace(POINT, features=FeatureSchema(action=(Number("price"), Number("delay"))))

OPS = {"who": "ops", "why": "incident"}


@pytest.mark.parametrize("point", [POINT, OF_ACTIONS])
def test_the_default_action_takes_all_but_the_floor_and_where_it_is_missing_all_are_alike(point: DecisionPoint) -> None:
    rng, p = np.random.default_rng(0), len(point.features.action_columns)
    eligible = np.array([[True, True, True], [True, True, False], [True, False, True], [False, False, True]])
    batch = DecisionBatch.of(
        rng.normal(size=(4, len(point.features.context_columns))) * 1e6, eligible, rng.normal(size=(4, 3, p)) * 1e6
    )
    floor = point.exploration_floor
    one = floor / 3, 1 - floor + floor / 3
    two = floor / 2, 1 - floor + floor / 2
    expected = [[one[0], one[1], one[0]], [*two, 0], [0.5, 0, 0.5], [0, 0, 1]]
    assert np.allclose(safe_policy(point).propensities(batch), expected, rtol=0, atol=1e-15)


def test_without_a_floor_it_plays_nothing_else() -> None:
    policy = safe_policy(replace(POINT, exploration_floor=0.0))
    assert policy.propensities(DecisionBatch.of(np.zeros((1, 1)), np.ones((1, 3), dtype=bool))).tolist() == [[0, 1, 0]]


def test_a_single_action_is_safe(tmp_path: Path) -> None:
    store, _ = registry(tmp_path, policies=0)
    only = replace(POINT, actions=Actions(catalogue=("b",)))
    freeze_safe(store, only, **OPS)
    assert store.verify() == []


def test_safe_is_promoted_and_frozen_at_once_and_a_rollback_leads_back(tmp_path: Path) -> None:
    store, digests = registry(tmp_path, POINT, policies=2)
    for digest in digests:
        store.promote(digest, who="nightly", why="better")
    promotion, freeze = freeze_safe(store, POINT, **OPS)
    assert [(entry.line, entry.action, entry.who, entry.why) for entry in (promotion, freeze)] == [
        (3, "promote", "ops", "incident"),
        (4, "freeze", "ops", "incident"),
    ]
    safe = str(promotion.to_digest)
    assert (promotion.from_digest, freeze.from_digest, freeze.to_digest) == (digests[1], None, None)
    assert store.pointer("route") == Pointer(safe, frozen=True)
    manifest = store.manifest(safe)
    assert (manifest.name, manifest.parent, manifest.snapshot["default_action"]) == ("safe", digests[1], "b")
    with pytest.raises(InputError, match=r"'route' is frozen; expected one that is not: lift it first, `propel policy freeze rou"):
        freeze_safe(store, POINT, **OPS)

    store.freeze("route", who="ops", why="over", frozen=False)
    assert store.pointer("route") == Pointer(safe, frozen=False)
    (again,) = freeze_safe(store, POINT, **OPS)  # it serves already
    assert (again.action, store.pointer("route")) == ("freeze", Pointer(safe, frozen=True))
    store.freeze("route", who="ops", why="over", frozen=False)
    assert store.rollback("route", who="ops", why="over").to_digest == digests[1]
    assert store.verify() == []


def test_safe_takes_over_from_what_cannot_be_read_any_more(tmp_path: Path) -> None:
    store, (digest,) = registry(tmp_path, POINT, policies=1)
    store.promote(digest, who="nightly", why="better")
    (store.path(digest) / "manifest.json").unlink()
    assert [entry.action for entry in freeze_safe(store, POINT, **OPS)] == ["promote", "freeze"]


def test_what_is_refused_leaves_neither_line(tmp_path: Path) -> None:
    store, (digest,) = registry(tmp_path, POINT, policies=1)
    store.promote(digest, who="nightly", why="better")
    with pytest.raises(InputError, match="served already"):
        store.promote_frozen(digest, **OPS)
    assert (store.ledger_lines(), store.pointer("route")) == (1, Pointer(digest, frozen=False))


PER_REQUEST = parse_decision_point(
    'name = "feed"\ndefault_action = "x"\n[actions]\nper_request = true\n'
    '[[rewards]]\nname = "click"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = 60\n'
)


@pytest.mark.parametrize(
    ("point", "said"),
    [(ROUTE, "'route': found no default_action"), (PER_REQUEST, "'feed': found actions that come with each request")],
)
def test_where_there_is_no_safe_action_it_is_said(tmp_path: Path, point: DecisionPoint, said: str) -> None:
    store, _ = registry(tmp_path, policies=0)
    with pytest.raises(InputError, match=f"{said}; expected a catalogue and a default_action"):
        freeze_safe(store, point, **OPS)
    assert (store.listed(), store.ledger()) == ({}, [])
