"""Settings of the night: what a file reads to, that every wrong key and value is named, and that the page says the same."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path

import msgspec
import pytest

from bandits.toml import parse_toml
from ope.data import InputError
from pipelines.nightly.settings import DAY_NS, File, Night, Settings, day_start_ns, read_settings
from serving.settings import Serve

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
SMALL = 'tenant = "t"\ndecision_points = ["p.toml"]\n'
POINT = """
name = "p"
actions = {catalogue = ["a", "b"]}
rewards = [{name = "r", low = 0, high = 1, window_seconds = 60}]
features = {context = [{type = "number", name = "x"}, {type = "category", name = "device", levels = ["phone"]}]}
"""
SECTIONS: dict[str, type[msgspec.Struct]] = {
    field.name: field.type
    for field in msgspec.structs.fields(File)
    if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
} | {"serve": Serve}


def read(folder: Path, text: str = SMALL, **points: str) -> Settings:
    for name, point in ({"p": POINT} | points).items():
        (folder / f"{name}.toml").write_text(point)
    path = folder / "propel.toml"
    path.write_text(text)
    return read_settings(path)


def table(section: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning of each key of a section of the page."""
    part = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert part is not None, f"a section {section}"
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part[1].splitlines() if line.startswith("| `")]
    return {name.strip("` "): (kind, default, meaning) for name, kind, default, meaning in rows}


def words(kind: msgspec.inspect.Type) -> str:
    """A type, as the page says it."""
    match kind:
        case msgspec.inspect.StrType(min_length=None):
            return "text"
        case msgspec.inspect.StrType(min_length=least, max_length=most):
            return f"text of {least} to {most} characters"
        case msgspec.inspect.IntType(ge=low, le=None):
            return f"whole number, at least {low}"
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"whole number, {low} to {high}"
        case msgspec.inspect.FloatType(ge=low) if low is not None:
            return f"number, at least {low:g}"
        case msgspec.inspect.FloatType(gt=low, le=None, lt=None):
            return f"number, above {low:g}"
        case msgspec.inspect.FloatType(gt=low, le=high, lt=below):
            return f"number, above {low:g}, " + (f"below {below:g}" if high is None else f"at most {high:g}")
        case msgspec.inspect.BoolType():
            return "`true` or `false`"
        case msgspec.inspect.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case msgspec.inspect.UnionType(types=types):
            (one,) = (each for each in types if not isinstance(each, msgspec.inspect.NoneType))
            return f"{words(one)}, or nothing"
        case msgspec.inspect.VarTupleType(item_type=item, min_length=least):
            name, _, bounds = words(item).partition(", ")
            return f"list of {name}s" + (f", {bounds}" if bounds else "") + (", not empty" if least else "")
    raise AssertionError(f"{kind} has no words")


@pytest.mark.parametrize("section", ["The file", *(f"`[{name}]`" for name in SECTIONS)])
def test_the_page_has_every_key_with_its_type_and_default(section: str) -> None:
    kind = SECTIONS.get(section.strip("`[]"), File)
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    expected = {}
    for field in info.fields:
        if field.name not in SECTIONS or kind is not File:
            default = "required" if field.required else "none" if field.default is None else f"`{json.dumps(field.default)}`"
            expected[field.name] = words(field.type), default
    found = table(section)
    assert {name: cells[:2] for name, cells in found.items()} == expected
    assert all(meaning for *_, meaning in found.values())


def test_the_page_has_every_section() -> None:
    assert set(re.findall(r"^## `\[(\w+)\]`$", PAGE.read_text(), re.MULTILINE)) == set(SECTIONS)


def test_the_smallest_file_has_all_defaults(tmp_path: Path) -> None:
    settings = read(tmp_path)
    assert settings.tenant == "t"
    assert settings.file == File(tenant="t", decision_points=("p.toml",))
    assert [point.name for point in settings.points] == ["p"]
    assert settings.point("p") is settings.points[0]
    assert settings.point("q") is None


def test_paths_are_relative_to_the_file_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "config"
    (folder / "points").mkdir(parents=True)
    (folder / "points" / "p.toml").write_text(POINT)
    (folder / "propel.toml").write_text(SMALL.replace("p.toml", "points/p.toml") + f'[lake]\nfolder = "{tmp_path / "lake"}"\n')
    monkeypatch.chdir(tmp_path)
    settings = read_settings(Path("config/propel.toml"))
    monkeypatch.chdir("/")
    assert settings.path(settings.file.lake.inbox) == folder / "inbox"
    assert settings.path(settings.file.lake.folder) == tmp_path / "lake", "an absolute path stays what it is"


KEYS = [(name, field) for name, kind in SECTIONS.items() if kind is not Serve for field in kind.__struct_fields__]


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda name: str(name))
def test_a_key_that_is_misspelt_is_named_with_the_one_that_was_meant(section: str, key: str) -> None:
    wrong = key[:-1]
    with pytest.raises(InputError, match=rf"^here: {section}: unknown key '{wrong}'; did you mean '{key}'\?$"):
        parse_toml(f"{SMALL}[{section}]\n{wrong} = 1\n", File, "here")


def test_a_section_that_is_misspelt_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown key 'evaluation'; did you mean 'evaluate'\?"):
        parse_toml(f"{SMALL}[evaluation]\nlevel = 0.9\n", File, "here")


WRONG = {
    'tenant = ""': "tenant",
    'decision_points = ["p.toml"]': "tenant",
    'tenant = "t"': "decision_points",
    'tenant = "t"\ndecision_points = []': "decision_points",
    'tenant = "a\\nb"\ndecision_points = ["p.toml"]': "tenant: found .*; expected 1 to 128 printable",
    SMALL + "[lake]\nbuckets = 0": "lake.buckets",
    SMALL + "[lake]\nsnapshots = 9": "lake.snapshots",
    SMALL + "[join]\ncutoff_hours = -1": "join.cutoff_hours",
    SMALL + "[join]\nlookback_days = 1.5": "join.lookback_days",
    SMALL + "[certificate]\nfalse_alarm = 0": "certificate.false_alarm",
    SMALL + "[train]\nshare = 1": "train.share",
    SMALL + "[train]\nlearners = 'DR'": "train.learners",
    SMALL + "[evaluate]\nwindows = [0]": "evaluate.windows",
    SMALL + "[evaluate]\nuncertified = 'drop'": "evaluate.uncertified: .* expected one of exclude, include",
    SMALL + "[evaluate]\nwindows = []": "evaluate.windows: found none",
    SMALL + "[evaluate]\nestimators = ['DRR', 'DR']": "unknown estimator 'DRR'; .* did you mean 'DR'",
    SMALL + "[evaluate]\nestimators = ['DR', 'Delta']": "found Delta, a difference; expected estimators of a value",
    SMALL + "[evaluate]\nestimators = ['IPS']": "select.estimator: found 'DR'; expected one of evaluate.estimators",
    SMALL + "[select]\nestimator = 'SNDR'": "select.estimator: found 'SNDR'; expected one of evaluate.estimators",
    SMALL + "[select]\nsizes = [1]": "select.sizes",
    SMALL + "[train]\ndays = 7": r"evaluate.windows: found 28 days; expected at most train.days",
    SMALL + "[join]\nlookback_days = 14": r"train.days: found 28; expected at most join.lookback_days",
    SMALL + "[lake": "not TOML",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.removeprefix(SMALL))
def test_a_wrong_value_is_named(text: str) -> None:
    with pytest.raises(InputError, match=f"^here: .*{WRONG[text]}"):
        parse_toml(text, File, "here")


def test_shorter_days_with_shorter_windows_are_good() -> None:
    text = f"{SMALL}[join]\nlookback_days = 7\n[train]\ndays = 7\n[evaluate]\nwindows = [7]\n"
    assert parse_toml(text, File, "here").evaluate.windows == (7,)


def test_an_estimator_with_a_setting_of_its_own_is_known_by_that_name() -> None:
    text = f"{SMALL}[evaluate]\nestimators = ['DRos(100)']\n[select]\nestimator = 'DRos(100)'\n"
    assert parse_toml(text, File, "here").select.estimator == "DRos(100)"


def test_segments_are_features_of_every_decision_point_that_declares_some(tmp_path: Path) -> None:
    bare = POINT.replace('"p"', '"bare"').replace("features", "# features")
    both = SMALL.replace('"p.toml"', '"p.toml", "bare.toml"')
    assert len(read(tmp_path, f'{both}[evaluate]\nsegments = ["device"]\n', bare=bare).points) == 2
    with pytest.raises(InputError, match=r"evaluate.segments: found 'devise'; expected context features of p: \['device', 'x'\]"):
        read(tmp_path, f'{SMALL}[evaluate]\nsegments = ["devise"]\n')


def test_decision_points_have_distinct_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"propel.toml: decision_points: found \['p', 'p'\]; expected distinct names"):
        read(tmp_path, SMALL.replace('"p.toml"', '"p.toml", "q.toml"'), q=POINT)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/propel.toml: No such file or directory; expected a TOML file"):
        read_settings(tmp_path / "nowhere" / "propel.toml")
    with pytest.raises(InputError, match=r"q.toml: No such file or directory; expected a TOML file"):
        read(tmp_path, SMALL.replace("p.toml", "q.toml"))


def test_a_decision_point_that_is_wrong_is_named_by_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p.toml: unknown key 'rewrads'; did you mean 'rewards'\?"):
        read(tmp_path, p=POINT.replace("rewards", "rewrads"))


def test_a_night_looks_at_the_end_of_its_date_and_the_cut_off(tmp_path: Path) -> None:
    day = dt.date(2025, 3, 3)
    end = int(dt.datetime(2025, 3, 4, tzinfo=dt.UTC).timestamp()) * 10**9
    assert Night.of(day, read(tmp_path)) == Night(day, end)
    assert Night.of(day, read(tmp_path, f"{SMALL}[join]\ncutoff_hours = 6\n")).cutoff_ns == end + 6 * 3600 * 10**9
    assert Night.of(day, read(tmp_path, f"{SMALL}[join]\ncutoff_hours = 0.5\n")).cutoff_ns == end + 1800 * 10**9


@pytest.mark.parametrize("day", [dt.date(2024, 2, 29), dt.date(2025, 3, 30), dt.date(2025, 12, 31)])
def test_days_are_utc_and_each_as_long_as_the_other(day: dt.date) -> None:
    """A leap day, a night on which clocks change in Europe, the end of a year."""
    assert day_start_ns(day + dt.timedelta(days=1)) - day_start_ns(day) == DAY_NS
    assert day_start_ns(day) % DAY_NS == 0


def test_days_of_a_night_end_with_its_date() -> None:
    night = Night(dt.date(2024, 3, 1), 0)
    assert night.days(3) == ["2024-02-28", "2024-02-29", "2024-03-01"]
    assert night.days(1) == ["2024-03-01"]
