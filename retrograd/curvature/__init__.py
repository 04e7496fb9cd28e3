"""Approximations of the Gauss-Newton matrix, one a file, and products with the exact one."""

from retrograd.curvature.ekfac import EKFAC
from retrograd.curvature.fisher import Fisher, ThinOperator
from retrograd.curvature.gauss_newton import gauss_newton_product
from retrograd.curvature.kfac import KFAC
from retrograd.curvature.operator import BlockOperator, Curvature, DiagonalBlock, KroneckerBlock, Operator

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockOperator",
    "Curvature",
    "DiagonalBlock",
    "Fisher",
    "KroneckerBlock",
    "Operator",
    "ThinOperator",
    "gauss_newton_product",
]
