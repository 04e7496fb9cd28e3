"""What a curvature is to everything above it: an operator G of which functions can be applied to vectors.

    G = ⊕_b Q_b diag(σ_b) Q_bᵀ        f(G) v = ⊕_b Q_b (f(σ_b) ∘ Q_bᵀ v_b)

b          a block of parameters: a layer's weight and bias, or one parameter alone;
Q_b, σ_b   its eigenvectors and eigenvalues: Q_S ⊗ Q_A and a matrix [out, in] for a Kronecker block, I for a diagonal one.

f(σ) = 1/(σ + ρ) gives influence functions, f(σ) = exp(−cσ) a stretch of training. G has no unit besides that of the loss
over parameters squared: it is the *mean* over examples of the Gauss-Newton matrix of ℓ_i, whatever the batch size was.

With ``scale`` s a curvature is that of parameters measured in units of s: diag(s) G diag(s), which is what an optimizer with a
preconditioner s² sees.

Assumptions: no curvature between blocks. Cost of applying a Kronecker block of [out, in]: 4 · out · in · (out + in)
multiplications a vector; of a diagonal one, one an entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrograd.errors import InputError
from retrograd.params import Params
from retrograd.trajectory import Run, TrainingState

Function = Callable[[Tensor, float], Tensor]
"""Maps eigenvalues (float64, of any shape) and the mean eigenvalue of their block to f of the eigenvalues, one by one."""


@runtime_checkable
class Operator(Protocol):
    """A symmetric positive semidefinite operator G on the trained parameters, of which functions can be applied."""

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return f(G) v for vectors with a leading axis ``query`` on every leaf; f is called once a block."""
        ...


@runtime_checkable
class Curvature(Protocol):
    """A way to approximate the mean Gauss-Newton matrix of the examples' losses, made of hyperparameters alone."""

    def fit(
        self,
        run: Run,
        states: Sequence[TrainingState],
        *,
        seed: int = 0,
        ids: Int[Tensor, " example"] | None = None,
        scale: Params | None = None,
    ) -> Operator:
        """Average over several states: factors averaged, a shared eigenbasis, eigenvalues averaged in that basis.

        Args:
            run: gives model, task and examples.
            states: where; each weighs the same.
            seed: of whatever is drawn.
            ids: the examples to average over; all if not given.
            scale: s, shaped like the parameters; the operator is that of diag(s) G diag(s).
        """
        ...


@dataclass(frozen=True)
class KroneckerBlock:
    """A layer's weight [out, in] and bias, whose curvature is diagonal in the basis Q_S ⊗ Q_A.

    Attributes:
        weight: the weight's name.
        bias: the bias's name, or None; it is the last column of the homogeneous weight [out, in + 1].
        out_basis: Q_S, an eigenvector a column.
        in_basis: Q_A, an eigenvector a column.
        eigenvalues: σ, float64.
    """

    weight: str
    bias: str | None
    out_basis: Float[Tensor, "out out"]
    in_basis: Float[Tensor, "in in"]
    eigenvalues: Float[Tensor, "out in"]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the block."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return f(G) v of this block's parameters."""
        weight = vectors[self.weight]
        matrices = weight.flatten(2)
        if self.bias is not None:
            matrices = torch.cat([matrices, vectors[self.bias][..., None]], dim=2)
        values = _applied(function, self.eigenvalues).to(matrices)
        left, right = self.out_basis.to(matrices), self.in_basis.to(matrices)
        matrices = left @ (values * (left.T @ matrices @ right)) @ right.T
        if self.bias is None:
            return {self.weight: matrices.view_as(weight)}
        return {self.weight: matrices[..., :-1].reshape(weight.shape), self.bias: matrices[..., -1]}


@dataclass(frozen=True)
class DiagonalBlock:
    """One parameter of any shape, whose curvature is diagonal as it is.

    Attributes:
        name: the parameter's name.
        eigenvalues: the diagonal in the parameter's shape, float64.
    """

    name: str
    eigenvalues: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the block."""
        return (self.name,)

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return f(G) v of this block's parameter."""
        return {self.name: vectors[self.name] * _applied(function, self.eigenvalues).to(vectors[self.name])}


@dataclass(frozen=True)
class BlockOperator:
    """An operator made of blocks that together hold every trained parameter once."""

    blocks: tuple[KroneckerBlock | DiagonalBlock, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of all blocks."""
        return tuple(name for block in self.blocks for name in block.names)

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return f(G) v for vectors with a leading axis ``query`` on every leaf; see `Operator.apply`."""
        check_names(vectors, self.names)
        found: Params = {}
        for block in self.blocks:
            found |= block.apply(function, vectors)
        return {name: found[name] for name in vectors}


def _applied(function: Function, eigenvalues: Tensor) -> Tensor:
    return function(eigenvalues, eigenvalues.mean().item())


def check_names(vectors: Params, names: Sequence[str]) -> None:
    """Refuse vectors that do not have exactly the parameters ``names``."""
    if vectors.keys() != set(names):
        raise InputError(
            f"vectors lack {sorted(set(names) - vectors.keys())} and have {sorted(vectors.keys() - set(names))} too many. "
            "They must have one leaf for each trained parameter, with a leading axis of queries."
        )
