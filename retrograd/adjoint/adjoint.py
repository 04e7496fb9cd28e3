"""What a method of attribution is: it walks a run and yields, part by part, scores of the examples that went in.

Every method returns the same quantity, d f_q / d w_i: how measurement q moves per unit of weight on example i. Exact
adjoints get it from their own reverse pass; approximate ones contract costates with per-example gradients. Both yield
parts that are added up, so that nothing above needs to know which it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from retrograd.adjoint.queries import Queries
from retrograd.trajectory import Run


@dataclass(frozen=True)
class ScorePart:
    """Scores of some examples: ``values[q, i]`` is to be added to the score of ``example_ids[i]``."""

    example_ids: Int[Tensor, " example"]
    values: Float[Tensor, "query example"]


@dataclass
class Notes:
    """What a method has to say about how it got its scores, stored with them."""

    entries: dict[str, Any] = field(default_factory=dict)

    def add(self, **entries: Any) -> None:
        """Add entries; each must be a plain number, text or None."""
        self.entries.update(entries)


@runtime_checkable
class Adjoint(Protocol):
    """A way to get costates, exact or approximate, together with their contraction."""

    citation: ClassVar[str]
    """BibTeX of the method's source."""

    unit: ClassVar[str]
    """Unit of the scores."""

    def parts(self, run: Run, queries: Queries, notes: Notes, /) -> Iterator[ScorePart]:
        """Yield scores part by part; they are added up over all parts."""
        ...
