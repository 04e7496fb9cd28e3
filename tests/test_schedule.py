"""Walking back: every step once, in order, from the right state, within the budget and with the fewest replayed steps."""

import gc
import math
import weakref
from functools import cache
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrograd.errors import InputError
from retrograd.trajectory import All, Every, MemoryCheckpoints, Schedule, Sqrt, TrainingState, Treeverse
from retrograd.trajectory.checkpoints import keep_checkpoint
from retrograd.trajectory.schedule import replayed_steps, reverse
from tests.cases import CASES, RULES


class Numbered:
    """A state that knows its step, so that a wrong one is seen, and that is counted while it lives."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, step: int):
        self.step = step
        self.alive.add(self)


def advance(state: Numbered, step: int) -> Numbered:
    assert state.step == step
    return Numbered(step + 1)


@given(
    st.integers(min_value=0, max_value=40),
    st.integers(min_value=0, max_value=70),
    st.one_of(st.none(), st.integers(min_value=1, max_value=9)),
)
def test_reverse_visits_each_step_once_from_the_last_to_the_first(start: int, length: int, slots: int | None):
    visited = list(reverse(Numbered(start), start, start + length, advance, slots))
    assert [step for step, _ in visited] == list(range(start, start + length))[::-1]
    assert all(state.step == step for step, state in visited)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 7, 30, 60])
def test_reverse_never_holds_more_states_than_its_slots(length: int, slots: int):
    gc.collect()
    Numbered.alive.clear()
    stored = []

    def counted(state: Numbered, step: int) -> Numbered:
        assert state.step == step
        stored.append(len(Numbered.alive) - (state in Numbered.alive))  # besides the state at work
        return Numbered(step + 1)

    walk = reverse(Numbered(0), 0, length, counted, slots)
    for _, state in walk:
        stored.append(len(Numbered.alive) - (state in Numbered.alive))  # besides the state that was asked for
        del state
    assert max(stored) <= slots
    assert len(Numbered.alive - set()) <= slots


@cache
def fewest_steps(length: int, slots: int) -> int:
    """Replayed steps of the best reversal, by trying every place for the next stored state."""
    if length <= 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(middle + fewest_steps(length - middle, slots - 1) + fewest_steps(middle, slots) for middle in range(1, length))


@pytest.mark.parametrize("slots", range(1, 7))
def test_treeverse_replays_the_fewest_steps_possible(slots: int):
    for length in range(1, 61):
        assert replayed_steps(length, slots) == fewest_steps(length, slots), (length, slots)


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_treeverse_replays_at_most_r_times_the_length(slots: int):
    for length in (1, 2, 5, 17, 60, 200, 500):
        repeats = next(r for r in range(1000) if math.comb(slots + r, slots) >= length)
        assert replayed_steps(length, slots) <= repeats * length


def test_without_a_bound_each_step_is_replayed_once_at_most():
    for length in (1, 2, 50):
        assert replayed_steps(length, None) == length - 1


def kept(schedule: Schedule, steps: int) -> list[list[int]]:
    """Steps of the stored states after each step of a run."""
    checkpoints, history = MemoryCheckpoints(), []
    for step in range(steps + 1):
        keep_checkpoint(checkpoints, schedule, TrainingState({}, {}, {}, step))
        history.append(checkpoints.steps())
    return history


def test_sqrt_keeps_between_its_bounds_without_knowing_the_length():
    for steps, stored in enumerate(kept(Sqrt(), 700)):
        assert stored[0] == 0
        if steps:
            root = math.sqrt(steps)
            interval = Sqrt().interval(steps)
            assert root / math.sqrt(2) <= interval <= root * math.sqrt(2)
            assert len(stored) <= math.sqrt(2) * root + 1  # the initial state is one more
            assert len(stored) >= root / math.sqrt(2)
            # No stretch is longer than √2·√T steps, up to where the recording is.
            assert max(right - left for left, right in zip(stored, [*stored[1:], steps + 1], strict=True)) <= 1.5 * root + 1


def test_every_keeps_each_kth_state_and_all_keeps_all():
    assert kept(Every(3), 10)[-1] == [0, 3, 6, 9]
    assert kept(Every(3), 2)[-1] == [0]
    assert kept(All(), 4)[-1] == [0, 1, 2, 3, 4]
    assert kept(Treeverse(states=2), 4)[-1] == [0]


def test_the_last_state_is_kept_whatever_the_schedule():
    for schedule, steps in (
        (All(), list(range(9))),
        (Every(3), [0, 3, 6, 8]),
        (Sqrt(), [0, 4, 8]),
        (Treeverse(states=2), [0, 8]),
    ):
        run = CASES["plain"].record(RULES["sgd"], schedule)
        assert run.checkpoints.steps() == steps


def test_treeverse_turns_memory_into_slots():
    assert Treeverse(memory=1000).slots(300) == 3
    assert Treeverse(memory=10).slots(300) == 1
    assert Treeverse(states=4).slots(300) == 4
    assert All().slots(300) is Every(2).slots(300) is Sqrt().slots(300) is None
    run = CASES["plain"].record(RULES["adam"], All())
    assert Treeverse(memory=run.state(0).nbytes() * 3).slots(run.state(0).nbytes()) == 3
    assert run.state(0).nbytes() == 59 * 3 * 8  # parameters and two moments, float64


@pytest.mark.parametrize("schedule", [All(), Every(3), Every(50), Sqrt(), Treeverse(states=1), Treeverse(states=2)], ids=str)
@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_a_trajectory_walks_back_through_the_states_that_it_went_through(schedule: Schedule, name: str):
    expected = CASES[name].record(RULES["adam"], All())
    run = CASES[name].record(RULES["adam"], schedule)
    for last in (None, 1, 5, 8, 99):
        walk = list(run.reverse(last))
        assert [step for step, _, _ in walk] == list(range(8))[::-1][:last]
        for step, state, inputs in walk:
            assert state.step == step
            assert state.equals(expected.state(step))
            assert torch.equal(inputs.example_ids, run.records[step].example_ids)
    assert all(run.state(step).equals(expected.checkpoints.load(step)) for step in range(9))
    assert run.drift == 0.0


def test_budgets_that_make_no_sense_are_refused():
    for wrong in (
        lambda: Every(0),
        lambda: Every(-2),
        lambda: Treeverse(),
        lambda: Treeverse(memory=5, states=5),
        lambda: Treeverse(states=0),
        lambda: Treeverse(states=-1),
        lambda: Treeverse(memory=0),
    ):
        with pytest.raises(InputError):
            wrong()
