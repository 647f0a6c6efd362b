"""How a run ends before its end and loses nothing: signals and the time limit.

While steps are taken a signal waits until one is done and saved; anywhere else in a run what it
may lose is on disk already, and it ends the run at once. All processes end after the same step: the
wish of each is part of the sums that they exchange in every step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from unislu_llm.errors import Stopped, launched

# A launcher passes a signal on that its processes may have had from the terminal already.
_ECHO_SECONDS = 3.0


class Interrupts:
    """SIGTERM and SIGINT of a training run, while it is entered.

    Raises Stopped outside :meth:`held`: a signal came. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.reason = ""  # why the run should end, once it should
        self.depth, self.since = 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._handle)
            _end_with_launcher()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Where the run must not be torn apart: a signal is noted, and `reason` says so."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Where all is saved, inside :meth:`held`; raises Stopped if a signal came before."""
        depth, self.depth = self.depth, 0
        try:
            if self.reason:
                raise Stopped(self.reason)
            yield
        finally:
            self.depth = depth

    def _handle(self, number: int, _: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.reason and now - self.since > _ECHO_SECONDS:
            print(f"{name} again: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if not self.reason:
            self.reason, self.since = name, now
            if not self.depth:
                raise Stopped(name)


def _end_with_launcher() -> None:
    """Let the kernel send SIGTERM when the launcher dies, which may not pass signals on."""
    # `accelerate launch` of one process leaves it behind, training on, when it is killed.
    if launched() and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def ignore_signals(_: int = 0) -> None:
    """In a loader process: leave the end to the run, which ends its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Clock:
    """When to save and when to end, by the time that has gone; the main process's counts.

    Args:
        save_minutes: between checkpoints; 0: never by time.
        time_limit: minutes that the run may take; 0: no limit.
        started: of the run, by `time.monotonic()`.
    """

    def __init__(self, save_minutes: float, time_limit: float, started: float) -> None:
        self.save_seconds, self.limit = save_minutes * 60, time_limit * 60
        self.started = started
        self.last_save = self.last_step = time.monotonic()
        self.longest_step = self.longest_save = self.longest_validation = 0.0

    def step(self) -> None:
        """A step begins."""
        now = time.monotonic()
        self.longest_step, self.last_step = max(self.longest_step, now - self.last_step), now

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """The time of a `save` or a `validation`, which no step's is."""
        began = time.monotonic()
        yield
        self.last_step = time.monotonic()
        name = f"longest_{what}"
        setattr(self, name, max(getattr(self, name), self.last_step - began))
        if what == "save":
            self.last_save = self.last_step

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return bool(self.save_seconds) and time.monotonic() - self.last_save >= self.save_seconds

    def time_is_up(self, validation: bool = False) -> bool:
        """Whether another step, or validation, and the save might go beyond the limit."""
        left = self.started + self.limit - time.monotonic()
        # The longest so far, and again as much as a margin: a batch system does not wait.
        need = 2 * (self.longest_step + self.longest_save)
        return bool(self.limit) and left < (need + self.longest_validation * validation)
