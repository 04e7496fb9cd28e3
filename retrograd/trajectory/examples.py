"""Training examples under stable ids, with a digest of each one's content."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from retrograd.errors import InputError, UnknownExample


class Examples:
    """A data set whose examples have ids.

    Args:
        data: tensors with one row an example (a tensor, or a tuple, list or dict of them, or a ``TensorDataset``), or a
            map-style data set (``len(data)``, ``data[row]``).
        ids: the id of each row, distinct integers, shape ``[N]``; 0 … N−1 if not given.
        collate: joins a list of ``data[row]`` to a batch (map-style data sets only); torch's ``default_collate`` if not
            given.

    >>> examples = Examples((torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])), ids=[7, 9])
    >>> examples.batch(torch.tensor([9]))
    (tensor([[2.]]), tensor([1]))
    """

    def __init__(self, data: Any, ids: Sequence[int] | Tensor | None = None, collate: Callable[[list], Any] | None = None):
        self.data = data.tensors if isinstance(data, TensorDataset) else data
        self._columns = _columns(self.data)
        rows = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Tensor)
        if self._columns is None and not rows:
            raise InputError(
                f"a data set of type {type(data).__name__} has no rows. Allowed: tensors with one row an example (also a "
                "tuple, list or dict of them), a TensorDataset, or an object with len(data) and data[row]."
            )
        self._count = len(self._columns[0]) if self._columns is not None else len(data)
        if self._columns is not None and any(len(column) != self._count for column in self._columns):
            raise InputError(f"the tensors of a data set must have equally many rows, got {[len(c) for c in self._columns]}.")
        self._collate = collate or default_collate
        self._default_ids = ids is None
        self.ids = torch.arange(self._count) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
        if len(self.ids) != self._count or len(self.ids.unique()) != self._count:
            raise InputError(f"{self._count} examples need {self._count} distinct ids, got {len(self.ids)}.")
        self._sorted, self._order = self.ids.sort()
        self._digests: list[bytes] | None = None

    @staticmethod
    def of(data: Any) -> "Examples":
        """Return ``data`` itself if it is already ``Examples``, else wrap it."""
        return data if isinstance(data, Examples) else Examples(data)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._count

    def rows(self, ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the row of each id; an id that no example has is an error."""
        if self._default_ids:
            numbers = ids.numpy()  # NumPy's reductions start four times faster, and this runs at every step of a recording
            found, known = ids, not numbers.size or (numbers.min() >= 0 and numbers.max() < self._count)
        else:
            places = torch.searchsorted(self._sorted, ids).clamp(max=self._count - 1)
            found, known = self._order[places], bool((self._sorted[places] == ids).all())
        if not known:
            missing = ids[~torch.isin(ids, self.ids)].tolist()[:5]
            raise UnknownExample(
                f"no example has the id {missing}. This data set has {self._count} examples with ids from "
                f"{int(self._sorted[0])} to {int(self._sorted[-1])}."
            )
        return found

    def batch(self, ids: Int[Tensor, " batch"]) -> Any:
        """Return the examples with these ids as one batch, in this order."""
        rows = self.rows(ids)
        if self._columns is None:
            return self._collate([self.data[row] for row in rows.tolist()])
        if isinstance(self.data, Tensor):
            return self.data[rows]
        if isinstance(self.data, Mapping):
            return {name: column[rows] for name, column in self.data.items()}
        return tuple(column[rows] for column in self.data)

    def digests(self) -> list[bytes]:
        """SHA-256 of each example's content, in the order of ``ids``; computed once.

        Raises:
            InputError: asking twice for the first example gave different contents.
        """
        if self._digests is None:
            if self._columns is not None:
                names = sorted(self.data) if isinstance(self.data, Mapping) else range(len(self._columns))
                columns = {name: self.data[name] if isinstance(self.data, Mapping) else self._columns[name] for name in names}
                heads = [f"{name}:{column.dtype}{tuple(column.shape[1:])}".encode() for name, column in columns.items()]
                rows = [_row_bytes(column) for column in columns.values()]
                self._digests = [
                    hashlib.sha256(b"".join(head + row for head, row in zip(heads, own, strict=True))).digest()
                    for own in zip(*rows, strict=True)
                ]
            else:
                if _digest(self.data[0]) != _digest(self.data[0]):
                    raise InputError(
                        "example 0 of the data set is different each time it is read. A record holds the ids of examples, so "
                        "their contents must stay; move random augmentation into the task's losses, where it is replayed "
                        "from the seed of the step."
                    )
                self._digests = [_digest(self.data[row]) for row in range(self._count)]
        return self._digests

    def root(self) -> str:
        """One digest of all ids and contents."""
        return root_digest(self.ids, self.digests())


def root_digest(ids: Tensor, contents: Sequence[bytes]) -> str:
    """One digest of all ids and content digests, in order."""
    return hashlib.sha256(ids.numpy().tobytes() + b"".join(contents)).hexdigest()


def _row_bytes(column: Tensor) -> list[bytes]:
    """The raw bytes of each row."""
    flat = column.detach().cpu().reshape(len(column), -1).contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]


def _columns(data: Any) -> list[Tensor] | None:
    if isinstance(data, Tensor):
        return [data] if data.dim() > 0 else None
    values = list(data.values()) if isinstance(data, Mapping) else list(data) if isinstance(data, tuple | list) else []
    return values if values and all(isinstance(value, Tensor) and value.dim() > 0 for value in values) else None


def _digest(item: Any) -> bytes:
    """SHA-256 of nested containers of tensors, arrays, numbers and text."""
    if isinstance(item, Tensor):
        return hashlib.sha256(f"{item.dtype}{tuple(item.shape)}".encode() + _row_bytes(item[None])[0]).digest()
    if isinstance(item, np.ndarray | np.generic):
        array = np.ascontiguousarray(item)
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
    if isinstance(item, Mapping):
        item = [part for key in sorted(item) for part in (key, item[key])]
    if isinstance(item, tuple | list):
        return hashlib.sha256(b"".join(_digest(part) for part in item)).digest()
    if isinstance(item, bytes):
        return hashlib.sha256(item).digest()
    if isinstance(item, str | int | float | bool | None):
        return hashlib.sha256(f"{type(item).__name__}:{item!r}".encode()).digest()
    raise InputError(
        f"an example contains a {type(item).__name__}, which has no content digest. Allowed: tensors, NumPy arrays, numbers, "
        "text, bytes, and tuples, lists and dicts of these."
    )
