"""Why did the model do this? Scores of training examples for queries."""

from retrograd.attribution.attribute import attribute, self_influence
from retrograd.attribution.blending import Shares, shares_by_agreement
from retrograd.attribution.check import Agreement, Check
from retrograd.attribution.choosing import Choice, choose
from retrograd.attribution.coverage import Coverage, coverage
from retrograd.attribution.scores import Ranked, Scores

__all__ = [
    "Agreement",
    "Check",
    "Choice",
    "Coverage",
    "Ranked",
    "Scores",
    "Shares",
    "attribute",
    "choose",
    "coverage",
    "self_influence",
    "shares_by_agreement",
]
