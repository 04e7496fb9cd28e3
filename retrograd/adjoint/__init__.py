"""Producers of costates, one a file: the methods of attribution."""

from retrograd.adjoint.adjoint import Adjoint, Notes, ScorePart
from retrograd.adjoint.blend import Blend
from retrograd.adjoint.implicit import Implicit
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.source import Source
from retrograd.adjoint.tracin import TracIn
from retrograd.adjoint.unrolled import Unrolled

__all__ = ["Adjoint", "Blend", "Implicit", "Notes", "Queries", "ScorePart", "Source", "TracIn", "Unrolled"]
