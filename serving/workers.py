"""Several processes that serve one address, each with a socket of its own: forked once all is loaded, started anew where one dies,
ended together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import structlog

log = structlog.get_logger()

END = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask for the end."""

PAUSE = 1.0
"""Seconds between two starts in the place of a worker that died, at least."""

PR_SET_PDEATHSIG = 1


class Workers:
    """Processes that run `work`, whose result is their exit status. To be used before any thread was started."""

    def __init__(self, work: Callable[[], int], count: int, drain_seconds: float) -> None:
        self.work, self.count, self.drain_seconds = work, count, drain_seconds
        self._ending = False
        self._running: set[int] = set()

    def run(self) -> int:
        """Keep as many running until told to end; then end them. The exit status."""
        for asked in END:
            signal.signal(asked, self._end)
        while not self._ending:
            started = time.monotonic()
            while len(self._running) < self.count:
                self._start()
            self._wait()
            if not self._ending and (early := started + PAUSE - time.monotonic()) > 0:
                time.sleep(early)
        return self._drain()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = True
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    def _start(self) -> None:
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, END)  # until whoever gets one knows what to do with it
        process = os.fork()
        if process:
            self._running.add(process)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
            return
        status = 1
        try:
            for asked in END:
                signal.signal(asked, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # nobody is left behind where the parent is killed
            if os.getppid() == parent:
                status = self.work()
        finally:
            os._exit(status)

    def _wait(self) -> None:
        """Until a worker ends, or the end is asked for."""
        try:
            process, status = os.waitpid(-1, 0)
        except (InterruptedError, ChildProcessError):
            return
        self._running.discard(process)
        if not self._ending:
            log.error("worker died", process=process, status=os.waitstatus_to_exitcode(status))

    def _drain(self) -> int:
        """Wait for the workers to finish what they do; kill those that do not. 0 where all ended well."""
        until, well = time.monotonic() + self.drain_seconds + 5, True
        while self._running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                self._running.discard(process)
                well = well and os.waitstatus_to_exitcode(status) in (0, -signal.SIGTERM)  # the latter before it served
            elif time.monotonic() > until:
                for left in self._running:
                    os.kill(left, signal.SIGKILL)
                until += 5
            else:
                time.sleep(0.02)
        return 0 if well else 1
