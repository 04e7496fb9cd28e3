"""Eigenvalues of one step of training or of a game: how fast it contracts, and what turns.

    A v = λ v,        A = ∂F_t/∂s at s_t,        residual = ‖A v − λ v‖ / ‖v‖

λ          complex: |λ| is the growth of v in one step, arg λ the angle it turns by; at a fixed point |λ| < 1 for all λ is
           local convergence, at the rate max |λ|;
A          of momentum and Adam it includes the slots, so it is not symmetric even where the Hessian is.

Up to `DENSE` dimensions A is formed, by pushing all unit vectors. Beyond, a Krylov space of ``krylov`` vectors is built, all
but the wanted part of it is dropped, and it is built up again from there, until residuals are below ``tolerance``:

    A Vᵀ = Vᵀ H + v bᵀ  →  H Q = Q S,  V ← Qᵀ V,  H ← S,  b ← Qᵀ b        Q: orthonormal basis of the wanted eigenvectors of H

which is Krylov-Schur, with an orthonormalised basis in the place of Schur's. For symmetric A that is thick-restart Lanczos.

Assumptions: A is real. Eigenvalues at the edge of the spectrum converge first. For a matrix far from normal the residual bounds
how far A must be moved for λ to be exact, not how far λ is off. Of a repeated eigenvalue one start vector sees one eigenvector.
Cost: dense dim pushes and dim³ operations; else ``krylov`` pushes, then ``krylov − count`` a restart; memory krylov · dim.

References: Saad (2011), "Numerical methods for large eigenvalue problems", chapters 6 and 7; Stewart (2002), "A Krylov-Schur
algorithm for large eigenproblems"; Wu and Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from retrograd.dynamics.flow import Flow, jacobian, start_of
from retrograd.errors import InputError
from retrograd.linalg.orthonormal import ROUNDING, finite_norms, normalise, remove
from retrograd.progress import track

DENSE = 2000
"""Up to so many dimensions the matrix is formed."""

Which = Literal["LM", "LR", "all"]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one step.

    Attributes:
        values: λ, the wanted ones first; of a complex pair the one with the positive imaginary part comes first.
        residuals: ‖A v − λ v‖ of the unit eigenvectors.
        vectors: unit eigenvectors as rows, or None where they were not asked for.
        dense: whether the matrix was formed.
        products: how many tangents were pushed.
    """

    values: Complex[Tensor, " count"]
    residuals: Float[Tensor, " count"]
    vectors: Complex[Tensor, "count dim"] | None
    dense: bool
    products: int

    @property
    def radius(self) -> float:
        """Largest modulus of the values found: that of all eigenvalues, for which="LM" or "all"."""
        return self.values.abs().max().item()

    def __str__(self) -> str:
        """Say how many, the largest, and how well it is known."""
        worst = self.residuals.max().item()
        return f"{len(self.values)} eigenvalues, largest modulus {self.radius:.6g}, residuals up to {worst:.1e}"


def spectrum(
    flow: Flow,
    state: Float[Tensor, " dim"] | None = None,
    count: int | None = None,
    which: Which = "LM",
    *,
    step: int = 0,
    symmetric: bool = False,
    vectors: bool = False,
    dense: bool | None = None,
    krylov: int | None = None,
    restarts: int = 50,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Spectrum:
    """Return eigenvalues of A_t = ∂F_t/∂s.

    Args:
        flow: the maps; see `flow_of`.
        state: s_t, ``[dim]``; None for the recorded one.
        count: how many eigenvalues; None for all (dense only) or 6.
        which: ``"LM"``: of largest modulus first; ``"LR"``: of largest real part first; ``"all"``: all, by modulus.
        step: t.
        symmetric: A is symmetric, as for gradient descent without momentum on one loss.
        vectors: whether to return eigenvectors, too.
        dense: whether to form the matrix; None: up to `DENSE` dimensions.
        krylov: dimension of the Krylov space; None: 2 · count + 20 or more.
        restarts: how often it is built up again at most.
        tolerance: the residual to reach, relative to the largest modulus. Where it is not reached, ``residuals`` say so.
        seed: seed of the start vector.

    Raises:
        InputError: a number is out of range, or all eigenvalues are asked for without forming the matrix.
        NonFinite: a product with A is not finite.

    Of a rotation by a right angle that grows by 2 in each step:

    >>> from retrograd.dynamics import FunctionFlow
    >>> turn = FunctionFlow(lambda state: torch.stack([-2 * state[1], 2 * state[0]]), dim=2)
    >>> spectrum(turn, torch.zeros(2)).values.imag.round(decimals=6).tolist()
    [2.0, -2.0]
    """
    state = start_of(flow, state, step).detach()
    dense = flow.dim <= DENSE if dense is None else dense
    if which not in ("LM", "LR", "all"):
        raise InputError(f'which must be "LM", "LR" or "all", got {which!r}.')
    everything = which == "all" or (count is None and dense)
    if everything and not dense:
        raise InputError(f"all {flow.dim} eigenvalues need the matrix: pass dense=True, or a count and which='LM' or 'LR'.")
    count = flow.dim if everything else 6 if count is None else count
    if not 1 <= count <= flow.dim:
        raise InputError(f"count must be between 1 and {flow.dim}, the length of a state, got {count}.")
    if dense:
        matrix = jacobian(flow, step, state).double()
        if symmetric:
            matrix = (matrix + matrix.T) / 2
        values, columns = _eigenpairs(matrix, which, symmetric)
        values, found = values[:count], columns.T[:count]
        residuals = torch.linalg.vector_norm(found @ matrix.T.to(found) - values[:, None] * found, dim=1)
        return Spectrum(values, residuals, found if vectors else None, True, flow.dim)

    counted = [0]

    def multiply(rows: Tensor) -> Tensor:
        counted[0] += len(rows)
        return flow.push(step, state, rows)[1]

    size = min(flow.dim, max(2 * count + 20, count + 3) if krylov is None else krylov)
    if size < min(count + 3, flow.dim):
        raise InputError(f"krylov must be at least count + 3 = {count + 3}, got {krylov}.")
    start = torch.randn(flow.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, found = _restarted(multiply, start.to(state.device), count, size, which, symmetric, restarts, tolerance)
    products = [multiply(part.to(start).to(state.device)) for part in (found.real, found.imag)]
    residuals = torch.linalg.vector_norm(torch.complex(*products) - values[:, None] * found, dim=1)
    return Spectrum(values.cpu(), residuals.cpu(), found if vectors else None, False, counted[0])


def _restarted(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    size: int,
    which: Which,
    symmetric: bool,
    restarts: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Return ``count`` values and unit vectors, from Krylov spaces of at most ``size`` vectors."""
    basis, matrix = start.new_zeros(size + 1, len(start)), start.new_zeros(size + 1, size)
    basis[0] = normalise(start[None])[0][0]
    first, values, columns, length = 0, torch.empty(0), torch.empty(0), size
    for _ in track(range(restarts + 1), "Krylov-Schur"):
        length, exhausted = _expand(multiply, basis, matrix, first)
        small = matrix[:length, :length]
        values, columns = _eigenpairs((small + small.T) / 2 if symmetric else small, which, symmetric)
        wanted = min(count, length)
        # The last row of H says how far each vector is from being an eigenvector of A.
        rest = torch.linalg.vector_norm(matrix[length : length + 1, :length].to(columns) @ columns[:, :wanted], dim=0)
        if exhausted or bool((rest <= tolerance * values.abs().max()).all()):
            break
        # A few more than wanted, as the last of those would else converge slowly; and no pair is cut in two.
        keep = min(count + min(count, (size - count) // 2), size - 2)
        keep += bool(values[keep - 1].imag > 0) and not symmetric
        kept = columns[:, :keep]
        both = torch.cat([kept.real, kept.imag], dim=1) if kept.is_complex() else kept
        left, lengths, _ = torch.linalg.svd(both, full_matrices=False)
        rotation = left[:, :keep] if int((lengths > ROUNDING * torch.finfo(lengths.dtype).eps).sum()) >= keep else left
        first = rotation.shape[1]
        square, last = rotation.T @ small @ rotation, matrix[length, :length] @ rotation
        basis[:first], basis[first] = rotation.T @ basis[:length], basis[length].clone()
        matrix.zero_()
        matrix[:first, :first], matrix[first, :first] = square, last
    wide = torch.complex128
    found = columns[:, : min(count, length)].T.to(wide) @ basis[:length].to(wide)
    return values[: len(found)].to(wide), found / torch.linalg.vector_norm(found, dim=1)[:, None]


def _expand(multiply: Callable[[Tensor], Tensor], basis: Tensor, matrix: Tensor, first: int) -> tuple[int, bool]:
    """Continue A Vᵀ = Vᵀ H from ``first`` vectors to as many as fit; return how many, and whether the space is exhausted."""
    size = matrix.shape[1]
    small = ROUNDING * torch.finfo(basis.dtype).eps
    for step in range(first, size):
        rest, removed = remove(basis[None, : step + 1], multiply(basis[step : step + 1]))
        matrix[: step + 1, step] = removed[0]
        length = finite_norms(rest)[0]
        if step + 1 == basis.shape[1] or length <= small * matrix.abs().max():
            return step + 1, True
        matrix[step + 1, step] = length
        basis[step + 1] = rest[0] / length
    return size, False


def _eigenpairs(matrix: Tensor, which: Which, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues in the order of ``which``, and their unit vectors as columns."""
    values, columns = torch.linalg.eigh(matrix.cpu()) if symmetric else torch.linalg.eig(matrix.cpu())
    values, columns = values.to(torch.complex128), columns.to(torch.complex128)
    key = values.real if which == "LR" else values.abs()
    order = torch.argsort(key, descending=True, stable=True)
    return values[order].to(matrix.device), columns[:, order].to(matrix.device)


__all__ = ["Spectrum", "spectrum"]
