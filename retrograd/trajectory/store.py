"""The run folder: a record on disk that survives kill −9 and says so when a file was torn or altered.

    RUN/run.json                          manifest: versions, model, task, optimizer, data root, status, chain head
    RUN/data.parquet                      a row an example: id, content digest
    RUN/steps.parquet/part-<first>.parquet  a row a step: example ids, weights, hyperparameters, seed, loss, witness,
                                          digest of the chain, digest of the state after the step if it was stored
    RUN/checkpoints/<step>.safetensors    parameters, optimizer slots, buffers

Every file is written under a temporary name and renamed, so a file that has its name is whole. The steps up to a
checkpoint are written before the checkpoint: what is on disk after a kill is always a shorter recording. Nothing is ever
unpickled. ``steps.parquet`` is a folder of parts, as Spark writes it: polars, duckdb and pandas open it by that name.
"""

import os
from pathlib import Path
from typing import Any

import torch

from retrograd.errors import CorruptRecord, NotRecorded, RecordExists
from retrograd.files import read_manifest, read_rows, replace_file, write_manifest, write_rows
from retrograd.params import Params
from retrograd.trajectory import digests
from retrograd.trajectory.examples import Examples, root_digest
from retrograd.trajectory.state import StepRecord, TrainingState

FORMAT = 1
_COLUMNS = ("step", "example_ids", "weights", "hyper", "seed", "loss", "witness", "digest", "state_digest")
_MANIFEST_KEYS = {
    "format",
    "versions",
    "model",
    "task",
    "rule",
    "groups",
    "clip_norm",
    "data",
    "initial",
    "genesis",
    "status",
    "steps",
    "head",
    "checkpoints",
    "digest",
}


class RunFolder:
    """Reads and writes the files of one run. Also the run's store of checkpoints."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.head = ""  # last link of the chain of the steps that were read
        self._expected: dict[int, str] = {}  # digest of each stored state, from the step rows

    # ------------------------------------------------------------------ manifest and data

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "run.json").is_file()

    def create(self, manifest: dict[str, Any], examples: Examples, initial: TrainingState, meta: Params) -> None:
        """Start a new run: the table of examples, the initial state, and last the manifest, which makes it a run."""
        if self.exists():
            raise RecordExists(f"{self.path} already holds a run. Give another folder, or continue it with resume=True.")
        self.clean()
        for remains in [*self._parts(), *(self.path / "checkpoints").glob("*.safetensors")]:
            remains.unlink()  # without a manifest they belong to no run: the recording was killed before it began
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.path / "steps.parquet").mkdir(exist_ok=True)
        self._write_data(examples)
        if meta:
            self._save(self.path / "meta.safetensors", meta, {})
        self.save(initial)
        self.write_manifest(manifest)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write ``run.json``, with a digest of itself."""
        write_manifest(self.path / "run.json", manifest)

    def manifest(self) -> dict[str, Any]:
        """Read and check ``run.json``."""
        file = self.path / "run.json"
        if not file.is_file():
            raise NotRecorded(f"{self.path} holds no run: there is no run.json in it.")
        return read_manifest(file, _MANIFEST_KEYS, FORMAT)

    def check_complete(self, manifest: dict[str, Any], records: list[StepRecord]) -> None:
        """Compare what is in the folder with the manifest of a complete run.

        Raises:
            CorruptRecord: examples, steps or states are missing, or there are others.
        """
        file = self.path / "data.parquet"
        rows = read_rows(file, "id", "digest")
        ids, contents = torch.tensor([row["id"] for row in rows]), [row["digest"] for row in rows]
        if root_digest(ids, contents) != manifest["data"]["root"]:
            raise CorruptRecord(f"{file} was altered: it does not have the digest that the manifest gives.")
        if len(records) != manifest["steps"] or (records and self.head != manifest["head"]):
            raise CorruptRecord(f"{self.path / 'steps.parquet'} has {len(records)} steps, the run had {manifest['steps']}.")
        for step in set(manifest["checkpoints"]) ^ set(self.steps()):
            known = "is missing" if step in manifest["checkpoints"] else "is no part of this run"
            raise CorruptRecord(f"{self._checkpoint(step)} {known}.")

    def _write_data(self, examples: Examples) -> None:
        import pyarrow as pa

        columns = {"id": examples.ids.tolist(), "digest": pa.array(examples.digests(), pa.binary(32))}
        write_rows(self.path / "data.parquet", columns)

    # ------------------------------------------------------------------ steps

    def write_steps(self, first: int, records: list[StepRecord], chain: list[str], state_digest: str | None) -> None:
        """Write the rows of steps ``first``, ``first + 1``, … as one part.

        Args:
            first: number of the first step.
            records: the records of the steps.
            chain: the chain's digests after each of them.
            state_digest: digest of the state after the last of them, if that state is about to be stored.
        """
        import pyarrow as pa

        columns = {
            "step": pa.array(range(first, first + len(records)), pa.int64()),
            "example_ids": pa.array([record.example_ids.tolist() for record in records], pa.list_(pa.int64())),
            "weights": pa.array(
                [None if record.weights is None else record.weights.tolist() for record in records], pa.list_(pa.float64())
            ),
            "hyper": pa.array([[dict(own) for own in record.hyper] for record in records]),
            "seed": pa.array([record.seed for record in records], pa.int64()),
            "loss": pa.array([record.loss for record in records], pa.float64()),
            "witness": pa.array([record.witness for record in records], pa.float64()),
            "digest": pa.array(chain, pa.string()),
            "state_digest": pa.array([None] * (len(records) - 1) + [state_digest], pa.string()),
        }
        write_rows(self._part(first), columns)
        if state_digest is not None:
            self._expected[first + len(records)] = state_digest

    def read_steps(self, genesis: str) -> list[StepRecord]:
        """Read all steps and check the chain of digests from ``genesis`` on.

        Raises:
            CorruptRecord: a part is missing, torn or altered.
        """
        records: list[StepRecord] = []
        previous = genesis
        for part in self._parts():
            rows = read_rows(part, *_COLUMNS)
            for row in rows:
                if row["step"] != len(records):
                    raise CorruptRecord(f"{part} begins at step {row['step']}, but the steps before it end at {len(records)}.")
                weights = row["weights"]
                record = StepRecord(
                    torch.tensor(row["example_ids"], dtype=torch.int64),
                    None if weights is None else torch.tensor(weights, dtype=torch.float64),
                    tuple(row["hyper"]),
                    row["seed"],
                    row["loss"],
                    row["witness"],
                )
                previous = digests.link(previous, record)
                if previous != row["digest"]:
                    raise CorruptRecord(f"step {row['step']} in {part} does not continue the chain of digests: it was altered.")
                if row["state_digest"] is not None:
                    self._expected[row["step"] + 1] = row["state_digest"]
                records.append(record)
        self.head = previous
        return records

    def drop_steps(self, stop: int) -> None:
        """Delete the parts that begin at step ``stop`` or later."""
        for part in self._parts():
            if int(part.stem.removeprefix("part-")) >= stop:
                part.unlink()

    def _part(self, first: int) -> Path:
        return self.path / "steps.parquet" / f"part-{first:012d}.parquet"

    def _parts(self) -> list[Path]:
        return sorted((self.path / "steps.parquet").glob("part-*.parquet"))

    # ------------------------------------------------------------------ checkpoints

    def steps(self) -> list[int]:
        """Return the steps whose states are stored, ascending."""
        return sorted(int(file.stem) for file in (self.path / "checkpoints").glob("*.safetensors") if file.stem.isdigit())

    def save(self, state: TrainingState) -> None:
        """Store a state."""
        note = {"step": str(state.step)}  # one key: safetensors writes several in random order
        self._save(self._checkpoint(state.step), state.tensors(), note)

    @staticmethod
    def _save(file: Path, tensors: Params, note: dict[str, str]) -> None:
        from safetensors.torch import save_file

        # One memory may stand behind two names (tied buffers); the file holds each name's values on its own.
        own = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
        replace_file(file, lambda temporary: save_file(own, temporary, note))

    def load_meta(self) -> Params:
        """Read the meta-parameters; their digest is in the manifest, as that of the model's description.

        Raises:
            NotRecorded: the run was trained without any.
            CorruptRecord: the file is torn.
        """
        file = self.path / "meta.safetensors"
        if not file.is_file():
            raise NotRecorded(f"{self.path} was trained without a meta-module: leave out meta=.")
        return self._read(file)

    @staticmethod
    def _read(file: Path) -> Params:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, ValueError, OSError) as error:
            raise CorruptRecord(f"{file} is torn: {error}") from error

    def load(self, step: int) -> TrainingState:
        """Read the state stored for ``step`` and compare it with its digest.

        Raises:
            NotRecorded: there is no such file.
            CorruptRecord: it is torn or altered.
        """
        file = self._checkpoint(step)
        if not file.is_file():
            raise NotRecorded(f"{file} is missing. Stored states: {', '.join(map(str, self.steps())) or 'none'}.")
        try:
            state = TrainingState.from_tensors(self._read(file), step)
        except (ValueError, KeyError) as error:
            raise CorruptRecord(f"{file} is torn: {error}") from error
        if digests.state_digest(state) != self._expected.get(step):
            raise CorruptRecord(f"{file} was altered: its content does not have the digest that was recorded for it.")
        return state

    def discard(self, step: int) -> None:
        """Delete the state of ``step``."""
        self._checkpoint(step).unlink()

    def expect(self, step: int, digest: str) -> None:
        """Remember the digest that the state of ``step`` must have."""
        self._expected[step] = digest

    def clean(self) -> None:
        """Delete temporary files that a killed process left."""
        # safetensors writes through temporary files of its own, named .tmp…
        for torn in (*self.path.glob("**/*.tmp"), *self.path.glob("checkpoints/.tmp*")):
            torn.unlink()

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step:012d}.safetensors"
