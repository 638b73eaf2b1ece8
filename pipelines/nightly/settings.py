"""Settings of the night, read from one TOML file. Every key has a default but the tenant and the decision points."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from bandits.decision_point import DecisionPoint, read_decision_points
from bandits.events import Id, check_id
from bandits.toml import read_toml
from ope.data import InputError
from ope.estimators import Estimator, estimator

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]

DAY_NS = 86_400 * 10**9


class Lake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[lake]`: where events come from and where they are kept."""

    folder: str = "lake"
    """Partitions and their manifest, relative to the settings file."""
    inbox: str = "inbox"
    """Folders of events, each as `propel import` writes it."""
    buckets: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    """Parts of a day, by hash of the unit. Fixed once the lake holds something."""
    snapshots: Annotated[int, msgspec.Meta(ge=10)] = 200
    """Manifests kept; files that none of them lists are deleted."""
    memory: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)? ?[KMGT]i?B$")] = "1GB"
    """What DuckDB may hold in memory; more goes to disk."""


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[join]`: when rewards are complete."""

    cutoff_hours: NotNegative = 0.0
    """Hours after the end of the date at which its night looks: what is not mature by then is left out."""
    lookback_days: Count = 28
    """Days before the date whose rewards may still arrive; older ones stay as they are."""


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[certificate]`: when logged propensities are believed."""

    false_alarm: Annotated[float, msgspec.Meta(gt=0, le=0.1)] = 0.01
    """Probability, at most, that all tests together fail a day that is well."""
    duplicates: Share = 0.02
    """Share of decisions delivered again above which a warning is given."""
    conflicts: Share = 0.001
    """Share of decisions whose id came with two contents above which a day fails."""
    replayed: Count = 1000
    """Decisions of each policy and day that are drawn again."""
    salts: str | None = None
    """TOML file of seed epochs and salts in hex, such as `1 = "..."`; without it nothing is replayed."""


class Train(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[train]`: what learns, on what."""

    learners: tuple[str, ...] = ("IPS", "DR", "oracle-softmax", "oracle-softmax (trees)")
    """Labels of `bandits.learners.LEARNERS`."""
    days: Count = 28
    """Days up to the date that are learned from and valued on."""
    share: Share = 0.5
    """Of units, by their hash, that are learned from; the others choose (fold A) and value (fold B), half each."""
    most_rows: Count = 1_000_000
    """About as many rows, drawn by hash of the unit, are learned from where there are more."""
    least_rows: Count = 500
    """With fewer rows to learn from nothing is learned."""


class Evaluate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[evaluate]`: what is estimated."""

    estimators: tuple[str, ...] = ("DM", "IPS", "SNIPS", "DR")
    windows: tuple[Count, ...] = (1, 7, 28)
    """Days up to the date; those longer than `train.days` are refused."""
    segments: tuple[str, ...] = ()
    """Names of context features whose every value is a segment of its own."""
    most_segments: Count = 20
    """Values of a segment, the most frequent first."""
    level: Share = 0.95
    tolerance: NotNegative = 0.0
    """c of `p_below_c`: how much less than the baseline would still be accepted, in units of the reward."""
    uncertified: Literal["exclude", "include"] = "exclude"
    """Rows of days and policies without a passed certificate; included, every verdict is at most caution."""


class Select(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[select]`: the portfolio worth an A/B test."""

    estimator: str = "DR"
    sizes: tuple[Annotated[int, msgspec.Meta(ge=2)], ...] = (2, 3, 4, 5)
    duplicate: NotNegative = 0.01
    """Mean total variation below which two candidates are one."""


class Reports(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[reports]`: where the night's tables and pages go."""

    folder: str = "reports"


class Registry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[registry]`: where learned policies are kept."""

    folder: str = "registry"


class Serve(msgspec.Struct, frozen=True):
    """What the night needs to know of `[serve]`; the service checks the rest."""

    data: str = "data"
    """Folder in which the service keeps its log."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings file as it is written."""

    tenant: Id
    decision_points: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """TOML files of decision points, relative to the settings file."""
    lake: Lake = Lake()
    join: Join = Join()
    certificate: Certificate = Certificate()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    select: Select = Select()
    registry: Registry = Registry()
    reports: Reports = Reports()
    serve: Serve = Serve()

    def __post_init__(self) -> None:
        check_id("tenant", self.tenant)
        for key, names in (("evaluate.estimators", self.evaluate.estimators), ("select.estimator", (self.select.estimator,))):
            for name in names:
                if _estimator(key, name).needs.baseline:
                    raise ValueError(f"{key}: found {name}, a difference; expected estimators of a value such as DR")
        if self.select.estimator not in self.evaluate.estimators:
            raise ValueError(f"select.estimator: found {self.select.estimator!r}; expected one of evaluate.estimators")
        if max(self.evaluate.windows, default=0) > self.train.days:
            raise ValueError(f"evaluate.windows: found {max(self.evaluate.windows)} days; expected at most train.days")
        if self.train.days > self.join.lookback_days:
            raise ValueError(f"train.days: found {self.train.days}; expected at most join.lookback_days: older days are not joined")
        if not self.evaluate.windows:
            raise ValueError("evaluate.windows: found none; expected at least one number of days")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings with their decision points read and their paths made whole."""

    file: File
    points: tuple[DecisionPoint, ...]
    folder: Path
    """That of the settings file."""

    @property
    def tenant(self) -> str:
        """Whose night it is."""
        return self.file.tenant

    @property
    def log(self) -> Path:
        """Folder of the service's log, which need not be there."""
        return self.folder / self.file.serve.data / "log"

    def path(self, relative: str) -> Path:
        """A path of the settings file."""
        return self.folder / relative

    def point(self, name: str) -> DecisionPoint | None:
        """The decision point of this name, or None."""
        return next((point for point in self.points if point.name == name), None)


@dataclass(frozen=True, slots=True)
class Night:
    """A date, and when its night looks at the events."""

    date: dt.date
    cutoff_ns: int
    """What closes later is not mature."""
    between: tuple[int, int] | None = None
    """Only decisions from the first moment on and before the second are certified, learned from and valued."""

    @classmethod
    def of(cls, day: dt.date, settings: Settings) -> Night:
        """The night of a date."""
        end = day_start_ns(day) + DAY_NS
        return cls(day, end + int(settings.file.join.cutoff_hours * 3600 * 10**9))

    @classmethod
    def cut(cls, since: dt.datetime, until: dt.datetime, settings: Settings) -> Night:
        """The decisions from one moment to another, as the night of the last one's date that looks then.

        Raises InputError for a moment without a time zone, and for a last one that is not after the first.
        """
        if since.tzinfo is None or until.tzinfo is None or until <= since:
            raise InputError(
                f"found {since.isoformat()} to {until.isoformat()}; expected two times with their zone, such as "
                "2026-11-29T18:00:00Z, the second one later"
            )
        start, end = (moment_ns(one) for one in (since, until))
        last = (until - dt.timedelta(microseconds=1)).astimezone(dt.UTC).date()
        return cls(last, end + int(settings.file.join.cutoff_hours * 3600 * 10**9), (start, end))

    def days(self, count: int) -> list[str]:
        """The last `count` days up to the date, oldest first, as ISO dates; of a stretch of time, those that it touches."""
        if self.between is not None:
            first = dt.datetime.fromtimestamp(self.between[0] // 10**9, dt.UTC).date()
            count = min(count, (self.date - first).days + 1)
        return [(self.date - dt.timedelta(days=back)).isoformat() for back in reversed(range(count))]


def moment_ns(moment: dt.datetime) -> int:
    """Nanoseconds since 1970, to the microsecond."""
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1) * 1000


def day_start_ns(day: dt.date) -> int:
    """Nanoseconds since 1970 at which a date begins, UTC."""
    return int(dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC).timestamp()) * 10**9


def read_settings(path: Path) -> Settings:
    """Settings from a TOML file and the decision points that it names. Raises InputError that names file and key."""
    file = read_toml(path, File)
    points = read_decision_points(path, file.decision_points)
    for point in points:
        known = {feature.name for feature in point.features.context}
        for name in file.evaluate.segments:
            if name not in known and known:
                raise InputError(
                    f"{path}: evaluate.segments: found {name!r}; expected context features of {point.name}: {sorted(known)}"
                )
    return Settings(file, points, path.resolve().parent)


def _estimator(key: str, name: str) -> Estimator:
    try:
        return estimator(name)
    except InputError as error:
        raise ValueError(f"{key}: {error}") from None
