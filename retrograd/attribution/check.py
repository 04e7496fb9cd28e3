"""How far scores can be trusted: what they predicted, what came out, and what the best possible prediction would have got."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.trajectory import Counterfactual


@dataclass(frozen=True)
class Agreement:
    """A statistic with its interval.

    Attributes:
        value: mean over queries.
        low: lower end of the interval.
        high: upper end.
        confidence: what share of such intervals cover the truth.
        per_query: the statistic of each query.
    """

    value: float
    low: float
    high: float
    confidence: float
    per_query: Float[Tensor, " query"]

    def __str__(self) -> str:
        """Give the value and its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Check:
    """What scores predicted for retrained models, beside what came out.

    Attributes:
        predicted: predicted change of each measurement, up to a constant of each query.
        actual: the measurement after retraining, averaged over seeds.
        pearson: correlation over subsets, mean over queries.
        spearman: rank correlation: the linear datamodeling score.
        slope: how much actual change goes with one unit of predicted change; 1 where scores are in the right unit.
        counterfactual: what was done to the data.
        examples: number N of training examples.
        seeds: number of retrainings of each subset.
        ceilings: rank correlations that no prediction of a kind can pass. ``"noise"``: any prediction, because the truth is
            a mean over so few seeds. ``"one seed"``: perfect knowledge of what one seed's own retraining would do.
            ``"additive"``: any sum of one number for each example.
        advice: what to try, and the measured facts that say so; empty where the predictions hold.
    """

    predicted: Float[Tensor, "subset query"]
    actual: Float[Tensor, "subset query"]
    pearson: Agreement
    spearman: Agreement
    slope: Agreement
    counterfactual: Counterfactual
    examples: int
    seeds: int = 1
    ceilings: Mapping[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        agreements = {name: _agreement_plain(getattr(self, name)) for name in _AGREEMENTS}
        return {
            "predicted": _array_plain(self.predicted),
            "actual": _array_plain(self.actual),
            **agreements,
            "counterfactual": [self.counterfactual.keep, self.counterfactual.removal, self.counterfactual.seeds],
            "examples": self.examples,
            "seeds": self.seeds,
            "ceilings": dict(self.ceilings),
            "advice": list(self.advice),
        }

    @staticmethod
    def of_plain(plain: Mapping[str, Any]) -> "Check":
        """Undo `plain`."""
        agreements = {name: Agreement(**{**plain[name], "per_query": _array(plain[name]["per_query"])}) for name in _AGREEMENTS}
        return Check(
            predicted=_array(plain["predicted"]),
            actual=_array(plain["actual"]),
            counterfactual=Counterfactual(*plain["counterfactual"]),
            examples=plain["examples"],
            seeds=plain["seeds"],
            ceilings=plain["ceilings"],
            advice=tuple(plain["advice"]),
            **agreements,
        )

    def __str__(self) -> str:
        """Give the correlation, its interval and the counterfactual, in one line."""
        r = self.pearson
        return f"predicted vs actual r = {r.value:.2f} [{r.low:.2f}, {r.high:.2f}] at {self.counterfactual}"


_AGREEMENTS = ("pearson", "spearman", "slope")


def _agreement_plain(found: Agreement) -> dict[str, Any]:
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "confidence": found.confidence,
        "per_query": _array_plain(found.per_query),
    }


def _array_plain(values: Tensor) -> dict[str, Any]:
    array = values.detach().cpu().contiguous().numpy()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def _array(plain: Mapping[str, Any]) -> Tensor:
    array = np.frombuffer(base64.b64decode(plain["base64"], validate=True), plain["dtype"])
    return torch.from_numpy(array.reshape(plain["shape"]).copy())
