"""Producers of costates, one a file: the methods of attribution."""

from retrograd.adjoint.adjoint import Adjoint, Notes, ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.tracin import TracIn
from retrograd.adjoint.unrolled import Unrolled

__all__ = ["Adjoint", "Notes", "Queries", "ScorePart", "TracIn", "Unrolled"]
