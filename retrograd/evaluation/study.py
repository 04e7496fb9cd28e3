"""A folder of retrainings: parts in Parquet, shared by as many processes as there are, killed and resumed at any time.

    STUDY/study.json             what is retrained: digests of run, queries and subsets, seeds, removal, size of a part
    STUDY/part-<number>.parquet  a row a retraining: subset, seed, factor on each example's weight, one column each query, and
                                 the digests of the run and of what the study was asked, by which a part is known anywhere
    STUDY/locks/                 a lock for each part that is being made

A part is made by whoever holds its lock. The operating system frees the lock of a killed process, so no part is lost, and
a part is looked for again after its lock was taken, so none is made twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from retrograd.errors import CorruptRecord, IncompleteRecord, NotRecorded, RecordExists
from retrograd.evaluation.retrained import Retrained
from retrograd.files import json_digest, read_manifest, read_rows, write_manifest, write_rows
from retrograd.trajectory import Counterfactual

FORMAT = 1
_KEYS = {"format", "asked", "together", "subsets", "seeds", "example_ids", "query_ids", "dtype", "digest"}


class Study:
    """Reads and writes the folder of a study.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)

    def begin(self, asked: dict[str, Any], measure: Callable[[], int], **shape: Any) -> dict[str, Any]:
        """Write the manifest, or read that of another process or time.

        Args:
            asked: what is retrained, plain values; a study in the folder must have been asked the same.
            measure: function that returns how many models are trained together, called if the study is new.
            shape: further entries of the manifest.

        Raises:
            RecordExists: the folder holds another study.
        """
        (self.path / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / "locks" / "study.lock"):
            if not (self.path / "study.json").is_file():
                write_manifest(self.path / "study.json", {"format": FORMAT, "asked": asked, "together": measure(), **shape})
        manifest = self.manifest()
        different = sorted(key for key in asked if manifest["asked"].get(key) != asked[key])
        if different:
            raise RecordExists(
                f"{self.path} holds another study: it differs in {', '.join(different)}. Give another folder, or ask the same "
                "to continue it."
            )
        return manifest

    def manifest(self) -> dict[str, Any]:
        """Read and check ``study.json``."""
        file = self.path / "study.json"
        if not file.is_file():
            raise NotRecorded(f"{self.path} holds no study: there is no study.json in it.")
        return read_manifest(file, _KEYS, FORMAT)

    def has(self, part: int) -> bool:
        """Whether a part is finished."""
        return self._part(part).is_file()

    @contextmanager
    def claim(self, part: int) -> Iterator[bool]:
        """Try to become the one who makes a part; gives False where another process is at it, or it is finished."""
        lock = FileLock(self.path / "locks" / f"part-{part:06d}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.has(part)
        finally:
            lock.release()

    def write(self, part: int, subsets: Tensor, seed: int | None, factors: Tensor, query_ids: Tensor, values: Tensor) -> None:
        """Write the retrainings of a part."""
        import pyarrow as pa

        asked = self.manifest()["asked"]
        columns = {
            "run": [asked["run"]] * len(subsets),
            "study": [json_digest(asked)] * len(subsets),
            "subset": subsets.numpy(),
            "seed": pa.array([seed] * len(subsets), pa.int64()),
            "factors": pa.array(factors.double().tolist(), pa.list_(pa.float64())),
        }
        each = zip(query_ids.tolist(), values.T, strict=True)
        columns |= {f"query_{query}": column.contiguous().numpy() for query, column in each}
        write_rows(self._part(part), columns)

    def read(self) -> Retrained:
        """Read all retrainings of a finished study.

        Raises:
            NotRecorded: there is no study in the folder.
            IncompleteRecord: parts are missing.
            CorruptRecord: a file is torn or altered.
        """
        manifest = self.manifest()
        seeds, count = manifest["seeds"], manifest["subsets"]
        parts = part_rows(count, len(seeds), manifest["together"])
        missing = [part for part in range(len(parts)) if not self.has(part)]
        if missing:
            raise IncompleteRecord(
                f"the study in {self.path} is not finished: {len(missing)} of {len(parts)} parts are missing, the first is "
                f"{missing[0]}. Call retrain with the same arguments and folder to make them."
            )
        example_ids, query_ids = torch.tensor(manifest["example_ids"]), torch.tensor(manifest["query_ids"])
        values = torch.full((count, len(seeds), len(query_ids)), torch.nan, dtype=getattr(torch, manifest["dtype"]))
        factors = torch.zeros(count, len(example_ids), dtype=torch.float64)
        study = json_digest(manifest["asked"])
        for number, (subsets, seed) in enumerate(parts):
            rows = read_rows(self._part(number))
            if any(row.get("study") != study for row in rows):
                raise CorruptRecord(f"{self._part(number)} belongs to another study. Take it out, and it will be made anew.")
            if [row["subset"] for row in rows] != subsets.tolist() or {row["seed"] for row in rows} != {seeds[seed]}:
                raise CorruptRecord(f"{self._part(number)} is another part of the study than its name says.")
            own = torch.tensor([[row[f"query_{query}"] for query in query_ids.tolist()] for row in rows], dtype=torch.float64)
            values[subsets, seed] = own.to(values.dtype)
            factors[subsets] = torch.tensor([row["factors"] for row in rows], dtype=torch.float64)
        asked = manifest["asked"]
        counterfactual = Counterfactual(asked["keep"], asked["removal"], "same" if seeds == [None] else "fresh")
        return Retrained(values, factors, tuple(seeds), example_ids, query_ids, counterfactual, asked["run"])

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:06d}.parquet"


def part_rows(subsets: int, seeds: int, size: int) -> Sequence[tuple[Tensor, int]]:
    """Cut a study to parts: some subsets of one seed each, as pairs of subset numbers and the seed's place."""
    return [(rows, seed) for seed in range(seeds) for rows in torch.arange(subsets).split(size)]
