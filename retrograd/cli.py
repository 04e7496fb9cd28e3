"""The command line: ``retrograd demo`` does the main job, ``retrograd show RUN`` reads a run folder without its code."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from retrograd.errors import CorruptRecord, IncompleteRecord, RetrogradError
from retrograd.progress import reporting, track

try:
    import typer
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError as _error:
    # Only the console script imports this module, and to whoever types `retrograd` a traceback says nothing.
    raise SystemExit(
        f"retrograd: the command line needs the package {_error.name}. Install it with: pip install 'retrograd[cli]'."
    ) from _error

app = typer.Typer(
    help="Differentiate through training: record a run once, then ask it why.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Bars:
    """A progress bar for each phase of work. Phases may begin, end and repeat in any order, and run inside each other."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._rounds: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int, /) -> None:
        """Move the bar of ``phase``; ``done = 0`` begins it, or begins it once more."""
        if phase not in self._tasks:
            self._tasks[phase], self._rounds[phase] = self._progress.add_task(phase, total=total), 1
        elif done == 0:
            self._rounds[phase] += 1
            self._progress.reset(self._tasks[phase], total=total, description=f"{phase} ({self._rounds[phase]})")
        self._progress.update(self._tasks[phase], completed=done, total=total)


@contextmanager
def progress_bars(transient: bool = False) -> Iterator[None]:
    """Show the progress of everything in this context on standard error, with elapsed and remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = transient and not console.is_terminal  # bars that must not stay have no place in a log
    with Progress(*columns, console=console, transient=transient, disable=hidden) as progress, reporting(Bars(progress)):
        yield


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """End with exit code 1 and a message instead of a traceback where retrograd raises an error on purpose."""
    try:
        yield
    except RetrogradError as error:
        typer.secho("error: ", fg="red", nl=False, err=True)
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _version(wanted: bool) -> bool:
    if wanted:
        from retrograd import __version__

        typer.echo(f"retrograd {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Differentiate through training: record a run once, then ask it why."""


# ---------------------------------------------------------------------- demo


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and the run.")] = Path("demo"),
) -> None:
    """Record a small training run, explain what it gets wrong, check that by retraining, and write a page."""
    with errors_as_messages():
        import torch

        from retrograd.demo import run_demo

        torch.set_num_threads(1)  # matrices of 64 × 64: a second thread waits more than it works
        with progress_bars():
            result = run_demo(output)
    console = Console()
    console.print(
        f"Trained on {result.trained:,} digits in {result.steps} steps; {result.wrong} of {result.tested} test images wrong. "
        f"Asked about {result.queries}, checked on {result.subsets} retrained models: {result.counterfactual}. "
        "Predicted against actual:",
        highlight=False,
    )
    table = Table("method", "r [95 % interval]", "rank r [95 % interval]", "took", box=SIMPLE)
    for method in result.methods:
        both = [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (method.correlation, method.rank_correlation)]
        table.add_row(method.name, *map(Text, both), f"{method.seconds:.1f} s")  # to a str, rich would read [...] as a style
    console.print(table)
    console.print(f"Roughness: {result.roughness}.", highlight=False)
    console.print(f"Took {result.seconds['total']:.0f} s. The page: {result.page}", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------- show


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what was recorded in a run folder, and check all its digests. Exit code 1 if it is not a whole run."""
    with errors_as_messages():
        try:
            with progress_bars(transient=True):
                contents = read_contents(run)
        except RetrogradError as error:
            if as_json:
                typer.echo(json.dumps({"folder": str(run), "error": type(error).__name__, "message": str(error)}, indent=1))
            raise
        if as_json:
            typer.echo(json.dumps(contents, indent=1))
        else:
            _print_contents(contents, Console())
        if contents["status"] != "complete":
            raise IncompleteRecord(
                f"the recording in {run} was killed and not resumed. Continue it: call record(...) or Recorder(...) again with "
                "resume=True."
            )


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


def _print_contents(contents: dict[str, Any], console: Console) -> None:
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
    if loss is not None and not console.options.ascii_only:
        rows["loss"] += f"   {_sparkline(loss['curve'])}"
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name, style="dim"), Text(_printable(text), overflow="fold"))
    console.print(table)
    checked = contents["checked"]
    table_of_examples = f" and the table of {checked['examples']:,} examples" if checked["examples"] else ""
    console.print(
        f"Checked: the chain of {checked['steps']:,} steps, {checked['checkpoints']} stored states{table_of_examples} have the "
        "digests that were recorded for them.",
        style="green",
        highlight=False,
    )


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
    """Replace what a terminal would obey: a run folder may come from a stranger."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


if __name__ == "__main__":
    app()
