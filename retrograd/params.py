"""Named parameters and their algebra.

``Params`` maps the names of ``module.named_parameters(remove_duplicate=True)`` to tensors, so a tied weight appears once.
``Slots`` maps the name of an optimizer slot ("velocity", "first_moment", …) to ``Params``.
A *batch* of vectors shaped like parameters has one extra axis in front of every leaf.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Params = dict[str, Tensor]
Slots = dict[str, Params]


def map_params(function: Callable[..., Tensor], first: Params, *others: Params) -> Params:
    """Apply ``function`` leaf by leaf to one or more ``Params`` with the same names."""
    return {name: function(leaf, *(other[name] for other in others)) for name, leaf in first.items()}


def map_slots(function: Callable[..., Tensor], first: Slots, *others: Slots) -> Slots:
    """Apply ``function`` leaf by leaf to one or more ``Slots`` with the same names."""
    return {name: map_params(function, slot, *(other[name] for other in others)) for name, slot in first.items()}


def zeros_like(params: Params, batch: int | None = None) -> Params:
    """Zeros shaped like ``params``, with a leading axis of length ``batch`` if one is given."""
    lead = () if batch is None else (batch,)
    return {name: leaf.new_zeros(lead + leaf.shape) for name, leaf in params.items()}


def count(params: Params) -> int:
    """Return the number of scalars in ``params``."""
    return sum(leaf.numel() for leaf in params.values())


def inner(left: Params, right: Params) -> Tensor:
    """Return the inner product ⟨left, right⟩, a scalar tensor.

    >>> inner({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])})
    tensor(11.)
    """
    return torch.stack([(left[name] * right[name]).sum() for name in left]).sum()


def batched_inner(vectors: Params, params: Params) -> Tensor:
    """Inner products of each vector of a batch (axis 0) with one ``params``; shape ``[batch]``."""
    total = None
    for name, leaf in params.items():
        part = vectors[name].reshape(len(vectors[name]), -1) @ leaf.flatten()
        total = part if total is None else total + part
    if total is None:
        raise ValueError("batched_inner of no parameters at all has no shape")
    return total


def flatten(leaves: Iterable[Tensor], batched: bool = False) -> Tensor:
    """Concatenate leaves to one vector ``[P]``, or to a matrix ``[batch, P]`` when they carry a batch axis."""
    return torch.cat([leaf.reshape(len(leaf), -1) if batched else leaf.flatten() for leaf in leaves], dim=-1)


def unflatten(vector: Tensor, like: Params) -> Params:
    """Split ``[P]`` or ``[batch, P]`` into leaves named and shaped like ``like`` (views, no copies).

    >>> like = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    >>> {name: tuple(leaf.shape) for name, leaf in unflatten(torch.arange(6.0), like).items()}
    {'w': (2, 2), 'b': (2,)}
    """
    parts = vector.split([leaf.numel() for leaf in like.values()], dim=-1)
    return {name: part.reshape(vector.shape[:-1] + leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}
