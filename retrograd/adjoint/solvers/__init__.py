"""Ways to solve the damped system of influence functions, one a file."""

from retrograd.adjoint.solvers.astra import Astra
from retrograd.adjoint.solvers.conjugate_gradients import ConjugateGradients
from retrograd.adjoint.solvers.damped import Damped
from retrograd.adjoint.solvers.datainf import DataInf
from retrograd.adjoint.solvers.neumann import Neumann
from retrograd.adjoint.solvers.solver import Solver, System
from retrograd.adjoint.solvers.spectral import Spectral

__all__ = ["Astra", "ConjugateGradients", "Damped", "DataInf", "Neumann", "Solver", "Spectral", "System"]
