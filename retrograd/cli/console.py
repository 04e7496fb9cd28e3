"""What all commands share: progress bars, errors and warnings as messages, and how a check is printed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
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
from rich.text import Text

from retrograd.errors import RetrogradError, RetrogradWarning
from retrograd.progress import reporting

if TYPE_CHECKING:
    from retrograd import Check


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


@contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Keep retrograd's own warnings to the end, and then say each as a message; others are shown as they come."""
    said: dict[str, None] = {}
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, RetrogradWarning):
                said[str(message)] = None
            else:
                show(message, category, *where, **more)

        warnings.showwarning = keep
        warnings.simplefilter("always", RetrogradWarning)
        try:
            yield
        finally:
            for message in said:
                typer.secho("warning: ", fg="yellow", nl=False, err=True)
                typer.echo(message, err=True)


def print_check(console: Console, check: "Check") -> None:
    """Print what a check found, and what to try."""
    from retrograd.report.sentences import size_of_changes

    rank = check.spearman
    lines = (
        f"{check}.",
        f"Rank correlation {rank}; {rank.confidence:.0%} intervals over {len(check.actual)} subsets and the queries.",
        size_of_changes(check.slope),
        *(f"What to try: {advice}" for advice in check.advice),
    )
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_ceilings(console: Console, check: "Check") -> None:
    """Print what no scores could pass."""
    from retrograd.report.sentences import ceilings

    for sentence in ceilings(check):
        console.print(Text(sentence), soft_wrap=True)
