"""The two Kronecker factors of every layer and the diagonal of everything else: what K-FAC and EK-FAC share.

    A = Σ_nt ā_nt ā_ntᵀ / Σ_nt 1        S = (1/N) Σ_nt d_nt d_ntᵀ        A ⊗ S ≈ E_n[vec(G_n) vec(G_n)ᵀ],  G_n = Σ_t d_nt ā_ntᵀ

with ā, d as in `layers`, d with sampled targets, N the number of examples times samples. Averaged over positions on the
input side and summed on the output side, the product stands for the sum over positions as if they were independent
("expand" in Eschenhagen et al. 2023; KFC in Grosse and Martens 2016). In layers with more than one position, a position
with d = 0 does not count: it is padding, which the loss does not see, and would dilute A.

Parameters of no covered layer get diag(F)_j = (1/N) Σ_n g_nj², exact up to the sampling.

Assumptions of the product: ā and d independent, positions independent. Memory: in² + out² numbers a layer in float64.

References: Martens, Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature"; Grosse,
Martens (2016), "A Kronecker-factored approximate Fisher matrix for convolution layers"; Eschenhagen et al. (2023),
"Kronecker-factored approximate curvature for modern neural network architectures".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retrograd.curvature.layers import Layer, Rows, capture, find_layers
from retrograd.curvature.operator import BlockOperator, DiagonalBlock, KroneckerBlock
from retrograd.curvature.pseudo_gradients import PseudoBatches, per_example_gradients
from retrograd.params import Params

_PROBES = 3  # examples on which the layers' gradients are compared with autograd's
_KEPT_SCALARS = 1 << 24  # activations and gradients of a first pass are kept for a second one up to so many numbers


@dataclass(frozen=True)
class Basis:
    """Eigenvectors (columns) and eigenvalues of both factors of a layer, all float64."""

    out_basis: Tensor
    out_values: Tensor
    in_basis: Tensor
    in_values: Tensor


@dataclass(frozen=True)
class Factors:
    """What a pass over the states gives.

    Attributes:
        layers: the covered layers.
        bases: eigendecompositions of the factors, averaged over the states, by the weight's name.
        leftover: a diagonal block for every other trained parameter.
        kept: rows of all batches, if they were few enough to keep.
        scalings: how each layer's rows are scaled, by the weight's name; empty without a scale.
    """

    layers: tuple[Layer, ...]
    bases: dict[str, Basis]
    leftover: tuple[DiagonalBlock, ...]
    kept: list[dict[str, Rows]] | None
    scalings: dict[str, "Scaling"]

    def residual(self, weight: str) -> Tensor | None:
        """What of a layer's scale its rows do not carry, ``[out, in]``."""
        return self.scalings[weight].residual if self.scalings else None

    def operator(self, eigenvalues: Params) -> BlockOperator:
        """Return the operator with these eigenvalues ``[out, in]``, by the weight's name, along the axes of the bases."""
        blocks = []
        for layer in self.layers:
            basis, values = self.bases[layer.weight], eigenvalues[layer.weight]
            blocks.append(KroneckerBlock(layer.weight, layer.bias, basis.out_basis, basis.in_basis, values))
        return BlockOperator((*blocks, *self.leftover))


@dataclass(frozen=True)
class Scaling:
    """A layer's scale as a product of rows and columns, which factors can carry, times what is left.

    s_oi = rows_o · columns_i · residual_oi, with log rows and log columns by the means of log s.
    """

    rows: Tensor
    columns: Tensor
    residual: Tensor

    @staticmethod
    def of(layer: Layer, scale: Params) -> "Scaling":
        """Split the scale of a layer's weight and bias."""
        whole = scale[layer.weight].flatten(1)
        if layer.bias is not None:
            whole = torch.cat([whole, scale[layer.bias][:, None]], dim=1)
        logs = whole.log()
        rows, columns = logs.mean(1).exp(), (logs.mean(0) - logs.mean()).exp()
        return Scaling(rows, columns, whole / torch.outer(rows, columns))

    def __call__(self, rows: Rows) -> Rows:
        """Scale both sides."""
        return rows[0] * self.columns, rows[1] * self.rows


def fit_factors(source: PseudoBatches, keep: bool, scale: Params | None = None) -> Factors:
    """Go once over the examples at each state; ``keep`` the rows for `rows_again`, if memory allows."""
    update_map, states = source.update_map, source.states
    probes = source.ids[:_PROBES]
    layers = find_layers(update_map, states[0], source.batch(states[0], probes), len(probes))
    covered = {name for layer in layers for name in (layer.weight, layer.bias)}
    rest = [name for name in update_map.names if name not in covered]
    diagonal: Params = {name: states[0].params[name].new_zeros(states[0].params[name].shape).double() for name in rest}
    sums = [{layer.weight: _Sums() for layer in layers} for _ in states]
    kept: list[dict[str, Rows]] | None = [] if keep else None
    room = _KEPT_SCALARS
    scalings = {layer.weight: Scaling.of(layer, scale) for layer in layers} if scale is not None else {}
    for index, state, size, batch in source.over("curvature: factors"):
        rows = _scaled(capture(update_map, layers, state, batch, size), scalings)
        for weight, own in rows.items():
            sums[index][weight].add(*own)
        if rest:
            for grads in per_example_gradients(update_map, state, batch, size, rest):
                for name, leaf in grads.items():
                    leaf = leaf if scale is None else leaf * scale[name]
                    diagonal[name] += leaf.square().sum(0, dtype=torch.float64)
        room -= sum(part.numel() for own in rows.values() for part in own)
        if kept is not None:
            kept.append(rows)
            kept = kept if room >= 0 else None
    bases = {layer.weight: _decomposed([own[layer.weight] for own in sums], source.count / len(states)) for layer in layers}
    leftover = tuple(DiagonalBlock(name, leaf / source.count) for name, leaf in diagonal.items())
    return Factors(layers, bases, leftover, kept, scalings)


def rows_again(source: PseudoBatches, factors: Factors) -> Iterator[dict[str, Rows]]:
    """Yield the rows of every batch at every state once more, from memory or by a second pass."""
    if factors.kept is not None:
        yield from factors.kept
        return
    for _, state, size, batch in source.over("curvature: eigenvalues"):
        yield _scaled(capture(source.update_map, factors.layers, state, batch, size), factors.scalings)


def _scaled(rows: dict[str, Rows], scalings: dict[str, Scaling]) -> dict[str, Rows]:
    return {weight: scalings[weight](own) for weight, own in rows.items()} if scalings else rows


class _Sums:
    """Second moments of one layer at one state, in float64."""

    def __init__(self) -> None:
        self.inputs: Tensor | float = 0.0
        self.outputs: Tensor | float = 0.0
        self.positions = 0.0

    def add(self, left: Tensor, right: Tensor) -> None:
        count = float(left.shape[0] * left.shape[1])
        flat, grads = left.flatten(0, 1), right.flatten(0, 1)
        if left.shape[1] > 1:
            seen = (grads != 0).any(dim=1, keepdim=True)
            flat, count = flat * seen, seen.sum().item()
        self.inputs = self.inputs + (flat.T @ flat).double()
        self.outputs = self.outputs + (grads.T @ grads).double()
        self.positions += count


def _decomposed(sums: list[_Sums], count: float) -> Basis:
    inputs = sum(own.inputs / max(own.positions, 1.0) for own in sums) / len(sums)
    outputs = sum(own.outputs for own in sums) / (count * len(sums))
    assert isinstance(inputs, Tensor)
    assert isinstance(outputs, Tensor)
    in_values, in_basis = _eigh(inputs)
    out_values, out_basis = _eigh(outputs)
    # Zero eigenvalues come out as ± rounding.
    return Basis(out_basis, out_values.clamp(min=0), in_basis, in_values.clamp(min=0))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; rows of zeros (pixels that are never lit) are left out of the cubic cost."""
    live = matrix.diagonal() > 0
    if live.all():
        return torch.linalg.eigh(matrix)
    values, basis = torch.zeros_like(matrix[0]), torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    place = live.nonzero()[:, 0]
    values[place], basis[place[:, None], place] = torch.linalg.eigh(matrix[place[:, None], place])
    return values, basis
