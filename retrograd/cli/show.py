"""``retrograd show``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrograd.cli.console import errors_as_messages, progress_bars
from retrograd.cli.contents import describe, read_contents
from retrograd.errors import IncompleteRecord, RetrogradError


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


def _print_contents(contents: dict[str, Any], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in describe(contents, blocks=not console.options.ascii_only).items():
        table.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    console.print(table)
    checked = contents["checked"]
    table_of_examples = f" and the table of {checked['examples']:,} examples" if checked["examples"] else ""
    console.print(
        f"Checked: the chain of {checked['steps']:,} steps, {checked['checkpoints']} stored states{table_of_examples} have the "
        "digests that were recorded for them.",
        style="green",
        highlight=False,
    )
