"""One set of events, delivered in any order, in any pieces, some of it twice."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path

from pipelines.nightly.ingest import Ingested, ingest
from pipelines.nightly.join import join
from pipelines.nightly.lake import Lake, Snapshot, open_lake
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.sources import inbox
from tests.nightly.events import DAY, decision, folder, listed, reward, settings, shown

DECISIONS = [decision(f"d{i:03d}", at=i, unit=f"u{i % 40}") for i in range(120)]
DECISIONS += [decision("d003", at=3, unit="u3", chosen=1), decision("d004", at=4, unit="u5"), *DECISIONS[:2]]
REWARDS = [reward(f"d{i:03d}", i / 100, at=i + (5000 if i % 5 == 0 else 30)) for i in range(115)]
REWARDS += [reward("d007", 9.0, at=9), reward("nobody", at=1), *REWARDS[:2], reward("d008", 0.5, at=20, event_id="more")]
SHOWN = [shown(f"d{i:03d}", "abc"[i % 3], at=i + 1) for i in range(60)] + [shown("d000", None, at=2), shown("nobody", "a")]
"""A fifth of the rewards is late; two ids came with two contents, one event id with two values."""

TABLES = ("decisions", "rewards", "shown", "rows", "orphan_rewards", "orphan_shown", "conflicts")


def take(config: Settings, lake: Lake) -> Ingested:
    """Ingest the inbox, and commit."""
    found = ingest(config, lake, lake.snapshot(), inbox(config.folder / "inbox"))
    lake.commit(found.entries, lambda entry: entry.place in found.dropped)
    return found


def lake_of(config: Settings) -> tuple[Lake, Snapshot]:
    """The lake of some settings, and what it lists."""
    lake = open_lake(config)
    return lake, lake.snapshot()


def deliver(path: Path, rng: random.Random) -> tuple[tuple[tuple[str, str, str, int], str], ...]:
    """Deliver the events in random pieces, each ingested before the next, and join them: the digest of every partition."""
    config = settings(path, more="[lake]\nbuckets = 2\n")
    lake, _ = lake_of(config)
    parts = [rng.sample(some, len(some)) for some in (DECISIONS, REWARDS, SHOWN)]
    cuts = sorted(rng.choices(range(3), k=2))
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, 3], strict=True)):
        pieces = [[row for i, row in enumerate(some) if start <= i % 3 < end] for some in parts]
        if any(pieces):
            folder(path / "inbox" / f"{number}", *pieces)
            take(config, lake)
    snapshot = lake.commit(join(Night.of(dt.date.fromisoformat(DAY), config), config, lake, lake.snapshot()))
    return tuple(sorted(listed(snapshot, *TABLES).items()))
