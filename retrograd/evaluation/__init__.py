"""Were the predictions right? Retraining with other data, and measures of agreement."""

from retrograd.evaluation.agreement import linear_datamodeling_score
from retrograd.evaluation.retraining import random_subsets, retrain

__all__ = ["linear_datamodeling_score", "random_subsets", "retrain"]
