"""Optimizers of our own, in the place of ``torch.optim``'s: learned learning rates, filtered gradients."""

from retrograd.optim.gradient_filter import FilterStep, GradientFilter
from retrograd.optim.hyper_adam import HyperAdam
from retrograd.optim.hyper_optimizer import HyperOptimizer
from retrograd.optim.hyper_sgd import HyperSGD

__all__ = ["FilterStep", "GradientFilter", "HyperAdam", "HyperOptimizer", "HyperSGD"]
