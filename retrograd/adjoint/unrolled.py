"""Exact adjoint by replay: the derivative of the run that really happened.

    λ_T = ∇f(s_T),     λ_t = A_tᵀ λ_{t+1},     d f / d w_i = Σ_{t: i ∈ batch t} ⟨λ_{t+1}, ∂Φ_t/∂w_i⟩

λ_t   costate: how the outcome moves if the whole state (parameters, optimizer slots, buffers) moves at step t;
A_t   Jacobian of the update map at the replayed state;
w_i   weight of example i, 1 in the run that happened.

The states are walked back from the stored ones; at each, one reverse pass gives A_tᵀ λ and the scores of the batch (see
`UpdateMap.pullback`).

``last=K`` stops K steps before the end (truncated backpropagation through training). ``rank=r`` sweeps an orthonormal
basis instead of the queries: scores are linear in ∇f_q, so with G = U S Vᵀ the queries' gradients, the rows of Vᵀ are swept
and U S applied to what comes out. Exact at full rank; the share of ΣS² that is dropped is reported as ``energy_lost``.

``curvature="gauss_newton"`` puts the batch's Gauss-Newton matrix (1/B) Σ_i w_i J_iᵀ H_i J_i, J_i = ∂f_i/∂θ the derivative of
the model's outputs and H_i = ∂²ℓ_i/∂f_i², in the place of the Hessian of its loss in A_t, and changes nothing else: scores of
given costates, update rule, clipping, dropout and buffers are exact (see ``gauss_newton_graph.py``). It has no negative
eigenvalues where losses are convex in the outputs, so it does not amplify along them: on runs too rough for the exact
derivative it predicts more, on smooth runs less. ``curvature="auto"`` measures which one this run is (`roughness`): it takes
Gauss-Newton where the run amplifies the smallest change more than five times, long before derivatives are of no use at all.

Assumptions: the replay has the run's bits; losses are smooth enough for a derivative to say something about finite
changes (`roughness` measures that). Cost: about half to two training runs for each query, see ``docs/cost.md``; memory 2 to
4 times the model's parameters for each query. With ``rank=r`` r counts instead of the number of queries. Gauss-Newton costs
no more; ``"auto"`` three trainings more.

References: Maclaurin et al. (2015), "Gradient-based hyperparameter optimization through reversible learning"; Hara et al.
(2019), "Data cleansing for models trained with SGD"; Ilyas and Engstrom (2025), "MAGIC: near-optimal data attribution for
deep learning"; Engstrom et al. (2025), "Optimizing ML training with metagradient descent"; Martens (2020), "New insights and
perspectives on the natural gradient method" (Gauss-Newton).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import Notes, ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.errors import InputError, NonFinite, NotRecorded
from retrograd.linalg.low_rank import compress as compress_rows
from retrograd.params import flatten, unflatten
from retrograd.progress import track_steps
from retrograd.trajectory import (
    Pullback,
    Route,
    Run,
    StateVectors,
    StepCurvature,
    StepInputs,
    TrainingState,
    Trajectory,
    UpdateMap,
    roughness,
)
from retrograd.trajectory.roughness import SMOOTH_ENOUGH

# Amplification of a change of one unit in the last place from which Gauss-Newton predicts more: the two matched digits runs on
# which the exact derivative is better have 1.4 and 1.5, the two on which Gauss-Newton is have 9 and 11.
TAMED_FROM = 5.0


@dataclass(frozen=True)
class Unrolled:
    """Exact unrolling of the run.

    Args:
        last: differentiate through only so many last steps; None for all.
        rank: sweep so many directions instead of all queries; None for all queries.
        route: how the costates of a step are reversed: ``"batched"`` all at once (small models), ``"loop"`` one after the
            other (large ones), or ``"auto"``: both are timed on the first step and the faster one is used.
        curvature: ``"hessian"`` is the exact derivative of each step, ``"gauss_newton"`` keeps the curvature of the losses in
            the model's outputs only (the task must be a `retrograd.task.SplitTask`), ``"auto"`` measures roughness and takes
            Gauss-Newton where the run is rough. What was taken is noted.
    """

    last: int | None = None
    rank: int | None = None
    route: Route | Literal["auto"] = "auto"
    curvature: StepCurvature | Literal["auto"] = "hessian"

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{ilyas2025magic,
  title = {{MAGIC}: Near-Optimal Data Attribution for Deep Learning},
  author = {Ilyas, Andrew and Engstrom, Logan},
  year = {2025}, note = {arXiv:2504.16430}
}"""

    def __post_init__(self):
        if self.last is not None and self.last < 1:
            raise InputError(f"last is a number of steps, at least 1, got {self.last}.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank is a number of directions, at least 1, got {self.rank}.")
        if self.route not in ("auto", "batched", "loop"):
            raise InputError(f"route must be 'auto', 'batched' or 'loop', got {self.route!r}.")
        if self.curvature not in ("hessian", "gauss_newton", "auto"):
            raise InputError(f"curvature must be 'hessian', 'gauss_newton' or 'auto', got {self.curvature!r}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of each step's batch, from the last step to the first."""
        notes = engine.notes
        if not isinstance(run, Trajectory):
            raise NotRecorded(
                "unrolling replays every step, and this run is only a list of checkpoints: the batches are not recorded. "
                "Record the training with record(...) or Recorder(...), or use a method that needs only checkpoints (TracIn)."
            )
        rank = engine.rank if self.rank is None else self.rank
        whole = self.last is None and (rank is None or rank >= len(queries))
        notes.add(exact=whole and self.chosen_curvature(run, notes) == "hessian")
        final = run.final_state
        cotangents = queries.gradients(run, final)
        mixing = None
        if rank is not None and rank < len(queries):
            cotangents, mixing, lost = compress(cotangents, rank)
            notes.add(rank=rank, energy_lost=lost)
        for inputs, _, pullback in self.sweep(run, cotangents, notes):
            values = pullback.scores if mixing is None else mixing @ pullback.scores
            yield ScorePart(inputs.example_ids, values)

    def costates(self, run: Trajectory, cotangents: StateVectors) -> Iterator[tuple[int, StateVectors]]:
        """Yield ``(t, λ_t)`` from t = T−1 down to 0 (or to T − last); each λ_t is valid until the next one."""
        own = cotangents.map(torch.clone)  # the sweep works in place
        for _, step, pullback in self.sweep(run, own, Notes()):
            yield step, pullback.costates

    def sweep(
        self, run: Trajectory, cotangents: StateVectors, notes: Notes, wrt: frozenset[str] = frozenset()
    ) -> Iterator[tuple[StepInputs, int, Pullback]]:
        """Pull the cotangents of the final state back step by step, in place; yields u_t, t and the pullback of step t.

        Args:
            run: the recorded run.
            cotangents: λ_T, overwritten.
            notes: of what was chosen.
            wrt: inputs to differentiate by, other than the example weights (see ``trajectory/step_inputs.py``).

        Raises:
            NonFinite: a costate or a derivative became so, with the step and the name of the first.
        """
        route = None if self.route == "auto" else self.route
        curvature = self.chosen_curvature(run, notes)
        costates = cotangents
        steps = min(len(run), self.last or len(run))
        for step, state, inputs in track_steps(run.reverse(self.last), steps, "walking back"):
            if route is None:
                route = fastest_route(run.update_map, state, inputs, costates, curvature)
                notes.add(route=route)
            pullback = run.update_map.pullback(state, inputs, costates, route, out=costates, curvature=curvature, wrt=wrt)
            refuse_non_finite(pullback, step)
            yield inputs, step, pullback

    def chosen_curvature(self, run: Trajectory, notes: Notes) -> StepCurvature:
        """Return the curvature to use, and note it; if it is ``"auto"``, with the measurements that decided.

        A measurement of this run that is in the notes already (by `attribute`, or for other queries) is not made again.
        """
        chosen = self.curvature
        if chosen == "auto" and not len(run):
            chosen = "hessian"  # nothing to measure, and nothing to differentiate
        if chosen == "auto":
            if "metasmoothness" not in notes.entries or "amplification" not in notes.entries:
                found = roughness(run)
                notes.add(metasmoothness=found.metasmoothness, amplification=found.amplification)
            smooth = notes.entries["metasmoothness"] >= SMOOTH_ENOUGH and notes.entries["amplification"] <= TAMED_FROM
            chosen = "hessian" if smooth else "gauss_newton"
        notes.add(curvature=chosen)
        return chosen


def refuse_non_finite(pullback: Pullback, step: int) -> None:
    """Refuse derivatives that are NaN or infinite, with the names of what they are of."""
    found = {"example_weights": pullback.scores, **pullback.inputs.hyper, **pullback.inputs.leaves()}
    wrong = [name for name, leaf in found.items() if not torch.isfinite(leaf).all()]
    if wrong:  # only now all of the costates are looked at
        wrong += [name for name, leaf in pullback.costates.leaves().items() if not torch.isfinite(leaf).all()]
        raise NonFinite(
            f"the costates became non-finite at step {step}, in {', '.join(wrong[:4])}. The run is too rough to differentiate "
            "through from there on; see roughness(run), or use Unrolled(last=...)."
        )


def fastest_route(
    update_map: UpdateMap, state: TrainingState, inputs: StepInputs, costates: StateVectors, curvature: StepCurvature
) -> Route:
    """Time both routes on one step, with at most 8 costates, and return the faster."""
    few = costates[:8]
    if len(few) == 1:
        return "loop"
    times: dict[Route, float] = {}
    for route in ("loop", "batched"):
        update_map.pullback(state, inputs, few[:2], route, curvature=curvature)  # pays for what torch sets up once
        start = time.perf_counter()
        update_map.pullback(state, inputs, few, route, curvature=curvature).scores.sum().item()  # an accelerator is waited for
        times[route] = time.perf_counter() - start
    return min(times, key=lambda route: times[route])


def compress(vectors: StateVectors, rank: int) -> tuple[StateVectors, Tensor, float]:
    """Return an orthonormal basis of the ``rank`` strongest directions, the mixing ``[query, rank]`` back, and the lost share.

    See `retrograd.linalg.low_rank`.
    """
    leaves = vectors.leaves()
    basis, mixing, lost = compress_rows(flatten(leaves.values(), batched=True), rank)
    like = {name: leaf[0] for name, leaf in leaves.items()}
    directions = TrainingState.from_tensors(unflatten(basis, like), 0)
    return StateVectors(directions.params, directions.slots, directions.buffers), mixing, lost
