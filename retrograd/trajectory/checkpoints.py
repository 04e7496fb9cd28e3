"""Stored states of a run: what keeps them, and which are kept."""

from typing import Protocol, runtime_checkable

from retrograd.trajectory.schedule import Schedule
from retrograd.trajectory.state import TrainingState


@runtime_checkable
class Checkpoints(Protocol):
    """Stored states, in memory or in a run folder."""

    def steps(self) -> list[int]:
        """Return the steps whose states are stored, ascending."""
        ...

    def load(self, step: int) -> TrainingState:
        """Return the state stored for ``step``."""
        ...

    def save(self, state: TrainingState) -> None:
        """Store a state; the caller does not change it afterwards."""
        ...

    def discard(self, step: int) -> None:
        """Forget the state of ``step``."""
        ...


class MemoryCheckpoints:
    """States kept in memory."""

    def __init__(self) -> None:
        self._states: dict[int, TrainingState] = {}

    def steps(self) -> list[int]:
        """Return the steps whose states are stored, ascending."""
        return sorted(self._states)

    def load(self, step: int) -> TrainingState:
        """Return the state stored for ``step``."""
        return self._states[step]

    def save(self, state: TrainingState) -> None:
        """Store a state."""
        self._states[state.step] = state

    def discard(self, step: int) -> None:
        """Forget the state of ``step``."""
        del self._states[step]


def keep_checkpoint(checkpoints: Checkpoints, schedule: Schedule, state: TrainingState, last: bool = False) -> None:
    """Store ``state`` if the schedule keeps it (or if it is the ``last``), and forget what the schedule no longer keeps."""
    interval = schedule.interval(state.step)
    if not last and state.step > 0 and (interval is None or state.step % interval):
        return
    checkpoints.save(state)
    for step in checkpoints.steps():
        if 0 < step < state.step and (interval is None or step % interval):
            checkpoints.discard(step)
