"""Curvatures that are known only by their products with vectors, and functions of them.

    G v = (1/N) Σ_n G_n v        f(G) v ≈ ‖v‖ V f(T) e₁        (see `retrograd.linalg.lanczos`)

G_n        what one example's loss adds: its Gauss-Newton matrix or its Hessian, or with a ``scale`` s diag(s) G_n diag(s);
T, V       G seen from the Krylov space of v after m = ``lanczos_steps`` Lanczos steps, a space for every vector; or, with
           ``lanczos_steps=None``, the eigenvalues and eigenvectors in float64 of the matrix made explicit by P products.

All parameters are one block. Its mean eigenvalue, which damping is relative to, is tr G / P of the whole matrix, never of the
Krylov space: exact where the matrix is explicit, else from products with random signs (Hutchinson), of relative standard error
√(2 Σ_{i≠j} G_ij² / probes) / tr G: about 8 % for 32 probes and ten directions that hold all of the curvature. It is the same
for all vectors, batches and slices of queries. Since most eigenvalues of a network are nearly 0, a tenth of this mean is a much
smaller damping than a tenth of each layer's own; influence functions do better with ``damping="training_time"``.

Assumptions: f is smooth on the scale of G's spectrum; 1/(σ + λ) needs about √(σ_max/λ) steps for each digit or two, exp(−cσ)
about √(cσ_max). Cost: m products a vector, however many functions are taken of it: the Krylov spaces of the last vectors are
kept as long as these vectors are, if they are no more than 2²⁷ numbers. Memory: those, or those of a slice of the vectors.

References: Saad (1992), "Analysis of some Krylov subspace approximations to the matrix exponential operator".
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from retrograd.curvature.fisher import ThinOperator
from retrograd.curvature.operator import Curvature, Function, Operator, check_names
from retrograd.curvature.pseudo_gradients import device_of
from retrograd.errors import InputError
from retrograd.linalg import Krylov, lanczos, trace
from retrograd.params import Params, count, flatten, map_params, unflatten, zeros_like
from retrograd.progress import track
from retrograd.trajectory import Run, TrainingState, UpdateMap
from retrograd.trajectory.trajectory import to_device

LARGEST_EXPLICIT = 4096
_KEPT_SCALARS = 1 << 27  # Krylov spaces are kept for a second function up to so many numbers
_ROWS_AT_ONCE = 256  # of the identity, when a matrix is made explicit

BatchProduct = Callable[[UpdateMap, TrainingState, Any, Params], Params]
"""Multiplies vectors by the *sum* of G_n over the examples of a batch."""


def mean_product(
    product: BatchProduct, run: Run, state: TrainingState, vectors: Params, ids: Tensor | None, batch_size: int, phase: str
) -> Params:
    """Multiply vectors by the mean of G_n over the examples ``ids``, all if not given.

    Raises:
        InputError: vectors lack a parameter, there is no example, or a batch has none.
    """
    check_names(vectors, run.update_map.names)
    ids = run.examples.ids if ids is None else ids
    if not len(ids) or batch_size < 1:
        raise InputError(
            f"a mean over examples needs at least one id and a batch size of 1, got {len(ids)} ids and batch_size={batch_size}."
        )
    total = zeros_like(vectors)
    for part in track(ids.split(batch_size), phase):
        batch = to_device(run.examples.batch(part), device_of(state))
        total = map_params(torch.add, total, product(run.update_map, state, batch, vectors))
    return map_params(lambda leaf: leaf / len(ids), total)


@dataclass(frozen=True)
class ProductOperator:
    """A curvature of which vectors can be multiplied, and functions applied to them.

    Attributes:
        product: multiplies vectors by the mean of G_n over some ids at a state.
        states: where; each weighs the same.
        ids: the examples of the whole mean.
        scale: s, or None.
        lanczos_steps: products with every vector, or None to make the matrix explicit.
        probes: random signs for the mean eigenvalue.
        seed: of the signs.
        definite: whether negative eigenvalues can only be rounding.
    """

    product: Callable[[TrainingState, Params, Tensor], Params]
    states: tuple[TrainingState, ...]
    ids: Int[Tensor, " example"]
    scale: Params | None
    lanczos_steps: int | None
    probes: int
    seed: int
    definite: bool
    _last: "_LastSpaces" = field(default_factory=lambda: _LastSpaces(), repr=False, compare=False)

    def __post_init__(self):
        if not self.states:
            raise InputError("curvature needs at least one state, got none.")
        size = count(self.like)
        if self.lanczos_steps is None and size > LARGEST_EXPLICIT:
            raise InputError(
                f"lanczos_steps=None makes a matrix of {size} x {size} explicit; at most {LARGEST_EXPLICIT} parameters are "
                "allowed. Give lanczos_steps=30, or a solver that needs only products."
            )
        if self.lanczos_steps is not None and self.lanczos_steps < 1:
            raise InputError(f"lanczos_steps must be at least 1, or None, got {self.lanczos_steps}.")

    @property
    def like(self) -> Params:
        """The parameters, for their names and shapes."""
        return self.states[0].params

    def multiply(self, vectors: Params, ids: Tensor | None = None) -> Params:
        """Return G v for vectors with a leading axis ``query`` on every leaf, or G averaged over the examples ``ids`` alone."""
        inside = vectors if self.scale is None else map_params(torch.mul, vectors, self.scale)
        products = [self.product(state, inside, self.ids if ids is None else ids) for state in self.states]
        total = map_params(lambda *leaves: torch.stack(leaves).mean(0), *products) if len(products) > 1 else products[0]
        return total if self.scale is None else map_params(torch.mul, total, self.scale)

    def rows(self, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """Do as `multiply` with flat vectors ``[query, P]``."""
        return flatten(self.multiply(unflatten(rows, self.like), ids).values(), batched=True)

    def apply(self, function: Function, vectors: Params) -> Params:
        """Return f(G) v for vectors with a leading axis ``query`` on every leaf; see `retrograd.curvature.Operator.apply`."""
        check_names(vectors, tuple(self.like))
        if self.lanczos_steps is None:
            return self.spectrum.apply(function, vectors)
        leaves = [vectors[name] for name in self.like]
        spaces = self._last.find(leaves)
        if spaces is None:
            rows, steps = flatten(leaves, batched=True), min(self.lanczos_steps, count(self.like))
            at_once = max(1, _KEPT_SCALARS // (steps * rows.shape[1]))
            spaces = (lanczos(self.rows, part, steps) for part in rows.split(at_once))
            spaces = self._last.keep(leaves, list(spaces)) if len(rows) <= at_once else spaces
        own = partial(self._values, function)
        found = unflatten(torch.cat([space.apply(own) for space in spaces]), self.like)
        return {name: found[name] for name in vectors}

    def _values(self, function: Function, ritz: Tensor) -> Tensor:
        return function(ritz.clamp(min=0) if self.definite else ritz, self.mean)

    @cached_property
    def mean(self) -> float:
        """The mean eigenvalue, tr G / P."""
        size, leaf = count(self.like), next(iter(self.like.values()))
        if self.lanczos_steps is None:
            return self.spectrum.eigenvalues.mean().item()
        generator = torch.Generator().manual_seed(self.seed)
        found = trace(self.rows, size, probes=self.probes, generator=generator, dtype=leaf.dtype, device=leaf.device)
        return found.value.item() / size

    @cached_property
    def spectrum(self) -> ThinOperator:
        """All eigenvalues, descending, and eigenvectors; P products."""
        size, leaf = count(self.like), next(iter(self.like.values()))
        units = torch.eye(size, dtype=leaf.dtype, device=leaf.device)
        matrix = torch.cat([self.rows(part) for part in units.split(_ROWS_AT_ONCE)]).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        values = values.clamp(min=0) if self.definite else values
        return ThinOperator(values.flip(0), vectors.flip(1), dict(self.like))


def with_products(curvature: Curvature, operator: Operator) -> ProductOperator:
    """Return what a curvature was fitted to as an operator with products.

    Raises:
        InputError: it has none.
    """
    if not isinstance(operator, ProductOperator):
        raise InputError(
            f"{type(curvature).__name__} has no products with the curvature itself, only functions of its own approximation. "
            "Give curvature=GaussNewton() or Hessian(); to invert the approximation there is Spectral()."
        )
    return operator


class _LastSpaces:
    """The Krylov spaces of the last vectors, for as long as these very tensors live and are not written to."""

    def __init__(self) -> None:
        self._owners: list[tuple[weakref.ref[Tensor], int]] = []
        self._spaces: list[Krylov] | None = None

    def find(self, leaves: Sequence[Tensor]) -> "Iterable[Krylov] | None":
        """Return what was kept for these leaves, or None."""
        same = len(leaves) == len(self._owners) and all(
            owner() is leaf and not leaf.is_inference() and leaf._version == version
            for leaf, (owner, version) in zip(leaves, self._owners, strict=True)
        )
        return self._spaces if same else None

    def keep(self, leaves: Sequence[Tensor], spaces: list[Krylov]) -> list[Krylov]:
        """Keep spaces; the vectors' death takes them along, since operators live longer."""
        if not any(leaf.is_inference() for leaf in leaves):  # writing to those leaves no trace
            own = weakref.ref(self)
            self._owners = [(weakref.ref(leaf, lambda _: _forget(own())), leaf._version) for leaf in leaves]
            self._spaces = spaces
        return spaces


def _forget(last: "_LastSpaces | None") -> None:
    if last is not None:
        last._owners, last._spaces = [], None
