"""Approximations of the Gauss-Newton matrix, one a file, and products with the exact one."""

from retrograd.curvature.arnoldi import Arnoldi
from retrograd.curvature.diagonal import Diagonal
from retrograd.curvature.ekfac import EKFAC
from retrograd.curvature.fisher import Fisher, ThinOperator
from retrograd.curvature.gauss_newton import GaussNewton, gauss_newton_product
from retrograd.curvature.hessian import Hessian, hessian_product
from retrograd.curvature.kfac import KFAC
from retrograd.curvature.nystrom import Nystrom
from retrograd.curvature.operator import BlockOperator, Curvature, DiagonalBlock, KroneckerBlock, Operator
from retrograd.curvature.products import ProductOperator
from retrograd.curvature.projected import ProjectedGaussNewton, ProjectedOperator
from retrograd.curvature.tangent_kernel import EmpiricalKernel, relative_change

__all__ = [
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "BlockOperator",
    "Curvature",
    "Diagonal",
    "DiagonalBlock",
    "EmpiricalKernel",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "KroneckerBlock",
    "Nystrom",
    "Operator",
    "ProductOperator",
    "ProjectedGaussNewton",
    "ProjectedOperator",
    "ThinOperator",
    "gauss_newton_product",
    "hessian_product",
    "relative_change",
]
