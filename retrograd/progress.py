"""Progress of long work: the library reports it, whoever runs it decides how to show it.

Work that may take more than a few seconds iterates over `track`. Without a reporter, progress goes to the log at most
every ten seconds, with an estimate of the time that is left. The command line puts a bar in its place::

    with reporting(my_reporter):
        attribute(...)
"""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")
_logger = logging.getLogger("retrograd")


@runtime_checkable
class Reporter(Protocol):
    """Shows the progress of one phase of work after another."""

    def __call__(self, phase: str, done: int, total: int, /) -> None:
        """Take note that ``done`` of ``total`` parts of ``phase`` are finished."""
        ...


class LogReporter:
    """Writes a line to the log every ``seconds`` seconds: share done, and the time left at the pace so far."""

    def __init__(self, seconds: float = 10.0):
        self.seconds = seconds
        self._phase, self._start, self._said = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int, /) -> None:
        """Log if it is time to."""
        now = time.monotonic()
        if phase != self._phase or done == 0:
            self._phase, self._start, self._said = phase, now, now
        elif now - self._said >= self.seconds:
            self._said = now
            left = (now - self._start) / done * (total - done)
            _logger.info("%s: %d of %d, about %.0f s left", phase, done, total, left)


_to_log = LogReporter()
_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send all progress within this context to ``reporter``."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def track(items: Collection[Item], phase: str) -> Iterator[Item]:
    """Iterate over ``items`` and report after each one.

    >>> seen = []
    >>> with reporting(lambda phase, done, total: seen.append((done, total))):
    ...     for _ in track(range(2), "counting"):
    ...         pass
    >>> seen
    [(0, 2), (1, 2), (2, 2)]
    """
    yield from track_steps(iter(items), len(items), phase)


def track_steps(steps: Iterator[Item], total: int, phase: str) -> Iterator[Item]:
    """Iterate over an iterator of known length and report after each item."""
    reporter = _reporter.get() or _to_log
    reporter(phase, 0, total)
    for done, item in enumerate(steps, start=1):
        yield item
        reporter(phase, done, total)
