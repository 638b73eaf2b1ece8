"""The registry: pointers move by lines of the ledger alone, in order, signed; what was touched afterwards is found."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import apsw
import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace

from bandits.artifact import digest_of
from bandits.decision_point import DecisionPoint, parse_decision_point
from bandits.events import canonical
from bandits.policy import Floor, Softmax
from bandits.registry import DamageError, Entry, Pointer, Registry
from bandits.scorers import Linear
from ope.data import InputError

POINT = parse_decision_point(
    'name = "route"\n[actions]\ncatalogue = ["a", "b", "c"]\n'
    '[[rewards]]\nname = "paid"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = 60\n'
    '[[features.context]]\nname = "amount"\ntype = "number"\n'
)
GOLDEN = POINT.features.batch([{"amount": float(x)} for x in np.linspace(-2, 2, 30)], 3)


def policy(seed: int) -> Floor:
    rng = np.random.default_rng(seed)
    return Floor(Softmax(Linear(rng.normal(size=3), rng.normal(size=(1, 3)), np.empty(0))), 0.02)


def registry(folder: Path, point: DecisionPoint = POINT, policies: int = 3) -> tuple[Registry, list[str]]:
    """A registry of some artifacts, none of them served, whose clock counts."""
    ticks = iter(range(1, 10_000))
    store = Registry(folder, clock=lambda: next(ticks))
    return store, [store.register(policy(seed), point, name=f"night-{seed}", golden=GOLDEN) for seed in range(policies)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Registry, list[str]]:
    """One that tests read only."""
    store, digests = registry(tmp_path_factory.mktemp("registry"))
    store.promote(digests[0], who="ops", why="first")
    store.promote(digests[1][:10], who="ops", why="better", estimate={"DR": {"value": 0.4, "low": 0.1}})
    return store, digests


def execute(store: Registry, *statements: str) -> None:
    connection = apsw.Connection(str(store.folder / "control.sqlite"))
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_the_signing_key_is_made_once_for_its_owner_alone(shared):
    store, _ = shared
    assert stat.S_IMODE((store.folder / "signing.key").stat().st_mode) == 0o600
    before = (store.folder / "signing.key").read_bytes()
    again = Registry(store.folder)
    assert (store.folder / "signing.key").read_bytes() == before
    assert again.public_key() == store.public_key()


def test_promotions_move_the_pointer_and_say_why(shared):
    store, digests = shared
    first, second = store.ledger()
    assert (first.from_digest, first.to_digest, first.why, first.estimate) == (None, digests[0], "first", None)
    assert (second.from_digest, second.to_digest, second.who) == (digests[0], digests[1], "ops")
    assert second.estimate == {"DR": {"value": 0.4, "low": 0.1}}
    assert store.pointers() == {"route": Pointer(digests[1], frozen=False)}
    assert store.pointer("other") == Pointer(None, frozen=False)
    assert store.verify() == []
    assert [store.manifest(digest).name for digest in store.listed()] == ["night-0", "night-1", "night-2"]


def test_rollback_restores_behaviour_to_the_bit_and_walks_back(tmp_path):
    store, digests = registry(tmp_path)
    for digest in digests:
        store.promote(digest, who="ops", why="nightly")
    golden = {digest: store.load(digest).policy.propensities(GOLDEN).tobytes() for digest in digests}
    for expected in (digests[1], digests[0]):  # not back and forth between the two last
        entry = store.rollback("route", who="ops", why="drop in authorisations")
        assert (entry.action, entry.to_digest) == ("rollback", expected)
        served = store.load(store.pointer("route").digest)
        assert served.policy.propensities(GOLDEN).tobytes() == golden[expected]
    with pytest.raises(InputError, match="found nothing that was served before"):
        store.rollback("route", who="ops", why="again")
    assert store.verify() == []


def test_rollback_to_what_was_never_served_is_refused(shared):
    store, digests = shared
    with pytest.raises(InputError, match="which did not lead to what is served"):
        store.rollback("route", who="ops", why="x", to=digests[2])


def test_a_frozen_decision_point_changes_by_nothing_but_unfreezing(tmp_path):
    store, digests = registry(tmp_path)
    store.promote(digests[0], who="ops", why="first")
    store.freeze("route", who="ops", why="incident")
    for change in (
        lambda: store.promote(digests[1], who="ops", why="x"),
        lambda: store.freeze("route", who="ops", why="twice"),
    ):
        with pytest.raises(InputError, match="is frozen"):
            change()
    store.freeze("route", who="ops", why="over", frozen=False)
    store.promote(digests[1], who="ops", why="better")
    assert [entry.action for entry in store.ledger()] == ["promote", "freeze", "unfreeze", "promote"]
    assert store.verify() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda store, _: store.promote("", who="ops", why="x"), "found 3 artifacts whose digest begins with ''"),
        (lambda store, _: store.promote("zz", who="ops", why="x"), "found 0 artifacts"),
        (lambda store, digests: store.promote(digests[0], who="", why="x"), "who: found ''"),
        (lambda store, digests: store.promote(digests[0], who="ops", why=" "), "why: found nothing"),
    ],
)
def test_changes_without_a_name_a_reason_or_an_artifact_are_refused(shared, change, said):
    store, digests = shared
    with pytest.raises(InputError, match=said):
        change(store, digests)
    assert len(store.ledger()) == 2


def test_the_ledger_only_grows(shared):
    store, _ = shared
    for statement in ("DELETE FROM ledger", "UPDATE ledger SET entry = x'00'"):
        with pytest.raises(apsw.ConstraintError, match="only grows"):
            execute(store, statement)


def forged(store: Registry, line: int) -> str:
    """A line with another reason, its hash made to fit; only the key is missing."""
    entry: Entry = store.ledger()[line - 1]
    raw = canonical(to_builtins(replace(entry, why="it was always so")))
    return f"UPDATE ledger SET entry = x'{raw.hex()}', hash = '{digest_of(raw)}' WHERE line = {line}"


TAMPERED = {
    "a line changed": (lambda _: ["UPDATE ledger SET entry = x'7b7d' WHERE line = 1"], "ledger line 1"),
    "a line forged": (lambda store: [forged(store, 2)], "ledger line 2"),
    "a line gone": (lambda store: ["DELETE FROM ledger WHERE line = 1"], "ledger line 1"),
    "the last line gone": (lambda store: ["DELETE FROM ledger WHERE line = 2"], "found 1 lines in the ledger; expected 2 or more"),
    "the last line gone, the pointer set back": (
        lambda store: [
            "DELETE FROM ledger WHERE line = 2", f"UPDATE pointers SET digest = '{store.ledger()[0].to_digest}'"
        ], "found 1 lines in the ledger",
    ),
    "the whole ledger gone": (lambda _: ["DELETE FROM ledger", "DELETE FROM pointers"], "found 0 lines in the ledger"),
    "artifacts no longer listed": (lambda _: ["DELETE FROM artifacts"], "not listed, though it is served at 'route'"),
    "an artifact of the ledger no longer listed": (
        lambda store: [f"DELETE FROM artifacts WHERE digest = '{store.ledger()[0].to_digest}'"], "not listed, though it was served"
    ),
    "an artifact moved to another decision point": (
        lambda _: ["UPDATE artifacts SET decision_point = 'other'"], "found it listed for 'other'; expected 'route'"
    ),
    "two lines swapped": (
        lambda store: ["UPDATE ledger SET line = 9 WHERE line = 1", "UPDATE ledger SET line = 1 WHERE line = 2"], "ledger line 1"
    ),
    "a signature of another": (
        lambda _: ["UPDATE ledger SET signature = (SELECT signature FROM ledger LIMIT 1) WHERE line = 2"], "ledger line 2"
    ),
    "a pointer moved": (
        lambda _: ["UPDATE pointers SET digest = (SELECT digest FROM artifacts WHERE rowid = 1)"], "decision point 'route'"
    ),
    "a freeze lifted": (lambda store: ["UPDATE pointers SET frozen = 1"], "decision point 'route'"),
}  # fmt: skip


@pytest.mark.parametrize(("statements", "said"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_touched_behind_its_back_is_found(tmp_path, shared, statements, said):
    shutil.copytree(shared[0].folder, tmp_path / "copy")
    store = Registry(tmp_path / "copy")
    assert store.verify() == []
    execute(store, "DROP TRIGGER no_update", "DROP TRIGGER no_delete", *statements(store))
    (wrong, *_) = store.verify()
    assert said in wrong
    assert "Pointer(" not in wrong


def test_pointers_are_named_in_words(tmp_path):
    store, digests = registry(tmp_path, policies=1)
    store.promote(digests[0], who="ops", why="first")
    execute(store, "UPDATE pointers SET frozen = 1")
    short = digests[0][:16]
    assert store.verify() == [
        f"decision point 'route': found {short} served, frozen; expected {short} served, not frozen, as in the ledger"
    ]


def test_a_ledger_one_line_beyond_its_head_is_good_and_one_that_lost_lines_takes_no_more(tmp_path):
    store, digests = registry(tmp_path, policies=2)
    head, first = tmp_path / "ledger.head", (tmp_path / "ledger.head").read_bytes()
    store.promote(digests[0], who="ops", why="first")
    after = head.read_bytes()
    head.write_bytes(first)  # as a crash between change and head leaves it
    assert store.verify() == []
    store.promote(digests[1], who="ops", why="second")
    assert b'"line":2' in head.read_bytes()
    for content in (head.read_bytes().replace(b'"line":2', b'"line":1'), b"{", None):
        head.unlink() if content is None else head.write_bytes(content)
        assert "ledger.head: found" in store.verify()[0]
        with pytest.raises(DamageError, match="expected where the ledger ended"):
            store.freeze("route", who="ops", why="x")
    assert store.ledger_lines() == 2
    head.write_bytes(after)
    assert store.verify() == []
    statements = "DROP TRIGGER no_update", "UPDATE ledger SET line = 9 WHERE line = 1", "UPDATE ledger SET line = 1 WHERE line = 2"
    execute(store, *statements)
    with pytest.raises(DamageError, match="found another line 1"):
        store.prune(keep=1)


@pytest.mark.parametrize("left", ["artifacts", "ledger.head"])
def test_an_emptied_database_is_no_fresh_registry(tmp_path, left):
    registry(tmp_path, policies=1)
    (tmp_path / "control.sqlite").write_bytes(b"")
    shutil.rmtree(tmp_path / "artifacts") if left == "ledger.head" else (tmp_path / "ledger.head").unlink()
    with pytest.raises(DamageError, match=f"found an empty database beside .*{left}.*restore it from a backup"):
        Registry(tmp_path)


def test_a_damaged_database_is_said_so(tmp_path):
    store, digests = registry(tmp_path, policies=1)
    execute(store, "UPDATE keys SET public_key = x'010203'")
    with pytest.raises(DamageError, match=r"control.sqlite: found a public key of 3 bytes; expected one of 32"):
        store.promote(digests[0], who="ops", why="x")
    execute(store, "DELETE FROM keys")
    with pytest.raises(DamageError, match="found no public key"):
        store.verify()
    execute(store, "DROP TABLE ledger")
    with pytest.raises(DamageError, match=r"control.sqlite: found .*no such table: ledger"):
        store.ledger()
    (tmp_path / "control.sqlite").write_bytes(np.random.default_rng(0).bytes(8192))
    with pytest.raises(DamageError, match=r"control.sqlite: found .*not a database"):
        Registry(tmp_path)


def test_changes_that_change_nothing_and_unknown_decision_points_are_refused(tmp_path):
    store, digests = registry(tmp_path, policies=2)
    store.promote(digests[0], who="ops", why="first")
    with pytest.raises(InputError, match="served already"):
        store.promote(digests[0], who="ops", why="again")
    with pytest.raises(InputError, match="is not frozen"):
        store.freeze("route", who="ops", why="x", frozen=False)
    for change in (store.freeze, store.rollback):
        with pytest.raises(InputError, match="found no artifact of decision point 'rout'; expected one of: route"):
            change("rout", who="ops", why="typo")
    store.freeze("route", who="ops", why="incident")
    with pytest.raises(InputError, match="is frozen already"):
        store.freeze("route", who="ops", why="incident")
    assert [entry.action for entry in store.ledger()] == ["promote", "freeze"]
    assert store.verify() == []


def test_a_refused_rollback_lists_what_was_served_before(tmp_path):
    store, digests = registry(tmp_path, policies=4)
    for digest in (*digests[:2], digests[0], digests[2]):
        store.promote(digest, who="ops", why="nightly")
    before = ", ".join(digest[:16] for digest in (*digests[:2], digests[0]))
    with pytest.raises(InputError, match=rf"newest last: {before}; to serve any other .*`propel policy promote`"):
        store.rollback("route", who="ops", why="x", to=digests[3])
    back = [store.rollback("route", who="ops", why="x").to_digest for _ in range(3)]
    assert back == [digests[0], digests[1], digests[0]]


def test_an_artifact_that_was_touched_is_found_and_not_promoted(tmp_path):
    store, digests = registry(tmp_path, policies=1)
    path = store.path(digests[0]) / "policy.json"
    path.write_bytes(path.read_bytes().replace(b"0.02", b"0.01"))
    assert ["digest check" in each for each in store.verify()] == [True]
    with pytest.raises(InputError, match="digest check"):
        store.promote(digests[0], who="ops", why="x")
    assert store.ledger() == []


def test_pruning_keeps_what_is_served_what_a_rollback_needs_and_the_newest(tmp_path):
    store, digests = registry(tmp_path, policies=5)
    for digest in digests[:3]:
        store.promote(digest, who="ops", why="nightly")
    assert store.prune(keep=1) == [digests[0], digests[3]]
    assert list(store.listed()) == [digests[1], digests[2], digests[4]]
    assert not store.path(digests[0]).exists()
    assert store.rollback("route", who="ops", why="x").to_digest == digests[1]
    assert store.verify() == []


def test_without_its_key_a_registry_is_read_only(tmp_path):
    store, digests = registry(tmp_path, policies=1)
    (tmp_path / "signing.key").chmod(0o644)
    with pytest.raises(InputError, match="others can read"):
        store.promote(digests[0], who="ops", why="x")
    (tmp_path / "signing.key").unlink()
    with pytest.raises(InputError, match="can be read, not changed"):
        store.promote(digests[0], who="ops", why="x")
    assert store.load(digests[0]).manifest.name == "night-0"
