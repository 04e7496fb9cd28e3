"""Which change of the data a score is meant to predict, and at which run to linearise for it.

A score is a derivative, and a derivative belongs to a point. Removing one example in a hundred stays near the run that
happened. Retraining on a random half does not: such a run makes half as many steps, so it is less far along than the
recorded one, and so is every derivative of it. The remedy is to linearise a run of **matched training time**:

* ``removal="deletion"``: the removed examples leave the data set, and the same number of epochs makes ``keep`` times as
  many steps. Matching run: every learning rate × ``keep``.
* ``removal="zero_weight"``: the batches stay, the removed examples weigh nothing. Matching run: every example weight
  ``keep``, which is the mean of the weights over random subsets. (Under Adam uniform weights change nothing, and neither
  does zero-weighting a random half shorten the run: the matching run is the recorded one in effect.)

For SGD without weight decay the two are the same run. See ``docs/linearisation.md`` for what was measured.
"""

from dataclasses import dataclass
from typing import Literal

from retrograd.errors import InputError

Removal = Literal["deletion", "zero_weight"]
Seeds = Literal["same", "fresh"]


@dataclass(frozen=True)
class Counterfactual:
    """A change of the training data: random subsets of share ``keep`` remain.

    Args:
        keep: the share of the training examples that is kept, in (0, 1]. 1 means small removals.
        removal: how examples are removed, ``"deletion"`` or ``"zero_weight"``.
        seeds: whether retraining uses the ``"same"`` initial model, order and random numbers, or ``"fresh"`` ones. It
            does not change where one run is linearised; with fresh seeds, average several runs.

    >>> Counterfactual(keep=0.5, removal="deletion").matched_inputs()   # factors on learning rates and on weights
    (0.5, 1.0)
    >>> Counterfactual(keep=0.5, removal="zero_weight").matched_inputs()
    (1.0, 0.5)
    """

    keep: float = 1.0
    removal: Removal = "zero_weight"
    seeds: Seeds = "same"

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"keep is the share of examples that stays, 0 < keep <= 1, got {self.keep}.")
        if self.removal not in ("deletion", "zero_weight"):
            raise InputError(f"removal must be 'deletion' or 'zero_weight', got {self.removal!r}.")
        if self.seeds not in ("same", "fresh"):
            raise InputError(f"seeds must be 'same' or 'fresh', got {self.seeds!r}.")

    def __str__(self) -> str:
        """Name the counterfactual in a few words."""
        how = "weight zero" if self.removal == "zero_weight" else "deletion"
        share = "small removals" if self.keep == 1.0 else f"keeping {self.keep:.0%}"
        return f"{share} by {how}, {self.seeds} seeds"

    def matched_inputs(self) -> tuple[float, float]:
        """Return the factors on the learning rates and on the example weights of the matching run."""
        return (self.keep, 1.0) if self.removal == "deletion" else (1.0, self.keep)

    @property
    def kept_weight(self) -> float:
        """Weight, at the matching run, of an example that stays: what it has more than one of weight 0 that goes.

        With deletion, those that stay fill the batches of a run that is ``keep`` times as long. At the matching run, whose
        steps are ``keep`` times as large and not fewer, that is a weight of 1 / ``keep``.
        """
        return 1 / self.keep if self.removal == "deletion" else 1.0
