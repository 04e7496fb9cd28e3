"""Ridge Rider: from a saddle of one loss, follow directions of negative curvature to different minima.

    H(w_t) e = λ e,   e_t: the eigenvector with the largest |⟨e, e_{t−1}⟩|, its sign such that ⟨e_t, e_{t−1}⟩ > 0
    w_{t+1} = w_t + α e_t                     as long as λ < 0: the ride
    w_{t+1} = w_t − η ∇L(w_t)                 then: descent

w          parameters, a vector [dim];
H, λ       Hessian of the loss L, and its curvature along e;
α, η       length of a step of the ride, in units of w, and the learning rate of descent.

Every direction of negative curvature is ridden both ways. Where a ride ends there may be others that are still of negative
curvature: with ``depth`` above 1 they are ridden from there, which gives the tree.

This is the one-player special case of `generalised_ridge_rider`: J = I − ηH is symmetric, what separates neighbours at a saddle
are the eigenvectors of H with λ < 0, and they need not be climbed to.

Assumptions, and where it fails: the start is a saddle, or close to one. Eigenvectors are matched from step to step by their
overlap, which needs α small where curvatures cross. Descent is plain: if the end of a ride lies exactly on the ridge of another
direction, by symmetry, it ends in the saddle on that ridge, and this is archived as a solution; ride on with ``depth``.
In a game there is no single Hessian, and eigenvalues may be complex: use `generalised_ridge_rider`.
Cost: a step of a ride takes ``dim`` Hessian products up to `DENSE` dimensions, beyond that ``krylov``; memory dim² or
krylov · dim.

Reference: Parker-Holder et al. (2020), "Ridge Rider: finding diverse solutions by following eigenvectors of the Hessian",
arXiv 2011.06505.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.dynamics.branching import Archive, BranchTree, Same, within
from retrograd.errors import InputError, NonFinite
from retrograd.linalg.lanczos import eigenpairs

DENSE = 200
"""Up to so many dimensions the Hessian is formed."""

Loss = Callable[[Tensor], Tensor]


def ridge_rider(
    loss: Loss,
    saddle: Float[Tensor, " dim"],
    *,
    learning_rate: float,
    ride_length: float = 0.01,
    ride_steps: int = 1000,
    descent_steps: int = 1000,
    count: int = 1,
    depth: int = 1,
    same: Same | None = None,
    tolerance: float = 0.01,
    krylov: int = 40,
    places: int = 0,
    dense: bool | None = None,
    seed: int = 0,
) -> BranchTree:
    """Return the tree of rides from a saddle, and the solutions they led to.

    Args:
        loss: L, from ``[dim]`` to a scalar; made of what torch.func can transform.
        saddle: where to start.
        learning_rate: η, of descent.
        ride_length: α, length of one step of a ride.
        ride_steps: how long a ride may be; it ends where its curvature is no longer negative.
        descent_steps: steps of descent after it.
        count: how many directions of negative curvature to ride from each point, the most negative first.
        depth: how often to branch: 1 rides from the saddle only, 2 also from where those rides ended, and so on.
        same: whether two points are the same solution; None: if within ``tolerance``.
        tolerance: distance of points that are the same solution.
        krylov: dimension of the Krylov space, where the Hessian is not formed.
        places: how many places of each path to keep, of the ride and of descent each; 0: none.
        dense: whether to form the Hessian; None: up to `DENSE` dimensions.
        seed: of Lanczos' start vectors.

    Returns:
        A tree with branches of the kind ``"ridge"``; the exponents of a branch are the curvatures at its point, and ε is α.

    Raises:
        InputError: a number is out of range, or there is no negative curvature at the start.
        NonFinite: the loss or its curvature is not finite.

    Two wells, (x² − 1)² + y², with a saddle between them:

    >>> saddle = torch.zeros(2, dtype=torch.float64)
    >>> tree = ridge_rider(lambda w: (w[0] ** 2 - 1) ** 2 + w[1] ** 2, saddle, learning_rate=0.1)
    >>> sorted(round(solution[0].item(), 3) for solution in tree.solutions), tree.branches()[0].exponents
    ([-1.0, 1.0], (-4.0,))
    """
    if not (learning_rate > 0 and ride_length > 0) or min(ride_steps, descent_steps, count, depth) < 1 or places == 1:
        raise InputError(
            f"learning_rate and ride_length must be above 0, ride_steps, descent_steps, count and depth at least 1, places 0 "
            f"or at least 2; got {learning_rate}, {ride_length}, {ride_steps}, {descent_steps}, {count}, {depth} and {places}."
        )
    point = saddle.detach()
    curvature = _Curvature(loss, len(point), len(point) <= DENSE if dense is None else dense, krylov, seed)
    tree = BranchTree(point[None], Archive(within(tolerance) if same is None else same))
    waiting = [(0, point)]
    for level in range(depth):
        ended = []
        for parent, place in waiting:
            values, vectors = curvature.negative(place, count)
            if not len(values) and level == 0:
                raise InputError("the Hessian has no negative eigenvalue at this point: it is no saddle. Start at one.")
            for value, vector in zip(values.tolist(), vectors, strict=True):
                for sign in (1, -1):
                    ride = _ride(curvature, place, sign * vector, ride_length, ride_steps)
                    descent = _descend(loss, ride[-1], learning_rate, descent_steps)
                    node = tree.add(
                        parent,
                        "ridge",
                        place,
                        vector,
                        sign,
                        ride_length,
                        end=descent[-1],
                        halfway=descent[descent_steps // 2],
                        exponents=(value,),
                        path=torch.cat([_thinned(ride, places), _thinned(descent, places)]) if places else None,
                    )
                    ended.append((node.number, ride[-1]))
        waiting = ended
    return tree


class _Curvature:
    """Eigenvectors of the Hessian: all of them, or the outermost by Lanczos."""

    def __init__(self, loss: Loss, dim: int, dense: bool, krylov: int, seed: int):
        self.loss, self.dim, self.dense, self.krylov = loss, dim, dense, krylov
        self.generator = torch.Generator().manual_seed(seed)

    def negative(self, point: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the most negative eigenvalues, below rounding of the largest, and their vectors as rows."""
        values, vectors = self._pairs(point, torch.zeros_like(point), min(count + 2, self.dim))
        below = values < -1e-8 * values.abs().max()
        return values[below][:count], vectors[below][:count]

    def follow(self, point: Tensor, before: Tensor) -> tuple[float, Tensor]:
        """Return the eigenpair whose vector overlaps most with ``before``, turned to its side."""
        values, vectors = self._pairs(point, before, min(8, self.dim))
        overlaps = vectors @ before
        best = int(overlaps.abs().argmax())
        return values[best].item(), vectors[best] * (1.0 if overlaps[best] >= 0 else -1.0)

    def _pairs(self, point: Tensor, near: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if self.dense:
            hessian: Any = torch.func.hessian(self.loss)
            matrix = hessian(point)
            if not matrix.isfinite().all():
                raise NonFinite("the Hessian is not finite here. Take a smaller ride_length, or start elsewhere.")
            values, columns = torch.linalg.eigh(matrix)
            return values, columns.T
        slope = torch.func.grad(self.loss)

        def minus(rows: Tensor) -> Tensor:
            along: Any = torch.func.vmap(lambda row: torch.func.jvp(slope, (point,), (row,))[1])
            return -along(rows)

        # What was followed so far, and a little of everything: the Krylov space of an eigenvector alone is a line.
        noise = torch.randn(self.dim, generator=self.generator, dtype=torch.float64).to(point)
        weight = 0.1 if near.any() else 1.0
        values, vectors = eigenpairs(minus, near + weight * noise / noise.norm(), min(self.krylov, self.dim), count)
        return -values, vectors


def _ride(curvature: _Curvature, start: Tensor, direction: Tensor, length: float, steps: int) -> Tensor:
    """Return the places of a ride, ``[place, dim]``; it makes at least one step."""
    places = [start, start + length * direction]
    for _ in range(steps - 1):
        value, direction = curvature.follow(places[-1], direction)
        if value >= 0:
            break
        places.append(places[-1] + length * direction)
    return torch.stack(places)


def _descend(loss: Loss, start: Tensor, learning_rate: float, steps: int) -> Tensor:
    slope, places = torch.func.grad(loss), [start]
    for _ in range(steps):
        places.append(places[-1] - learning_rate * slope(places[-1]))
    if not places[-1].isfinite().all():
        raise NonFinite(f"descent from the end of a ride left the finite numbers. Take learning_rate below {learning_rate}.")
    return torch.stack(places)


def _thinned(places: Tensor, count: int) -> Tensor:
    return places[torch.linspace(0, len(places) - 1, count).round().long()]
