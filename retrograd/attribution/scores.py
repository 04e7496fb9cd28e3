"""Scores of training examples: what they mean, how to read them, and their file format.

``values[q, i] = d measurement_q / d w_i``, summed over every step that used example i. Positive: more weight on example i
raises measurement q. Unit: that of the measurement, per unit of example weight. Orientation: (query, example), always.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrograd.adjoint import Queries
from retrograd.attribution.check import Check
from retrograd.errors import CorruptRecord, InputError, UnknownExample
from retrograd.files import read_columns, write_columns
from retrograd.trajectory import Counterfactual


@dataclass(frozen=True)
class Ranked:
    """One training example and its score for a query."""

    example_id: int
    score: float


@dataclass(frozen=True)
class Scores:
    """Scores of all training examples for some queries.

    Attributes:
        values: ``[query, example]``.
        example_ids: id of each column.
        query_ids: id of each row.
        method: how they were computed.
        unit: their unit.
        trajectory_digest: digest of the run, or of all runs of an average joined by commas.
        counterfactual: the change of the data that they are meant to predict.
        notes: what the method and the run reported: coverage, roughness, lost energy, processor seconds.
        queries: what was asked, so that it can be asked again of retrained models; not in files.
        check: predictions beside outcomes of retraining, if they were compared (`retrograd.check`).
        tokens: each score split over the positions of its example, if that was asked for; not in files.

    >>> scores = Scores(torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([10, 11, 12]), torch.tensor([0]), "by hand")
    >>> scores.top(0, k=2)
    [Ranked(example_id=10, score=1.0), Ranked(example_id=12, score=0.5)]
    >>> scores.predicted_change(removed=[11])
    tensor([2.])
    """

    values: Float[Tensor, "query example"]
    example_ids: Int[Tensor, " example"]
    query_ids: Int[Tensor, " query"]
    method: str
    unit: str = "measurement per unit of example weight"
    trajectory_digest: str = ""
    counterfactual: Counterfactual = field(default_factory=Counterfactual)
    notes: Mapping[str, Any] = field(default_factory=dict)
    queries: Queries | None = field(default=None, repr=False, compare=False)
    check: Check | None = field(default=None, compare=False)
    tokens: Float[Tensor, "query example position"] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.values.shape != (len(self.query_ids), len(self.example_ids)):
            raise InputError(
                f"scores of {len(self.query_ids)} queries and {len(self.example_ids)} examples must have shape "
                f"({len(self.query_ids)}, {len(self.example_ids)}), got {tuple(self.values.shape)}."
            )

    def __repr__(self) -> str:
        """Say what is inside, on one line."""
        return (
            f"<Scores {self.method}: {len(self.query_ids)} queries × {len(self.example_ids)} examples, {self.counterfactual}>"
        )

    def of(self, query: int) -> Float[Tensor, " example"]:
        """Return the scores of one query, by its id."""
        return self.values[self._row(query)]

    def top(self, query: int, k: int = 10, *, lowering: bool = False) -> list[Ranked]:
        """Return the ``k`` examples that raise a query's measurement most, strongest first.

        Args:
            query: id of the query.
            k: how many.
            lowering: instead those that lower it most.
        """
        scores = self.of(query)
        best = scores.topk(min(k, len(scores)), largest=not lowering)
        return [
            Ranked(int(self.example_ids[place]), float(score)) for score, place in zip(best.values, best.indices, strict=True)
        ]

    def predicted_change(self, removed: Sequence[int] | Tensor) -> Float[Tensor, " query"]:
        """Predict how each measurement changes when these examples, of weight 1, are removed: minus the sum of their scores.

        (Times 1 / ``keep`` where a random share ``keep`` stays and the rest is deleted, see `Counterfactual.kept_weight`.)

        Args:
            removed: ids of the removed examples, each at most once.
        """
        ids = torch.as_tensor(removed, dtype=torch.int64)
        if len(ids.unique()) != len(ids):
            raise InputError("an example can be removed only once; the list of removed ids has duplicates.")
        unknown = ids[~torch.isin(ids, self.example_ids)]
        if len(unknown):
            raise UnknownExample(f"the scores have no example with the id {unknown.tolist()[:5]}.")
        return -self.counterfactual.kept_weight * self.values[:, torch.isin(self.example_ids, ids)].sum(dim=1)

    def predicted_subset(self, kept: Tensor) -> Float[Tensor, "subset query"]:
        """Predict the change of each measurement when only a subset is kept, or weights are multiplied by factors.

        Args:
            kept: True for the examples that stay, or a factor on each weight, in the order of ``example_ids``, shape
                ``[subset, example]``.
        """
        return self.counterfactual.kept_weight * (kept.to(self.values) - 1) @ self.values.T

    def asked(self, queries: Any = None) -> Queries:
        """Return what was asked, to ask it again.

        Args:
            queries: the same queries once more; needed for scores that come from a file, which holds only their ids.
        """
        found = self.queries if queries is None else queries if isinstance(queries, Queries) else Queries(queries)
        if found is None:
            raise InputError("these scores do not hold their queries, as they come from a file: give them again, queries=...")
        if not torch.equal(found.ids, self.query_ids):
            raise InputError(f"these are other queries than those of the scores, whose ids are {self.query_ids.tolist()[:10]}.")
        return found

    @staticmethod
    def mean(parts: "Sequence[Scores]") -> "Scores":
        """Average scores of several runs (an ensemble); ids must agree."""
        if not parts:
            raise InputError("there is nothing to average.")
        first = parts[0]
        for other in parts[1:]:
            if not torch.equal(other.example_ids, first.example_ids) or not torch.equal(other.query_ids, first.query_ids):
                raise InputError("scores of other examples or queries cannot be averaged; their ids must agree, in order.")
            if other.unit != first.unit or other.counterfactual != first.counterfactual:
                raise InputError(f"{first!r} and {other!r} do not mean the same: unit and counterfactual must agree.")
        values = torch.stack([part.values for part in parts]).mean(0)
        digest = ",".join(part.trajectory_digest for part in parts)
        notes = {**first.notes, "runs": len(parts)}
        if all("seconds" in part.notes for part in parts):
            notes["seconds"] = sum(part.notes["seconds"] for part in parts)
        split = [part.tokens for part in parts if part.tokens is not None]
        tokens = torch.stack(split).mean(0) if len(split) == len(parts) else None
        return replace(first, values=values, trajectory_digest=digest, notes=notes, check=None, tokens=tokens)

    # ------------------------------------------------------------------ files

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write a table: one row an example, a column ``example_id`` and one column ``query_<id>`` for each query."""
        values = self.values.cpu().float() if self.values.dtype == torch.bfloat16 else self.values.cpu()
        columns = {"example_id": self.example_ids.numpy()}
        columns |= {f"query_{int(query)}": row.numpy() for query, row in zip(self.query_ids, values, strict=True)}
        about = {
            "method": self.method,
            "unit": self.unit,
            "trajectory_digest": self.trajectory_digest,
            "counterfactual": [self.counterfactual.keep, self.counterfactual.removal, self.counterfactual.seeds],
            "notes": dict(self.notes),
            "check": None if self.check is None else self.check.plain(),
        }
        write_columns(Path(path), columns, about)

    @staticmethod
    def from_parquet(path: str | os.PathLike[str]) -> "Scores":
        """Read what `to_parquet` wrote.

        Raises:
            CorruptRecord: the file is torn, or no table of scores.
        """
        columns, about = read_columns(Path(path))
        try:
            queries = [name for name in columns if name.startswith("query_")]
            return Scores(
                torch.from_numpy(np.stack([columns[name] for name in queries])),
                torch.from_numpy(columns["example_id"].copy()),
                torch.tensor([int(name.removeprefix("query_")) for name in queries]),
                about["method"],
                about["unit"],
                about["trajectory_digest"],
                Counterfactual(*about["counterfactual"]),
                about["notes"],
                check=None if about["check"] is None else Check.of_plain(about["check"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise CorruptRecord(f"{path} is not a whole table: a table of scores lacks {error}") from error

    def _row(self, query: int) -> int:
        found = (self.query_ids == query).nonzero()
        if not len(found):
            raise UnknownExample(f"there is no query {query}. Query ids: {self.query_ids.tolist()[:10]}.")
        return int(found[0])
