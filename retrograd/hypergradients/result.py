"""A hypergradient: the derivative of an outcome by what went into training, and what is known of its worth."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError
from retrograd.params import Params

Direction = Mapping[str, Tensor | Params]
"""A change of inputs: name → a tensor (or Params) shaped like the derivative of one question."""

SETTLED = 0.1  # a run that would still move by so much of its way is not at a fixed point
SOLVED = 0.1  # relative residual above which a solver's answer is another system's


@dataclass(frozen=True)
class Hypergradient:
    """d outcome / d input, for each input that was asked for.

    Attributes:
        values: name → derivative, the axis ``query`` first: ``example_weights`` [query, example]; hyperparameters and
            ``clip_norm`` [query, group], or [query, step, group] if asked per step; ``inputs`` and ``labels``
            [query, example, …]; ``meta`` and ``initial_params`` Params whose leaves have the axis in front.
        outcome: the outcome at the end of the run, [query].
        method: what it was computed by.
        notes: what is known about it: ``exact``, ``drift``, ``solver_residual``, ``steps`` of a truncated one, ….
    """

    values: dict[str, Tensor | Params]
    outcome: Float[Tensor, " query"]
    method: str
    notes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Return the derivative by one input."""
        if name not in self.values:
            raise InputError(f"there is no derivative by {name!r} here. There is: {sorted(self.values)}.")
        return self.values[name]

    def along(self, direction: Direction) -> Float[Tensor, " query"]:
        """Return the derivative along a change of inputs, in units of the outcome for the whole of the change."""
        total = torch.zeros(len(self.outcome), dtype=torch.float64)
        for name, change in direction.items():
            leaves, moves = _leaves(self[name]), _leaves(change)
            wanted = {key: tuple(leaf.shape[1:]) for key, leaf in leaves.items()}
            given = {key: tuple(leaf.shape) for key, leaf in moves.items()}
            if given != wanted:
                raise InputError(f"a change of {name} has the shape {wanted.get('', wanted)}, got {given.get('', given)}.")
            for key, leaf in leaves.items():
                total += _rows(leaf) @ moves[key].double().cpu().flatten()
        return total

    def vector(self, *names: str) -> Float[Tensor, "query number"]:
        """Return the derivatives by the named inputs (all if none is named) as one vector for each question."""
        leaves = [leaf for name in names or self.values for leaf in _leaves(self[name]).values()]
        return torch.cat([_rows(leaf) for leaf in leaves], dim=1)

    def cosine(self, other: "Hypergradient", *names: str) -> Float[Tensor, " query"]:
        """Return the cosine to another hypergradient by the same inputs: the agreement of two methods."""
        return torch.cosine_similarity(self.vector(*names), other.vector(*names), dim=1)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why this hypergradient may not be what retraining would show, as far as is known without retraining."""
        found = []
        if self.notes.get("steps") is not None:
            found.append(
                f"only the last {self.notes['steps']} of {self.notes['of_steps']} steps are differentiated through: what an "
                "input did before is left out (for learning rates nearly all of the effect)"
            )
        if self.notes.get("drift", 0.0) > SETTLED:
            found.append(
                f"the run has not settled: at its present pace it would move {self.notes['drift']:.2g} of its way again, so "
                "there is no fixed point here to differentiate"
            )
        if self.notes.get("solver_residual", 0.0) > SOLVED:
            found.append(f"the solver left {self.notes['solver_residual']:.0%} of the right-hand side unsolved")
        return tuple(found)


def _leaves(value: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"": value} if isinstance(value, Tensor) else value


def _rows(leaf: Tensor) -> Tensor:
    return leaf.double().cpu().reshape(len(leaf), -1)
