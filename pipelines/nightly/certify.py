"""Step `certify`: one certificate per policy and day. Were logged propensities what was sampled from, and did everything arrive?

Sums are taken bucket by bucket, so memory does not grow with the day; what they mean is in `ope.certificate`.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bandits.decision_point import DecisionPoint
from bandits.events import KINDS, canonical
from bandits.registry import Registry
from bandits.sampling import TOTAL
from ope.certificate import Examination, Finding, Usual, examine
from ope.data import BoolArray, FloatArray, IntArray
from ope.draws import Draws, Tally, tally
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.provenance import Provenance, Raw, provenance
from pipelines.nightly.rows import SHOWN, STATES, Rows, read_rows, width, within
from pipelines.nightly.settings import DAY_NS, Night, Settings, day_start_ns
from pipelines.nightly.tables import TABLES
from pipelines.nightly.verdict import Judged, judge

VERSION = 2
"""Of this step: another one makes everything anew."""

NAMES = ("certificates", "calibration", "maturity", "support")
"""Tables that this step writes."""

AGES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Ages at which labelled rows are counted, as parts of a reward's window."""

HISTORY = 28
"""Days before a day whose join rates are usual."""

COUNTED = ("late", "early", "refused", "reversed", "conflicts")

Record = dict[str, Any]


class Rate(NamedTuple):
    """Join rate of one policy's day."""

    day: str
    policy: str
    joined: int
    mature: int


class Past(NamedTuple):
    """What join rates are usual: of the policy itself where it has a past, and of all policies together."""

    own: dict[str, Usual]
    all_policies: Usual | None


@dataclass(slots=True)
class Sums:
    """Of one policy's day, over its buckets. Sampled rows only, but for the kinds."""

    tally: Tally = field(default_factory=Tally)
    kinds: IntArray = field(default_factory=lambda: np.zeros(len(KINDS), np.int64))
    joined: int = 0
    mature: int = 0
    counts: IntArray = field(default_factory=lambda: np.zeros(len(COUNTED), np.int64))
    """Observations of all rewards, in the order of `COUNTED`."""
    ages: dict[str, IntArray] = field(default_factory=dict)
    """By reward: rows old enough, and of them labelled, at each age (2, ages)."""


def certify(
    night: Night, settings: Settings, lake: Lake, snapshot: Snapshot, progress: Callable[[int, int], object]
) -> list[Entry]:
    """Partitions of `certificates`, `calibration`, `maturity` and `support`, one each per decision point and day with rows.

    A day that was certified from the same rows, sources, settings and earlier join rates is left as it is.
    Raises InputError where the salts or the signing key cannot be read.
    """
    raw = Raw.of(settings, lake, snapshot)
    registry = Registry(settings.path(settings.file.registry.folder))
    days = night.days(settings.file.join.lookback_days)
    work = [
        (point, day) for point in settings.points for day in days if any(e.rows for e in snapshot.find("rows", point.name, [day]))
    ]
    found: list[Entry] = []
    rates: dict[str, list[Rate]] = {}
    for done, (point, day) in enumerate(work):
        if point.name not in rates:
            rates[point.name] = _rates(lake, snapshot.find("certificates", point.name, _before(days[0])))
        made = _certify_day(_Day(night, settings, lake, snapshot, point, day), raw, registry, _past(rates[point.name], day))
        found += made
        listed = [entry for entry in made if entry.table == "certificates"] or snapshot.find("certificates", point.name, [day])
        rates[point.name] += _rates(lake, listed)
        progress(done + 1, len(work))
    return found


def passed(lake: Lake, snapshot: Snapshot, point: str, days: Iterable[str]) -> dict[tuple[str, str], str]:
    """Verdict of every certificate of a decision point on some days, by policy and day."""
    entries = snapshot.find("certificates", point, days)
    rows = [row for entry in entries for row in lake.read(entry, ["policy", "day", "verdict"]).to_pylist()]
    return {(row["policy"], row["day"]): row["verdict"] for row in rows}


def verify_certificate(record: Mapping[str, Any], public_key: Ed25519PublicKey) -> bool:
    """Whether a row of `certificates`, as the lake or the mart has it, is what was signed. `tenant` is not part of it."""
    try:
        public_key.verify(bytes.fromhex(record["signature"]), _signed(record))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _signed(record: Mapping[str, Any]) -> bytes:
    return canonical({name: record[name] for name in TABLES["certificates"].columns if name != "signature"})


@dataclass(frozen=True, slots=True)
class _Day:
    night: Night
    settings: Settings
    lake: Lake
    snapshot: Snapshot
    point: DecisionPoint
    day: str

    def find(self, table: str) -> list[Entry]:
        return self.snapshot.find(table, self.point.name, [self.day])

    def open_until(self) -> int:
        """When the night looks, or when the last window of the day closes: later looks see nothing else."""
        longest = max(rule.window_seconds for rule in self.point.rewards)
        end = day_start_ns(dt.date.fromisoformat(self.day)) + DAY_NS
        return min(self.night.cutoff_ns, end + math.ceil(longest * 1e9))


def _certify_day(day: _Day, raw: Raw, registry: Registry, past: Past) -> list[Entry]:
    rows, decisions, deliveries = day.find("rows"), day.find("decisions"), day.find("deliveries")
    settings = day.settings.file.certificate
    inputs = raw.key(day.point.name, day.day, [*decisions, *deliveries])
    key = key_of(
        "certify", VERSION, settings, msgspec.to_builtins(day.point), [entry.sha256 for entry in rows], inputs, past.own,
        past.all_policies, day.open_until(), day.night.between, registry.public_key().public_bytes_raw().hex(),
    )  # fmt: skip
    if all([entry.key for entry in day.find(table)] == [key] for table in NAMES):
        return []
    k = len(day.point.actions.catalogue) or max(width(rows, day.lake), 1)
    sums: dict[str, Sums] = {}
    for entry in rows:
        if entry.rows:
            _add_bucket(sums, day, entry, k)
    sources = provenance(day.lake, raw, day.point.name, day.day, decisions, deliveries)
    tables: dict[str, list[Record]] = {name: [] for name in NAMES}
    for policy, mine in sorted(sums.items()):
        for name, records in _records(day, policy, mine, sources.get(policy, Provenance()), past, k).items():
            tables[name] += records
    tables["certificates"] = [_with_signature(record, registry) for record in tables["certificates"]]
    return [day.lake.write(name, TABLES[name].of(tables[name]), point=day.point.name, day=day.day, key=key) for name in NAMES]


def _with_signature(record: Record, registry: Registry) -> Record:
    """The record as Arrow will give it back, signed."""
    (stored,) = TABLES["certificates"].of([record]).to_pylist()
    signed: Record = stored | {"signature": registry.sign(_signed(stored)).hex()}
    return signed


def _rates(lake: Lake, entries: Sequence[Entry]) -> list[Rate]:
    """Join rates of certificates, those left out that fell below their band: what is missing is not usual."""
    columns = ["day", "policy", "joined", "mature", "join_rate", "join_low"]
    rows = [row for entry in entries for row in lake.read(entry, columns).to_pylist() if row["mature"]]
    return [
        Rate(row["day"], row["policy"], row["joined"], row["mature"])
        for row in rows
        if row["join_low"] is None or row["join_rate"] >= row["join_low"]
    ]


def _past(rates: Sequence[Rate], day: str) -> Past:
    """Usual join rates before a day."""
    days = _before(day)
    used = [rate for rate in rates if rate.day in days]
    own = {}
    for policy in sorted({rate.policy for rate in used}):
        mine = [rate for rate in used if rate.policy == policy]
        if (usual := Usual.of([rate.joined for rate in mine], [rate.mature for rate in mine])) is not None:
            own[policy] = usual
    joined = [sum(rate.joined for rate in used if rate.day == one) for one in days]
    mature = [sum(rate.mature for rate in used if rate.day == one) for one in days]
    return Past(own, Usual.of(joined, mature))


def _before(day: str) -> list[str]:
    """The days before a day that say what is usual, oldest first."""
    return [(dt.date.fromisoformat(day) - dt.timedelta(days=back)).isoformat() for back in range(HISTORY, 0, -1)]


def _add_bucket(sums: dict[str, Sums], day: _Day, entry: Entry, k: int) -> None:
    """Add the rows of one bucket to the sums of their policies."""
    rows = read_rows(day.lake, [entry], day.point, k=k, context=False, between=day.night.between)
    names = [f"x.{name}" for name in day.point.features.context_columns]
    table = within(day.lake.read(entry, ["decided_at_ns", *names]), day.night.between) if names else None
    context = np.empty((rows.n, 0)) if table is None else np.stack([table[name].to_numpy() for name in names], axis=1)
    for policy in sorted(set(rows.policy.tolist())):
        mine = rows.policy == policy
        one = sums.setdefault(policy, Sums())
        one.kinds += [int((mine & (rows.kind == kind)).sum()) for kind in KINDS]
        sampled = mine & (rows.kind == "sampled")
        if sampled.any():
            one.tally += tally(_draws(rows, context, sampled), day.point.exploration_floor)
            _add_rewards(one, day, rows, sampled)


def _draws(rows: Rows, context: FloatArray, which: BoolArray) -> Draws:
    where: slice | BoolArray = slice(None) if which.all() else which
    shown = np.full(len(SHOWN), 0)
    shown[SHOWN.index("as_sampled")], shown[SHOWN.index("unknown")] = 1, -1
    return Draws(
        rows.action[where], rows.propensity[where], rows.eligible[where], rows.shares[where] / TOTAL,
        rows.vector[where].astype(bool), context[where], rows.pass_probability[where], shown[rows.shown[where]],
    )  # fmt: skip


def _add_rewards(one: Sums, day: _Day, rows: Rows, which: BoolArray) -> None:
    first = rows.rewards[day.point.rewards[0].name].state[which]
    one.mature += int((first != STATES.index("pending")).sum())
    one.joined += int(np.isin(first, [STATES.index("observed"), STATES.index("conflict")]).sum())
    age = day.night.cutoff_ns - rows.decided_at_ns[which]
    for rule in day.point.rewards:
        outcome = rows.rewards[rule.name]
        one.counts += [int(outcome.counts[name][which].sum()) for name in COUNTED]
        delay = outcome.delay[which]
        limits = [part * rule.window_seconds * 1e9 for part in AGES]
        counted = [(int((age >= limit).sum()), int(((age >= limit) & (delay <= limit)).sum())) for limit in limits]
        one.ages[rule.name] = one.ages.get(rule.name, 0) + np.array(counted).T


def _records(day: _Day, policy: str, sums: Sums, source: Provenance, past: Past, k: int) -> dict[str, list[Record]]:
    """Rows of every table for one policy's day."""
    actions = list(day.point.actions.catalogue) or [f"position {j}" for j in range(k)]
    settings, columns = day.settings.file.certificate, day.point.features.context_columns
    place = {"dp": day.point.name, "policy": policy, "day": day.day}
    tests = examine(sums.tally, settings.false_alarm, actions, columns) if sums.tally.rows else None
    usual = past.own.get(policy, past.all_policies)
    band = usual.band(sums.mature, settings.false_alarm) if usual and sums.mature else None
    numbers = _numbers(sums, source, tests, band)
    verdict, reasons = judge(Judged(numbers, tests, source.span, policy in past.own), settings, day.point)
    return {
        "certificates": [place | numbers | {"verdict": verdict, "reasons": reasons}],
        "calibration": [] if tests is None else [place | _calibration(one) for one in tests.findings if _printed(one)],
        "maturity": [place | record for name, ages in sums.ages.items() for record in _maturity(day.point, name, ages)],
        "support": [] if tests is None else [place | record for record in _support(sums.tally, actions)],
    }


def _numbers(sums: Sums, source: Provenance, tests: Examination | None, band: tuple[float, float] | None) -> Record:
    """Columns of a certificate, but for its key, verdict and signature."""
    numbers: Record = {
        "rows": int(sums.kinds.sum()), **dict(zip(KINDS, sums.kinds.tolist(), strict=True)),
        "replay_checked": source.replay_checked, "replay_wrong": source.replay_wrong, "delivered": source.delivered,
        "repeated": source.repeated, "conflicts": source.conflicts, "numbered": source.numbered, "gaps": source.gaps,
        "mature": sums.mature, "joined": sums.joined, "join_rate": sums.joined / sums.mature if sums.mature else None,
        "join_low": band and band[0], "join_high": band and band[1], "outside": 0, "below_floor": 0,
        **dict(zip(("late", "early", "refused", "reversed", "reward_conflicts"), sums.counts.tolist(), strict=True)),
    }  # fmt: skip
    if sums.tally.sums:
        numbers |= {"outside": int(sums.tally.sums["outside"]), "below_floor": int(sums.tally.sums["below"])}
    weight = tests.worst("weights") if tests else None
    if tests is None or weight is None:
        return numbers
    total = sums.tally
    return numbers | {
        "weight_mean": weight.observed, "weight_z": weight.z, "weight_p": weight.p, "calibration_chi2": _known(tests.chi2),
        "calibration_df": tests.df, "calibration_p": _known(tests.chi2_p), "p_min": float(total.lows["p"].min()),
        "p_max": float(total.highs["p"].max()), "floor": float(total.lows["floor"]), "ess": tests.ess, "tail": _known(tests.tail),
        "not_shown": _known(tests.not_shown), "shown_known": int(total.sums["shown_known"].sum()),
        "not_shown_p": _known(tests.not_shown_p), "not_shown_independent": tests.not_shown_independent,
        "vectors": float(total.sums["vectors"] / total.rows),
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _printed(one: Finding) -> bool:
    """Every action and bin of probability; of the many others those that fail."""
    return one.family in ("actions", "probabilities") or one.failed


def _calibration(one: Finding) -> Record:
    name = one.name if one.family == "probabilities" else f"{one.family}: {one.name}"
    return {"bin": name, "rows": one.rows, "expected": one.expected, "observed": one.observed, "z": _known(one.z), "p": one.p}


def _maturity(point: DecisionPoint, name: str, ages: IntArray) -> list[Record]:
    window = point.reward(name).window_seconds
    return [
        {"reward": name, "age_seconds": part * window, "rows": int(rows), "labelled": labelled / rows if rows else None}
        for part, rows, labelled in zip(AGES, *ages.tolist(), strict=True)
    ]


def _support(total: Tally, actions: Sequence[str]) -> list[Record]:
    return [
        {
            "action": action, "eligible": int(total.sums["eligible"][j]), "taken": int(total.sums["taken"][j]),
            "expected": float(total.sums["expected"][j]), "p_min": _known(float(total.lows["p"][j])),
            "p_max": _known(float(total.highs["p"][j])), "shown_known": int(total.sums["shown_known"][j]),
            "not_shown": int(total.sums["not_shown"][j]),
        }
        for j, action in enumerate(actions)
    ]  # fmt: skip
