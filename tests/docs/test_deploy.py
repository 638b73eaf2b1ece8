"""The files on the page about deployment: they agree with the service's own limits, and those who read them find no fault."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.main import get_command

from bandits.terminal import BAD_INPUT
from propel import app
from serving.app import FAILED
from serving.protocol import MOST_CONNECTIONS
from serving.server import OTHER_FILES
from serving.settings import Serve
from tests.serving.server import Server, free_port, make, running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
FILES = dict(re.findall(r"^```\w+\n# file: (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SERVER = "\n".join(path.read_text() for path in sorted((ROOT / "serving").rglob("*.py")))
DEFAULTS = Serve()

KEEPS_ALIVE = int(re.search(r'"timeout_keep_alive": (\d+)', SERVER)[1])  # type: ignore[index]


def unit() -> configparser.SectionProxy:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(FILES["propel@.service"])
    return found["Service"]


def seconds(name: str, text: str) -> float:
    found = re.search(rf"^\s*{name} (\d+)s?;?$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_the_unit_waits_for_the_end_and_starts_again_after_a_failed_write() -> None:
    assert float(unit()["TimeoutStopSec"]) >= DEFAULTS.drain_seconds + 5 + 10  # workers' own limit, and time to close the log
    assert int(unit()["LimitNOFILE"]) == MOST_CONNECTIONS + OTHER_FILES
    assert unit()["Restart"] == "on-failure"
    assert unit()["RestartPreventExitStatus"] == str(BAD_INPUT) != str(FAILED)
    assert f"status {FAILED} is a disk" in PAGE


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "propel@.service"
    path.write_text(FILES["propel@.service"].replace("/opt/propel/.venv/bin/propel", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "propel@" in line]) == (0, [])


def test_commands_on_the_page_exist() -> None:
    """In units and crontabs, which nothing else runs: each command with its options."""
    commands = get_command(app)
    found = re.findall(r"\.venv/bin/propel (\w+)((?: [^\s>&]+)*)", PAGE)
    assert {name for name, _ in found} == {"serve", "backup", "init"}
    for name, words in found:
        options = {option for one in commands.commands[name].params for option in one.opts}  # type: ignore[attr-defined]
        assert {word for word in words.split() if word.startswith("--")} <= options


def test_the_proxies_fit_the_service() -> None:
    nginx, caddy = FILES["propel.conf"], FILES["Caddyfile"]
    most = 16 * DEFAULTS.most_body_kilobytes // 1024
    assert f"client_max_body_size {most}m;" in nginx
    assert f"max_size {most}MiB" in caddy
    assert f"client_body_buffer_size {DEFAULTS.most_body_kilobytes}k;" in nginx
    assert "most_body_kilobytes * 1024" in SERVER
    assert seconds("keepalive_timeout", nginx) < KEEPS_ALIVE
    assert seconds("keepalive", caddy) < KEEPS_ALIVE
    for text, name in ((nginx, "proxy_read_timeout"), (caddy, "response_header_timeout")):
        assert seconds(name, text) > DEFAULTS.longest_wait_seconds + 1
    assert f"127.0.0.1:{DEFAULTS.port}" in nginx
    assert f"127.0.0.1:{DEFAULTS.port}" in caddy
    assert "non_idempotent" not in nginx


@pytest.mark.skipif(shutil.which("caddy") is None, reason="needs caddy")
def test_caddy_takes_its_file(tmp_path: Path) -> None:
    (tmp_path / "Caddyfile").write_text(FILES["Caddyfile"])
    command = ["caddy", "validate", "--config", str(tmp_path / "Caddyfile"), "--adapter", "caddyfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_what_is_alarmed_on_is_measured() -> None:
    names = set(re.findall(r"\bpropel_\w+", PAGE.partition("## Alarms")[2]))
    assert len(names) >= 6
    assert {name for name in names if f'"{name.removesuffix("_total")}"' not in SERVER} == set()


@contextmanager
def nginx(folder: Path, front: int, first: int, second: int) -> Iterator[None]:
    """nginx with the page's configuration, on plain HTTP: certificates are not what is tried."""
    text = FILES["propel.conf"].replace("8080", str(first)).replace("8081", str(second)).replace("443 ssl", f"127.0.0.1:{front}")
    text = re.sub(r"^\s*ssl_.*\n", "", text, flags=re.MULTILINE)
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n{text}}}\n"
    )
    process = subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_an_upgrade_behind_nginx_refuses_next_to_nothing(tmp_path: Path) -> None:
    config, key = make(tmp_path / "shop")
    port = int(config.read_text().split("port = ")[1].split("\n")[0])
    other, front = free_port(), free_port()
    second = config.with_name("second.toml")
    second.write_text(config.read_text().replace(f"port = {port}", f"port = {other}"))
    ending, answers = threading.Event(), list[int]()

    def ask_on(proxy: Server) -> None:
        while not ending.is_set():
            answers.append(proxy.decide().status)

    with running(config, key) as first, nginx(tmp_path, front, port, other):
        proxy = Server(config, key, front, first.process)
        threads = [threading.Thread(target=ask_on, args=[proxy]) for _ in range(2)]
        with running(second, key):
            for one in threads:
                one.start()
            try:
                first.process.terminate()
                assert first.process.wait(20) == 0
                asked = len(answers)
                while len(answers) < asked + 50:
                    threads[0].join(0.05)
                named = proxy.decide({"decision_id": "one", "context": {}})
                assert named.status == 200
                for path in ("/metrics", "/docs", "/openapi.json", "/healthz"):
                    assert proxy.ask("GET", path).status == 404
                assert proxy.ask("GET", "/readyz").status == 200
            finally:
                ending.set()
                for one in threads:
                    one.join()
    # each thread may have been sending on a connection that was closed at that moment, as the page says; nothing was decided then
    assert set(answers) <= {200, 502}
    assert answers.count(502) <= 2
    assert len(first.stored()) == answers.count(200) + 1
