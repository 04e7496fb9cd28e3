"""Exact hypergradients of few numbers by forward mode: tangents run along with training, and nothing is stored.

    S_0 = 0,     S_{t+1} = A_t S_t + B_t,     d f / d z = ⟨∇f(s_T), S_T⟩            one column of S for each number z

z   learning rates, momentum, decay, clipping norm (one number a group, the same in every step), or few meta-parameters;
A_t, B_t   Jacobians of the update map by state and by z.

Assumptions: as for `Unrolled`; the loss has forward-mode derivatives. Cost: about 2 to 3 training steps for each number and
step, for all questions together, and one walk through the run; memory: as many states as there are numbers, whatever the length
of the run. So it is the method for a handful of numbers and a very long run.

Reference: Franceschi et al. (2017), "Forward and reverse gradient-based hyperparameter optimization", section 3.2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrograd.adjoint import Notes, Outcome, Queries
from retrograd.errors import InputError, NonFinite
from retrograd.params import Params, flatten, map_params, map_slots, unflatten
from retrograd.progress import track
from retrograd.trajectory import InputVectors, StateVectors, Trajectory

MOST = 64  # numbers: beyond, reverse mode costs less and no more memory


@dataclass(frozen=True)
class Forward:
    """Forward mode, for few numbers."""

    citation: ClassVar[str] = """@inproceedings{franceschi2017forward,
  title = {Forward and Reverse Gradient-Based Hyperparameter Optimization},
  author = {Franceschi, Luca and Donini, Michele and Frasconi, Paolo and Pontil, Massimiliano},
  booktitle = {International Conference on Machine Learning}, year = {2017}
}"""

    def derivatives(
        self, run: Trajectory, outcome: "Outcome | Queries", wrt: frozenset[str], notes: Notes
    ) -> dict[str, Tensor | Params]:
        """Return the derivatives by numbers that are the same in every step.

        Raises:
            InputError: ``wrt`` names per-example inputs, or more than 64 numbers.
        """
        update_map, groups = run.update_map, len(run.update_map.groups)
        meta = update_map.meta if "meta" in wrt else {}
        counts = {name: 1 if name == "clip_norm" else groups for name in sorted(wrt - {"meta"})}
        counts |= {"meta": sum(leaf.numel() for leaf in meta.values())} if meta else {}
        total = sum(counts.values())
        if total > MOST:
            raise InputError(
                f"forward mode carries one state for each number, and {total} numbers are asked for (at most {MOST}). "
                "Use Unrolled()."
            )
        notes.add(exact=True, tangents=total)
        final = run.final_state
        cotangents = outcome.gradients(run, final)
        start = run.state(0)
        some = next(iter(start.params.values()))
        tangents = StateVectors(
            map_params(lambda leaf: leaf.new_zeros(total, *leaf.shape), start.params),
            map_slots(lambda leaf: leaf.new_zeros(total, *leaf.shape), start.slots),
            {name: leaf.new_zeros(total, *leaf.shape[1:]) for name, leaf in cotangents.buffers.items()},
        )
        units = torch.eye(total, dtype=some.dtype, device=some.device).split(list(counts.values()), 1)
        columns = dict(zip(counts, units, strict=True))
        moves = InputVectors(
            {name: column for name, column in columns.items() if name != "meta"},
            unflatten(columns["meta"], meta) if meta else {},
        )
        state = start
        for step in track(range(len(run)), "running forward"):
            tangents = update_map.pushforward(state, run.inputs(step), tangents, input_tangents=moves)
            wrong = [name for name, leaf in tangents.leaves().items() if not torch.isfinite(leaf).all()]
            if wrong:
                raise NonFinite(f"the tangents became non-finite at step {step}, in {', '.join(wrong[:4])}.")
            state = run.advance(state, step)
        values = _products(cotangents, tangents)
        split = dict(zip(counts, values.split(list(counts.values()), dim=1), strict=True))
        return {name: unflatten(part, meta) if name == "meta" else part for name, part in split.items()}


def _products(cotangents: StateVectors, tangents: StateVectors) -> Tensor:
    """Inner products of all pairs, ``[query, tangent]``; leaves that either one lacks count as zero."""
    left, right = cotangents.leaves(), tangents.leaves()
    shared = [name for name in left if name in right]
    rows: list[Any] = [flatten([own[name] for name in shared], batched=True) for own in (left, right)]
    return rows[0] @ rows[1].T
