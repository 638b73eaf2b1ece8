"""`propel backup` of a service that decides, `propel restore`, and the service that starts from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner

from bandits.log.files import log_files
from bandits.log.port import decision_key
from bandits.log.replay import replay
from bandits.log.segments import gaps, records, segment
from bandits.registry import Registry
from bandits.salts import read_salts
from propel import app
from tests.serving.points import AD_LOAD, promote
from tests.serving.server import Server, make, running, within


def propel(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "propel", *map(str, words)], capture_output=True, text=True, check=False)


def request_of(name: str) -> dict[str, object]:
    return {"decision_id": name, "unit": f"unit-{name}", "context": {"device": "phone", "minutes_in_session": len(name) / 2}}


@contextmanager
def deciding(server: Server, told: dict[str, bytes]) -> Iterator[None]:
    """Two clients that ask for one decision after another, and note each answer."""
    ending = threading.Event()

    def ask_on(client: int) -> None:
        number = 0
        while not ending.is_set():
            name = f"{client}-{number}"
            answer = server.decide(request_of(name))
            assert answer.status == 200
            told[name], number = answer.body, number + 1

    threads = [threading.Thread(target=ask_on, args=[client]) for client in range(2)]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        ending.set()
        for one in threads:
            one.join()


def test_a_service_that_decides_is_backed_up_and_put_back(tmp_path: Path) -> None:
    config, key = make(tmp_path / "shop", serve="rotate_seconds = 0.5")
    reference = promote(tmp_path / "shop" / "registry", AD_LOAD)
    told = dict[str, bytes]()
    with running(config, key) as server, deciding(server, told):
        within(20, lambda: len(log_files(server.data / "log")) > 2 and len(told) > 60)
        first = propel("backup", "--to", tmp_path / "backup", "--config", config, "--json")
        before = dict(told)
        second = propel("backup", "--to", tmp_path / "backup", "--config", config, "--json")
    for done in (first, second):
        assert (done.returncode, done.stderr) == (0, "")
    made = [json.loads(done.stdout) for done in (first, second)]
    assert made[0]["copied_bytes"] <= made[0]["bytes"]
    assert made[1]["copied_bytes"] < made[1]["bytes"]
    assert made[1]["damaged"] == {}

    shutil.rmtree(tmp_path / "shop")
    done = propel("restore", tmp_path / "backup", "--to", tmp_path / "shop")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"propel serve --config {config}" in done.stdout
    files = log_files(tmp_path / "shop" / "data" / "log")
    saved = {one.key for path in files for one in records(path)}
    assert {decision_key("default", name) for name in before} <= saved
    assert not [path for path in files if gaps(path)]
    assert Registry(tmp_path / "shop" / "registry").verify() == []
    replayed = replay(files, read_salts(tmp_path / "shop" / "data" / "salts.toml"))
    assert (replayed.wrong, replayed.actions, replayed.decisions) == ([], len(saved), len(saved))

    with running(config, key) as server:
        for name in list(before)[:: max(1, len(before) // 50)]:
            assert (
                server.decide(request_of(name)).body == before[name]
            )  # byte for byte, those from the file that was written to, too
        assert server.decide(request_of(next(iter(before))) | {"unit": "other"}).status == 409
        new = server.decide(request_of("new"))
        assert (new.status, new.json["policy"]) == (200, reference)
        later = log_files(server.data / "log")[len(files) :]
        assert [one.key for path in later for one in records(path)] == [decision_key("default", "new")]
        assert {segment(path).log_id for path in later}.isdisjoint({segment(path).log_id for path in files})


def test_what_people_see(tmp_path: Path) -> None:
    config, _ = make(tmp_path / "shop")
    run = CliRunner().invoke
    done = run(app, ["backup", "--to", str(tmp_path / "backup"), "--config", str(config)])
    assert (done.exit_code, done.output) == (0, f"5 files, 0.0 MB, 0.0 MB of it new, in {tmp_path / 'backup'}\n")
    done = run(app, ["restore", str(tmp_path / "backup"), "--to", str(tmp_path / "new"), "--json"])
    assert (done.exit_code, json.loads(done.output)["config"]) == (0, str(tmp_path / "new" / "propel.toml"))

    done = run(app, ["restore", str(tmp_path / "backup"), "--to", str(tmp_path / "new")])
    assert (done.exit_code, done.output) == (
        2, f"propel: {tmp_path / 'new'}: found something there; expected an empty folder, or none: name another\n",
    )  # fmt: skip
    for name in json.loads((tmp_path / "backup" / "manifest.json").read_bytes())["manifest"]["files"]:
        if name["path"] == "data/salts.toml":
            (tmp_path / "backup" / "files" / name["sha256"]).unlink()
    done = run(app, ["restore", str(tmp_path / "backup"), "--to", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert done.output.startswith("propel: data/salts.toml: found no ")
    assert not (tmp_path / "other").exists()

    config.write_text(config.read_text().replace('data = "data"', f'data = "{tmp_path}/shop/data"'))
    done = run(app, ["backup", "--to", str(tmp_path / "backup"), "--config", str(config)])
    assert done.exit_code == 2
    assert "serve.data: found" in done.output


def test_what_was_damaged_before_is_told(tmp_path: Path) -> None:
    config, _ = make(tmp_path / "shop")
    promote(tmp_path / "shop" / "registry", AD_LOAD)
    (tmp_path / "shop" / "registry" / "ledger.head").write_bytes(b"{}")
    (tmp_path / "shop" / "data" / "log").mkdir()
    (tmp_path / "shop" / "data" / "log" / "log-00000001.sqlite").write_bytes(b"no database")
    (tmp_path / "shop" / "data" / "log" / "log-00000001.head").write_bytes((7).to_bytes(8, "little"))
    done = propel("backup", "--to", tmp_path / "backup", "--config", config)
    assert done.returncode == 3
    assert "data/log/log-00000001.sqlite: found rows 1 to 7 damaged or missing" in done.stderr
    done = propel("restore", tmp_path / "backup", "--to", tmp_path / "new")
    assert done.returncode == 3
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()] == ["it was so when the backup was made"] * 2
    assert "found rows 1 to 7 damaged or missing" in done.stderr
    assert "ledger.head: found a file that this registry's key did not sign" in done.stderr
