"""Producers of costates, one a file, and the engine that contracts those of approximate ones."""

from retrograd.adjoint.adjoint import Adjoint
from retrograd.adjoint.blend import Blend
from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.first_order import FirstOrder
from retrograd.adjoint.fixed_point import FixedPoint
from retrograd.adjoint.implicit import Implicit
from retrograd.adjoint.logra import LoGra
from retrograd.adjoint.outcome import Outcome
from retrograd.adjoint.parts import Notes, Probe, ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.source import Source
from retrograd.adjoint.tangent_kernel import TangentKernel
from retrograd.adjoint.tracin import TracIn
from retrograd.adjoint.trak import TRAK
from retrograd.adjoint.unrolled import Unrolled

__all__ = [
    "TRAK",
    "Adjoint",
    "Blend",
    "Engine",
    "FirstOrder",
    "FixedPoint",
    "Implicit",
    "LoGra",
    "Notes",
    "Outcome",
    "Probe",
    "Queries",
    "ScorePart",
    "Source",
    "TangentKernel",
    "TracIn",
    "Unrolled",
]
