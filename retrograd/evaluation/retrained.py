"""What came of retraining: the measurements of every subset and seed, and what they are measurements of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from retrograd.errors import InputError
from retrograd.trajectory import Counterfactual


@dataclass(frozen=True)
class Retrained:
    """Outcomes of retraining one run on several subsets, with the same seeds or with fresh ones.

    Attributes:
        values: the measurements.
        factors: factor on each example's recorded weight; 0 or False where it was removed.
        seeds: the fresh seeds, shared by all subsets; None stands for the recorded one.
        example_ids: id of each example.
        query_ids: id of each query.
        counterfactual: what was done to the data.
        trajectory_digest: digest of the run that was varied.

    >>> found = Retrained(torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2), (4, 5), torch.arange(2), torch.tensor([0]))
    >>> found.outcomes                                                     # mean over seeds, [subset, query]
    tensor([[2.]])
    """

    values: Float[Tensor, "subset seed query"]
    factors: Shaped[Tensor, "subset example"]
    seeds: tuple[int | None, ...]
    example_ids: Int[Tensor, " example"]
    query_ids: Int[Tensor, " query"]
    counterfactual: Counterfactual = field(default_factory=Counterfactual)
    trajectory_digest: str = ""

    def __repr__(self) -> str:
        """Say what is inside, on one line."""
        subsets, seeds, queries = self.values.shape
        return f"<Retrained: {subsets} subsets × {seeds} seeds × {queries} queries, {self.counterfactual}>"

    @property
    def outcomes(self) -> Float[Tensor, "subset query"]:
        """The measurements, averaged over seeds."""
        return self.values.mean(1)

    @staticmethod
    def merge(parts: "Sequence[Retrained]") -> "Retrained":
        """Join retrainings of the same run, made in different places: other subsets, or other seeds of the same subsets.

        Args:
            parts: what was made in each place.

        Raises:
            InputError: they are of different runs, queries or counterfactuals, or differ in both subsets and seeds.
        """
        if not parts:
            raise InputError("there is nothing to merge.")
        merged = parts[0]
        for part in parts[1:]:
            for name in ("trajectory_digest", "example_ids", "query_ids"):
                mine, other = getattr(merged, name), getattr(part, name)
                if not (torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other):
                    raise InputError(f"{merged!r} and {part!r} do not belong together: their {name} differ.")
            if (merged.counterfactual.removal, merged.counterfactual.seeds) != (
                part.counterfactual.removal,
                part.counterfactual.seeds,
            ):
                raise InputError(f"{merged!r} and {part!r} ask different questions of the data.")
            if merged.seeds == part.seeds and not _rows(merged.factors) & _rows(part.factors):
                factors = torch.cat([merged.factors, part.factors.to(merged.factors)])
                shares = replace(merged.counterfactual, keep=share_kept(factors))
                merged = replace(merged, values=torch.cat([merged.values, part.values]), factors=factors, counterfactual=shares)
            elif torch.equal(merged.factors, part.factors) and not set(merged.seeds) & set(part.seeds):
                values = torch.cat([merged.values, part.values], dim=1)
                merged = replace(merged, values=values, seeds=merged.seeds + part.seeds)
            else:
                raise InputError(
                    "retrainings can be merged if they have the same seeds and no subset in common, or the same subsets and no "
                    f"seed in common; got seeds {merged.seeds} and {part.seeds} on "
                    f"{len(_rows(merged.factors) & _rows(part.factors))} common subsets of {len(part.factors)}."
                )
        return merged


def share_kept(factors: Tensor) -> float:
    """Return the mean share of the examples that is kept; what has a factor other than 0 is."""
    return (factors != 0).double().mean().item()


def _rows(factors: Tensor) -> set[bytes]:
    return {row.double().numpy().tobytes() for row in factors}
