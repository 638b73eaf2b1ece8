"""Promotion: the night's winner is served where it passes every guard rail; else it is said which ones it does not pass."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Any

from bandits.policy import UNIFORM
from bandits.registry import Registry
from pipelines.nightly.certify import verify_certificate
from pipelines.nightly.mart import HEADLINE_FOLD, WHOLE, Mart
from pipelines.nightly.settings import Settings
from pipelines.nightly.views import PointView, Record, label, point_views

WHO = "propel promote"


@dataclass(frozen=True, slots=True)
class Promotion:
    """What was decided at one decision point."""

    decision_point: str
    policy: str | None
    """The winner: of the candidates worth a test, the one that ranks first on fold A."""
    digest: str | None
    promoted: bool
    """Whether it is served from now on, or would be."""
    reasons: tuple[str, ...]
    """Why not."""
    difference: Record | None
    """To the policy that is served, which logged, on fold B, which neither taught nor chose: the forecast."""
    estimate: Record | None
    """Its value there."""

    @property
    def line(self) -> str:
        """In words."""
        name = "no candidate" if self.policy is None else label(self.policy)
        gain = self.difference
        forecast = f" (difference {gain['value']:+.4f}, {gain['low']:+.4f} to {gain['high']:+.4f})" if _known(gain) and gain else ""
        return f"{self.decision_point}: {name}{forecast}: {'promoted' if self.promoted else ' '.join(self.reasons)}"


def promote(mart: Mart, settings: Settings, *, point: str | None = None, dry_run: bool = False) -> list[Promotion]:
    """Serve the winner of each decision point, or of one, where every guard rail lets it pass; the ledger keeps the estimate.

    Raises InputError where the registry refuses.
    """
    registry = Registry(settings.path(settings.file.registry.folder))
    found = [_judge(view, mart, settings, registry) for view in point_views(mart) if point in (None, view.point["dp"])]
    for one in found:
        if one.promoted and not dry_run:
            assert one.digest is not None, "a winner that passed is an artifact"
            why = f"night of {mart.manifest.date}, report {mart.manifest.snapshot_id}: every guard rail passed"
            registry.promote(one.digest, who=WHO, why=why, estimate=_finite(one.difference))
    return found


def _judge(view: PointView, mart: Mart, settings: Settings, registry: Registry) -> Promotion:
    dp = view.point["dp"]
    worth = sorted((row for row in view.shortlist if row["decision"] == "test" and row["rank"]), key=lambda row: row["rank"])
    if not worth:
        return Promotion(dp, None, None, False, ("No candidate is worth a test: see the report.",), None, None)
    policy = worth[0]["policy"]
    digest = next((row["digest"] for row in view.candidates if row["policy"] == policy), None)
    pointer = registry.pointer(dp)
    served = UNIFORM if pointer.digest is None else f"{registry.manifest(pointer.digest).name}@{pointer.digest[:32]}"
    window, mixed = _window(view, mart, settings, served)
    difference, estimate = (_row(mart, view, table, policy, window) for table in ("differences", "estimates"))
    if pointer.digest is not None and pointer.digest == digest:
        reasons = ["It is served already."]
    else:
        reasons = [
            *_of_certificates(view, registry), *mixed, *_of_estimates(difference, estimate, settings.file.evaluate.tolerance),
            *_of_registry(dp, digest, mart, registry),
        ]  # fmt: skip
    return Promotion(dp, policy, digest, not reasons, tuple(reasons), difference, estimate)


def _window(view: PointView, mart: Mart, settings: Settings, served: str) -> tuple[int, list[str]]:
    """The longest window that the policy which is served decided alone: that is what a winner must be better than.

    Differences are to whoever logged. Where older policies decided, too, they say nothing of the one that is to be replaced.
    """
    windows = sorted(settings.file.evaluate.windows, reverse=True)
    by_day: dict[str, set[str]] = {}
    for row in mart.records("certificates", dp=view.point["dp"]):
        if row["sampled"]:
            by_day.setdefault(row["day"], set()).add(row["policy"])
    date = dt.date.fromisoformat(mart.manifest.date)
    others: set[str] = set()
    for window in windows:
        days = [(date - dt.timedelta(days=back)).isoformat() for back in range(window)]
        others = set().union(*(by_day.get(day, set()) for day in days)) - {served}
        if not others:
            return window, []
    names = ", ".join(sorted(map(label, others)))
    return windows[0], [
        f"It is not known to be better than {label(served)}, which is served: in every window {names} decided, too. Wait for a day "
        "that it decides alone, or value a stretch of time (propel nightly --from --to)."
    ]


def _row(mart: Mart, view: PointView, table: str, policy: str, window: int) -> Record | None:
    """A winner's row of a table on fold B, over all rows of a window."""
    mine = {row["evaluation_id"] for row in mart.records("evaluations", dp=view.point["dp"])}
    found = mart.records(
        table,
        policy=policy,
        estimator=view.estimator,
        metric=view.point["reward"],
        segment=WHOLE,
        fold=HEADLINE_FOLD,
        window=window,
    )
    return next((row for row in found if row["evaluation_id"] in mine), None)


def _of_certificates(view: PointView, registry: Registry) -> list[str]:
    """What the certificates of the date say against it."""
    rows = [row for row in view.certificates if row["sampled"]]
    if not rows:
        return ["The date has no certificate."]
    key = registry.public_key()
    found = []
    for row in rows:
        if row["verdict"] != "pass":
            found.append(f"The certificate of {label(row['policy'])} says {row['verdict']}: {' '.join(row['reasons'] or ())}")
        elif not verify_certificate({name: value for name, value in row.items() if name != "tenant"}, key):
            found.append(f"The certificate of {label(row['policy'])} is not what was signed.")
    return found


def _of_estimates(difference: Record | None, estimate: Record | None, tolerance: float) -> list[str]:
    """What its estimates say against it."""
    if difference is None or estimate is None or not _known(difference):
        return ["Its difference to the policy that logged is not known on fold B."]
    found = []
    for row, what in ((difference, "difference"), (estimate, "value")):
        if row["verdict"] != "trust":
            found.append(f"The verdict on its {what} is {row['verdict']}: {' '.join(row['reasons'] or ())}")
        if not row["certified"]:
            found.append(f"Its {what} stands on rows without a passed certificate.")
    if difference["low"] <= -tolerance:
        found.append(
            f"It may be worse: the lower bound of its difference on fold B is {difference['low']:+.4g}; "
            f"expected above {0.0 - tolerance:g} (evaluate.tolerance)."
        )
    return found


def _of_registry(dp: str, digest: str | None, mart: Mart, registry: Registry) -> list[str]:
    """What the registry says against it."""
    if digest is None:
        return ["It is no artifact of this night."]
    if registry.pointer(dp).frozen:
        return [f"The decision point is frozen: `propel policy freeze {dp} --off` lifts that."]
    built = dt.datetime.fromisoformat(mart.manifest.built_at)
    changes = [line for line in registry.ledger() if line.decision_point == dp and line.to_digest is not None]
    if changes and dt.datetime.fromtimestamp(changes[-1].at_ns / 1e9, dt.UTC) > built:
        return [f"What is served was changed after this report was made ({built:%Y-%m-%d %H:%M} UTC): run the night again."]
    return []


def _known(row: Record | None) -> bool:
    return row is not None and all(row[name] is not None and math.isfinite(row[name]) for name in ("value", "low", "high"))


def _finite(row: Record | None) -> dict[str, Any] | None:
    """Ready for JSON."""
    if row is None:
        return None
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
