"""Choosing a method for a budget: what each would cost on this run, by timing, and which promises most for the question.

    exact       E · c_step · Q                a reverse sweep through E epochs for Q queries, if the run is smooth enough
    SOURCE      6 · (fit + pass)              six checkpoints: curvature, and a pass over the data for all queries
    influence   fit + pass                    one
    TracIn      k · pass                      k checkpoints

c_step, fit and pass are timed on one batch of the run and told in epochs of its own training. On random halves with fresh seeds
exact and SOURCE blended scored best wherever measured, then SOURCE; for small removals and the run's own seed the exact method
(``docs/choosing.md`` has the tables). One recorded run trained again at matched time (``keep`` below 1) counts as E epochs, the
measurement of roughness as 3 E.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from retrograd.adjoint import Adjoint, Blend, Engine, Implicit, Queries, Source, TracIn, Unrolled
from retrograd.adjoint.parts import Probe
from retrograd.adjoint.unrolled import fastest_route
from retrograd.errors import InputError
from retrograd.task import Samples
from retrograd.trajectory import Counterfactual, Run, Trajectory

_PROBED = 64  # costates on which a reverse step is timed: fewer cost more each
_REPEATS = 3
_FIT = 1.2  # passes that a fit of EK-FAC takes beside its products, measured on two tasks


@dataclass(frozen=True)
class Choice:
    """A method for a budget.

    Attributes:
        method: which.
        epochs: what it is expected to cost, in epochs of the run's training.
        why: why this one, in a sentence.
        more: what more budget would give, in a sentence.
    """

    method: Adjoint
    epochs: float
    why: str
    more: str


@dataclass(frozen=True)
class Prices:
    """What things cost on this run, in epochs of its training.

    Attributes:
        training: E, all of the run.
        sweep: a reverse sweep for all queries; None where the batches are not recorded.
        pass_: a pass over the data with all queries.
    """

    training: float
    sweep: float | None
    pass_: float


def choose(run: Run, queries: Queries, budget: float, counterfactual: Counterfactual) -> Choice:
    """Choose the method that promises most within a budget.

    Args:
        run: the recorded run.
        queries: what is asked.
        budget: processor time, in epochs of the run's own training.
        counterfactual: the change of the data that scores are to predict.

    Raises:
        InputError: the budget does not pay for any method.
    """
    price = prices(run, queries)
    matched = price.training if counterfactual != run.counterfactual and counterfactual.keep != 1.0 else 0.0
    offers: list[tuple[Adjoint, float, str]] = []
    sampled = isinstance(run.update_map.task, Samples)
    enough = lambda count: len(run) >= count and len(set(run.spread(count))) == count  # noqa: E731
    source = 6 * (_FIT + 1) * price.pass_
    if price.sweep is not None:
        exact = 3 * price.training + price.sweep
        exactly = Unrolled(curvature="auto")
        if sampled and counterfactual.seeds == "fresh" and enough(6):
            why = "the exact method knows this run, SOURCE the expected one, and their errors are nearly independent"
            offers.append((Blend((exactly, Source())), exact + source, why))
        offers.append((exactly, exact, "it is the derivative of this very run"))
    if sampled and enough(6):
        why = "it knows how long the run trained, and costs the same for any number of steps"
        offers.append((Source(), source, why))
    if sampled:
        offers.append((Implicit(damping="training_time"), (_FIT + 1) * price.pass_, "it needs only the final model"))
    for count in (6, 1):
        if enough(count):
            offers.append((TracIn(count), count * price.pass_, "it needs nothing but gradients"))
    dearer: tuple[Adjoint, float, str] | None = None
    for method, epochs, why in offers:
        if matched + epochs <= budget:
            more = "Nothing better is known for one run; runs with other seeds, averaged, would take out their noise."
            if dearer is not None:
                more = f"{matched + dearer[1]:.0f} epochs would pay for {_name(dearer[0])}: {dearer[2]}."
            return Choice(method, matched + epochs, f"{_name(method)} for about {matched + epochs:.1f} epochs: {why}.", more)
        dearer = (method, epochs, why)
    cheapest = min(epochs for _, epochs, _ in offers)
    raise InputError(
        f"a budget of {budget:g} epochs pays for no method: the cheapest costs about {matched + cheapest:.1f}, and "
        f"{matched:.0f} of it is for training again at matched time. Raise the budget, or ask with keep=1 or of fewer queries."
    )


def prices(run: Run, queries: Queries) -> Prices:
    """Time one step, one reverse step and one pass on this machine."""
    update_map, examples = run.update_map, run.examples
    few = queries.slices(min(_PROBED, Engine().query_batch(run)))[0]
    start = run.state(0)
    gradients = few.gradients(run, start)
    if isinstance(run, Trajectory):
        inputs = run.inputs(0)
        step = _timed(lambda: update_map(start, inputs))
        batch = len(inputs.example_ids)
        training = sum(len(record.example_ids) for record in run.records) / len(examples)
        route = fastest_route(update_map, start, inputs, gradients, "hessian")
        place = gradients.map(torch.empty_like)
        reverse = _timed(lambda: update_map.pullback(start, inputs, gradients, route, out=place)) / len(few)
        sweep = (1 + reverse / step * len(queries)) * training
    else:
        batch = min(64, len(examples))
        ids = examples.ids[:batch]
        step = _timed(lambda: update_map.losses(start, examples.batch(ids)))
        training, sweep = 0.0, None
    exposure = torch.zeros(len(examples), dtype=torch.float64)
    exposure[: min(len(examples), 256)] = 1.0
    vectors = {name: leaf[:1].expand(len(queries), *leaf.shape[1:]).contiguous() for name, leaf in gradients.params.items()}
    probe = Probe((start,), vectors, exposure)
    whole = _timed(lambda: list(Engine().contract(run, iter([probe]), 1))) / exposure.sum().item()
    return Prices(training, sweep, whole / (step / batch))


def _timed(work: Callable[[], object]) -> float:
    """Processor seconds, the least of a few."""
    work()
    times = []
    for _ in range(_REPEATS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return max(min(times), 1e-6)


def _name(method: Adjoint) -> str:
    return type(method).__name__
