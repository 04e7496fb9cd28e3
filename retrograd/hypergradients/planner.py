"""Which method for this run, these inputs, this much time and memory: what each would cost, and what a short pilot says of it.

    exact, reverse     T r + R c               R steps replayed, as the run's schedule of checkpoints says
    exact, forward     T n f                   n numbers; no storage
    fixed point        (i + 1) W r             i iterations, W steps in the window
    truncated          K r                     the last K steps
    first order        2 c                     the last step

c, r, f: a training step, a step back for one question, a step forward of one tangent, timed on the run's first step. All are
told in multiples of the run's own training, T c. Methods that are not exact are run on a **pilot**, the run's first steps,
beside the exact one: what they leave out there, ‖g̃ − g‖ / ‖g‖ for each input, is the bias to expect at best, as it grows with
the length of training. Cosine and share ⟨g̃, g⟩ / ‖g‖² say of which kind it is. A fixed point is judged by the `drift` of the
whole run, too. An exact method is taken if one fits; else the one that fits with the least bias.

Memory: states that are stored and held, and costates or tangents; activations of a step are as in training (about three times
for second derivatives) and not counted.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retrograd.adjoint import FirstOrder, FixedPoint, Outcome, Queries, Unrolled
from retrograd.adjoint.unrolled import fastest_route
from retrograd.errors import InputError, RetrogradError, UntrustedGradient
from retrograd.hypergradients.forward import MOST, Forward
from retrograd.hypergradients.hypergradient import Method, hypergradient
from retrograd.hypergradients.result import SETTLED, Hypergradient
from retrograd.params import map_params, map_slots
from retrograd.trajectory import MemoryCheckpoints, StateVectors, Trajectory
from retrograd.trajectory.schedule import replayed_steps

_LEAST, _MOST, _ENOUGH = 3, 20, 0.5  # tries of a step, and seconds for all of them
_BY_REVERSE_ONLY = frozenset({"example_weights", "initial_params", "inputs", "labels"})


@dataclass(frozen=True)
class Option:
    """A method, and what it would cost here.

    Attributes:
        method: which.
        trainings: its time, in multiples of the run's own training.
        nbytes: memory for states, costates and tangents.
        bias: ‖g̃ − g‖ / ‖g‖ on the pilot, of the input where it is largest; None where it can't give these inputs.
        cosine: to the exact hypergradient on the pilot, of the input where it is smallest.
        remark: what else to know.
    """

    method: Method
    trainings: float
    nbytes: int
    bias: float | None
    cosine: float | None
    remark: str = ""

    @property
    def exact(self) -> bool:
        """Whether it is the derivative of the run that happened."""
        return isinstance(self.method, Forward) or (isinstance(self.method, Unrolled) and self.method.last is None)


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `print` shows it.

    Attributes:
        method: the one to take.
        why: in a sentence.
        options: all that were looked at.
    """

    method: Method
    why: str
    options: tuple[Option, ...]

    def __str__(self) -> str:
        """Show all options, and the choice."""
        rows = [
            f"{type(one.method).__name__ + _how(one.method):<24}{one.trainings:9.2f} trainings {one.nbytes / 1e6:9.1f} MB   "
            + ("–" if one.bias is None else "exact" if one.exact else f"bias {one.bias:.2f} (cosine {one.cosine:.2f})")
            + (f"   {one.remark}" if one.remark else "")
            for one in self.options
        ]
        return "\n".join([*rows, f"take {self.method!r}: {self.why}"])


def plan(
    run: Trajectory,
    outcome: Any,
    wrt: str | Iterable[str],
    *,
    trainings: float | None = None,
    memory: int | None = None,
    pilot: int = 32,
) -> Plan:
    """Choose a method for `hypergradient`.

    Args:
        run: the recorded run.
        outcome: what is asked, as for `hypergradient`.
        wrt: by which inputs.
        trainings: time that may be spent, in multiples of the run's own training; no bound if not given.
        memory: bytes for states, costates and tangents; no bound if not given.
        pilot: steps of the pilot.

    Raises:
        InputError: the run has no such input, or nothing fits: then it says what would.
    """
    names = frozenset([wrt] if isinstance(wrt, str) else wrt)
    if not names <= {"example_weights", "initial_params"}:
        run.update_map.check_inputs(names - {"example_weights", "initial_params"}, run.inputs(0))
    if pilot < 4:
        raise InputError(f"a pilot needs at least 4 steps, got {pilot}.")
    asked = Outcome.of(outcome)
    prices = _Prices(run, asked)
    options = [prices.reverse(), *prices.forward(names)]
    options += _piloted(run, asked, names, prices, min(pilot, len(run)))
    can = [one for one in options if one.bias is not None]
    fits = [
        one for one in can if (trainings is None or one.trainings <= trainings) and (memory is None or one.nbytes <= memory)
    ]
    if not fits:
        least = min(can, key=lambda one: one.trainings)
        raise InputError(
            f"no method fits {trainings} trainings and {memory} bytes. The cheapest, {least.method!r}, takes "
            f"{least.trainings:.2g} trainings and {least.nbytes} bytes. A run recorded with Treeverse(states=…) takes less "
            "memory and more time."
        )
    best = min(fits, key=lambda one: (not one.exact, 0.0 if one.exact else one.bias or 0.0, one.trainings))
    why = (
        "exact, and the cheapest such within the budget"
        if best.exact
        else f"nothing exact fits the budget; it leaves out {best.bias or 0.0:.0%} on a pilot of {min(pilot, len(run))} steps"
    )
    return Plan(best.method, why, tuple(options))


class _Prices:
    """Times of one step of each kind, and bytes of a state."""

    def __init__(self, run: Trajectory, outcome: "Outcome | Queries"):
        self._run = run
        state, inputs, step = run.state(0), run.inputs(0), run.update_map
        self.cotangents = outcome.gradients(run, run.final_state)
        route = fastest_route(step, state, inputs, self.cotangents, "hessian")
        own = self.cotangents.map(torch.clone)  # in place, as a walk does it
        self.train, self.back = _timed(
            lambda: run.advance(state, 0), lambda: step.pullback(state, run.inputs(0), own, route, out=own)
        )
        one = StateVectors(
            map_params(lambda leaf: leaf[None], state.params), map_slots(lambda leaf: leaf[None], state.slots), {}
        )
        self._push = lambda: step.pushforward(state, inputs, one)
        self.nbytes = state.nbytes()

    def reverse(self) -> Option:
        """The exact method: how many steps it replays is known beforehand."""
        run = self._run
        steps, held = replays(run)
        trainings = (len(run) * self.back + steps * self.train) / (len(run) * self.train)
        stored = len(run.checkpoints.steps()) if isinstance(run.checkpoints, MemoryCheckpoints) else 0
        return Option(Unrolled(), trainings, (stored + held + 2 * len(self.cotangents)) * self.nbytes, 0.0, 1.0)

    def forward(self, names: frozenset[str]) -> list[Option]:
        """Forward mode, where it can give these inputs."""
        groups, meta = len(self._run.update_map.groups), self._run.update_map.meta
        numbers = groups * len(names - {"meta", "clip_norm"}) + ("clip_norm" in names)
        numbers += sum(leaf.numel() for leaf in meta.values()) if "meta" in names else 0
        if numbers > MOST or names & _BY_REVERSE_ONLY:
            return []
        return [Option(Forward(), numbers * _timed(self._push)[0] / self.train, (2 * numbers + 1) * self.nbytes, 0.0, 1.0)]

    def approximate(self, method: Method) -> tuple[float, int]:
        """Time in trainings and bytes of a method that looks at the end of the run."""
        run = self._run
        costates = (2 * len(self.cotangents) + 1) * self.nbytes
        if isinstance(method, FixedPoint):
            window = max(1, round(len(run.examples) / len(run.records[-1].example_ids)))
            return (method.iterations + 2) * window * self.back / (len(run) * self.train), 5 * costates
        last = getattr(method, "last", None) or 1
        each = 3 * self.train * len(self.cotangents) if isinstance(method, FirstOrder) else self.back + self.train
        held = costates if isinstance(method, FirstOrder) else costates + last * self.nbytes
        return last * each / (len(run) * self.train), held


def replays(run: Trajectory) -> tuple[int, int]:
    """Return how many steps a walk back through ``run`` makes again, and how many states it holds at most."""
    stops = [step for step in run.checkpoints.steps() if step < len(run)] + [len(run)]
    steps = held = 0
    for start, stop in pairwise(stops):
        slots = run.schedule.slots(run.state(0).nbytes())
        steps += replayed_steps(stop - start, slots) + 1  # the last step before a stored state is compared with it
        held = max(held, min(stop - start, slots or stop - start))
    return steps, held


def _piloted(run: Trajectory, outcome: "Outcome | Queries", names: frozenset[str], prices: _Prices, steps: int) -> list[Option]:
    """Approximate methods, each run beside the exact one on the first steps of the run."""
    first = MemoryCheckpoints()
    for step in (0, steps):
        first.save(run.state(step))
    short = Trajectory(run.update_map, run.examples, run.records[:steps], first, run.schedule, tolerance=run.tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedGradient)
        exact = hypergradient(short, outcome, names)
        found = []
        for method in (FixedPoint(), Unrolled(last=max(1, len(run) // 4)), FirstOrder()):
            piloted = replace(method, last=max(1, steps // 4)) if isinstance(method, Unrolled) else method
            trainings, nbytes = prices.approximate(method)
            bias, cosine, remark = None, None, ""
            try:
                if isinstance(method, FixedPoint):
                    drift = hypergradient(run, outcome, names, method=FixedPoint(solver="identity")).notes["drift"]
                    remark = f"drift {drift:.2g}" + (": the run has not settled" if drift > SETTLED else "")
                short_one = hypergradient(short, outcome, names, method=piloted)
                cosine = min(short_one.cosine(exact, name).min().item() for name in sorted(names))
                bias = max(_left_out(short_one, exact, name) for name in sorted(names))
            except RetrogradError as error:
                remark = str(error).split(". ")[0].split(";")[0]
            found.append(Option(method, trainings, nbytes, bias, cosine, remark))
    return found


def _left_out(found: Hypergradient, exact: Hypergradient, name: str) -> float:
    true = exact.vector(name)
    sizes = true.norm(dim=1).clamp(min=torch.finfo(true.dtype).tiny)  # where nothing is to be found, nothing is left out
    return ((found.vector(name) - true).norm(dim=1) / sizes).max().item()


def _how(method: Method) -> str:
    last = getattr(method, "last", None)
    return "" if last is None else f"(last={last})"


def _timed(*works: Callable[[], object]) -> list[float]:
    """Seconds of the fastest of some tries of each work, after one that pays for what torch sets up once.

    In turn, so that what else the machine does meets all of them alike.
    """

    def once(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        done: Any = work()
        some = next(iter((done.costates if hasattr(done, "costates") else done).params.values()))
        assert isinstance(some, Tensor)
        some.sum().item()  # an accelerator is waited for
        return time.perf_counter() - start

    tries = [[once(work) for work in works]]
    while len(tries) <= _LEAST or (len(tries) <= _MOST and sum(map(sum, tries)) < _ENOUGH):
        tries.append([once(work) for work in works])
    return [min(own) for own in zip(*tries[1:], strict=True)]
