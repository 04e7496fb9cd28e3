"""Solvers and spectra of operators that are known only by their products with vectors, one method a file.

Vectors are flat, with a leading axis: ``[query, P]``. An operator is a function from ``[query, P]`` to ``[query, P]`` that
multiplies every row; rows never influence each other.
"""

from retrograd.linalg.arnoldi import arnoldi, ritz_pairs, ritz_values
from retrograd.linalg.conjugate_gradients import conjugate_gradients
from retrograd.linalg.hutchinson import Estimate, diagonal, trace
from retrograd.linalg.lanczos import Krylov, apply_function, eigenpairs, lanczos
from retrograd.linalg.neumann import lissa, neumann
from retrograd.linalg.nystrom import nystrom
from retrograd.linalg.orthonormal import orthonormalise
from retrograd.linalg.projection import Projection
from retrograd.linalg.solution import Solution

__all__ = [
    "Estimate",
    "Krylov",
    "Projection",
    "Solution",
    "apply_function",
    "arnoldi",
    "conjugate_gradients",
    "diagonal",
    "eigenpairs",
    "lanczos",
    "lissa",
    "neumann",
    "nystrom",
    "orthonormalise",
    "ritz_pairs",
    "ritz_values",
    "trace",
]
