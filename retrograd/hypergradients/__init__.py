"""Hypergradients: what to change in training, of anything that went into it."""

from retrograd.hypergradients.audit import Arm, Audit, audit
from retrograd.hypergradients.chain import Chain, chain
from retrograd.hypergradients.forward import Forward
from retrograd.hypergradients.hypergradient import hypergradient
from retrograd.hypergradients.meta_training import MetaTraining, OuterStep, meta_train
from retrograd.hypergradients.result import Hypergradient
from retrograd.hypergradients.verdict import Verdict, verify

__all__ = [
    "Arm",
    "Audit",
    "Chain",
    "Forward",
    "Hypergradient",
    "MetaTraining",
    "OuterStep",
    "Verdict",
    "audit",
    "chain",
    "hypergradient",
    "meta_train",
    "verify",
]
