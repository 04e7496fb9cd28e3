"""Finished parts of an attribution, in a folder: a killed call goes on after the last whole one.

    FOLDER/scores.json                               what is attributed; another call must ask the same
    FOLDER/part-<queries>.parquet                    sum over all parts of a slice of queries
    FOLDER/part-<queries>-…-<pass>-<batch>.parquet   a batch of examples at one checkpoint

A row an example, a column a query; each file appears whole or not at all, with a digest of its content.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograd.adjoint.parts import Notes, ScorePart
from retrograd.errors import CorruptRecord
from retrograd.files import begin_folder, read_columns, write_columns

FORMAT = 1


def begin(folder: Path, asked: dict[str, Any]) -> Path:
    """Make the folder, or check that it is of the same call.

    Raises:
        RecordExists: it holds parts of another call.
    """
    return begin_folder(folder, "scores.json", asked, FORMAT, "parts of another attribution")


def write_part(file: Path, part: ScorePart, notes: Notes | None = None) -> None:
    """Write a part's ids and values, and what was noted by then."""
    columns = {"example_id": part.example_ids.numpy()}
    values = part.values.cpu().float() if part.values.dtype == torch.bfloat16 else part.values.cpu()
    write_columns(
        file,
        columns | {f"query_{row}": column.numpy() for row, column in enumerate(values)},
        {} if notes is None else notes.entries,
    )


def read_part(file: Path, ids: Tensor, notes: Notes | None = None) -> ScorePart | None:
    """Read the part of these examples, and add to ``notes`` what was noted; None if it is not there.

    Raises:
        CorruptRecord: the file is torn, altered, or of other examples.
    """
    if not file.is_file():
        return None
    columns, about = read_columns(file)
    if not np.array_equal(columns.pop("example_id"), ids.numpy()):
        raise CorruptRecord(f"{file} holds other examples than this part has. Take it out, and it will be made anew.")
    if notes is not None:
        notes.add(**about)
    return ScorePart(ids, torch.from_numpy(np.stack(list(columns.values()))))
