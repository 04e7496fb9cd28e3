"""Which states of a run are kept, and how the others are reached again.

A schedule answers two questions. While recording, of whose length nobody needs to know: `interval(steps)` is the distance
between the states that are kept when ``steps`` steps have been made (None: only the first and the last). While walking
back: `slots` bounds how many states a replay may hold at a time between two kept ones (None: as many as there are).

| schedule | states kept on T steps | states held in a replay | steps replayed |
|---|---|---|---|
| `All()` | T | 1 | 0 |
| `Every(k)` | T / k | k | T − T / k |
| `Sqrt()` | between √T/√2 and √2·√T | √T | T |
| `Treeverse(slots=s)` | 1 | s | ≤ r·T, with r the smallest number that has C(s + r, s) ≥ T |

Besides, the last step before each kept state is replayed once, to compare it with the record. Results never depend on the
schedule. The offline schedule of `Treeverse` is Griewank's: it reverses T steps with s stored
states in the fewest possible steps.

References: Griewank (1992), "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
differentiation"; Griewank and Walther (2000), "Algorithm 799: revolve".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from retrograd.errors import InputError

State = TypeVar("State")


@runtime_checkable
class Schedule(Protocol):
    """Which states a recording keeps and how many a replay may hold."""

    def interval(self, steps: int) -> int | None:
        """Return the distance between kept states after ``steps`` steps; None keeps only the first and the last."""
        ...

    def slots(self, state_bytes: int) -> int | None:
        """Return how many states of this size a replay may hold at once; None for no bound."""
        ...


@dataclass(frozen=True)
class All:
    """Keep every state: a step is replayed only to compare it with the record."""

    def interval(self, steps: int) -> int | None:
        """Return 1."""
        return 1

    def slots(self, state_bytes: int) -> int | None:
        """Return None: no bound."""
        return None


@dataclass(frozen=True)
class Every:
    """Keep every ``steps``-th state."""

    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"Every(steps={self.steps}) keeps nothing; steps must be at least 1.")

    def interval(self, steps: int) -> int | None:
        """Return the fixed distance."""
        return self.steps

    def slots(self, state_bytes: int) -> int | None:
        """Return None: no bound."""
        return None


@dataclass(frozen=True)
class Sqrt:
    """Keep about √T states without knowing T: the distance is the power of two next to √t and grows with t."""

    def interval(self, steps: int) -> int | None:
        """Return the power of two nearest to √steps, on a logarithmic scale."""
        return 1 << round(math.log2(max(steps, 1)) / 2)

    def slots(self, state_bytes: int) -> int | None:
        """Return None: no bound."""
        return None


@dataclass(frozen=True)
class Treeverse:
    """Keep only the first state and replay under a memory budget: ``memory`` bytes, or a number of ``slots``."""

    memory: int | None = None
    states: int | None = None

    def __post_init__(self):
        if (self.memory is None) == (self.states is None):
            raise InputError("Treeverse needs either memory= (bytes) or states= (a number of states), not both.")
        if (self.memory or self.states or 0) < 1:
            raise InputError(f"Treeverse's budget must be positive, got {self.memory or self.states}.")

    def interval(self, steps: int) -> int | None:
        """Return None: only the first and the last state are kept."""
        return None

    def slots(self, state_bytes: int) -> int | None:
        """Return the number of states that fit the budget, at least 1."""
        return self.states if self.memory is None else max(1, self.memory // max(state_bytes, 1))


def reverse(
    first: State, start: int, stop: int, advance: Callable[[State, int], State], slots: int | None
) -> Iterator[tuple[int, State]]:
    """Yield ``(t, state t)`` for t = stop−1 … start, holding at most ``slots`` states (``first`` is one of them).

    Args:
        first: the state at ``start``.
        start: its step.
        stop: one behind the last step that is wanted.
        advance: maps the state at t and t to the state at t + 1.
        slots: how many states may be held at once; None for no bound.

    >>> [t for t, _ in reverse(0, 0, 5, lambda state, t: state + 1, slots=2)]
    [4, 3, 2, 1, 0]
    """
    held = [(start, first)]  # the stored states, each the base of a stretch that ends where the next one begins
    while held:
        base, state = held[-1]
        length, free = stop - base, None if slots is None else slots - len(held) + 1
        if free is None or length <= free:
            states = [state] if length else []
            for step in range(base, stop - 1):
                states.append(advance(states[-1], step))
            while states:
                yield base + len(states) - 1, states.pop()
        elif free == 1:
            for step in range(stop - 1, base - 1, -1):
                reached = state
                for between in range(base, step):
                    reached = advance(reached, between)
                yield step, reached
        else:
            middle = base + _split(length, free)
            for step in range(base, middle):
                state = advance(state, step)
            held.append((middle, state))
            continue
        held.pop()
        stop = base


def _split(length: int, slots: int) -> int:
    """Where to put the next state so that the whole reversal takes the fewest steps (Griewank and Walther, section 2).

    With r the smallest repetition number that has C(slots + r, slots) ≥ length, any m is optimal that leaves both sides
    within what r and r − 1 repetitions can do.
    """
    repeats = 1
    while math.comb(slots + repeats, slots) < length:
        repeats += 1
    right_most = math.comb(slots - 1 + repeats, slots - 1)  # what slots − 1 can reverse with r repetitions
    left_least = math.comb(slots + repeats - 2, slots) if repeats >= 2 else 1
    return min(max(length - right_most, left_least, 1), length - 1)


def replayed_steps(length: int, slots: int | None) -> int:
    """Predict how many steps `reverse` replays, by going through its moves without a model."""
    calls = 0

    def advance(state: None, step: int) -> None:
        nonlocal calls
        calls += 1

    for _ in reverse(None, 0, length, advance, slots):
        pass
    return calls
