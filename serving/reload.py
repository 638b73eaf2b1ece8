"""Which policies serve: what the registry promotes, taken while the service runs. Where that fails, the last good one goes on.

A thread of each process looks at the promoted digests every second. A new artifact is verified, tried in a child process and built
there; then, on the event loop, one reference is swapped: a request that holds the old policy keeps it to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import structlog

from bandits.decision_point import DecisionPoint
from bandits.policy import UNIFORM, Uniform
from bandits.registry import Registry
from ope.data import InputError
from serving.decide import Served
from serving.service import Service
from serving.settings import Settings

log = structlog.get_logger()

EVERY = 1.0
"""Seconds between two looks at what is promoted."""

PAUSE = 30.0
"""Seconds until an artifact that failed is tried again, unless another one is promoted before."""

END_SECONDS = 2.0
"""How long the end waits for a trial under way."""

MOST_SAID = 500
"""Letters of an error that are logged."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why what is promoted does not serve."""

    digest: str | None
    """None where it is not known what is promoted."""
    said: str
    again: float
    """When it is tried again, as the clock counts."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What serves at a decision point."""

    served: Served
    digest: str | None
    """None where nothing was promoted."""
    failed: Failed | None = None


@dataclass(frozen=True, slots=True)
class Promoted:
    """What a registry promotes, and how it is taken."""

    registry: Registry
    clock: Callable[[], float] = time.monotonic

    def first(self, point: DecisionPoint) -> Standing:
        """What serves at the start: what is promoted or, where that fails, the newest before it that does not; else uniform.

        Raises InputError of what is promoted where none of them serves.
        """
        digest = self.registry.pointer(point.name).digest
        if digest is None:
            return unpromoted(point)
        try:
            return Standing(self._load(point, digest), digest)
        except InputError as error:
            for earlier in reversed(self.registry.served(point.name)):
                with contextlib.suppress(InputError):
                    return Standing(self._load(point, earlier), earlier, Failed(digest, str(error), self.clock() + PAUSE))
            raise

    def next(self, standing: Standing, digest: str | None) -> Standing:
        """What serves from now on, where this digest is promoted. The same object where nothing changed."""
        failed = standing.failed
        if digest == standing.digest:
            return standing if failed is None else replace(standing, failed=None)
        if digest is None:
            return unknown(standing, "found nothing promoted any more; expected what serves, or another artifact: promote one")
        if failed is not None and failed.digest == digest and self.clock() < failed.again:
            return standing
        try:
            return Standing(self._load(standing.served.point, digest), digest)
        except Exception as error:  # whatever it is, what serves goes on
            return replace(standing, failed=Failed(digest, str(error) or repr(error), self.clock() + PAUSE))

    def _load(self, point: DecisionPoint, digest: str) -> Served:
        """An artifact that passed every check, as it serves. Raises InputError, too, where it was made for something else."""
        artifact = self.registry.load(digest)
        made_for = (artifact.manifest.decision_point, artifact.manifest.features, artifact.manifest.actions)
        if made_for != (point.name, point.features, point.actions):
            raise InputError(
                f"decision point {point.name!r}: found a promoted policy {artifact.reference} for other features or actions; "
                "expected those of the decision point: promote one that was learned since they changed"
            )
        return Served(point, artifact.policy, artifact.reference)


def unpromoted(point: DecisionPoint) -> Standing:
    """What serves where nothing was promoted yet."""
    return Standing(Served(point, Uniform(), UNIFORM), None)


def unknown(standing: Standing, said: str) -> Standing:
    """A decision point of which it cannot be told what is promoted. What is known to have failed stays so."""
    return standing if standing.failed is not None else replace(standing, failed=Failed(None, said, 0.0))


class Reload:
    """Policies of all decision points, from the start on. Raises InputError where one of them cannot start."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.registry
        self._promoted = Promoted(Registry(self._folder)) if self._folder.exists() else None
        first = unpromoted if self._promoted is None else self._promoted.first
        self.standing: Mapping[str, Standing] = {point.name: first(point) for point in settings.points}
        self._looked = dict(self.standing)  # what whoever looks has found; what is told changes on the event loop alone
        for name, one in self.standing.items():
            _warn(name, one)

    @property
    def served(self) -> dict[str, Served]:
        """What decides where."""
        return {name: one.served for name, one in self.standing.items()}

    @property
    def stale(self) -> list[str]:
        """Decision points that do not serve what is promoted, because that failed."""
        return sorted(name for name, one in self.standing.items() if one.failed is not None)

    @contextlib.asynccontextmanager
    async def follow(self, service: Service) -> AsyncIterator[None]:
        """Follow the registry. A worker that was forked a while after the start has caught up before it serves."""
        loop, ended = asyncio.get_running_loop(), threading.Event()
        for name, one in await asyncio.to_thread(list, self._changes()):
            self._take(service, name, one)

        def tell(name: str, one: Standing) -> None:
            loop.call_soon_threadsafe(self._take, service, name, one)

        # a daemon of its own: threads of the loop's executor would hold up the end for as long as a trial takes
        thread = threading.Thread(target=self._run, args=(ended, tell), name="reload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            await asyncio.to_thread(thread.join, END_SECONDS)

    def _run(self, ended: threading.Event, tell: Callable[[str, Standing], object]) -> None:
        changed = False
        while not ended.wait(EVERY):
            if changed:  # decoders of requests are cycles, and nothing else collects any soon
                gc.collect()
            changed = False
            for name, one in self._changes():
                if ended.is_set():
                    return
                tell(name, one)
                changed = True

    def _changes(self) -> Iterator[tuple[str, Standing]]:
        """What stands otherwise than at the last look, each as soon as it is known."""
        digests, said = dict[str, str | None](), None
        try:
            digests = self._digests()
        except Exception as error:  # whatever it is, what serves goes on
            said = str(error) or repr(error)
        for name, one in list(self._looked.items()):
            if said is not None:
                new = unknown(one, said)
            elif self._promoted is None:
                new = one if one.failed is None else replace(one, failed=None)
            else:
                new = self._promoted.next(one, digests.get(name))
            if new is not one:
                self._looked[name] = new
                yield name, new

    def _digests(self) -> dict[str, str | None]:
        """Promoted digests by decision point. Raises InputError where they cannot be read."""
        database = self._folder / "control.sqlite"
        if self._promoted is None and database.is_file():
            self._promoted = Promoted(Registry(self._folder))
        if self._promoted is None:
            return {}
        if not database.is_file():  # to open it would make another
            raise InputError(f"{database}: found none; expected that of the registry: restore it from a backup")
        return {point: pointer.digest for point, pointer in self._promoted.registry.pointers().items()}

    def _take(self, service: Service, name: str, one: Standing) -> None:
        """Let it serve, and say so."""
        before = self.standing[name]
        self.standing = {**self.standing, name: one}
        if one.served is not before.served:
            service.served = self.served
            service.metrics.reloads[name, "loaded"] += 1
            log.info("policy serves", decision_point=name, policy=one.served.reference, before=before.served.reference)
        elif one.failed is not None:
            service.metrics.reloads[name, "failed"] += 1
            if before.failed is None or (one.failed.digest, one.failed.said) != (before.failed.digest, before.failed.said):
                _warn(name, one)


def _warn(name: str, one: Standing) -> None:
    """Say what does not serve, and why, where that is so."""
    if one.failed is None:
        return
    log.error(
        "promoted policy does not serve", decision_point=name, promoted=one.failed.digest, serves=one.served.reference,
        error=one.failed.said[:MOST_SAID],
    )  # fmt: skip
