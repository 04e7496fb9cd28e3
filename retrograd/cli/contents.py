"""What a run folder says of itself, without model, data or task: what `retrograd show` prints."""

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from retrograd.errors import CorruptRecord, RetrogradError
from retrograd.progress import track


def read_contents(path: Path) -> dict[str, Any]:
    """Read what a run folder says of itself, without model, data or task, and check it against all its digests.

    Args:
        path: the run folder.

    Returns:
        Plain values, ready for JSON. ``checked`` counts what was compared with its digest.

    Raises:
        NotRecorded: there is no run in the folder.
        CorruptRecord: a file is missing, torn or altered.
    """
    from retrograd.trajectory.store import RunFolder

    folder = RunFolder(path)
    manifest = folder.manifest()
    try:
        return _contents(folder, manifest)
    except RetrogradError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise CorruptRecord(f"{path} is not a run as this version writes it: {type(error).__name__}: {error}.") from error


def describe(contents: dict[str, Any], blocks: bool = True) -> dict[str, str]:
    """Say what `read_contents` found in a few words each, safe to print: a run folder may come from a stranger.

    Args:
        contents: what was read.
        blocks: draw the curve of the loss, too.
    """
    model, task, optimizer, loss = (contents[key] for key in ("model", "task", "optimizer", "loss"))
    rows = {
        "status": f"{contents['status']}, {contents['steps']:,} steps, {_size(contents['bytes'])} on disk",
        "model": f"{model['class']}, {model['parameters']:,} parameters in {model['tensors']} tensors",
        "task": _call(task),
        "optimizer": _call(optimizer),
        "hyperparameters": "\n".join(map(_change, optimizer["first"], optimizer["last"])) or "no step yet",
        "clipping": "none" if contents["clip_norm"] is None else f"global norm at {contents['clip_norm']:g}",
        "data": f"{contents['data']['count']:,} examples, digest {contents['data']['root'][:16]}…",
        "loss": "not recorded" if loss is None else f"{loss['first']:.4g} → {loss['last']:.4g}",
        "checkpoints": f"{len(contents['checkpoints'])}, at steps {_shortened(contents['checkpoints'])}",
        "seed": f"{contents['seed']}",
        "chain ends at": f"{contents['head'][:16]}…",
        "versions": ", ".join(f"{name} {version}" for name, version in contents["versions"].items()),
    }
    if loss is not None and blocks:
        rows["loss"] += f"   {_sparkline(loss['curve'])}"
    return {name: _printable(text) for name, text in rows.items()}


def _contents(folder: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    complete = manifest["status"] == "complete"
    records = folder.read_steps(manifest["genesis"])
    _check(folder, manifest, records, complete)
    checkpoints = folder.steps()
    losses = [record.loss for record in records if record.loss is not None]
    shapes = [shape for shape, _ in manifest["model"]["parameters"].values()]
    return {
        "folder": str(folder.path),
        "status": "complete" if complete else "incomplete",
        "steps": len(records),
        "head": folder.head,
        "model": {"class": manifest["model"]["class"], "parameters": sum(map(_product, shapes)), "tensors": len(shapes)},
        "task": manifest["task"],
        "optimizer": {
            **manifest["rule"],
            "first": [dict(group) for group in records[0].hyper] if records else [],
            "last": [dict(group) for group in records[-1].hyper] if records else [],
        },
        "clip_norm": manifest["clip_norm"],
        "counterfactual": manifest.get("counterfactual"),
        "seed": manifest.get("seed"),
        "data": manifest["data"],
        "loss": {"first": losses[0], "last": losses[-1], "curve": _binned(losses, 32)} if losses else None,
        "checkpoints": checkpoints,
        "bytes": sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file()),
        "versions": manifest["versions"],
        "checked": {"steps": len(records), "checkpoints": len(checkpoints), "examples": manifest["data"]["count"] * complete},
    }


def _check(folder: Any, manifest: dict[str, Any], records: Sequence[Any], complete: bool) -> None:
    """Compare everything that has a digest with it; manifest and steps were compared when they were read."""
    described = json.dumps({key: manifest[key] for key in ("model", "task", "rule", "groups", "clip_norm")}, sort_keys=True)
    begin = f"{described}|{manifest['data']['root']}|{manifest['initial']}"
    if manifest["genesis"] != hashlib.sha256(begin.encode()).hexdigest():
        raise CorruptRecord(
            f"{folder.path / 'run.json'} was altered: the chain of digests does not begin with what it says of model, task, "
            "optimizer, data and initial state."
        )
    folder.expect(0, manifest["initial"])
    if complete:
        folder.check_complete(manifest, records)
    for step in track(folder.steps(), "checking"):
        folder.load(step)


def _call(thing: dict[str, Any]) -> str:
    """Write a class with its options as one would in Python."""
    return f"{thing['class']}({', '.join(f'{name}={value!r}' for name, value in thing['options'].items())})"


def _change(first: dict[str, float], last: dict[str, float]) -> str:
    """Write hyperparameters; those that changed with their first and last values.

    >>> _change({"learning_rate": 0.1, "momentum": 0.9}, {"learning_rate": 0.01, "momentum": 0.9})
    'learning_rate 0.1 → 0.01, momentum 0.9'
    """
    changed = {name: f"{value:g}" + (f" → {last[name]:g}" if last[name] != value else "") for name, value in first.items()}
    return ", ".join(f"{name} {text}" for name, text in changed.items())


def _sparkline(values: Sequence[float]) -> str:
    """Draw values as blocks.

    >>> _sparkline([3.0, 2.0, 1.0])
    '█▅▁'
    """
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] for value in values)


def _binned(values: Sequence[float], count: int) -> list[float]:
    """Average values over at most ``count`` stretches of equal length.

    >>> _binned([1.0, 3.0, 5.0, 7.0], 2)
    [2.0, 6.0]
    """
    count = min(count, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    return [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(edges)]


def _shortened(numbers: Sequence[int], most: int = 12) -> str:
    """Write a list, its middle left out if it is long.

    >>> _shortened(range(100), most=5)
    '0, 1, 2, …, 98, 99'
    """
    texts = [str(number) for number in numbers]
    return ", ".join(texts if len(texts) <= most else [*texts[: (most + 1) // 2], "…", *texts[-(most // 2) :]])


def _size(count: int) -> str:
    """Write a number of bytes.

    >>> _size(2_500_000)
    '2.5 MB'
    """
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count} bytes" if not power else f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _product(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _printable(text: str) -> str:
    """Replace what a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
