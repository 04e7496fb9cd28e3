"""Writes to disk while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundWriter:
    """Writes in the background, in order; an error surfaces at the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retrograd-writer")
        self._last: Future[None] | None = None

    def submit(self, job: Any) -> None:
        """Run ``job()`` after all others."""
        if self._last is not None:
            self._last.result()  # at most one state waits in memory
        self._last = self._pool.submit(job)

    def close(self) -> None:
        """Wait for what is left."""
        self._pool.shutdown()
        if self._last is not None:
            self._last.result()
