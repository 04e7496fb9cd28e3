"""What a selection of training data is: a proposal, why, and what it does to an outcome, predicted and verified."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrograd.errors import InputError


@dataclass(frozen=True)
class Effect:
    """What an outcome became after retraining, and by how much it changed.

    Attributes:
        outcome: mean over seeds and validation examples.
        change: against training on everything, with the same seeds and validation examples; below 0 is better for a loss.
        low: lower end of the 95 % interval of the change, over validation examples and, where there are several, seeds.
        high: upper end.
        seeds: number of seeds.
    """

    outcome: float
    change: float
    low: float
    high: float
    seeds: int = 1

    def __str__(self) -> str:
        """Give the outcome, its change and the interval."""
        return f"{self.outcome:.4f} ({self.change:+.4f} [{self.low:+.4f}, {self.high:+.4f}])"


@dataclass(frozen=True)
class Selection:
    """A proposal for the training data.

    Attributes:
        example_ids: id of each example.
        values: what the examples were ranked by; the method says what that is.
        weights: proposed factor on each example's weight; 0 removes it.
        method: how it was found.
        predicted: predicted change of the validation loss, first order; None where nothing predicts it.
        verified: what retraining gave: ``"selected"`` for this proposal, and controls under their own names.

    >>> found = Selection(torch.tensor([7, 8, 9]), torch.tensor([0.1, 5.0, 0.2]), torch.tensor([1.0, 0.0, 1.0]), "by hand")
    >>> found.removed_ids.tolist(), found.kept_ids.tolist(), found.ranked(2).tolist()
    ([8], [7, 9], [8, 9])
    """

    example_ids: Int[Tensor, " example"]
    values: Float[Tensor, " example"]
    weights: Float[Tensor, " example"]
    method: str
    predicted: float | None = None
    verified: Mapping[str, Effect] = field(default_factory=dict)

    def __post_init__(self):
        if not self.example_ids.shape == self.values.shape == self.weights.shape:
            raise InputError(
                f"a selection needs one value and one weight an example, got {len(self.example_ids)} ids, {len(self.values)} "
                f"values and {len(self.weights)} weights."
            )

    def __repr__(self) -> str:
        """Say what is proposed, on one line."""
        kept = int((self.weights != 0).sum())
        return f"<Selection by {self.method}: {kept} of {len(self.weights)} examples stay>"

    @property
    def kept_ids(self) -> Int[Tensor, " kept"]:
        """Ids of the examples that stay."""
        return self.example_ids[self.weights != 0]

    @property
    def removed_ids(self) -> Int[Tensor, " removed"]:
        """Ids of the examples that go."""
        return self.example_ids[self.weights == 0]

    def ranked(self, k: int | None = None) -> Int[Tensor, " ranked"]:
        """Return the ids with the ``k`` highest values, highest first; all if k is not given."""
        order = torch.argsort(self.values, descending=True, stable=True)
        return self.example_ids[order[: len(order) if k is None else k]]
