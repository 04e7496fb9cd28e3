"""What a method of attribution is: it walks a run and yields, part by part, scores of the examples that went in.

Every method returns the same quantity, d f_q / d w_i: how measurement q moves per unit of weight on example i. Exact
adjoints get it from their own reverse pass; approximate ones hand costates at a few checkpoints to the `Engine`, which
contracts them with per-example gradients. Both yield parts that are added up, so that nothing above needs to know which it was.
"""

from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.trajectory import Run


@runtime_checkable
class Adjoint(Protocol):
    """A way to get costates, exact or approximate, together with their contraction."""

    citation: ClassVar[str]
    """BibTeX of the method's source."""

    unit: ClassVar[str]
    """Unit of the scores."""

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield scores part by part; they are added up over all parts."""
        ...
