"""The command line.

``retrograd demo`` does the main job on a small example, ``retrograd attribute SCRIPT.py:FUNCTION`` does it on a run of yours,
``retrograd show RUN`` reads a run folder without its code.
"""

from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ImportError as _error:
    # Only the console script imports this module, and to whoever types `retrograd` a traceback says nothing.
    raise SystemExit(
        f"retrograd: the command line needs the package {_error.name}. Install it with: pip install 'retrograd[cli]'."
    ) from _error

from retrograd.cli.attribute import attribute
from retrograd.cli.demo import demo
from retrograd.cli.show import show

app = typer.Typer(
    help="Differentiate through training: record a run once, then ask it why.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (demo, attribute, show):
    app.command()(_command)


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
