"""The trace and the diagonal of an operator, from its products with random signs.

    tr A = E[z·Az]        diag A = E[z ⊙ Az]        z_i = ±1, independent

Assumptions: none; A need not be symmetric. The standard error of the trace is √(2 Σ_{i≠j} A_ij² / probes) for a symmetric A,
that of the diagonal's i-th number √(Σ_{j≠i} A_ij² / probes): nothing for a diagonal A. Both are estimated from the probes.
Cost: one product a probe. Memory: ``batch_size`` vectors and their products.

References: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines";
Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix"; its divisor Σ z ⊙ z is the number of probes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError
from retrograd.progress import track


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes.

    Attributes:
        value: the estimate.
        standard_error: of the estimate, from how much the probes differ.
    """

    value: Float[Tensor, "*shape"]
    standard_error: Float[Tensor, "*shape"]


def trace(
    multiply: Callable[[Tensor], Tensor],
    size: int,
    *,
    probes: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    batch_size: int = 16,
) -> Estimate:
    """Estimate the trace.

    Args:
        multiply: multiplies every row of ``[query, P]`` by A.
        size: P.
        probes: how many, at least 2. The error falls as 1/√probes.
        generator: draws the signs. One in main memory gives the same on every device.
        dtype: of the vectors that ``multiply`` takes.
        device: where they are; where the generator is, if not given.
        batch_size: probes that are multiplied at once; the result does not depend on it.

    Raises:
        InputError: there are fewer than 2 probes, or none in a batch.

    >>> found = trace(lambda rows: rows * torch.tensor([1.0, 2.0]), 2, probes=4, generator=torch.Generator().manual_seed(0))
    >>> found.value, found.standard_error
    (tensor(3.), tensor(0.))
    """
    signs = _signs(size, probes, generator, dtype, device, batch_size)
    return _mean((part * multiply(part)).sum(dim=1) for part in signs)


def diagonal(
    multiply: Callable[[Tensor], Tensor],
    size: int,
    *,
    probes: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    batch_size: int = 16,
) -> Estimate:
    """Estimate the diagonal, ``[P]``.

    Args:
        multiply: multiplies every row of ``[query, P]`` by A.
        size: P.
        probes: how many, at least 2. The error falls as 1/√probes.
        generator: draws the signs. One in main memory gives the same on every device.
        dtype: of the vectors that ``multiply`` takes.
        device: where they are; where the generator is, if not given.
        batch_size: probes that are multiplied at once; the result does not depend on it.

    Raises:
        InputError: there are fewer than 2 probes, or none in a batch.

    >>> seed = torch.Generator().manual_seed(0)
    >>> diagonal(lambda rows: rows * torch.tensor([1.0, 2.0]), 2, probes=4, generator=seed).value
    tensor([1., 2.])
    """
    signs = _signs(size, probes, generator, dtype, device, batch_size)
    return _mean(part * multiply(part) for part in signs)


def _signs(
    size: int, probes: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str | None, batch_size: int
) -> Iterator[Float[Tensor, "query P"]]:
    if probes < 2 or batch_size < 1:
        raise InputError(
            f"a standard error takes at least 2 probes and a batch at least 1, got probes={probes} and batch_size={batch_size}."
        )
    for part in track(torch.arange(probes).split(batch_size), "Hutchinson probes"):
        # One by one, because numbers drawn together depend on how many they are.
        bits = [torch.randint(0, 2, (size,), generator=generator, device=generator.device) for _ in part]
        yield (2 * torch.stack(bits) - 1).to(device or generator.device, dtype)


def _mean(parts: Iterator[Float[Tensor, "query *shape"]]) -> Estimate:
    """Mean over axis 0 of all parts, with its standard error, by Welford's recurrence: Σx² − (Σx)²/n would cancel."""
    samples = (sample for part in parts for sample in part)
    mean, count = next(samples), 1
    spread = torch.zeros_like(mean)
    for count, sample in enumerate(samples, start=2):
        before = sample - mean
        mean = mean + before / count
        spread = spread + before * (sample - mean)
    return Estimate(mean, (spread / (count - 1) / count).sqrt())
