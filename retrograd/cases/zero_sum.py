"""Two players with opposite losses: x wants f low, y wants it high.

    f = −log(1 + e^{−xy}) − log 2                                        Dirac-GAN
    f = xᵀAy                                                             bilinear
    f = xᵀ(ΓA)y + xᵀ((I − Γ)B)x − yᵀ((I − Γ)H)y                          mixed: partly adversarial, partly not
    f = Σ_j  a_j (x_j² − y_j²) / 2 + b_j x_j y_j                         quadratic, with eigenvalues a_j ± i b_j

Γ          diagonal, from 0 (each player has its own problem) to 1 (nothing but rotation);
A, B, H    matrices; the Jacobian of the game gradient at 0 is [[(I−Γ)B + ((I−Γ)B)ᵀ, ΓA], [−(ΓA)ᵀ, (I−Γ)H + ((I−Γ)H)ᵀ]].

All have their equilibrium at 0. Eigenvalues a ± ib of the Jacobian make training converge (a > 0) and turn (b): |b|/a is the
tangent of the angle by which it turns, and simultaneous descent converges if its learning rate is below 2a / (a² + b²), never
where a = 0.

References: Mescheder et al. (2018), "Which training methods for GANs do actually converge?", for the Dirac-GAN; Lorraine,
Acuna, Vicol, Duvenaud (2022), "Complex momentum for optimization in games", arXiv 2102.08431, for the mixed game.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from retrograd.cases.game_case import GameCase
from retrograd.errors import InputError
from retrograd.game import FunctionGame


def dirac_gan() -> GameCase:
    """Return the smallest GAN: data in one point, a generator of one point, a linear discriminator; start (1, 1).

    >>> dirac_gan().jacobian(torch.zeros(2))                   # eigenvalues ± i/2
    tensor([[-0.0000,  0.5000],
            [-0.5000, -0.0000]])
    """
    return _zero_sum("Dirac-GAN", lambda x, y: -F.softplus(-x * y) - math.log(2.0), torch.ones((), dtype=torch.float64))


def bilinear(matrix: Float[Tensor, "row column"] | None = None, size: int = 2, seed: int = 0) -> GameCase:
    """Return f = xᵀAy: pure rotation, with eigenvalues ± i times the singular values of A.

    Args:
        matrix: A; normal numbers over √size if not given.
        size: rows and columns of a random A.
        seed: of a random A.

    >>> bilinear(torch.tensor([[3.0]])).jacobian(torch.zeros(2))
    tensor([[ 0.,  3.],
            [-3., -0.]])
    """
    if matrix is None:
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / math.sqrt(size)
    a = matrix
    one = a.new_ones(())
    return _zero_sum("bilinear", lambda x, y: x @ a.to(x) @ y, one.expand(a.shape[0]), one.expand(a.shape[1]))


def mixed_game(
    rotation: float | Float[Tensor, " coordinate"],
    matrix: Float[Tensor, "size size"] | None = None,
    own_first: Float[Tensor, "size size"] | None = None,
    own_second: Float[Tensor, "size size"] | None = None,
    size: int = 1,
) -> GameCase:
    """Return a game whose rotation is set, coordinate by coordinate.

    Args:
        rotation: γ, from 0 (none) to 1 (nothing else), one number or one for each coordinate.
        matrix: A; the identity if not given.
        own_first: B; half the identity if not given, so that the eigenvalues are (1 − γ) ± iγ.
        own_second: H; as B.
        size: coordinates of each player, where none of the others says.

    Raises:
        InputError: a rotation is outside [0, 1], or sizes differ.

    >>> mixed_game(0.75).jacobian(torch.zeros(2))
    tensor([[ 0.2500,  0.7500],
            [-0.7500,  0.2500]])
    """
    gamma = torch.as_tensor(rotation, dtype=torch.float64)
    given = [part for part in (matrix, own_first, own_second) if part is not None]
    size = len(given[0]) if given else len(gamma) if gamma.dim() else size
    if not bool(((gamma >= 0) & (gamma <= 1)).all()):
        raise InputError(f"rotation must lie in [0, 1], got {gamma.tolist()}.")
    if (gamma.dim() and len(gamma) != size) or any(part.shape != (size, size) for part in given):
        shapes = [tuple(part.shape) for part in given]
        raise InputError(f"rotation and matrices must be of one size; got a rotation of {gamma.numel()} and matrices {shapes}.")
    identity, gamma = torch.eye(size, dtype=torch.float64), gamma.expand(size)[:, None]
    a = gamma * (identity if matrix is None else matrix)
    b = (1 - gamma) * (identity / 2 if own_first is None else own_first)
    h = (1 - gamma) * (identity / 2 if own_second is None else own_second)

    def value(x: Tensor, y: Tensor) -> Tensor:
        return x @ a.to(x) @ y + x @ b.to(x) @ x - y @ h.to(x) @ y

    return _zero_sum("mixed game", value, torch.ones(size, dtype=torch.float64))


def quadratic_game(spectrum: Sequence[complex | float], seed: int | None = None) -> GameCase:
    """Return a game whose Jacobian has a given spectrum.

    Args:
        spectrum: eigenvalues a + ib, each of which comes with a − ib; ``cmath.rect(size, angle)`` gives one by its angle.
        seed: of a random rotation of each player's coordinates, which hides the pairs; none if not given.

    Raises:
        InputError: the spectrum is empty.

    >>> quadratic_game([1 + 2j]).jacobian(torch.zeros(2))
    tensor([[ 1.,  2.],
            [-2.,  1.]])
    """
    if not len(spectrum):
        raise InputError("spectrum is empty; give at least one eigenvalue.")
    values = torch.tensor([complex(value) for value in spectrum], dtype=torch.complex128)
    turns = [torch.eye(len(values), dtype=torch.float64)] * 2
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        turns = [
            torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0] for _ in turns
        ]

    def value(x: Tensor, y: Tensor) -> Tensor:
        x, y = turns[0].to(x) @ x, turns[1].to(y) @ y
        return (values.real.to(x) * (x * x - y * y) / 2 + values.imag.to(x) * x * y).sum()

    return _zero_sum("quadratic game", value, torch.ones(len(values), dtype=torch.float64))


def _zero_sum(name: str, value, x: Tensor, y: Tensor | None = None) -> GameCase:
    losses = {"x": lambda own: value(own["x"], own["y"]), "y": lambda own: -value(own["x"], own["y"])}
    return GameCase(name, FunctionGame(losses), {"x": x.clone(), "y": (x if y is None else y).clone()})
