"""A few directions in place of many vectors.

    G = U S Vᵀ,    G ≈ (U_r S_r) V_rᵀ

The rows of V_rᵀ are carried in place of the rows of G, and U_r S_r mixes what comes out, because everything that a costate
meets is linear. What is lost is the share 1 − Σ_{j ≤ r} s_j² / Σ_j s_j² of the rows' energy. The decomposition is that of the
Gram matrix G Gᵀ, in float64. Cost: query² · P. Memory: [rank, P].
"""

import torch
from jaxtyping import Float
from torch import Tensor


def compress(rows: Float[Tensor, "query P"], rank: int) -> tuple[Float[Tensor, "rank P"], Float[Tensor, "query rank"], float]:
    """Return an orthonormal basis of the ``rank`` strongest directions, the mixing back, and the lost share of energy.

    >>> rows = torch.tensor([[0.0, 3.0], [0.0, 4.0], [2.5, 0.0]])
    >>> basis, mixing, lost = compress(rows, rank=1)
    >>> torch.allclose(mixing @ basis, rows * torch.tensor([0.0, 1.0]), atol=1e-6), round(lost, 6)
    (True, 0.2)
    """
    gram = (rows.double() @ rows.double().T) if rows.numel() < 1 << 24 else (rows @ rows.T).double()
    energies, left = torch.linalg.eigh(gram)
    energies, left = energies.flip(0).clamp(min=0), left.flip(1)
    kept = max(1, min(rank, int((energies > energies[0] * 1e-14).sum())))
    scale = energies[:kept].sqrt().clamp(min=torch.finfo(energies.dtype).tiny)
    basis = ((left[:, :kept] / scale).T.to(rows) @ rows).contiguous()
    lost = 1.0 - (energies[:kept].sum() / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)).item()
    return basis, (left[:, :kept] * scale).to(rows), lost
