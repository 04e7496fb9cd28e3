"""Files that are whole or not there: written under a temporary name, renamed, and read against a digest of their content."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrograd.errors import CorruptRecord, RecordExists


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write ``file`` under a temporary name and rename it: it appears whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def json_digest(content: Any) -> str:
    """Digest of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Write plain values as JSON, with a digest of themselves."""
    text = json.dumps({**manifest, "digest": json_digest(manifest)}, indent=1)
    replace_file(file, lambda temporary: temporary.write_text(text))


def read_manifest(file: Path, keys: set[str], expected: int, largest: int = 1 << 26) -> dict[str, Any]:
    """Read what `write_manifest` wrote.

    Args:
        file: the manifest.
        keys: what must be in it.
        expected: the value that its key ``format`` must have.
        largest: bytes that a manifest can have at most: it is names and shapes.

    Raises:
        CorruptRecord: it is torn, altered, or none.
    """
    if file.stat().st_size > largest:
        raise CorruptRecord(f"{file} has {file.stat().st_size} bytes; a manifest has at most {largest}.")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{file} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise CorruptRecord(f"{file} is not a manifest.")
    if "format" in manifest and manifest["format"] != expected:
        raise CorruptRecord(f"{file} has format {manifest['format']!r}; this version of retrograd reads format {expected}.")
    missing = keys - set(manifest)
    if missing:
        raise CorruptRecord(f"{file} lacks {sorted(missing)}.")
    if manifest.pop("digest") != json_digest(manifest):
        raise CorruptRecord(f"{file} was altered: it does not have its own digest.")
    return manifest


def begin_folder(folder: Path, name: str, asked: Mapping[str, Any], expected: int, what: str) -> Path:
    """Make a folder of parts with a manifest of what was asked, or check that it was begun for the same.

    Args:
        folder: the folder.
        name: of the manifest in it.
        asked: plain values that decide the parts.
        expected: the manifest's format.
        what: what the parts are of, for the message.

    Raises:
        RecordExists: it was begun for something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if not file.is_file():
        write_manifest(file, {"format": expected, "asked": dict(asked)})
    found = read_manifest(file, {"format", "asked", "digest"}, expected)["asked"]
    different = [f"{key}={found.get(key)!r}, asked for {asked[key]!r}" for key in sorted(asked) if found.get(key) != asked[key]]
    if different:
        raise RecordExists(
            f"{folder} holds {what}: it differs in {'; '.join(different)}. Give another folder, or ask the same to continue it."
        )
    return folder


def write_rows(file: Path, columns: Mapping[str, Any]) -> None:
    """Write a table to Parquet, with a digest of its rows in its own metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(dict(columns))
    table = table.replace_schema_metadata({"digest": _rows_digest(table.to_pylist())})
    replace_file(file, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def read_rows(file: Path, *columns: str) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote and compare it with its digest.

    Args:
        file: the table.
        columns: the columns that it must have; all that are there if none is named.

    Raises:
        CorruptRecord: it is missing, torn or altered.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise CorruptRecord(f"{file} is missing.")
    try:
        # A part must be read as the one file it is: as a data set, the folder's name would be parsed for partitions.
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
        rows = table.select(list(columns) or table.column_names).to_pylist()
        digest = (table.schema.metadata or {})[b"digest"].decode()
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError, TypeError) as error:
        raise CorruptRecord(f"{file} is torn: {error}") from error
    if digest != _rows_digest(rows):
        raise CorruptRecord(f"{file} was altered: its rows do not have the digest that is written with them.")
    return rows


def write_columns(file: Path, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a table of number columns to Parquet, with plain values ``about`` it and a digest of both in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = {**about, "digest": _columns_digest(columns, about)}
    table = pa.table(dict(columns)).replace_schema_metadata({"retrograd": json.dumps(content)})
    replace_file(file, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def read_columns(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write_columns` wrote: the columns, and what was said about them.

    Raises:
        CorruptRecord: the file is torn, altered, or no such table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
        about = json.loads(table.schema.metadata[b"retrograd"])
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        if about.pop("digest") != _columns_digest(columns, about):
            raise ValueError("its contents do not have the digest that is written with them")
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise CorruptRecord(f"{file} is not a whole table: {error}") from error
    return columns, about


def _columns_digest(columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str:
    hasher = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, column in columns.items():
        hasher.update(f"{name}:{column.dtype};".encode() + np.ascontiguousarray(column).tobytes())
    return hasher.hexdigest()


def _rows_digest(rows: list[dict[str, Any]]) -> str:
    plain = [{key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()} for row in rows]
    return json_digest(plain)


def write_tensors(file: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write named tensors and plain values about them as one safetensors file, with a digest of both."""
    from safetensors.torch import save_file

    own = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in tensors.items()}
    text = json.dumps({**about, "digest": _tensors_digest(own, about)}, sort_keys=True)
    replace_file(file, lambda temporary: save_file(own, temporary, {"about": text}))


def read_tensors(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CorruptRecord: it is torn, altered, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 it is no dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptRecord(f"{file} cannot be read: {error}") from error
    if about.pop("digest", None) != _tensors_digest(tensors, about):
        raise CorruptRecord(f"{file} was altered: it does not have the digest that was written with it.")
    return tensors, about


def _tensors_digest(tensors: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    hasher = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        leaf = tensors[name]
        hasher.update(f"{name}:{leaf.dtype}:{tuple(leaf.shape)};".encode())
        hasher.update(leaf.flatten().numpy().tobytes())
    return hasher.hexdigest()
