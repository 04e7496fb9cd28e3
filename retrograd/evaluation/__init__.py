"""Were the predictions right? Retraining with other data, and measures of agreement."""

from retrograd.evaluation.agreement import linear_datamodeling_score
from retrograd.evaluation.retrained import Retrained
from retrograd.evaluation.retraining import retrain
from retrograd.evaluation.study import Study
from retrograd.evaluation.subsets import leave_one_out, random_subsets

__all__ = ["Retrained", "Study", "leave_one_out", "linear_datamodeling_score", "random_subsets", "retrain"]
