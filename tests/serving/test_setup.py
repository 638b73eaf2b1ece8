"""From `propel init` to a service that runs, or says in one line why it does not."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from bandits.salts import read_salts
from ope.data import InputError
from pipelines.nightly.settings import read_settings as read_night
from propel import app
from serving.access import Secret
from serving.settings import read_settings
from serving.setup import add_key, initialise, keys_of
from tests.serving.points import AD_LOAD, ROUTES_POINT, promote
from tests.serving.server import SECONDS, make, running


def propel(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings that tests copy or read only."""
    return initialise(tmp_path_factory.mktemp("made") / "service").config


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Path:
    """Settings that a test may spoil."""
    shutil.copytree(made.parent, tmp_path / "copy")
    return tmp_path / "copy" / "propel.toml"


def test_init_writes_a_folder_that_service_and_night_read(tmp_path: Path) -> None:
    result = propel("init", tmp_path / "shop", "--port", 9123, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    config = tmp_path / "shop" / "propel.toml"
    assert told == {"config": str(config), "key": told["key"], "decision_point": "ad-load", "url": "http://127.0.0.1:9123"}
    settings, night = read_settings(config), read_night(config)
    assert settings.points == night.points == (AD_LOAD,)
    assert (settings.serve.port, settings.serve.host, settings.serve.workers) == (9123, "127.0.0.1", 1)
    assert (settings.file.tenant, night.tenant) == ("default", "default")
    assert night.file.certificate.salts is not None
    assert list(read_salts(night.path(night.file.certificate.salts))) == [1]  # so that the night replays what was drawn
    (key,) = keys_of(settings.data)
    assert key.scopes == ("decide", "reward", "read")
    assert told["key"].startswith(f"propel_{key.prefix}_")
    assert key.hash == Secret.read(settings.data / "secret.key").keyed(b"keys", told["key"], size=32).hex()
    assert told["key"].split("_", 2)[2] not in (settings.data / "keys.toml").read_text()


def test_secrets_are_for_their_owner_alone(made: Path) -> None:
    data = made.parent / "data"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [data, *data.iterdir()]}
    assert modes == {"data": 0o700, "secret.key": 0o600, "salts.toml": 0o600, "keys.toml": 0o600, "keys.lock": 0o600}


def test_two_folders_share_no_secret(made: Path, tmp_path: Path) -> None:
    other = initialise(tmp_path / "other").config
    for name in ("secret.key", "salts.toml", "keys.toml"):
        assert (made.parent / "data" / name).read_bytes() != (other.parent / "data" / name).read_bytes()


def test_init_in_words_says_how_to_go_on(tmp_path: Path) -> None:
    result = propel("init", tmp_path / "shop")
    assert result.exit_code == 0
    (key,) = {word for word in result.stdout.replace("'", " ").split() if word.startswith("propel_")}
    assert f"propel serve --config {tmp_path / 'shop' / 'propel.toml'}" in result.stdout
    assert f"curl -H 'Authorization: Bearer {key}'" in result.stdout
    assert "http://127.0.0.1:8080/v1/ad-load/decisions" in result.stdout


@pytest.mark.parametrize("left", ["propel.toml", "data"])
def test_init_refuses_a_folder_in_use_and_changes_nothing(config: Path, left: str) -> None:
    gone = config if left == "data" else config.parent / "data"
    gone.unlink() if gone.is_file() else shutil.rmtree(gone)
    before = {path: path.stat().st_mtime_ns for path in config.parent.rglob("*")}
    result = propel("init", config.parent)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "found settings or data already; expected a new folder" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in config.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("below", "found"),
    [("file", "a file in its place"), ("file/more", "a file in its place"), ("x" * 256, "no place for it (File name too long)")],
)
def test_init_says_why_there_can_be_no_folder(tmp_path: Path, below: str, found: str) -> None:
    (tmp_path / "file").write_text("kept")
    result = propel("init", tmp_path / below)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"propel: {tmp_path / below}: found {found}; expected room for a new folder: name another\n"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "kept")]


def test_a_new_key_as_json_says_what_it_may(config: Path) -> None:
    result = propel("key", "add", "--scopes", "read", "--expires", "2999-01-31", "--json", "--config", config)
    told = json.loads(result.stdout)
    kept = keys_of(config.parent / "data")[1]
    assert told == {
        "key": told["key"], "prefix": kept.prefix, "tenant": "default", "scopes": ["read"], "expires": "2999-01-31",
    }  # fmt: skip
    assert kept.hash == Secret.read(config.parent / "data" / "secret.key").keyed(b"keys", told["key"], size=32).hex()
    assert json.loads(propel("key", "add", "--json", "--config", config).stdout)["expires"] is None


def test_a_key_for_tomorrow_is_made_and_one_that_is_dead_today_is_not(config: Path) -> None:
    today = dt.datetime.now(dt.UTC).date()
    days = {day: propel("key", "add", "--expires", today + dt.timedelta(day), "--config", config) for day in (-1, 0, 2)}
    assert [one.exit_code for one in days.values()] == [2, 2, 0]
    assert f"found --expires {today}, from which on the key is not valid; expected a date after today" in days[0].stderr
    assert len(keys_of(config.parent / "data")) == 2


def test_no_key_is_lost_where_several_are_made_and_ended_at_once(config: Path) -> None:
    first = keys_of(config.parent / "data")[0].prefix
    arguments = [["add"]] * 6 + [["remove", first]]
    command = [sys.executable, "-m", "propel", "key"]
    processes = [
        subprocess.Popen([*command, *one, "--config", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in arguments
    ]
    told = [process.communicate(timeout=SECONDS) for process in processes]
    assert [(process.returncode, errors) for process, (_, errors) in zip(processes, told, strict=True)] == [(0, "")] * 7
    made = {out.split("_")[1] for out, _ in told[:6]}
    assert len(made) == 6
    assert {key.prefix for key in keys_of(config.parent / "data")} == made
    assert not (config.parent / "data" / "keys.new").exists()


def test_the_file_of_keys_is_private_before_it_has_its_name(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, modes = config.parent / "data", list[int]()
    (data / "keys.new").write_text("of one that was killed")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda new, to: (modes.append(stat.S_IMODE(new.stat().st_mode)), rename(new, to)))
    monkeypatch.setattr(Path, "chmod", None)  # nobody needs it: it is made so
    before = os.umask(0)
    try:
        add_key(data, "default", ("read",))
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_keys_are_added_listed_and_ended(config: Path) -> None:
    first = keys_of(config.parent / "data")[0].prefix
    added = propel("key", "add", "--scopes", "read, decide", "--expires", "2031-01-31", "--tenant", "shop", "--config", config)
    assert added.exit_code == 0
    key = added.stdout.strip()
    prefix = key.split("_")[1]
    listed = json.loads(propel("key", "list", "--json", "--config", config).stdout)
    assert listed[1] == {"prefix": prefix, "tenant": "shop", "scopes": ["decide", "read"], "expires": "2031-01-31"}
    assert [one["prefix"] for one in listed] == [first, prefix]
    words = propel("key", "list", "--config", config).stdout
    assert f"propel_{prefix}_...  shop  decide,read  2031-01-31" in words
    assert key not in words
    assert stat.S_IMODE((config.parent / "data" / "keys.toml").stat().st_mode) == 0o600
    assert propel("key", "remove", prefix[:8], "--config", config).stdout == f"ended propel_{prefix}_...\n"
    assert [one.prefix for one in keys_of(config.parent / "data")] == [first]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "--scopes", "decide,admin"), "found scopes 'decide,admin'; expected some of decide, reward, read"),
        (("add", "--scopes", ""), "found scopes ''"),
        (("add", "--expires", "soon"), "found --expires 'soon'; expected a date"),
        (
            ("add", "--expires", "2026-01-01"),
            "found --expires 2026-01-01, from which on the key is not valid; expected a date after",
        ),
        (("add", "--tenant", "x" * 129), "tenant"),
        (("add", "--tenant", "a\nb"), "tenant"),
        (("remove", "zz"), "found 0 keys that begin with 'zz'"),
        (("remove", ""), "found 1 keys that begin with ''"),
    ],
)
def test_bad_words_about_keys_change_nothing(config: Path, arguments: tuple[str, ...], said: str) -> None:
    before = (config.parent / "data" / "keys.toml").read_bytes()
    result = propel("key", *arguments, "--config", config)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (config.parent / "data" / "keys.toml").read_bytes() == before
    keys_of(config.parent / "data")


def _settings(old: str, new: str) -> Callable[[Path], object]:
    return lambda config: config.write_text(config.read_text().replace(old, new, 1))


def _point(old: str, new: str) -> Callable[[Path], object]:
    return lambda config: (config.parent / "ad-load.toml").write_text(
        (config.parent / "ad-load.toml").read_text().replace(old, new, 1)
    )


def _data(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda config: change(config.parent / "data" / name)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a public address": (_settings("127.0.0.1", "0.0.0.0"), "serve.host: found 0.0.0.0, which others can reach"),
    "a public name": (_settings('host = "127.0.0.1"', 'host = "shop.example"'), "serve.host: found shop.example"),
    "a misspelt key": (_settings("workers = 1", "worker = 1"), "serve: unknown key 'worker'; did you mean 'workers'?"),
    "a misspelt table": (_settings("[serve]", "[server]"), "unknown key 'server'; did you mean 'serve'?"),
    "no workers": (_settings("workers = 1", "workers = 0"), "serve.workers"),
    "a slash in a name": (_point('"ad-load"', '"ad/load"'), "decision point 'ad/load': found a slash"),
    "two of one name": (_settings('["ad-load.toml"]', '["ad-load.toml", "ad-load.toml"]'), "expected distinct names"),
    "no decision point": (lambda config: (config.parent / "ad-load.toml").unlink(), "ad-load.toml: No such file"),
    "an unprintable tenant": (_settings('tenant = "default"', 'tenant = "a\\nb"'), "tenant: found 'a\\nb'"),
    "no TOML": (lambda config: config.write_text("tenant ="), "found text that is not TOML"),
    "no settings": (lambda config: config.unlink(), "propel.toml: No such file"),
    "no secret": (_data("secret.key", Path.unlink), "secret.key: No such file or directory; expected a secret"),
    "a secret for all to read": (_data("secret.key", lambda path: path.chmod(0o644)), "found a secret that others can read"),
    "a short secret": (_data("secret.key", lambda path: path.write_bytes(b"short")), "found 5 bytes; expected the 32"),
    "no salts": (_data("salts.toml", Path.unlink), "salts.toml: No such file"),
    "salts for all to read": (_data("salts.toml", lambda path: path.chmod(0o640)), "found a secret that others can read"),
    "salts without any": (_data("salts.toml", lambda path: path.write_text("# nothing\n")), "salts.toml"),
    "no TOML of salts": (_data("salts.toml", lambda path: path.write_text("1 = 2")), "found no TOML of epochs and salts"),
    "no keys": (_data("keys.toml", Path.unlink), "keys.toml"),
    "no TOML of keys": (_data("keys.toml", lambda path: path.write_text("[[key]]\nprefix = 1")), "keys.toml: key"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_is_said_in_one_line_and_nothing_starts(config: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(config)
    result = propel("serve", "--config", config)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("propel: ")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (config.parent / "data" / "log").exists()


def test_a_policy_for_other_features_is_not_served(config: Path) -> None:
    other = msgspec.structs.replace(ROUTES_POINT, name="ad-load")
    promote(config.parent / "registry", other)
    result = propel("serve", "--config", config)
    assert result.exit_code == 2
    assert "decision point 'ad-load': found a promoted policy linear@" in result.stderr
    assert "for other features or actions" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_policy_is_not_served(config: Path) -> None:
    promote(config.parent / "registry", AD_LOAD)
    (policy,) = (config.parent / "registry" / "artifacts").glob("*/policy.json")
    policy.write_bytes(policy.read_bytes().replace(b"1", b"2"))
    result = propel("serve", "--config", config)
    assert result.exit_code == 2
    assert "digest check" in result.stderr


def test_behind_a_proxy_any_address_will_do(config: Path) -> None:
    config.write_text(config.read_text().replace('host = "127.0.0.1"', 'host = "0.0.0.0"\nbehind_proxy = true'))
    assert read_settings(config).serve.host == "0.0.0.0"
    for host in ("localhost", "::1", "127.8.8.8"):
        config.write_text(config.read_text().replace("behind_proxy = true\n", "").replace('"0.0.0.0"', f'"{host}"'))
        assert read_settings(config).serve.host == host
        config.write_text(config.read_text().replace(f'"{host}"', '"0.0.0.0"'))
    with pytest.raises(InputError):
        read_settings(config)


def test_a_taken_port_ends_it_with_1_and_one_line_for_people(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.write_text(config.read_text().replace("port = 8080", f"port = {port}"))
        command = [sys.executable, "-m", "propel", "serve", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert done.stdout == ""
    people = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # others are the log's, in JSON
    assert len(people) == 1
    assert str(port) in people[0]
    assert "Traceback" not in done.stderr


def test_a_promoted_policy_decides_from_the_next_start(tmp_path: Path) -> None:
    config, key = make(tmp_path / "shop")
    reference = promote(config.parent / "registry", AD_LOAD)
    with running(config, key) as server:
        told = server.decide({"context": {"minutes_in_session": 3.0, "device": "phone"}}).json
        assert told["policy"] == reference
        assert len(set(told["propensities"].values())) == 5  # not uniform
        assert min(told["propensities"].values()) >= 0.1 / 5 - 2**-31
