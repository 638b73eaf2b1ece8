"""A decision point's file: what it reads to, and that every wrong key and value is named."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from bandits.decision_point import Actions, DecisionPoint, RewardRule, parse_decision_point, read_decision_point
from bandits.features import Boolean, Category, FeatureSchema, Hashed, Number
from ope.data import InputError

PATH = Path(__file__).parent / "fixtures" / "decision_point.toml"
TEXT = PATH.read_text()
EXPECTED = DecisionPoint(
    name="payment-route",
    actions=Actions(catalogue=("acq1", "acq2", "acq3"), per_request=False, most=12),
    rewards=(
        RewardRule("authorised", 0.0, 1.0, 86400.0, "first", 0.0, "last", 2.5, 2),
        RewardRule("net", -500.0, 10000.0, 1.5, "last", 0.0, "exclude", 5.0, 1),
    ),
    features=FeatureSchema(
        context=(
            Number("amount", 0.0, 40.0, 12.5),
            Boolean("token", False),
            Category("card", ("debit", "credit"), "level", "error"),
            Hashed("issuer", 64),
        ),
        action=(Number("cost"),),
        interactions=(("amount", "cost"),),
    ),
    exploration_floor=0.05,
    default_action="acq1",
    attribution="root",
    shown="exclude",
    version=3,
)
SMALL = """
name = "p"
actions = {per_request = true}
rewards = [{name = "r", low = 0, high = 1, window_seconds = 60}]
"""


def test_a_full_file_reads_to_its_values():
    point = read_decision_point(PATH)
    assert point == EXPECTED
    assert point.explores
    assert [rule.name for rule in point.rewards] == ["authorised", "net"], "the first is the one that policies maximise"


def test_what_is_left_out_has_its_documented_default():
    point = parse_decision_point(SMALL)
    assert (point.exploration_floor, point.default_action, point.attribution, point.version) == (0.02, None, "decision", 1)
    assert (point.shown, point.features, point.actions.most) == ("intention_to_treat", FeatureSchema(), 1000)
    rule = point.reward("r")
    assert (rule.aggregation, rule.default, rule.conflict) == ("last", 0.0, "exclude")
    assert (rule.clock_tolerance_seconds, rule.version) == (5.0, 1)


def test_only_a_floor_above_0_explores():
    assert not parse_decision_point("exploration_floor = 0" + SMALL).explores
    assert parse_decision_point("exploration_floor = 1e-9" + SMALL).explores
    assert parse_decision_point("exploration_floor = 1" + SMALL).exploration_floor == 1.0


KEYS = [
    ("exploration_floor", "", "exploration_flor"),
    ("default_action", "", "defualt_action"),
    ("attribution", "", "atribution"),
    ("shown", "", "show"),
    ("version = 3", "", "versoin = 3"),
    ("catalogue", "actions", "catalog"),
    ("per_request", "actions", "per_reqest"),
    ("most", "actions", "mots"),
    ("low", "rewards", "lwo"),
    ("high", "rewards", "hihg"),
    ("window_seconds", "rewards", "window_secs"),
    ("aggregation", "rewards", "agregation"),
    ("default = 0", "rewards", "defalt = 0"),
    ("conflict", "rewards", "conflit"),
    ("clock_tolerance_seconds", "rewards", "clock_tolerence_seconds"),
    ("interactions", "features", "interaction"),
    ("missing = 0", "features", "mising = 0"),
    ("centre", "features", "center"),
    ("scale", "features", "scael"),
    ("levels", "features", "level"),
    ("unknown", "features", "unknwon"),
    ("buckets", "features", "bucket"),
    ("[[features.context]]", "features", "[[features.contxt]]"),
    ("[[features.action]]", "features", "[[features.actoin]]"),
]


def word(line: str) -> str:
    return re.sub(r"\W*(features\.)?(\w+).*", r"\2", line)


@pytest.mark.parametrize(("key", "place", "typed"), KEYS, ids=[word(typed) for _, _, typed in KEYS])
def test_a_misspelt_key_is_named_with_file_path_and_the_key_that_was_meant(tmp_path, key, place, typed):
    file = tmp_path / "point.toml"
    wrong = re.sub(rf"^{re.escape(key)}", typed, TEXT, flags=re.MULTILINE)
    assert wrong != TEXT
    file.write_text(wrong)
    hint = rf"unknown key '{word(typed)}'; did you mean '{word(key)}'\?"
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}: {place}[^ ]*:? ?{hint}$") as error:
        read_decision_point(file)
    assert place in str(error.value)


def test_a_key_like_no_other_is_named_without_a_guess():
    with pytest.raises(InputError, match=r"^f: unknown key 'zzzzzz'$"):
        parse_decision_point("zzzzzz = 1" + SMALL, "f")


VALUES = {
    "low above high": ("high = 1.0", "high = -1.0", "rewards", "low, high: found 0.0, -1.0"),
    "low equal to high": ("high = 1.0", "high = 0.0", "rewards", "low, high"),
    "infinite high": ("high = 1.0", "high = inf", "rewards", "low, high"),
    "NaN low": ("low = 0.0", "low = nan", "rewards", "low, high"),
    "default outside": ("default = 0.0", "default = 2.0", "rewards", r"default: found 2\.0; expected .* \[0\.0, 1\.0\]"),
    "NaN default": ("default = 0.0", "default = nan", "rewards", "default: found nan"),
    "window 0": ("window_seconds = 1.5", "window_seconds = 0", "rewards", "window_seconds"),
    "negative window": ("window_seconds = 1.5", "window_seconds = -1.5", "rewards", "window_seconds"),
    "negative tolerance": ("seconds = 2.5", "seconds = -2.5", "rewards", "clock_tolerance_seconds"),
    "unknown aggregation": ('aggregation = "first"', 'aggregation = "mean"', "rewards", "aggregation"),
    "unknown conflict rule": ('conflict = "last"', 'conflict = "max"', "rewards", "conflict"),
    "reward names twice": ('name = "net"', 'name = "authorised"', "", r"rewards: found \['authorised', 'authorised'\]"),
    "floor 2": ("floor = 0.05", "floor = 2", "", "exploration_floor"),
    "negative floor": ("floor = 0.05", "floor = -0.1", "", "exploration_floor"),
    "floor as text": ("floor = 0.05", 'floor = "5 %"', "", "exploration_floor"),
    "default action elsewhere": ('action = "acq1"', 'action = "acq9"', "", "default_action: found 'acq9'; expected one of .*acq3"),
    "attribution": ('"root"', '"leaf"', "", "attribution"),
    "shown": ('"exclude"', '"drop"', "", "shown"),
    "catalogue and per request": ("per_request = false", "per_request = true", "actions", "either a catalogue or per_request"),
    "neither": ('catalogue = ["acq1", "acq2", "acq3"]', "catalogue = []", "actions", "either a catalogue or per_request"),
    "action twice": ('"acq2", "acq3"', '"acq2", "acq2"', "actions", "catalogue: found an action twice"),
    "action of no characters": ('"acq2"', '""', "actions", "catalogue"),
    "action that does not print": ('"acq2"', '"a\\u001b"', "actions", "catalogue: found .*printable"),
    "most 0": ("most = 12", "most = 0", "actions", "most"),
    "most 10,001": ("most = 12", "most = 10001", "actions", "most"),
    "version 0": ("version = 3", "version = 0", "", "version"),
    "name of 129": ('"payment-route"', '"' + "x" * 129 + '"', "", "name"),
    "name that does not print": ('"payment-route"', '"a\\tb"', "", "name: found .*printable"),
    "scale 0": ("scale = 12.5", "scale = 0.0", "features", "amount: found scale 0"),
    "buckets 0": ("buckets = 64", "buckets = 0", "features", "buckets"),
    "feature kind": ('type = "hashed"', 'type = "hash"', "features", "hash"),
    "feature twice": ('name = "cost"', 'name = "amount"', "features", "found a name twice"),
    "interaction of nothing": ('["amount", "cost"]', '["amount", "cots"]', "features", "interactions: found 'cots'"),
}


@pytest.mark.parametrize(("old", "new", "place", "message"), VALUES.values(), ids=VALUES)
def test_an_invalid_value_is_named_by_its_key(old, new, place, message):
    assert TEXT.count(old) >= 1
    with pytest.raises(InputError, match=f"^point.toml: .*{place}.*") as error:
        parse_decision_point(TEXT.replace(old, new, 1), "point.toml")
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize("key", ["name", "low", "high", "window_seconds"])
def test_a_reward_states_its_range_and_window(key):
    rule = {"name": '"r"', "low": "0", "high": "1", "window_seconds": "60"}
    inline = ", ".join(f"{name} = {value}" for name, value in rule.items() if name != key)
    with pytest.raises(InputError, match=rf"^f: rewards\[0\].*`{key}`"):
        parse_decision_point(f'name = "p"\nactions = {{per_request = true}}\nrewards = [{{{inline}}}]', "f")


def test_no_reward_and_no_action_are_named():
    with pytest.raises(InputError, match="rewards: found none"):
        parse_decision_point('name = "p"\nrewards = []\nactions = {per_request = true}')
    with pytest.raises(InputError, match="actions"):
        parse_decision_point('name = "p"\nrewards = [{name = "r", low = 0, high = 1, window_seconds = 60}]')


def test_text_that_is_no_toml_and_files_that_are_not_there_are_messages(tmp_path):
    with pytest.raises(InputError, match=r"^f: found text that is not TOML"):
        parse_decision_point("name = ", "f")
    with pytest.raises(InputError, match=r"^f: found text that is not TOML"):
        parse_decision_point(b"\xff\xfe", "f")
    with pytest.raises(InputError, match=r"absent\.toml: No such file"):
        read_decision_point(tmp_path / "absent.toml")


@pytest.mark.parametrize("value", [-0.001, 1.001, math.nan, math.inf, -math.inf])
def test_rewards_outside_their_range_are_refused(value):
    with pytest.raises(InputError, match=rf"reward 'authorised': found {value}; expected a number within \[0, 1\]"):
        EXPECTED.reward("authorised").check(value)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_rewards_within_their_range_are_never_changed(value):
    assert EXPECTED.reward("authorised").check(value) == value


def test_an_unknown_reward_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"'payment-route': found reward 'auth'; expected one of \['authorised', 'net'\]"):
        EXPECTED.reward("auth")
