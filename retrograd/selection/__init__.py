"""Which training data to keep, and how much of it: proposals, what they should change, and what retraining says."""

from retrograd.selection.distillation import Distillation, suggested_weight, with_teacher
from retrograd.selection.effects import effect, effects
from retrograd.selection.mislabelled import find_mislabelled
from retrograd.selection.pruning import el2n, prune
from retrograd.selection.reweighting import reweight
from retrograd.selection.selection import Effect, Selection

__all__ = [
    "Distillation",
    "Effect",
    "Selection",
    "effect",
    "effects",
    "el2n",
    "find_mislabelled",
    "prune",
    "reweight",
    "suggested_weight",
    "with_teacher",
]
