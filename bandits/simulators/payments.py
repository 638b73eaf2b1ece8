"""Card payments with known truth: which acquirer, with or without 3-D Secure, in which message format, and who authorises.

Issuers differ in what they accept; mandates and tokens decide what may be tried; most results come at once, some hours later. The
probability of every action is known, so that what a policy is worth can be computed and not only estimated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np

from ope.data import BoolArray, FloatArray, InputError, IntArray

ISSUERS, COUNTRIES, ACQUIRERS = 30, 8, 3

ROUTES = tuple((acquirer, secure, form) for acquirer, secure, form in itertools.product(range(ACQUIRERS), (0, 1), (0, 1)))
"""Acquirer, 3-D Secure, message format of every action."""

ACTIONS = tuple(f"acquirer-{acquirer + 1}/3ds-{('off', 'on')[secure]}/{'AB'[form]}" for acquirer, secure, form in ROUTES)

_ACQUIRER, _SECURE, _FORM = (np.array(part) for part in zip(*ROUTES, strict=True))

TOKENISED = 2
"""The acquirer, counted from 0, that takes network tokens only."""

SLOW = 0.03
"""Share of results that come after hours and not at once."""

CHARGEBACKS = 0.002
"""Share of authorised payments that are reversed after months."""

DAY = 86_400.0
"""Seconds."""

POINT = f"""
name = "payments"
exploration_floor = 0.02
default_action = "{ACTIONS[1]}"

[actions]
catalogue = [{", ".join(f'"{action}"' for action in ACTIONS)}]

[[rewards]]
name = "authorised"
low = 0.0
high = 1.0
window_seconds = 86400.0

[features]
context = [
  {{type = "category", name = "issuer", levels = [{", ".join(f'"{issuer}"' for issuer in range(ISSUERS))}]}},
  {{type = "category", name = "country", levels = [{", ".join(f'"{country}"' for country in range(COUNTRIES))}]}},
  {{type = "number", name = "amount"}},
  {{type = "boolean", name = "network_token"}},
  {{type = "boolean", name = "sca_mandate"}},
  {{type = "number", name = "hour", scale = 24.0}},
]
"""
"""The decision point, in TOML. A window of seconds, where time passes quickly, goes in place of 86400.0."""


@dataclass(frozen=True, slots=True, eq=False)
class Payments:
    """n payments that wait for a route."""

    issuer: IntArray
    country: IntArray
    """Of the issuer, (n,)."""
    amount: FloatArray
    """Standardised logarithm, (n,)."""
    network_token: BoolArray
    sca_mandate: BoolArray
    hour: IntArray

    def __len__(self) -> int:
        return len(self.issuer)

    @property
    def eligible(self) -> BoolArray:
        """What may be tried (n, 12): a mandate wants 3-D Secure, one acquirer wants a token. 4, 6, 8 or 12 actions each."""
        secured = ~self.sca_mandate[:, None] | (_SECURE == 1)
        tokenised = self.network_token[:, None] | (_ACQUIRER != TOKENISED)
        return np.asarray(secured & tokenised)

    def take(self, rows: IntArray) -> Payments:
        """Some of them."""
        return Payments(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})

    def contexts(self) -> list[dict[str, object]]:
        """Features of each, as a request names them."""
        columns = (self.issuer, self.country, self.amount, self.network_token, self.sca_mandate, self.hour)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            {
                "issuer": str(issuer), "country": str(country), "amount": amount, "network_token": token, "sca_mandate": mandate,
                "hour": hour,
            }
            for issuer, country, amount, token, mandate, hour in rows
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outage:
    """An acquirer that loses 3 logits during some hours of a day."""

    day: int
    hours: tuple[int, int]
    """First, and the one after the last."""
    acquirer: int


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Who accepts what.

    logit q = base + b[issuer] + G[country, acquirer] + F[issuer, format] + D[issuer]·3DS
              + h[acquirer]·z - 0.3 z + 0.1 cos(2π hour / 24)
    """

    share: FloatArray
    """Of each issuer (30,)."""
    country: IntArray
    """Of each issuer (30,)."""
    issuer_term: FloatArray
    """b (30,)"""
    country_term: FloatArray
    """G (8, 3)"""
    format_term: FloatArray
    """F (30, 2)"""
    secure_term: FloatArray
    """D (30,)"""
    amount_term: FloatArray
    """h (3,)"""
    base: float
    outage: Outage | None = None
    day: int = 0

    @classmethod
    def draw(cls, seed: int, *, base: float = 2.6, outage: Outage | None = None) -> World:
        """A world. At base 2.6 uniform routing authorises 86 %, the best 95 %; at 4.0, 95 % and 98.5 %."""
        rng = np.random.default_rng(seed)
        return cls(
            share=rng.dirichlet(np.full(ISSUERS, 0.6)),
            country=rng.integers(0, COUNTRIES, ISSUERS),
            issuer_term=rng.normal(0, 0.7, ISSUERS),
            country_term=rng.normal(0, 0.6, (COUNTRIES, ACQUIRERS)),
            format_term=rng.normal(0, 0.6, (ISSUERS, 2)),
            secure_term=rng.normal(-0.4, 0.72, ISSUERS),
            amount_term=rng.normal(0, 0.42, ACQUIRERS),
            base=base,
            outage=outage,
        )

    def drifted(self, rng: np.random.Generator, sd: float = 0.02) -> World:
        """The next day: issuers have moved a little. With sd = 0 only the day is another one."""
        return replace(
            self, issuer_term=self.issuer_term + rng.normal(0, sd, ISSUERS) if sd else self.issuer_term, day=self.day + 1
        )

    def payments(self, n: int, rng: np.random.Generator) -> Payments:
        """Payments of a day."""
        issuer = rng.choice(ISSUERS, n, p=self.share)
        return Payments(
            issuer, self.country[issuer], rng.normal(size=n), rng.random(n) < 0.5, rng.random(n) < 0.25, rng.integers(0, 24, n)
        )

    def acceptance(self, payments: Payments) -> FloatArray:
        """Probability that each action is authorised (n, 12), also where it may not be tried."""
        one, z = payments.issuer, payments.amount[:, None]
        logit = (
            self.base
            + self.issuer_term[one][:, None]
            + self.country_term[payments.country][:, _ACQUIRER]
            + self.format_term[one][:, _FORM]
            + self.secure_term[one][:, None] * _SECURE
            + (self.amount_term[_ACQUIRER] - 0.3) * z
            + 0.1 * np.cos(2 * np.pi * payments.hour / 24)[:, None]
        )
        if self.outage is not None and self.outage.day == self.day:
            first, after = self.outage.hours
            during = (payments.hour >= first) & (payments.hour < after)
            logit = logit - 3.0 * (during[:, None] & (self.outage.acquirer == _ACQUIRER))
        return np.asarray(1 / (1 + np.exp(-logit)))

    def value(self, payments: Payments, propensities: FloatArray) -> float:
        """Share authorised under a policy's vectors (n, 12): its true value on these payments.

        Raises InputError where a vector has weight on what may not be tried.
        """
        if np.any(propensities[~payments.eligible]):
            row = int(np.argmax((propensities * ~payments.eligible).any(axis=1)))
            raise InputError(f"row {row}: found weight on an action that may not be tried; expected 0 there: mask before sampling")
        return float(np.mean(np.vecdot(propensities, self.acceptance(payments))))

    def best(self, payments: Payments) -> FloatArray:
        """The vectors (n, 12) of whoever knows this world."""
        reachable = np.where(payments.eligible, self.acceptance(payments), -1.0)
        return np.eye(len(ACTIONS))[reachable.argmax(axis=1)]

    def uniform(self, payments: Payments) -> FloatArray:
        """Even over what may be tried (n, 12)."""
        return payments.eligible / payments.eligible.sum(axis=1, keepdims=True)


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """What came of n payments, and when."""

    authorised: BoolArray
    after: FloatArray
    """Seconds until the result is known."""
    reversed_after: FloatArray
    """Seconds until a chargeback; infinite where none comes."""


def results(world: World, payments: Payments, action: IntArray, rng: np.random.Generator, *, second: float = 1.0) -> Results:
    """What comes of the routes taken (n,): most results after about 2 s, a few after 1 to 24 hours; a few chargebacks after months.

    `second`: how long a second of the world takes, such as 1e-4 where a day is to pass in 9 s, or 0 where nothing is late.
    Raises InputError for a route that may not be tried.
    """
    rows = np.arange(len(payments))
    if not payments.eligible[rows, action].all():
        row = int(np.argmin(payments.eligible[rows, action]))
        raise InputError(f"row {row}: found {ACTIONS[action[row]]}, which may not be tried; expected an eligible action")
    authorised = rng.random(len(payments)) < world.acceptance(payments)[rows, action]
    slow = rng.random(len(payments)) < SLOW
    after = np.where(slow, rng.uniform(3600, DAY, len(payments)), rng.exponential(2.0, len(payments)))
    charged_back = authorised & (rng.random(len(payments)) < CHARGEBACKS)
    back = np.where(charged_back, rng.uniform(30 * DAY, 120 * DAY, len(payments)) * second, np.inf)
    return Results(authorised, after * second, back)
