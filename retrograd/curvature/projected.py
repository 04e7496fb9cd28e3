"""A Gauss-Newton matrix of randomly projected gradients: small and dense, whatever the layers are.

    K = (1/M) Σ_n (G g_n)(G g_n)ᵀ  [d, d]        f(K) in place of f of the whole matrix:  v ↦ Gᵀ f(K) G v

G          a random projection [d, P] with E[GᵀG] = I (see `retrograd.linalg.projection`); the identity from d = P on;
g_n        gradient of an example, of what ``gradients`` says:
           ``"sampled"``        the loss with a target drawn from the model: the Gauss-Newton matrix of losses −log p;
           ``"losses"``         the loss itself: the empirical Fisher matrix;
           ``"measurements"``   the measurement: Φᵀ Φ / N of TRAK, a Gauss-Newton matrix whose weights p(1 − p) are left out;
M          examples × samples × states.

Assumptions: gradients keep their inner products when projected, whose error falls as 1/√d, and M is well above d, or K is
singular. It is made for inverses (`Implicit`, `TRAK`). For d < P, f = 1 gives GᵀG v, which is v on average only: functions that
leave directions without curvature as they are, like SOURCE's exponentials, become noisy. Cost: a gradient for every example,
M · d · (P + d) multiplications. Memory: P gradients' slices and d².

References: Park, Georgiev, Ilyas, Leclerc, Mądry (2023), "TRAK: attributing model behavior at scale", section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.curvature.operator import Function, check_names
from retrograd.curvature.pseudo_gradients import PseudoBatches, chosen, device_of, per_example_gradients
from retrograd.errors import InputError
from retrograd.linalg import Projection
from retrograd.params import Params, count, flatten, map_params, unflatten
from retrograd.progress import track
from retrograd.trajectory import Run, TrainingState, UpdateMap
from retrograd.trajectory.per_example import per_example
from retrograd.trajectory.trajectory import to_device


@dataclass(frozen=True)
class ProjectedGaussNewton:
    """Gauss-Newton matrix of randomly projected gradients.

    Args:
        dimension: d, how many numbers stand for a gradient.
        gradients: what is differentiated: ``"sampled"`` losses, the ``"losses"`` themselves, or the ``"measurements"``.
        batch_size: examples taken together; the result does not depend on it.
        samples: how often targets are drawn for each example, where they are.
        examples: which training examples to average over: so many at random, those with these ids, or all.
    """

    dimension: int = 512
    gradients: Literal["sampled", "losses", "measurements"] = "sampled"
    batch_size: int = 64
    samples: int = 1
    examples: int | Sequence[int] | None = None

    def __post_init__(self):
        if self.dimension < 1 or self.batch_size < 1:
            raise InputError(f"dimension and batch_size are at least 1, got {self.dimension} and {self.batch_size}.")
        if self.gradients not in ("sampled", "losses", "measurements"):
            raise InputError(f"gradients must be 'sampled', 'losses' or 'measurements', got {self.gradients!r}.")

    def fit(
        self,
        run: Run,
        states: Sequence[TrainingState],
        *,
        seed: int = 0,
        ids: Tensor | None = None,
        scale: Params | None = None,
    ) -> "ProjectedOperator":
        """Return K, averaged over ``states``; the projection has the same ``seed`` as the targets.

        Raises:
            InputError: targets are to be drawn, and the task cannot.
        """
        ids = chosen(run.examples, self.examples, seed, ids)
        like = {name: states[0].params[name] for name in run.update_map.names}
        projection = Projection(count(like), self.dimension, seed)
        total, number = torch.zeros((), dtype=torch.float64), 0
        for gradients in self._gradients(run, states, seed, ids):
            scaled = gradients if scale is None else map_params(torch.mul, gradients, scale)
            rows = projection.down(flatten(scaled.values(), batched=True)).double()
            total, number = total.to(rows) + rows.T @ rows, number + len(rows)
        return ProjectedOperator.of(total / number, projection, like)

    def _gradients(self, run: Run, states: Sequence[TrainingState], seed: int, ids: Tensor) -> Iterator[Params]:
        names, update_map = run.update_map.names, run.update_map
        if self.gradients == "sampled":
            source = PseudoBatches(update_map, run.examples, ids, self.batch_size, self.samples, seed, states)
            for _, state, size, batch in source.over("curvature: projected gradients"):
                yield from per_example_gradients(update_map, state, batch, size, names)
            return
        work = [(state, own) for state in states for own in ids.split(self.batch_size)]
        for state, own in track(work, "curvature: projected gradients"):
            batch = to_device(run.examples.batch(own), device_of(state))
            if self.gradients == "measurements":
                yield measurement_gradients(update_map, state, batch, len(own), names)
            else:
                yield from per_example_gradients(update_map, state, batch, len(own), names)


@dataclass(frozen=True)
class ProjectedOperator:
    """Gᵀ (·) G around functions of a dense matrix.

    Attributes:
        eigenvalues: of K, ascending, none below 0, float64.
        eigenvectors: of K, one a column.
        projection: G.
        like: the parameters, for their names and shapes.
    """

    eigenvalues: Float[Tensor, " d"]
    eigenvectors: Float[Tensor, "d d"]
    projection: Projection
    like: Params = field(repr=False)

    @staticmethod
    def of(matrix: Float[Tensor, "d d"], projection: Projection, like: Params) -> "ProjectedOperator":
        """Decompose K."""
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        return ProjectedOperator(eigenvalues.clamp(min=0), eigenvectors, projection, like)

    def inside(self, function: Function, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return f(K) u of projected vectors, float64."""
        values = function(self.eigenvalues, self.eigenvalues.mean().item())
        return rows.double() @ self.eigenvectors * values @ self.eigenvectors.T

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return Gᵀ f(K) G v for vectors with a leading axis ``query`` on every leaf; see `Operator.apply`."""
        check_names(vectors, tuple(self.like))
        matrix = flatten((vectors[name] for name in self.like), batched=True)
        rows = self.inside(function, self.projection.down(matrix))
        found = unflatten(self.projection.up(rows.to(matrix)), self.like)
        return {name: found[name] for name in vectors}


def measurement_gradients(update_map: UpdateMap, state: TrainingState, batch: Any, size: int, names: Sequence[str]) -> Params:
    """Return ∇f_n of the task's measurement of every example of a batch, with respect to the parameters ``names``."""
    fixed = {name: leaf for name, leaf in state.params.items() if name not in names}

    def measured(params: Params, row: Any) -> Tensor:
        values = update_map.measurements(TrainingState({**fixed, **params}, state.slots, state.buffers, state.step), row)
        if values.shape != (1,):
            raise InputError(
                f"{type(update_map.task).__name__}.measurements gave shape {tuple(values.shape)} for one example. It must give "
                "one number per example, shape (1,)."
            )
        return values

    return per_example(measured, {name: state.params[name].detach() for name in names}, batch, size)[1]
