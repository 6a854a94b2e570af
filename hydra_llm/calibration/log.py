"""Decisions in a file, for whoever runs routers: a line for each request that has ended.

A request only puts its decision in line; what is written is worked out on the router's own thread,
about once a second, and when the router is closed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from hydra_llm.calibration.records import OK, older_of, record_of
from hydra_llm.scheduling import RoutingDecision

__all__ = ["DecisionLog"]

log = logging.getLogger("hydra_llm")

MAX_BYTES = 16_000_000
"""A file that would get longer is set aside, in the place of the one before."""
MOST_WAITING = 10_000
"""Decisions that wait to be written; of more, the oldest are lost."""
PATIENCE_SECONDS = 1.0
"""A finalizer may come in anywhere, in a thread that is just writing too."""


class DecisionLog:
    """
    The file, and what is still to be written to it.

    It is opened for each write, so that several processes may have one file.

    Args:
        path: where; its folder is made when it is first written.
        wall_clock: seconds since 1970.
        max_bytes: how long the file may get.
    """

    def __init__(
        self,
        path: Path,
        *,
        wall_clock: Callable[[], float] = time.time,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.path = path
        self._wall_clock = wall_clock
        self._max_bytes = max_bytes
        self._answers: Counter[tuple[str, str]] = Counter()
        self._has_complained = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[tuple[RoutingDecision, int, float]] = deque(maxlen=MOST_WAITING)

    def __repr__(self) -> str:
        return f"<DecisionLog {self.path}>"

    def add(self, decision: RoutingDecision, priority: int) -> None:
        """Have a finished request written; returns at once."""
        self._be_in_own_process()
        self._waiting.append((decision, priority, self._wall_clock()))

    def write(self) -> None:
        """Write what waits. What cannot be written is lost, and said once."""
        self._be_in_own_process()
        if not self._waiting or not self._lock.acquire(timeout=PATIENCE_SECONDS):
            return
        try:
            self._append("".join(self._lines()))
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                log.warning("decision log %s: it cannot be written (%s)", self.path, error.strerror)
        finally:
            self._lock.release()

    def _be_in_own_process(self) -> None:
        # What a fork has copied is the parent's to write, and its lock may be held for ever.
        if self._process != os.getpid():
            self._begin()

    def _lines(self) -> list[str]:
        lines = []
        for _ in range(len(self._waiting)):
            decision, priority, at = self._waiting.popleft()
            pair = (decision.selected_node or "", decision.model)
            before = self._answers[pair]
            record = record_of(decision, at=at, priority=priority, answers_before=before)
            if record.ended == OK:
                self._answers[pair] = before + 1
            lines.append(record.line())
        return lines

    def _append(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            if self.path.stat().st_size + len(data) > self._max_bytes:
                self.path.replace(older_of(self.path))
        except FileNotFoundError:
            pass
        # In one piece, or the lines of two processes could get mixed up.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
