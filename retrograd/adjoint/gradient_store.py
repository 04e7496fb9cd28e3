"""Projected gradients of all training examples, made once and read again: in memory, on disk, or, without room, made anew.

    FOLDER/gradients.json                 what they are gradients of, and how they were projected; no other call may use them
    FOLDER/part-<number>.safetensors      ``example_id`` and ``rows``, one row an example
    FOLDER/<name>.safetensors             whatever else a method made on the way, as its projections

Each file is written under a temporary name and renamed, with a digest of its content: a killed call goes on at the next part,
and a torn or altered file is found and named. How examples are divided into parts depends on the length of the rows alone, not
on the memory of a call. Reading holds one part at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograd.errors import CorruptRecord, NonFinite
from retrograd.files import begin_folder, replace_file
from retrograd.progress import track

FORMAT = 1
_PART_BYTES = 16 << 20
_PART_EXAMPLES = 1024


class GradientStore:
    """One row of numbers for each example, in parts.

    Args:
        ids: the examples.
        width: numbers in a row.
        dtype: of the rows.
        make: gives the rows of some examples.
        at_once: how many examples to ask ``make`` for.
        room: bytes that may be kept in memory, where nothing is kept on disk.
        folder: where parts are kept, made by `begin`.
    """

    def __init__(
        self,
        ids: Tensor,
        width: int,
        dtype: torch.dtype,
        make: Callable[[Tensor], Tensor],
        *,
        at_once: int,
        room: int,
        folder: Path | None = None,
    ):
        each = width * dtype.itemsize
        self.parts = ids.split(max(1, min(_PART_EXAMPLES, _PART_BYTES // each)))
        self._make, self._at_once, self._room, self._folder = make, at_once, room, folder
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and rows, ``[example, width]``, part by part."""
        for number, ids in enumerate(track(self.parts, "training data: projected gradients")):
            yield ids, self._part(number, ids)

    def _part(self, number: int, ids: Tensor) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        file = None if self._folder is None else self._folder / f"part-{number:06d}.safetensors"
        if file is not None and file.is_file():
            found, _ = read_tensors(file)
            if found.keys() != {"example_id", "rows"} or not torch.equal(found["example_id"], ids):
                raise CorruptRecord(f"{file} holds other examples than this part has. Take it out, and it will be made anew.")
            return found["rows"]
        rows = torch.cat([self._make(some) for some in ids.split(self._at_once)])
        if not torch.isfinite(rows).all():
            bad = int(ids[int(torch.isfinite(rows).all(1).logical_not().nonzero()[0])])
            raise NonFinite(f"the gradient of example {bad} is not finite.")
        rows = rows.cpu()
        if file is not None:
            write_tensors(file, {"example_id": ids, "rows": rows}, {})
        elif rows.nbytes <= self._room:
            self._room -= rows.nbytes
            self._kept[number] = rows
        return rows


def begin(folder: Path, asked: Mapping[str, Any]) -> Path:
    """Make the folder, or check that it is of the same gradients.

    Raises:
        RecordExists: it holds other gradients.
    """
    return begin_folder(folder, "gradients.json", asked, FORMAT, "projected gradients of another run or projection")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors with plain values ``about`` them, and a digest of both."""
    from safetensors.torch import save_file

    own = {name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}
    note = {"retrograd": json.dumps({"about": dict(about), "digest": _digest(own, about)})}  # one key: several have no order
    replace_file(file, lambda temporary: save_file(own, temporary, note))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors, and what was said about them.

    Raises:
        CorruptRecord: the file is torn, altered, or none of these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            note = json.loads((opened.metadata() or {})["retrograd"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
        if note["digest"] != _digest(tensors, note["about"]):
            raise ValueError("its content does not have the digest that is written with it")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptRecord(f"{file} is torn or altered: {error}. Take it out, and it will be made anew.") from error
    return tensors, note["about"]


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    hasher = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, leaf in sorted(tensors.items()):
        hasher.update(f"{name}:{leaf.dtype}{tuple(leaf.shape)};".encode())
        hasher.update(leaf.contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
