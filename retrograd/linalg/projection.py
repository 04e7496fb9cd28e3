"""A random projection of long vectors, drawn anew wherever it is needed.

    G [d, P],  G_jp = ±1/√d at random        down(v) = G v        up(u) = Gᵀ u        E[GᵀG] = I

so ⟨Gu, Gv⟩ is ⟨u, v⟩ on average, with variance (‖u‖² ‖v‖² + ⟨u, v⟩² − 2 Σ_p u_p² v_p²) / d.

d, P       ``dimension`` and ``size``. From d = P on there is nothing to gain, and G is the identity.

G is never whole. Column p is bits of a counter-based generator (Philox 4×64 with the seed as its key) from counter p · ⌈d/256⌉
on, so any block of columns can be drawn by itself, and they are the same on every machine. Signs in place of normal numbers
are one bit each, have no rounding, and less variance: that of normal numbers lacks the last term.

Assumptions: none of the vectors, as long as they do not depend on G. Cost: n · d · P multiplications for n vectors. Memory: one
block in the vectors' dtype; blocks are kept, one byte an entry, as far as ``memory`` goes.

References: Johnson, Lindenstrauss (1984); Achlioptas (2003), "Database-friendly random projections"; Salmon et al. (2011),
"Parallel random numbers: as easy as 1, 2, 3".
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError

_ENTRIES = 1 << 22  # of a block
_WORD = 256  # bits that a step of the counter gives


class Projection:
    """G, by its products.

    Args:
        size: P, the length of the vectors.
        dimension: d, how many numbers stand for a vector.
        seed: of G.
        block: columns taken together; results depend on it by rounding alone.
        memory: bytes in which blocks may be kept.

    >>> projection = Projection(size=1000, dimension=64, seed=1)
    >>> projection.down(torch.ones(3, 1000)).shape, Projection(3, 8).down(torch.ones(1, 3))
    (torch.Size([3, 64]), tensor([[1., 1., 1.]]))
    """

    def __init__(self, size: int, dimension: int, seed: int = 0, *, block: int | None = None, memory: int = 1 << 27):
        if size < 1 or dimension < 1 or (block is not None and block < 1) or seed < 0:
            raise InputError(
                f"a projection needs a size, dimension and block of at least 1 and a seed of at least 0; got size={size}, "
                f"dimension={dimension}, block={block}, seed={seed}."
            )
        self.size, self.dimension, self.seed, self._room = size, min(size, dimension), seed, memory
        self._block = block or max(1, _ENTRIES // dimension)
        self._kept: dict[int, Tensor] = {}

    def down(self, vectors: Float[Tensor, "n P"]) -> Float[Tensor, "n d"]:
        """Return G v of every row."""
        if self.dimension == self.size:
            return vectors
        result = vectors.new_zeros(len(vectors), self.dimension)
        for start, columns in self._blocks(vectors):
            result += vectors[:, start : start + len(columns)] @ columns
        return result / self.dimension**0.5

    def up(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n P"]:
        """Return Gᵀ u of every row."""
        if self.dimension == self.size:
            return rows
        result = rows.new_empty(len(rows), self.size)
        for start, columns in self._blocks(rows):
            torch.matmul(rows, columns.T, out=result[:, start : start + len(columns)])
        return result / self.dimension**0.5

    def _blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the first column of each block and its signs, ``[column, d]``."""
        for start in range(0, self.size, self._block):
            signs = self._kept.get(start)
            if signs is None:
                signs = self._signs(start, min(start + self._block, self.size))
                if signs.numel() <= self._room:
                    self._room -= signs.numel()
                    self._kept[start] = signs
            yield start, signs.to(like)

    def _signs(self, start: int, stop: int) -> Tensor:
        words = -(-self.dimension // _WORD)
        generator = np.random.Philox(key=self.seed).advance(start * words)
        bits = generator.random_raw((stop - start) * words * 4).astype("<u8").view(np.uint8)
        bits = np.unpackbits(bits.reshape(stop - start, -1), axis=1, count=self.dimension)
        return torch.from_numpy(2 * bits.astype(np.int8) - 1)
