"""Optimizers of our own, in the place of ``torch.optim``'s: learned learning rates, filtered gradients, games."""

from retrograd.optim.aggregated_momentum import AggregatedSGD
from retrograd.optim.complex_adam import ComplexAdam
from retrograd.optim.complex_momentum import ComplexSGD
from retrograd.optim.extragradient import ExtraGradient
from retrograd.optim.gradient_filter import FilterStep, GradientFilter
from retrograd.optim.hyper_adam import HyperAdam
from retrograd.optim.hyper_optimizer import HyperOptimizer
from retrograd.optim.hyper_sgd import HyperSGD
from retrograd.optim.lookahead import Lookahead
from retrograd.optim.optimistic import OptimisticAdam, OptimisticSGD

__all__ = [
    "AggregatedSGD",
    "ComplexAdam",
    "ComplexSGD",
    "ExtraGradient",
    "FilterStep",
    "GradientFilter",
    "HyperAdam",
    "HyperOptimizer",
    "HyperSGD",
    "Lookahead",
    "OptimisticAdam",
    "OptimisticSGD",
]
