"""The answer: a value with what is needed to believe it, or to refuse it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["trust", "caution", "refused"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a policy is worth per decision, in units of the reward, and whether to believe it."""

    estimator: str
    value: float
    stderr: float
    """Delta-method standard error."""
    low: float
    high: float
    level: float
    """Nominal coverage of (low, high)."""
    interval: str
    """Kind of interval: normal, bootstrap, bernstein."""
    n: int
    """Rows."""
    ess: float
    """Kish's effective sample size of the importance weights."""
    verdict: Level
    reasons: tuple[str, ...] = ()
    """Why the verdict is not `trust`, in plain English."""
    notes: tuple[str, ...] = ()
    """How the number was made, where that is worth knowing."""

    def to_record(self, *, force: bool = False) -> dict[str, Any]:
        """A flat dict ready for JSON or a data frame. Refused numbers are None unless forced; so is what is not finite."""
        record = asdict(self)
        for name in ("value", "stderr", "low", "high", "ess"):
            withheld = self.verdict == "refused" and not force and name != "ess"
            if withheld or not math.isfinite(record[name]):
                record[name] = None
        return record | {"reasons": list(self.reasons), "notes": list(self.notes)}

    def __str__(self) -> str:
        ends = f"{100 * self.level:g} % {self.interval} {self.low:.6g} to {self.high:.6g}"
        why = f": {' '.join(self.reasons)}" if self.reasons else ""
        size = f"n = {self.n:,}, ESS = {self.ess:,.0f}"
        return f"{self.estimator} {self.value:.6g} ± {self.stderr:.2g} ({ends}), {size}, {self.verdict}{why}"
