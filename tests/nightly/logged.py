"""The events of tests in a log of the service's, each as the service stores it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from bandits.events import Decision, Reward, Shown, digest
from bandits.log.keys import open_keys, unindexed
from bandits.log.port import Entry, Kind, decision_key, reward_key, shown_key
from bandits.log.sqlite import SqliteLog
from tests.log.test_contract import wait_until

Record = Mapping[str, Any]

NUMBERS = ("log_id", "log_row")

encode = msgspec.json.Encoder().encode


def entries(
    decisions: Sequence[Record] = (),
    rewards: Sequence[Record] = (),
    shown: Sequence[Record] = (),
    quarantined: Sequence[Record] = (),
) -> Iterator[Entry]:
    """What the service would append."""
    for one in map(_without_numbers, decisions):
        made = Decision(**one | {"body": msgspec.Raw(one["body"]), "actions": tuple(one["actions"]), "excluded": ()})
        yield Entry(
            Kind.DECISION, decision_key(made.tenant, made.decision_id), made.request_hash, encode(made), b"answer", fresh=True
        )
    for some, kind in ((rewards, Kind.REWARD), (quarantined, Kind.QUARANTINED)):
        for one in map(_without_numbers, some):
            key = reward_key(one["tenant"], one["decision_id"], one["name"], one["event_id"])
            content = digest(struct.pack("<d", one["value"]))
            yield Entry(kind, key if kind is Kind.REWARD else b"q" + key[1:], content, encode(Reward(**one)), kept=True)
    for one in map(_without_numbers, shown):
        content = digest(encode(one["action"]))
        yield Entry(Kind.SHOWN, shown_key(one["tenant"], one["decision_id"]), content, encode(Shown(**one)), kept=True)


def append(folder: Path, *groups: Iterator[Entry], apart: bool = False) -> None:
    """Append groups to the log in a folder; `apart`: each to a file of its own, sealed and indexed but for the last."""
    log = SqliteLog(folder, reserve=1, rotate_bytes=1 if apart else 1 << 30)
    for group in groups:
        log.append(list(group))
    if apart:
        wait_until(lambda: _is_indexed(folder))
    log.close()


def _is_indexed(folder: Path) -> bool:
    with closing(open_keys(folder)) as keys:
        return not unindexed(keys, folder)


def _without_numbers(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in NUMBERS}
