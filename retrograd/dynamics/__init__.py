"""How training behaves as a dynamical system: its spectrum, its Lyapunov exponents, where it branches, how to steer it."""

from retrograd.dynamics.bifurcation import (
    Bifurcation,
    Branches,
    branch,
    eigen_directions,
    find_bifurcation,
    separating_directions,
)
from retrograd.dynamics.branching import Archive, BranchNode, BranchTree
from retrograd.dynamics.flow import Flow, FunctionFlow, StepFlow, StridedFlow, compose, flow_of, jacobian
from retrograd.dynamics.generalised_ridge_rider import generalised_ridge_rider
from retrograd.dynamics.linearised_training import EarlyStopping, LinearisedTraining, Modes, descend
from retrograd.dynamics.lyapunov import (
    FiniteTimeExponents,
    LyapunovExponents,
    exponent_objective,
    finite_time_exponents,
    lyapunov_exponents,
    top_exponents,
)
from retrograd.dynamics.momentum import convergence_rate, is_adversarially_stable, momentum_roots, tune_momentum
from retrograd.dynamics.ridge_rider import ridge_rider
from retrograd.dynamics.spectrum import Spectrum, spectrum
from retrograd.dynamics.tuning import Tuned, tune_extragradient, tune_optimistic

__all__ = [
    "Archive",
    "Bifurcation",
    "BranchNode",
    "BranchTree",
    "Branches",
    "EarlyStopping",
    "FiniteTimeExponents",
    "Flow",
    "FunctionFlow",
    "LinearisedTraining",
    "LyapunovExponents",
    "Modes",
    "Spectrum",
    "StepFlow",
    "StridedFlow",
    "Tuned",
    "branch",
    "compose",
    "convergence_rate",
    "descend",
    "eigen_directions",
    "exponent_objective",
    "find_bifurcation",
    "finite_time_exponents",
    "flow_of",
    "generalised_ridge_rider",
    "is_adversarially_stable",
    "jacobian",
    "lyapunov_exponents",
    "momentum_roots",
    "ridge_rider",
    "separating_directions",
    "spectrum",
    "top_exponents",
    "tune_extragradient",
    "tune_momentum",
    "tune_optimistic",
]
