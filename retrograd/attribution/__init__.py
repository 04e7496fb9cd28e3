"""Why did the model do this? Scores of training examples for queries."""

from retrograd.attribution.attribute import attribute, self_influence
from retrograd.attribution.check import Agreement, Check
from retrograd.attribution.coverage import Coverage, coverage
from retrograd.attribution.scores import Ranked, Scores

__all__ = ["Agreement", "Check", "Coverage", "Ranked", "Scores", "attribute", "coverage", "self_influence"]
