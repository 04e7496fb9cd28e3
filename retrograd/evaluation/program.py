"""Train many models along their courses: all together in one batched program, or one after the other.

Together, parameters, slots and buffers have a leading axis ``model`` and one vmapped step advances every model at once. That is
several times faster where a plain step is bound by overhead, as for small networks, and slower where compute binds and the
batched kernels are worse than the plain ones (grouped convolutions, attention). Which it is gets measured: two steps of
the run itself, both ways. The results are equal up to rounding.

Memory: one state, its gradient and successor, and the activations of one batch for each model that is trained together.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.adjoint import Queries
from retrograd.evaluation.course import Course, Protocol
from retrograd.params import Params
from retrograd.trajectory import StepInputs, TrainingState, Trajectory, UpdateMap
from retrograd.trajectory.state import map_batch

MOST_TOGETHER = 128  # beyond it a batched step gains next to nothing, and a killed study loses more
_PILOT_SECONDS, _MOST_IN_PILOT = 0.02, 16


@dataclass(frozen=True)
class Program:
    """Trains models and measures them.

    Attributes:
        protocol: what the retrainings share.
        queries: what is measured at the end.
        starts: the initial state of each fresh seed; that of the run under None.
        together: how many models are trained at once.
    """

    protocol: Protocol
    queries: Queries
    starts: dict[int | None, TrainingState]
    together: int

    def groups(self, factors: Tensor) -> list[Tensor]:
        """Cut the rows of ``factors`` to those that can be trained together: courses must be equally long."""
        sizes = (factors != 0).sum(1) if self.protocol.removal == "deletion" else torch.zeros(len(factors))
        return [part for size in sizes.unique() for part in (sizes == size).nonzero()[:, 0].split(self.together)]

    def steps(self, factors: Tensor) -> int:
        """Return how many steps `train` makes, a batched one counted once."""
        kept = (factors != 0).sum(1)
        return sum(self.protocol.length(int(kept[rows[0]])) for rows in self.groups(factors))

    def train(self, factors: Tensor, numbers: Tensor, seed: int | None) -> Generator[None, None, Tensor]:
        """Train a model for each row of ``factors``; yields after every step.

        Args:
            factors: factor on each example's weight, ``[model, example]``.
            numbers: number of each retraining in its study.
            seed: a key of `starts`.

        Returns:
            The measurements, ``[model, query]``, NaN where a training became non-finite.
        """
        values: Tensor | None = None
        for rows in self.groups(factors):
            course = Course(self.protocol, factors[rows], numbers[rows], seed)
            found = yield from (self._batched if self.together > 1 else self._single)(course, seed, len(rows))
            values = found.new_empty(len(factors), len(self.queries)) if values is None else values
            values[rows] = found
        assert values is not None
        return values

    def _batched(self, course: Course, seed: int | None, count: int) -> Generator[None, None, Tensor]:
        update_map = self.protocol.run.update_map
        states = stacked(self.starts[seed], count)
        for number in range(len(course)):
            inputs, weights = course.step(number)
            states = update_map.many(states, inputs, weights, own_batches=course.own_batches)
            yield
        return measured(update_map, self.queries, states)

    def _single(self, course: Course, seed: int | None, count: int) -> Generator[None, None, Tensor]:
        update_map, state = self.protocol.run.update_map, self.starts[seed]
        for number in range(len(course)):
            state = update_map(state, plain(*course.step(number), course.own_batches))
            yield
        with torch.no_grad():
            return self.queries.values(update_map, state).detach()[None].cpu()


def measured(update_map: UpdateMap, queries: Queries, states: TrainingState) -> Tensor:
    """Measure many models at once, ``[model, query]``; every tensor of ``states`` has a leading axis ``model``."""

    def measure(params: Params, buffers: Params) -> Tensor:
        return queries.values(update_map, TrainingState(params, {}, buffers, states.step))

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batched form
        return torch.func.vmap(measure)(states.params, states.buffers).cpu()


def plain(inputs: StepInputs, weights: Tensor, own_batches: bool) -> StepInputs:
    """Return the inputs of a step of one model, of those of a step of many with one model among them."""
    batch = map_batch(lambda leaf: leaf[0], inputs.batch) if own_batches else inputs.batch
    return replace(inputs, batch=batch, weights=weights[0])


def stacked(state: TrainingState, count: int) -> TrainingState:
    """Repeat a state along a new leading axis ``model``."""
    return state.map(lambda leaf: leaf.expand(count, *leaf.shape).clone())


# ---------------------------------------------------------------------- how many together


def best_together(protocol: Protocol, start: TrainingState, factors: Tensor, seed: int | None, memory: int) -> int:
    """Measure how many models are best trained together: as many as ``memory`` bytes hold, or 1 if that is no slower.

    Args:
        protocol: what the retrainings share.
        start: the initial state of the first.
        factors: the factors of all.
        seed: seed of the first.
        memory: bytes that models trained together may take.
    """
    if not len(protocol.run):
        return 1
    most = min(len(factors), MOST_TOGETHER, memory // _bytes_per_model(protocol.run, start))
    if most < 2:
        return 1
    course = Course(protocol, factors[:1], torch.zeros(1, dtype=torch.int64), seed)
    inputs, weights = course.step(0)
    update_map = protocol.run.update_map
    alone = _seconds(lambda: update_map(start, plain(inputs, weights, course.own_batches)))
    # A batched step of many small models is mostly overhead, which more of them share; two large ones tell.
    count = min(most, max(2, min(_MOST_IN_PILOT, round(_PILOT_SECONDS / alone))))
    states, many = stacked(start, count), weights.expand(count, -1)
    if course.own_batches:
        inputs = replace(inputs, batch=map_batch(lambda leaf: leaf.expand(count, *leaf.shape[1:]), inputs.batch))
    batched = _seconds(lambda: update_map.many(states, inputs, many, own_batches=course.own_batches))
    return most if batched < count * alone else 1


def _seconds(step: Callable[[], TrainingState]) -> float:
    """How long a step takes when one has been made before."""
    step()
    began = time.perf_counter()
    after = step()
    if next(iter(after.params.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _bytes_per_model(run: Trajectory, start: TrainingState) -> int:
    """What a batched step holds for each model: state, gradient and successor, and what the backward pass needs."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run.update_map(start, run.inputs(0))
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return 3 * start.nbytes() + 4 * _bytes_of_outputs(run, start)
    return 3 * start.nbytes() + 2 * sum(saved.values())


def _bytes_of_outputs(run: Trajectory, start: TrainingState) -> int:
    """What all calls of modules give out in one step, where torch.func in a loss keeps us from seeing what is saved."""
    sizes: list[int] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        map_batch(lambda leaf: sizes.append(leaf.numel() * leaf.element_size()) or leaf, output)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        run.update_map(start, run.inputs(0))
    finally:
        handle.remove()
    return sum(sizes)
