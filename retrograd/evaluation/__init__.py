"""Were the predictions right? Retraining with other data, and measures of agreement."""

from retrograd.evaluation.agreement import calibration, linear_datamodeling_score
from retrograd.evaluation.brittleness import Brittleness, brittleness
from retrograd.evaluation.compare import Comparison, compare
from retrograd.evaluation.detection import Detection, mislabelled_detection
from retrograd.evaluation.reliability import additive_ceiling, noise_ceiling, one_seed_wall
from retrograd.evaluation.retrained import Retrained
from retrograd.evaluation.retraining import retrain
from retrograd.evaluation.self_check import check, evaluate
from retrograd.evaluation.study import Study
from retrograd.evaluation.subsets import leave_one_out, random_subsets
from retrograd.evaluation.tail_patch import TailPatch, tail_patch

__all__ = [
    "Brittleness",
    "Comparison",
    "Detection",
    "Retrained",
    "Study",
    "TailPatch",
    "additive_ceiling",
    "brittleness",
    "calibration",
    "check",
    "compare",
    "evaluate",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabelled_detection",
    "noise_ceiling",
    "one_seed_wall",
    "random_subsets",
    "retrain",
    "tail_patch",
]
