"""What methods, engine and the sum over both exchange: parts of scores, costates at a checkpoint, and notes."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from retrograd.params import Params
from retrograd.trajectory import TrainingState


@dataclass(frozen=True)
class ScorePart:
    """Scores of some examples: ``values[q, i]`` is to be added to the score of ``example_ids[i]``.

    Attributes:
        example_ids: the examples.
        values: their scores.
        tokens: the same split over the positions of each example, if that was asked for; its sum over positions is ``values``.
    """

    example_ids: Int[Tensor, " example"]
    values: Float[Tensor, "query example"]
    tokens: Float[Tensor, "query example position"] | None = None


@dataclass(frozen=True)
class Probe:
    """Costates at one or more checkpoints, to be contracted with the examples' gradients there.

        part[q, i] = −exposure_i · ⟨vectors_q, ḡ_i⟩,    ḡ_i = mean over the checkpoints of ∇ℓ_i(θ_c)

    Attributes:
        states: θ_c; losses are taken in evaluation mode.
        vectors: a leading axis ``query`` on every leaf.
        exposure: how much of each example went in, in the order of the run's ids; examples with 0 are not looked at.
        cosine: divide by the norm of ḡ_i.
    """

    states: tuple[TrainingState, ...]
    vectors: Params
    exposure: Float[Tensor, " example"]
    cosine: bool = False


@dataclass
class Notes:
    """What a method has to say about how it got its scores, stored with them."""

    entries: dict[str, Any] = field(default_factory=dict)

    def add(self, **entries: Any) -> None:
        """Add entries; each must be a plain number, text or None."""
        self.entries.update(entries)
