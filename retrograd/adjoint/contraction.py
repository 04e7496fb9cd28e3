"""The contraction engine of approximate adjoints: costates at checkpoints × gradients of the training examples there.

    part[q, i] = −exposure_i · ⟨v_q, ḡ_i⟩,    ḡ_i = mean over some checkpoints c of ∇ℓ_i(θ_c)

v_q         one vector for each query, of the shape of the parameters (a `Probe` brings it with its checkpoints);
θ_c         the parameters at checkpoint c; losses are taken in evaluation mode;
exposure    how much of example i went in around these checkpoints.

A method says *what*: which vectors at which checkpoints. The engine knows *how*: one pass over the examples per checkpoint for
all queries, in batches that keep within a bound of memory; with every parameter covered, because the gradients are those of
the loss itself; on a few directions instead of all queries (``rank``); token by token (``tokens``, by forward-mode derivatives
of the losses of tokens along v_q); and in part files that are not made twice (``folder``).

Cost: a pass over the examples a checkpoint, and a matrix product [query, P] × [P, example] a probe. Memory: see
`Engine.batch_size`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from retrograd.adjoint.part_files import read_part, write_part
from retrograd.adjoint.parts import Notes, Probe, ScorePart
from retrograd.errors import InputError, NonFinite
from retrograd.linalg.low_rank import compress
from retrograd.params import Params, flatten, unflatten
from retrograd.progress import track
from retrograd.task import BoundModel, TokenTask
from retrograd.trajectory import Run, TrainingState
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.modes import evaluation_mode
from retrograd.trajectory.per_example import loss_gradients
from retrograd.trajectory.trajectory import to_device

Made = TypeVar("Made")
MEMORY = 4 << 30
_LARGEST_BATCH = 1024  # beyond it a pass over a small model is no faster
_COPIES = 4  # of [query, P]: gradients, what a curvature makes of them, the matrix of all leaves, and what it came from
_TANGENTS = 8  # queries whose forward-mode derivatives are taken together


@dataclass
class Engine:
    """How costates are contracted, and what a method has to say about how it went.

    Args:
        memory: bytes that vectors and gradients may take, beside the model's own activations.
        rank: contract so many directions of each checkpoint's vectors, not all of them; exact from the number of queries on.
        tokens: split each example's score over its positions; the task must have ``token_losses``.
        folder: where finished parts are kept and looked for.
        prefix: of the names of parts.
        reuse: keep fitted operators, for further slices of queries.
        notes: stored with the scores.
    """

    memory: int = MEMORY
    rank: int | None = None
    tokens: bool = False
    folder: Path | None = None
    prefix: str = "part"
    reuse: bool = True
    notes: Notes = field(default_factory=Notes)
    _made: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.memory < 1:
            raise InputError(f"memory is a number of bytes, got {self.memory}.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank is a number of directions, at least 1, got {self.rank}.")

    def under(self, name: str) -> "Engine":
        """Return this engine with ``name`` added to the names of its parts."""
        return replace(self, prefix=f"{self.prefix}-{name}")

    # ------------------------------------------------------------------ what fits

    def query_batch(self, run: Run) -> int:
        """Return how many queries half of the memory can carry: four vectors each, and one more for each optimizer slot."""
        each = _bytes(run.state(0).params) * (_COPIES + len(run.update_map.rule.slots))
        return max(1, self.memory // 2 // each)

    def batch_size(self, probe: Probe) -> int:
        """Return how many examples' gradients fit into what the probe's vectors leave of the memory.

        Each has a flat copy, and one more where several checkpoints are averaged.
        """
        queries = len(next(iter(probe.vectors.values())))
        each = _bytes(probe.vectors) // max(queries, 1)
        left, copies = self.memory - _COPIES * each * queries, 2 if len(probe.states) == 1 else 3
        if left < copies * each:
            raise InputError(
                f"memory={self.memory} holds not even one example's gradient beside the vectors of {queries} queries, "
                f"{each} bytes each. Give more memory, or a smaller query_batch."
            )
        return min(left // (copies * each), _LARGEST_BATCH)

    # ------------------------------------------------------------------ what methods call

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """Make an operator or whatever else, or return what was made under this key before: slices of queries share it."""
        if not self.reuse:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def contract(self, run: Run, probes: Iterable[Probe], total: int) -> Iterator[ScorePart]:
        """Yield the scores of a batch of training examples at a checkpoint, for one probe after the other.

        Args:
            run: gives model, task and examples.
            probes: costates at checkpoints.
            total: how many there are.
        """
        for number, probe in enumerate(probes):
            ids = run.examples.ids[probe.exposure > 0]
            batches = ids.split(self.batch_size(probe)) if len(ids) else ()
            products = self._products(run, probe)
            for place, own in enumerate(track(batches, f"training data, pass {number + 1} of {total}")):
                file = None if self.folder is None else self.folder / f"{self.prefix}-{number:04d}-{place:06d}.parquet"
                part = None if file is None else read_part(file, own)
                if part is None:
                    exposure = probe.exposure[run.examples.rows(own)]
                    part = products(own, exposure)
                    if not torch.isfinite(part.values).all():
                        bad = int(own[int(torch.isfinite(part.values).all(0).logical_not().nonzero()[0])])
                        raise NonFinite(f"the score of example {bad} at step {probe.states[-1].step} is not finite.")
                    if file is not None:
                        write_part(file, part)
                yield part

    # ------------------------------------------------------------------ inside

    def _products(self, run: Run, probe: Probe) -> Callable[[Tensor, Tensor], ScorePart]:
        """Return the function from (ids, exposure) to their part."""
        point = {name: leaf for name, leaf in probe.states[0].params.items() if name in probe.vectors}
        vectors = {name: probe.vectors[name] for name in point}
        mixing = None
        if self.rank is not None:
            basis, mixing, lost = compress(flatten(vectors.values(), batched=True), self.rank)
            vectors = unflatten(basis, point)
            self.notes.add(rank=self.rank, energy_lost=max(lost, self.notes.entries.get("energy_lost", 0.0)))
        if self.tokens:
            return _TokenProducts(run, probe.states, vectors, mixing)
        matrix = flatten(vectors.values(), batched=True)

        def products(ids: Tensor, exposure: Tensor) -> ScorePart:
            batch = to_device(run.examples.batch(ids), matrix.device)
            at = lambda state: loss_gradients(run.update_map, state, batch, len(ids), tuple(vectors))  # noqa: E731
            gradients = flatten(at(probe.states[0]).values(), batched=True)
            for state in probe.states[1:]:
                gradients += flatten(at(state).values(), batched=True)
            gradients /= len(probe.states)
            if probe.cosine:
                gradients = gradients / gradients.norm(dim=1, keepdim=True)
            values = matrix @ gradients.T
            values = values if mixing is None else mixing @ values
            return ScorePart(ids, -exposure.to(values) * values)

        return products


@dataclass(frozen=True)
class _TokenProducts:
    """−exposure_i · ⟨v_q, ∇ℓ_it⟩ for every position t: the derivative of the tokens' losses along v_q."""

    run: Run
    states: tuple[TrainingState, ...]
    vectors: Params
    mixing: Tensor | None

    def __call__(self, ids: Tensor, exposure: Tensor) -> ScorePart:
        update_map = self.run.update_map
        task = update_map.task
        if not isinstance(task, TokenTask):
            raise InputError(
                f"{type(task).__name__} has no token_losses(model, batch), which scores by token need: the loss of each "
                "position, [batch, position], whose sum over positions is the example's loss (see retrograd.task.TokenTask)."
            )
        batch = to_device(self.run.examples.batch(ids), next(iter(self.vectors.values())).device)
        values = torch.stack([self._along(task, state, batch) for state in self.states]).mean(0)
        values = values if self.mixing is None else torch.einsum("qr,rit->qit", self.mixing, values)
        values = -exposure.to(values)[:, None] * values
        return ScorePart(ids, values.sum(2), values)

    def _along(self, task: TokenTask, state: TrainingState, batch: Any) -> Tensor:
        """⟨v_q, ∇ℓ_it⟩ at one state, ``[query, example, position]``."""
        update_map = self.run.update_map
        bound, point = BoundModel(update_map.model), {name: state.params[name] for name in self.vectors}

        def losses(params: Params) -> Tensor:
            return bound(task.token_losses, {**state.params, **params, **state.buffers}, batch)

        with evaluation_mode(update_map.model), twice_differentiable(own_functions=False):
            with torch.no_grad():
                found, whole = losses(point), update_map.losses(state, batch)
                if found.dim() != 2 or not torch.allclose(found.sum(1), whole, rtol=1e-4, atol=1e-6):
                    raise InputError(
                        f"{type(task).__name__}.token_losses must give [batch, position] with the sum over positions equal "
                        f"to losses; got shape {tuple(found.shape)}, sums {found.flatten(1).sum(1)[:3].tolist()} for losses "
                        f"{whole[:3].tolist()}."
                    )
            along = lambda vector: torch.func.jvp(losses, (point,), (vector,))[1]  # noqa: E731
            return torch.func.vmap(along, chunk_size=_TANGENTS)(self.vectors)


def _bytes(params: Params) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in params.values())
