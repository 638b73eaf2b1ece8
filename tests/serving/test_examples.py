"""Examples of the client's page: made from the description, there as they are made, and run as they are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ope.data import InputError
from serving.examples import DECIDE, markdown, request
from serving.openapi import described
from tests.serving.misbehaving import drops, forwards, loses, misbehaving
from tests.serving.server import Server, make, running

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-the-client.md"

BLOCKS = dict(re.findall(r"^```(sh|js)\n(.*?)^```", markdown(), re.MULTILINE | re.DOTALL))

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(*make(tmp_path_factory.mktemp("examples") / "service")) as one:
        yield one


def test_the_page_shows_what_is_made() -> None:
    printed = subprocess.run([sys.executable, "-m", "serving.examples"], capture_output=True, text=True, check=True).stdout
    assert printed == markdown()
    assert all(f"```{kind}\n{block}```\n" in PAGE.read_text() for kind, block in BLOCKS.items())
    assert set(BLOCKS) == {"sh", "js"}


def test_examples_that_the_service_does_not_describe_are_not_made() -> None:
    document = described({})
    with pytest.raises(InputError, match="found no operation 'decided'"):
        request(document, DECIDE._replace(operation="decided"))
    for body in ({}, {**DECIDE.body, "contexts": {}}):
        with pytest.raises(InputError, match=r"decide: found .*; expected \['context'\]"):
            request(document, DECIDE._replace(body=body))


@needs_curl
def test_curl_does_what_the_page_says(server: Server, tmp_path: Path) -> None:
    (tmp_path / "shop.json").write_text(f'{{"key": "{server.key}"}}')
    commands = BLOCKS["sh"].replace("http://127.0.0.1:8349", server.url)
    done = subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.count('"state":"stored"') == 3
    kinds = [server.ask("GET", f"/v1/decisions/{id_}").json["kind"] for id_ in ("order-2", "order-3")]
    assert kinds == ["sampled", "fallback"]


def node(folder: Path, url: str, key: str) -> list[str]:
    """Lines that the program prints."""
    (folder / "client.mjs").write_text(BLOCKS["js"])
    environment = os.environ | {"URL": url, "KEY": key}
    done = subprocess.run(["node", "client.mjs"], cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@needs_node
def test_javascript_does_what_the_page_says(server: Server, tmp_path: Path) -> None:
    """Served; by default, since no try was answered, and told so; and the same where the service had decided all the same."""
    decided, rewarded = node(tmp_path, server.url, server.key)
    assert (decided.endswith(" decided"), rewarded) == (True, "stored")
    with misbehaving(drops, drops, drops, forwards(server)) as odd:
        assert node(tmp_path, odd.url, server.key) == ["ads-2 by default", "stored"]
    (id_,) = {one.json["decision_id"] for one in odd.seen[:4]}
    assert server.ask("GET", f"/v1/decisions/{id_}").json["kind"] == "fallback"
    with misbehaving(loses(server), drops, drops, forwards(server)) as odd:
        assert node(tmp_path, odd.url, server.key) == ["ads-2 by default", "stored"]
    assert [one.path.rpartition("/")[2] for one in odd.seen[3:]] == ["unserved", "shown", "rewards"]
    with misbehaving(drops) as odd:
        assert node(tmp_path, odd.url, server.key) == ["ads-2 by default", "to be sent again"]
