"""Plans: what they choose under budgets, and what they promise. No test looks at how long anything takes."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from retrograd import All, Every, FirstOrder, FixedPoint, Forward, Sqrt, Treeverse, Unrolled, hypergradient, plan
from retrograd.errors import InputError, UntrustedGradient
from retrograd.hypergradients import planner
from retrograd.hypergradients.planner import replays
from retrograd.trajectory import Trajectory
from tests.cases import CASES, RULES, Schedule
from tests.setups import SETUPS


@cache
def of(setup: str, rule: str, schedule: Any = None) -> Trajectory:
    return SETUPS[setup].record(RULES[rule], schedule)


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed step, a step back and a step forward take as long on every machine."""
    monkeypatch.setattr(planner, "_timed", lambda *works: [1.0, 3.0] if len(works) == 2 else [2.0])


def named(found: Any) -> dict[type, Any]:
    return {type(one.method): one for one in found.options}


# ---------------------------------------------------------------------------------------------------------------------
# Promises


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (All(), (8, 1)),
        (Every(3), (8, 3)),
        (Sqrt(), None),
        (Treeverse(states=1), (29, 1)),
        (Treeverse(states=2), None),
        (Treeverse(states=3), None),
        (Treeverse(states=20), (8, 8)),
    ],
    ids=str,
)
def test_replays_are_counted_before_they_are_made(schedule: Schedule, expected: Any, monkeypatch: pytest.MonkeyPatch):
    run = of("plain", "momentum", schedule)
    promised = replays(run)
    made = []
    advance = Trajectory.advance
    monkeypatch.setattr(Trajectory, "advance", lambda run, state, step: made.append(step) or advance(run, state, step))
    hypergradient(run, SETUPS["plain"].case.queries, "example_weights", method=Unrolled(route="batched"))
    assert len(made) == promised[0]
    if expected is not None:
        assert promised == expected
    if isinstance(schedule, Treeverse):
        assert promised[1] <= (schedule.states or 0)


def test_costs_are_sums_of_steps(prices: None):
    """29 replays at 1, 8 steps back at 3; forward mode 2 numbers at 2."""
    run = of("plain", "momentum", Treeverse(states=1))
    state = run.state(0).nbytes()
    made = plan(run, SETUPS["plain"].case.queries, ("learning_rate", "momentum"), pilot=4)
    exact, found = made.options[0], named(made)
    assert exact.method == Unrolled()
    assert found[Forward].trainings == 4.0
    assert exact.trainings == (29 + 8 * 3) / 8
    assert exact.nbytes == (2 + 1 + 2) * state  # stored, held, and the costates of one question
    assert found[Forward].nbytes == 5 * state
    assert found[FirstOrder].trainings == 3 / 8
    assert found[FixedPoint].trainings == 102 * 7 * 3 / 8  # the last batch has 2 of 14 examples


# ---------------------------------------------------------------------------------------------------------------------
# Choices


def test_what_is_exact_and_cheapest_is_taken(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    one = plan(run, queries, "learning_rate")
    assert one.method == Forward()  # 2 against 4 trainings
    assert one.why == "exact, and the cheapest such within the budget"
    assert plan(run, queries, ("learning_rate", "momentum", "weight_decay")).method == Unrolled()
    for wrt in ("example_weights", "inputs"):
        found = plan(run, queries, wrt)
        assert found.method == Unrolled()
        assert Forward not in named(found)


def test_a_budget_of_memory_leads_to_forward_mode(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    names = ("learning_rate", "momentum", "weight_decay")
    found = plan(run, queries, names)
    whole, whole_exact = named(found), found.options[0]
    assert whole_exact.method == Unrolled()
    assert whole[Forward].nbytes < whole_exact.nbytes
    assert plan(run, queries, names, memory=whole[Forward].nbytes).method == Forward()


def test_without_time_for_the_exact_one_the_least_bias_is_taken(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    found = plan(run, queries, "example_weights", trainings=2.0)
    can = [one for one in found.options if one.bias is not None and one.trainings <= 2.0]
    assert len(can) == 2
    assert not any(one.exact for one in can)
    best = min(can, key=lambda one: one.bias or 0.0)
    assert found.method == best.method == Unrolled(last=2)
    assert best.bias is not None
    assert found.why == f"nothing exact fits the budget; it leaves out {best.bias:.0%} on a pilot of 8 steps"
    assert plan(run, queries, "example_weights", trainings=0.5).method == FirstOrder()


def test_what_fits_nothing_is_refused_with_the_cheapest(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    with pytest.raises(InputError, match=r"no method fits 0.1 trainings and None bytes. The cheapest, FirstOrder\("):
        plan(run, queries, "example_weights", trainings=0.1)
    with pytest.raises(InputError, match=r"The cheapest, Unrolled\(last=None.* Treeverse\(states=…\) takes less memory"):
        plan(run, queries, "initial_params", memory=10)


def test_what_cannot_be_asked_is_refused():
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    with pytest.raises(InputError, match="did not go into this training"):
        plan(run, queries, "meta")
    with pytest.raises(InputError, match="a pilot needs at least 4 steps, got 3"):
        plan(run, queries, "learning_rate", pilot=3)


# ---------------------------------------------------------------------------------------------------------------------
# The pilot


def test_the_pilot_says_what_truncation_leaves_out(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    names = ("example_weights", "learning_rate")
    found = next(one for one in plan(run, queries, names).options if one.method == Unrolled(last=2))
    exact = hypergradient(run, queries, names)
    with pytest.warns(UntrustedGradient):
        short = hypergradient(run, queries, names, method=Unrolled(last=2))
    left_out = {name: (short.vector(name) - exact.vector(name)).norm() / exact.vector(name).norm() for name in names}
    assert found.bias == pytest.approx(max(left_out.values()).item())
    assert found.cosine == pytest.approx(min(short.cosine(exact, name).item() for name in names))
    assert max(left_out.values()) > 0.1
    # a shorter pilot is of the first steps
    piloted = next(one for one in plan(run, queries, names, pilot=4).options if one.method == Unrolled(last=2))
    assert piloted.bias is not None
    assert piloted.bias != found.bias


def test_methods_that_cannot_give_an_input_say_why(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    found = plan(run, queries, "learning_rate")
    fixed = named(found)[FixedPoint]
    assert fixed.bias is None
    assert "do not move the fixed point" in fixed.remark
    weights = named(plan(run, queries, "example_weights"))[FixedPoint]
    assert "the run has not settled" in weights.remark or weights.bias is None


def test_an_input_that_moves_nothing_has_no_bias(prices: None):
    case = replace(CASES["plain"], clip_norm=1e6)
    found = plan(case.record(RULES["momentum"]), case.queries, "clip_norm")
    assert [one.bias for one in found.options if isinstance(one.method, Unrolled | FirstOrder)] == [0.0, 0.0, 0.0]


def test_the_plan_in_words(prices: None):
    run, queries = of("plain", "momentum"), SETUPS["plain"].case.queries
    found = plan(run, queries, "learning_rate")
    lines = str(found).splitlines()
    assert len(lines) == len(found.options) + 1 == 6
    assert [line.split()[0] for line in lines[:-1]] == [
        "Unrolled",
        "Forward",
        "FixedPoint",
        "Unrolled(last=2)",
        "FirstOrder(last=1)",
    ]
    assert all(" trainings " in line and " MB " in line for line in lines[:-1])
    assert lines[1].endswith("exact")
    assert "–" in lines[2]
    assert "bias " in lines[3]
    assert "cosine " in lines[3]
    assert lines[-1] == "take Forward(): exact, and the cheapest such within the budget"


def test_steps_are_timed_in_turn():
    state = of("plain", "sgd").state(0)
    calls: list[str] = []
    found = planner._timed(lambda: calls.append("one") or state, lambda: calls.append("other") or state)
    assert len(found) == 2
    assert min(found) > 0
    assert len(calls) >= 8
    assert calls == ["one", "other"] * (len(calls) // 2)
