"""Hypergradients: what to change in training, of anything that went into it."""

from retrograd.hypergradients.audit import Arm, Audit, audit
from retrograd.hypergradients.chain import Chain, chain
from retrograd.hypergradients.commentary import (
    Blended,
    BlendingMatrix,
    ExampleWeights,
    Masked,
    MaskedModel,
    MaskNetwork,
    Weighted,
    WeightNetwork,
)
from retrograd.hypergradients.commentary_file import Commentary
from retrograd.hypergradients.distillation import distil_dataset
from retrograd.hypergradients.distilled_data import DistilledData
from retrograd.hypergradients.forward import Forward
from retrograd.hypergradients.hypergradient import hypergradient
from retrograd.hypergradients.initialisation import adapt, initialisation_gradient, meta_initialise
from retrograd.hypergradients.label_smoothing import label_smoothing_gradient
from retrograd.hypergradients.learned_initialiser import LearnedInitialiser, solve
from retrograd.hypergradients.meta_training import MetaTraining, OuterStep, meta_train
from retrograd.hypergradients.patching import Patched, Patching, patch
from retrograd.hypergradients.planner import Option, Plan, plan
from retrograd.hypergradients.pretraining import ContrastiveLoss, MultitaskLoss, TaskWeights, pretraining_estimator
from retrograd.hypergradients.result import Hypergradient
from retrograd.hypergradients.verdict import Verdict, verify

__all__ = [
    "Arm",
    "Audit",
    "Blended",
    "BlendingMatrix",
    "Chain",
    "Commentary",
    "ContrastiveLoss",
    "DistilledData",
    "ExampleWeights",
    "Forward",
    "Hypergradient",
    "LearnedInitialiser",
    "MaskNetwork",
    "Masked",
    "MaskedModel",
    "MetaTraining",
    "MultitaskLoss",
    "Option",
    "OuterStep",
    "Patched",
    "Patching",
    "Plan",
    "TaskWeights",
    "Verdict",
    "WeightNetwork",
    "Weighted",
    "adapt",
    "audit",
    "chain",
    "distil_dataset",
    "hypergradient",
    "initialisation_gradient",
    "label_smoothing_gradient",
    "meta_initialise",
    "meta_train",
    "patch",
    "plan",
    "pretraining_estimator",
    "solve",
    "verify",
]
