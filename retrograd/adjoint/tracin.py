"""TracIn: every step's effect is taken to stay as it was made (Pruthi et al. 2020).

With A_t := I, and ∇f taken anew at each of C checkpoints θ_c, example i's score is

    d f / d w_i ≈ − Σ_c  Σ_{t ∈ window c, i ∈ batch t}  ⟨s_t ∘ ∇f(θ_c), ∇ℓ_i(θ_c)⟩ / B_t

θ_c        the parameters at checkpoint c; its window is the stretch of the run that is nearest to it;
s_t        the step size −dθ/dg of the update rule, momentum summed up: η/(1−μ) for SGD, η/(√v̂ + ε) a coordinate for Adam;
B_t        the number of examples in batch t.

This is the published TracInCP with its learning rates, number of visits and batch size filled in, so that scores have the
same sign and unit as the exact ones (TracIn itself has the opposite sign: its proponents lower the loss). One checkpoint at
the end gives gradient dot products; ``cosine=True`` divides by both gradients' norms and loses the unit.

With ``projection=d`` the product is ⟨G (s_t ∘ ∇f), G ∇ℓ_i⟩ with a random G [d, P], E[GᵀG] = I (TracInRP): right on average,
with a standard deviation of about ‖s_t ∘ ∇f‖ ‖∇ℓ_i‖ / √d. The engine takes whole gradients, so the query's vector becomes
GᵀG (s_t ∘ ∇f); one G serves all checkpoints. With ``layers`` only the gradients by some parameters count, as the paper does for
large models (their last layer); what the others would have said is lost, and the notes say how much was looked at.

Assumptions: nothing that one step does is amplified or undone by later ones. Good early in training, poor near
convergence, where curvature undoes most of each step. Losses are evaluated in evaluation mode. Cost: C passes over the
training data for each query, and no replay beyond the C states.

References: Pruthi, Liu, Sundararajan, Kale (2020), "Estimating training data influence by tracing gradient descent",
section 3; Charpiat et al. (2019), "Input similarity from the neural network perspective" (cosine).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import Probe, ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.errors import InputError
from retrograd.linalg import Projection
from retrograd.params import Params, count, flatten, unflatten
from retrograd.trajectory import Run, TrainingState


@dataclass(frozen=True)
class TracIn:
    """TracIn over checkpoints of the run.

    Args:
        checkpoints: a number of checkpoints in the middles of equal stretches of the run, or the steps themselves.
        cosine: divide each product by the norms of both gradients (scores then have no unit); the norms are never projected.
        projection: d, how many random numbers stand for a gradient; none if not given, or from the number of parameters on.
        layers: names of the modules and parameters whose gradients count; all if not given. A module stands for all
            parameters in it, and ``*``, ``?`` and ``[…]`` are those of a shell: ``"head"``, ``"blocks.1?.mlp"``, ``"*.bias"``.
        seed: of the projection.
    """

    checkpoints: int | Sequence[int] = 6
    cosine: bool = False
    projection: int | None = None
    layers: Sequence[str] | None = None
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{pruthi2020tracin,
  title = {Estimating Training Data Influence by Tracing Gradient Descent},
  author = {Pruthi, Garima and Liu, Frederick and Sundararajan, Mukund and Kale, Satyen},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2020}
}"""

    def __post_init__(self):
        if self.projection is not None and self.projection < 1:
            raise InputError(f"projection is a number of dimensions, at least 1, got {self.projection}.")
        if isinstance(self.layers, str) or (self.layers is not None and not self.layers):
            raise InputError(f"layers is a list of names, such as ['head'], got {self.layers!r}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of a batch of training examples at a checkpoint."""
        steps = self.steps(run)
        engine.notes.add(checkpoints=", ".join(map(str, steps)), exact=False)
        if self.layers is not None:
            params = run.state(0).params
            names = self.names(run)
            covered = count({name: params[name] for name in names})
            text = f"covers {covered:,} of {count(params):,} trained parameters: {', '.join(names)}"
            engine.notes.add(parameters_covered=covered, coverage=text)
        yield from engine.contract(run, self._probes(run, queries, steps), len(steps))

    def steps(self, run: Run) -> list[int]:
        """Return the checkpoints' steps in ``run``."""
        if isinstance(self.checkpoints, int):
            if not 1 <= self.checkpoints <= max(len(run), 1):
                raise InputError(f"checkpoints must be between 1 and the number of steps, {len(run)}, got {self.checkpoints}.")
            return run.spread(self.checkpoints)
        return sorted(self.checkpoints)

    def names(self, run: Run) -> tuple[str, ...]:
        """Return the parameters of ``run`` whose gradients count, in the order of the model.

        Raises:
            InputError: one of ``layers`` matches no trained parameter.
        """
        trained = tuple(run.state(0).params)
        if self.layers is None:
            return trained
        model = run.update_map.model
        owner = {id(leaf): name for name, leaf in model.named_parameters()}
        aliases = {name: owner[id(leaf)] for name, leaf in model.named_parameters(remove_duplicate=False)}  # tied weights
        chosen = set()
        for pattern in self.layers:
            found = {aliases[name] for name in aliases if any(fnmatchcase(part, pattern) for part in _parts(name))}
            if not found & set(trained):
                modules = sorted({part for name in aliases if aliases[name] in trained for part in _parts(name)})
                raise InputError(f"layers={pattern!r} matches no trained parameter. There are: {', '.join(modules)}.")
            chosen |= found
        return tuple(name for name in trained if name in chosen)

    def _probes(self, run: Run, queries: Queries, steps: list[int]) -> Iterator[Probe]:
        exposure = torch.ones(len(steps), len(run.examples)) if self.cosine else run.exposure(steps)
        names, projection = self.names(run), None
        for step, own in zip(steps, exposure, strict=True):
            state = run.state(step)
            gradients = queries.gradients(run, state).params
            vectors = self._preconditioned(run, state, {name: gradients[name] for name in names})
            if self.projection is not None:
                like = {name: state.params[name] for name in names}
                projection = projection or Projection(count(like), self.projection, self.seed)
                vectors = unflatten(projection.up(projection.down(flatten(vectors.values(), batched=True))), like)
            yield Probe((state,), vectors, own, self.cosine)

    def _preconditioned(self, run: Run, state: TrainingState, gradients: Params) -> Params:
        """Multiply the queries' gradients by the step size per unit of learning rate."""
        if self.cosine:
            norms = flatten(gradients.values(), batched=True).norm(dim=1)
            return {name: leaf / norms.view(-1, *[1] * (leaf.dim() - 1)) for name, leaf in gradients.items()}
        return {name: leaf * run.step_size(state, name) for name, leaf in gradients.items()}


def _parts(name: str) -> list[str]:
    """A parameter's name and those of the modules it is in."""
    words = name.split(".")
    return [".".join(words[:length]) for length in range(1, len(words) + 1)]
