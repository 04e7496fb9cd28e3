"""Random numbers that belong to an example, not to the batch it happens to be in."""

import numpy as np
import torch
from torch import Tensor


class Noise:
    """Random numbers for the examples of a batch: each example has its own, whatever it is batched with.

    They are a hash (SplitMix64) of the example's id, of ``key`` and of how many numbers were drawn before.

    Args:
        ids: the ids of the examples, ``[batch]``.
        key: seeds; other keys give independent numbers.

    >>> both, second = Noise(torch.tensor([4, 9]), 0), Noise(torch.tensor([9]), 0)
    >>> bool(both.uniform(3)[1].equal(second.uniform(3)[0]))
    True
    """

    def __init__(self, ids: Tensor, *key: int):
        self._state = np.zeros(len(ids), dtype=np.uint64)
        for part in (*(np.full(len(ids), number, dtype=np.int64) for number in key), ids.cpu().numpy()):
            self._state = _hashed(self._state + part.astype(np.uint64))
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1, neither of them included: ``[batch, *shape]``, float64, on the CPU."""
        count = int(np.prod(shape, dtype=np.int64))
        places = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._drawn += count
        bits = _hashed(self._state[:, None] + places)
        numbers = torch.from_numpy((bits >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
        return numbers.reshape(len(self._state), *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``[batch, *shape]``, float64, on the CPU."""
        return torch.special.ndtri(self.uniform(*shape))


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, a bijection of 64 bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
